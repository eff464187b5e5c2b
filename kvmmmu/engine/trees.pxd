# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A picture of the tables KVM built: which pages there are, and what each says.  Looks, never changes."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_present
from kvmmmu.engine.pages cimport page_at, page_sptes, role_level
from kvmmmu.engine.state cimport LIST_FREE, PREV_ROOTS, ShadowPage, Vcpu, Vm

cdef enum:
    TREE_DEPTH = 8

cdef struct TreePage:
    # One page as Python sees it; the door's dtype has these fields in this order.
    uint64_t gfn
    uint32_t id
    uint32_t role
    int32_t root_count
    uint32_t unsync_children
    uint32_t write_flooding
    uint8_t level
    uint8_t unsync
    uint8_t valid_gen
    uint8_t nx_disallowed
    uint8_t tdp
    uint8_t special       # a PAE root table: no shadow page
    uint8_t reached       # a root of the vCPU leads here
    uint8_t unused
    uint32_t unused2


cdef inline int tree_level(Vm *vm, int32_t id) noexcept nogil:
    if page_at(vm, id).special:
        return 3
    return role_level(page_at(vm, id).role)


cdef inline int32_t tree_child(Vm *vm, uint64_t spte, int level, bint special) noexcept nogil:
    """The table an entry points at, 0 for none."""
    cdef int32_t id
    if special:
        if not spte & PT_PRESENT_MASK:
            return 0
    elif not spte_present(spte) or spte_is_last(spte, level):
        return 0
    id = spte_child(spte)
    return id if 0 < id < vm.arena.top else 0


cdef inline int tree_collect(Vm *vm, int32_t root, uint8_t *seen, int32_t *ids, int n) noexcept nogil:
    """Append the pages under ``root`` not ``seen`` yet, each before its children, in order of entries."""
    cdef int32_t stack[8]
    cdef int index[8]
    cdef int depth = 0
    cdef int32_t child
    if root == 0 or seen[root]:
        return n
    seen[root] = 1
    ids[n] = root
    n += 1
    stack[0] = root
    index[0] = 0
    while depth >= 0:
        if index[depth] == 512 or page_at(vm, stack[depth]).special and index[depth] == 4:
            depth -= 1
            continue
        child = tree_child(vm, page_sptes(vm, stack[depth])[index[depth]], tree_level(vm, stack[depth]),
                           page_at(vm, stack[depth]).special)
        index[depth] += 1
        if child == 0 or seen[child] or depth == TREE_DEPTH - 1:
            continue
        seen[child] = 1
        ids[n] = child
        n += 1
        depth += 1
        stack[depth] = child
        index[depth] = 0
    return n


cdef inline int tree_rest(Vm *vm, const uint8_t *seen, int32_t *ids, int n) noexcept nogil:
    """Append the pages in use that are not ``seen``, oldest id first."""
    cdef int32_t id
    for id in range(1, vm.arena.top):
        if not seen[id] and page_at(vm, id).on_list != LIST_FREE:
            ids[n] = id
            n += 1
    return n


cdef inline int tree_list(Vcpu *vcpu, bint everything, int previous, uint8_t *seen, int32_t *ids) noexcept nogil:
    """Which pages to show, and how many: those under one root (``previous`` -1: the current one), or all."""
    cdef int32_t root = vcpu.root.page if previous < 0 else vcpu.prev_roots[previous].page
    cdef int i, n
    if previous < 0 and root == 0 and page_at(vcpu.vm, vcpu.last_root).on_list != LIST_FREE:
        # None is loaded (the guest shut down, or a register change dropped it): the last one still stands.
        root = vcpu.last_root
    n = tree_collect(vcpu.vm, root, seen, ids, 0)
    if everything:
        for i in range(PREV_ROOTS):
            n = tree_collect(vcpu.vm, vcpu.prev_roots[i].page, seen, ids, n)
        n = tree_rest(vcpu.vm, seen, ids, n)
    return n


cdef inline void tree_copy(Vm *vm, const int32_t *ids, const uint8_t *seen, int n, TreePage *pages,
                           uint64_t *sptes) noexcept nogil:
    cdef int i
    cdef ShadowPage *sp
    for i in range(n):
        sp = page_at(vm, ids[i])
        pages[i].gfn = sp.gfn
        pages[i].id = <uint32_t>ids[i]
        pages[i].role = sp.role
        pages[i].root_count = sp.root_count
        pages[i].unsync_children = sp.unsync_children
        pages[i].write_flooding = sp.flooding
        pages[i].level = <uint8_t>tree_level(vm, ids[i])
        pages[i].unsync = sp.unsync
        pages[i].valid_gen = sp.valid_gen
        pages[i].nx_disallowed = sp.nx_disallowed
        pages[i].tdp = sp.tdp
        pages[i].special = sp.special
        pages[i].reached = seen[ids[i]]
        pages[i].unused = 0
        pages[i].unused2 = 0
        memcpy(sptes + (<uint64_t>i << 9), page_sptes(vm, ids[i]), 4096)
