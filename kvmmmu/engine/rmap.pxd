# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Lists of sptes: by gfn (rmap) and by child page (parents).

A head word is 0 (empty), ``index << 2 | 1`` (one spte) or ``block << 2 | 2`` (a
chain of 14-entry blocks).  Entries keep insertion order; a removal moves the last
entry of the same block into the hole, as KVM does, because zap order shows it.
"""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.engine.state cimport PTE_LIST_EXT, PteDesc, Vm

cdef enum:
    HEAD_ONE = 1
    HEAD_MANY = 2
    HEAD_KIND = 3

cdef struct PteIter:
    # A position in a list; the list must not change but for removal of the current entry.
    uint32_t block
    uint32_t i


cdef inline PteDesc *desc_at(Vm *vm, uint32_t block) noexcept nogil:
    return &vm.arena.desc[block]

cdef inline uint32_t desc_alloc(Vm *vm) noexcept nogil:
    cdef uint32_t block = vm.arena.desc_free
    if block:
        vm.arena.desc_free = desc_at(vm, block).more
    else:
        # No block in a list is empty and no spte is in two lists: one block for each spte is enough.
        vm.arena.desc_top += 1
        block = vm.arena.desc_top
    desc_at(vm, block).more = 0
    desc_at(vm, block).count = 0
    return block

cdef inline void desc_release(Vm *vm, uint32_t block) noexcept nogil:
    desc_at(vm, block).more = vm.arena.desc_free
    vm.arena.desc_free = block


cdef inline uint64_t pte_list_add(Vm *vm, uint64_t *head, uint64_t spte) noexcept nogil:
    """Returns the number of entries present before."""
    cdef uint32_t block
    cdef PteDesc *desc
    cdef uint64_t count = 0
    if head[0] == 0:
        head[0] = (spte << 2) | HEAD_ONE
        return 0
    if (head[0] & HEAD_KIND) == HEAD_ONE:
        block = desc_alloc(vm)
        desc = desc_at(vm, block)
        desc.sptes[0] = head[0] >> 2
        desc.sptes[1] = spte
        desc.count = 2
        head[0] = (<uint64_t>block << 2) | HEAD_MANY
        return 1
    block = <uint32_t>(head[0] >> 2)
    desc = desc_at(vm, block)
    while desc.count == PTE_LIST_EXT:
        count += PTE_LIST_EXT
        if desc.more == 0:
            block = desc_alloc(vm)
            desc.more = block
            desc = desc_at(vm, block)
            break
        desc = desc_at(vm, desc.more)
    count += desc.count
    desc.sptes[desc.count] = spte
    desc.count += 1
    return count


cdef inline bint pte_list_remove(Vm *vm, uint64_t *head, uint64_t spte) noexcept nogil:
    """False if the spte is not in the list: the caller's books are wrong."""
    cdef uint32_t block, before = 0, i
    cdef PteDesc *desc
    if (head[0] & HEAD_KIND) != HEAD_MANY:
        if head[0] != ((spte << 2) | HEAD_ONE):
            return False
        head[0] = 0
        return True
    block = <uint32_t>(head[0] >> 2)
    while block:
        desc = desc_at(vm, block)
        for i in range(desc.count):
            if desc.sptes[i] == spte:
                desc.count -= 1
                desc.sptes[i] = desc.sptes[desc.count]
                if desc.count == 0:
                    if before:
                        desc_at(vm, before).more = desc.more
                    elif desc.more:
                        head[0] = (<uint64_t>desc.more << 2) | HEAD_MANY
                    else:
                        head[0] = 0
                    desc_release(vm, block)
                return True
        before = block
        block = desc.more
    return False


cdef inline uint64_t pte_list_first(Vm *vm, uint64_t head, PteIter *it) noexcept nogil:
    """The first spte index, or 0."""
    it.i = 0
    it.block = 0
    if (head & HEAD_KIND) == HEAD_ONE:
        return head >> 2
    if head == 0:
        return 0
    it.block = <uint32_t>(head >> 2)
    return desc_at(vm, it.block).sptes[0]

cdef inline uint64_t pte_list_next(Vm *vm, PteIter *it) noexcept nogil:
    if it.block == 0:
        return 0
    it.i += 1
    if it.i == desc_at(vm, it.block).count:
        it.block = desc_at(vm, it.block).more
        it.i = 0
        if it.block == 0:
            return 0
    return desc_at(vm, it.block).sptes[it.i]
