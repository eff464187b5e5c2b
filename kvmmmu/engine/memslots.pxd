# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What a fault asks of memslots: which slot, which frame, how large, and the slot's own columns."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.state cimport Segment, Slot, SlotSet, Vm
from kvmmmu.engine.memory cimport memmap_find
from kvmmmu.engine.atomics cimport ld_acquire_ptr, ld_acquire_u64


# ---- lookup -----------------------------------------------------------------------

cdef inline SlotSet *vm_slots(const Vm *vm, int as_id) noexcept nogil:
    """The published slots of an address space; good until the reader's mark is lifted."""
    return <SlotSet *>ld_acquire_ptr(&vm.slots[as_id])


cdef inline uint64_t slots_generation(const SlotSet *slots) noexcept nogil:
    """Bit 63 is set while an update is in flight."""
    return ld_acquire_u64(&slots.generation)


cdef inline Slot *slot_find(const SlotSet *slots, uint64_t gfn, int *hint) noexcept nogil:
    """The slot of a gfn or NULL.  INVALID slots are found: the caller asks ``slot_visible``."""
    cdef int i = memmap_find(&slots.map, gfn, hint, slots.slot)
    return slots.slot[i] if i >= 0 else NULL


cdef inline bint slot_visible(const Slot *slot) noexcept nogil:
    """Memory is there for the guest; False too while the slot is being deleted or moved."""
    return slot != NULL and not slot.flags & MEMSLOT_INVALID


# ---- frames -----------------------------------------------------------------------

cdef inline const Segment *slot_segment(const Slot *slot, uint64_t page) noexcept nogil:
    """The segment that holds a page of the slot."""
    cdef int lo = 0
    cdef int hi = slot.n_segments - 1
    cdef int mid
    while lo < hi:
        mid = (lo + hi + 1) >> 1
        if slot.segments[mid].first <= page:
            lo = mid
        else:
            hi = mid - 1
    return &slot.segments[lo]


cdef inline uint64_t slot_pfn(const Slot *slot, uint64_t gfn) noexcept nogil:
    """Frame of a gfn of the slot."""
    cdef uint64_t page = gfn - slot.base_gfn
    cdef const Segment *s
    if slot.n_segments == 1:
        return slot.base_pfn + page
    s = slot_segment(slot, page)
    return s.pfn + (page - s.first)


cdef inline uint8_t *slot_host(const Slot *slot, uint64_t gfn) noexcept nogil:
    """Host address of the first byte of a gfn of the slot."""
    return slot.hva + ((gfn - slot.base_gfn) << 12)


cdef inline int slot_host_level(const Slot *slot, uint64_t gfn) noexcept nogil:
    """The largest page the host backs this gfn with, so that it can be mapped at that size.

    The page must lie inside the slot and one run of frames, and gfn and pfn must agree
    below its size.
    """
    cdef const Segment *s = slot_segment(slot, gfn - slot.base_gfn)
    cdef uint64_t low = slot.base_gfn + s.first
    cdef uint64_t mask
    cdef uint64_t start
    cdef int level = s.max_level
    while level > LEVEL_4K:
        mask = level_pages(level) - 1
        start = gfn & ~mask
        if start >= low and start - low + mask < s.npages and ((s.pfn ^ low) & mask) == 0:
            return level
        level -= 1
    return LEVEL_4K


# ---- columns ----------------------------------------------------------------------

cdef inline uint64_t level_pages(int level) noexcept nogil:
    """4 KiB pages in one page of ``level``."""
    return <uint64_t>1 << (9 * (level - 1))


cdef inline uint64_t gfn_index(uint64_t gfn, uint64_t base_gfn, int level) noexcept nogil:
    return (gfn >> (9 * (level - 1))) - (base_gfn >> (9 * (level - 1)))


