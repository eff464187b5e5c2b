# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""MMIO sptes: access, gfn and generation packed into an entry that always faults.

Linux 5.17 and later: generation bits 0..7 stand in spte 3..10, bits 8..18 in
52..62; bit 11 stays clear so that the entry never looks present to KVM.
"""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport SpteMasks

cdef inline uint64_t mmio_gen_bits(uint64_t gen) noexcept nogil:
    """Spread a generation number over its two fields."""
    return (((gen << MMIO_GEN_LOW_SHIFT) & MMIO_GEN_LOW_MASK)
            | (((gen >> MMIO_GEN_LOW_BITS) << MMIO_GEN_HIGH_SHIFT) & MMIO_GEN_HIGH_MASK))

cdef inline uint64_t mmio_spte_make(const SpteMasks *m, uint64_t gfn, uint32_t access, uint64_t gen) noexcept nogil:
    """The mmio spte of a gfn; ``gen`` is used modulo 2^19, its in-progress bit never stored."""
    cdef uint64_t gpa = gfn << 12
    return (mmio_gen_bits(gen & MMIO_GEN_MASK) | m.mmio_value | (access & m.mmio_access)
            | gpa | m.nonpresent_or_rsvd
            | ((gpa & m.nonpresent_or_rsvd) << L1TF_MASK_LEN))

cdef inline uint64_t mmio_spte_gfn(const SpteMasks *m, uint64_t spte) noexcept nogil:
    cdef uint64_t gpa = spte & m.nonpresent_low_gfn
    gpa |= (spte >> L1TF_MASK_LEN) & m.nonpresent_or_rsvd
    return gpa >> 12

cdef inline uint32_t mmio_spte_access(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return <uint32_t>(spte & m.mmio_access)

cdef inline uint64_t mmio_spte_gen(uint64_t spte) noexcept nogil:
    return (((spte & MMIO_GEN_LOW_MASK) >> MMIO_GEN_LOW_SHIFT)
            | (((spte & MMIO_GEN_HIGH_MASK) >> MMIO_GEN_HIGH_SHIFT) << MMIO_GEN_LOW_BITS))

cdef inline bint mmio_gen_valid(uint64_t gen, uint64_t spte) noexcept nogil:
    """False while an update is in flight: what was cached may already be wrong."""
    if gen & GEN_UPDATE_IN_PROGRESS:
        return False
    return (gen & MMIO_GEN_MASK) == mmio_spte_gen(spte)
