# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The published tables of slots: building the next one, swapping it in, and the generation that counts swaps."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.state cimport ADDRESS_SPACES, MemMap, Slot, SlotSet, Vm
from kvmmmu.engine.memmap cimport (
    CACHE_LINE, capacity_step, column_size, columns_after, memmap_index, memmap_lay_out, memmap_upper,
)
from kvmmmu.engine.atomics cimport st_release_ptr, st_release_u64
from kvmmmu.engine.drain cimport vm_drain
from kvmmmu.engine.hooks cimport (
    MUTANT_NO_GENERATION, MUTANT_NO_IN_PROGRESS, POINT_SLOT_DRAINED, POINT_SLOT_PUBLISHED, POINT_SLOT_SETTLED, hook,
    mutant,
)


cdef inline SlotSet *slotset_new(int n) noexcept nogil:
    """One block: the header and its columns.  ``memmap_index`` its map when the slots are in."""
    cdef int capacity = capacity_step(n)
    cdef uint64_t column = column_size(capacity)
    cdef MemMap sizes
    cdef SlotSet *s = <SlotSet *>malloc(sizeof(SlotSet) + CACHE_LINE + column + memmap_lay_out(&sizes, capacity, 0))
    if s == NULL:
        return NULL
    s.map.n = n
    s.slot = <Slot **>columns_after(s + 1)
    memmap_lay_out(&s.map, capacity, <uint64_t>s.slot + column)
    s.generation = 0
    return s


cdef inline SlotSet *slotset_empty(uint64_t generation) noexcept nogil:
    cdef SlotSet *s = slotset_new(0)
    if s != NULL:
        memmap_index(&s.map)
        s.generation = generation
    return s


cdef inline void slotset_copy_areas(SlotSet *to, int at, const SlotSet *from_, int first, int n) noexcept nogil:
    cdef size_t count = <size_t>n
    memcpy(to.map.first + at, from_.map.first + first, count * 8)
    memcpy(to.map.npages + at, from_.map.npages + first, count * 8)
    memcpy(to.map.host + at, from_.map.host + first, count * sizeof(void *))
    memcpy(to.slot + at, from_.slot + first, count * sizeof(Slot *))
    memcpy(to.map.writable + at, from_.map.writable + first, count)


cdef inline void slotset_put(SlotSet *s, int at, Slot *slot) noexcept nogil:
    cdef bint invalid = (slot.flags & MEMSLOT_INVALID) != 0
    s.map.first[at] = slot.base_gfn
    s.map.npages[at] = slot.npages
    s.map.host[at] = NULL if invalid else slot.hva
    s.map.writable[at] = not invalid and not slot.flags & MEM_READONLY
    s.slot[at] = slot


cdef inline SlotSet *slotset_replace(const SlotSet *old, const Slot *gone, Slot *come) noexcept nogil:
    """A table without ``gone`` and with ``come`` (either may be NULL)."""
    cdef int n = old.map.n - (gone != NULL) + (come != NULL)
    cdef SlotSet *s = slotset_new(n)
    cdef int out
    cdef int in_
    if s == NULL:
        return NULL
    out = memmap_upper(&old.map, gone.base_gfn) - 1 if gone != NULL else old.map.n
    in_ = memmap_upper(&old.map, come.base_gfn) if come != NULL else old.map.n
    # Areas keep their order; one leaves at ``out``, one enters before ``in_``.
    if out < in_:
        slotset_copy_areas(s, 0, old, 0, out)
        slotset_copy_areas(s, out, old, out + 1, in_ - out - 1)
        if come != NULL:
            slotset_put(s, in_ - 1, come)
        slotset_copy_areas(s, in_ - 1 + (come != NULL), old, in_, old.map.n - in_)
    else:
        slotset_copy_areas(s, 0, old, 0, in_)
        if come != NULL:
            slotset_put(s, in_, come)
        slotset_copy_areas(s, in_ + (come != NULL), old, in_, out - in_)
        if gone != NULL:
            slotset_copy_areas(s, out + (come != NULL), old, out + 1, old.map.n - out - 1)
    memmap_index(&s.map)
    return s


cdef inline const Slot *slotset_overlap(const SlotSet *s, uint64_t base_gfn, uint64_t npages,
                                        const Slot *besides) noexcept nogil:
    """Some slot other than ``besides`` that shares a gfn with the range, or NULL."""
    cdef int i = memmap_upper(&s.map, base_gfn + npages - 1) - 1
    while i >= 0 and s.map.first[i] + s.map.npages[i] > base_gfn:
        if s.slot[i] != besides:
            return s.slot[i]
        i -= 1
    return NULL


cdef inline uint64_t slots_publish(Vm *vm, int as_id, SlotSet *next) noexcept nogil:
    """Publish a table and wait for the readers of the one it replaces, which is freed.

    Returns the generation to settle on.
    While old and new readers coexist the generation carries bit 63, so that nothing
    learnt from the old table is taken for knowledge of the new one.
    """
    cdef SlotSet *old = vm.slots[as_id]
    cdef uint64_t generation = old.generation
    next.generation = generation if mutant(vm, MUTANT_NO_IN_PROGRESS) else generation | GEN_UPDATE_IN_PROGRESS
    st_release_ptr(&vm.slots[as_id], next)
    hook(vm, POINT_SLOT_PUBLISHED)
    vm_drain(vm)
    hook(vm, POINT_SLOT_DRAINED)
    if not mutant(vm, MUTANT_NO_GENERATION):
        generation += ADDRESS_SPACES
    free(old)
    return generation


cdef inline void slots_settle(Vm *vm, SlotSet *published, uint64_t generation) noexcept nogil:
    """The update is over: what is cached from now on is knowledge of this table."""
    st_release_u64(&published.generation, generation)
    hook(vm, POINT_SLOT_SETTLED)