cdef inline uint64_t slot_index(const Slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Place of a gfn in the slot's column of ``level``."""
    return gfn_index(gfn, slot.base_gfn, level)


cdef inline uint64_t slot_entries(const Slot *slot, int level) noexcept nogil:
    """Length of the slot's column of ``level``."""
    return gfn_index(slot.base_gfn + slot.npages - 1, slot.base_gfn, level) + 1


cdef inline uint64_t *gfn_to_rmap(const Slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Head word of the reverse map of a gfn."""
    return &slot.rmap[level - 1][slot_index(slot, gfn, level)]


cdef inline uint32_t *gfn_to_disallow(const Slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Count of reasons against a page of ``level`` (2 or 3) at a gfn."""
    return &slot.disallow[level - 2][slot_index(slot, gfn, level)]


cdef inline uint16_t *gfn_to_write_track(const Slot *slot, uint64_t gfn) noexcept nogil:
    return &slot.write_track[gfn - slot.base_gfn]


cdef inline uint64_t dirty_words(uint64_t npages) noexcept nogil:
    return (npages + 63) >> 6


# ---- life of a slot: under slots_lock ---------------------------------------------

cdef inline bint slot_make_arrays(Slot *slot) noexcept nogil:
    """Columns of a new or moved slot, all zero but for the large pages its borders forbid."""
    cdef uint64_t words = 0
    cdef uint64_t n2 = slot_entries(slot, LEVEL_2M)
    cdef uint64_t n3 = slot_entries(slot, LEVEL_1G)
    cdef uint64_t *at
    cdef uint32_t *counts
    cdef int level
    words = slot.npages + n2 + n3 + ((n2 + n3 + 1) >> 1) + ((slot.npages + 3) >> 2)
    # calloc takes a large block from zero pages, so columns that nothing touches cost nothing.
    at = <uint64_t *>calloc(<size_t>words, 8)
    if at == NULL:
        return False
    slot.arrays = at
    for level in range(LEVEL_4K, LEVEL_1G + 1):
        slot.rmap[level - 1] = at
        at += slot_entries(slot, level)
    counts = <uint32_t *>at
    slot.disallow[0] = counts
    slot.disallow[1] = counts + n2
    slot.write_track = <uint16_t *>(at + ((n2 + n3 + 1) >> 1))
    for level in range(LEVEL_2M, LEVEL_1G + 1):
        slot_forbid_borders(slot, level)
    return True


cdef inline void slot_forbid_borders(Slot *slot, int level) noexcept nogil:
    cdef uint32_t *counts = slot.disallow[level - 2]
    cdef uint64_t n = slot_entries(slot, level)
    cdef uint64_t mask = level_pages(level) - 1
    cdef uint64_t i
    if slot.base_gfn & mask:
        counts[0] = 1
    if (slot.base_gfn + slot.npages) & mask:
        counts[n - 1] = 1
    # Frames stand in for host addresses here: the same in every process.
    if (slot.base_gfn ^ slot.base_pfn) & mask:
        for i in range(n):
            counts[i] = 1


cdef inline Slot *slot_copy(const Slot *old) noexcept nogil:
    cdef Slot *slot = <Slot *>malloc(sizeof(Slot))
    if slot != NULL:
        memcpy(slot, old, sizeof(Slot))
    return slot


cdef inline uint64_t *dirty_new(uint64_t npages) noexcept nogil:
    return <uint64_t *>calloc(<size_t>dirty_words(npages), 8)


cdef inline void slot_free(Slot *slot) noexcept nogil:
    """Free a slot and all it owns; no reader is left."""
    if slot != NULL:
        free(slot.arrays)
        free(slot.segments)
        free(slot.dirty)
        free(slot)


cdef inline bint slot_is_mapped(const Slot *slot) noexcept nogil:
    """Some spte maps a page of the slot."""
    cdef uint64_t i
    cdef int level
    for level in range(LEVEL_4K, LEVEL_1G + 1):
        if slot.rmap[level - 1] != NULL:
            for i in range(slot_entries(slot, level)):
                if slot.rmap[level - 1][i]:
                    return True
    return False
