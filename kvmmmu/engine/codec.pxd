# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Whole columns of mmio sptes: the kernels of ``bits/mmio.pxd`` in a loop.

Each loop stops at the first element it must refuse and returns its index, or
``n`` when the whole column is done; what stands in the output before it is valid.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport EPT_RWX, PT_PRESENT_MASK
from kvmmmu.bits.mmio cimport mmio_spte_access, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make
from kvmmmu.bits.paging cimport FMT_EPT, Paging
from kvmmmu.bits.spte cimport SpteMasks, spte_is_mmio


cdef inline uint64_t codec_max_gfn(const SpteMasks *m) noexcept nogil:
    """The largest gfn that comes back from an mmio spte of this host unchanged."""
    return (m.nonpresent_low_gfn | m.nonpresent_or_rsvd) >> 12


cdef inline size_t codec_mmio_make(const SpteMasks *masks, const uint64_t *gfn, const uint32_t *access,
                                   const uint64_t *gen, uint64_t *spte, size_t n) noexcept nogil:
    # A copy the compiler can keep in registers: ``spte`` might alias ``masks``.
    cdef SpteMasks m = masks[0]
    cdef uint64_t max_gfn = codec_max_gfn(&m)
    cdef size_t i
    for i in range(n):
        if gfn[i] > max_gfn:
            return i
        spte[i] = mmio_spte_make(&m, gfn[i], access[i], gen[i])
    return n


cdef inline size_t codec_mmio_split(const SpteMasks *masks, const uint64_t *spte, uint64_t *gfn, uint32_t *access,
                                    uint64_t *gen, size_t n) noexcept nogil:
    cdef SpteMasks m = masks[0]
    cdef uint64_t word
    cdef size_t i
    for i in range(n):
        # Read once: for all the compiler knows, the columns written overlap the one read.
        word = spte[i]
        if not spte_is_mmio(&m, word):
            return i
        gfn[i] = mmio_spte_gfn(&m, word)
        access[i] = mmio_spte_access(&m, word)
        gen[i] = mmio_spte_gen(word)
    return n


cdef inline void codec_is_mmio(const SpteMasks *masks, const uint64_t *spte, uint8_t *out, size_t n) noexcept nogil:
    cdef SpteMasks m = masks[0]
    cdef size_t i
    for i in range(n):
        out[i] = spte_is_mmio(&m, spte[i])


cdef inline uint64_t codec_present_bits(const Paging *p) noexcept nogil:
    """An entry without any of these is not present: the processor looks at nothing else in it."""
    return EPT_RWX if p.format == FMT_EPT else PT_PRESENT_MASK


cdef inline void codec_reserved(const Paging *paging, int level, const uint64_t *entry, uint8_t *out,
                                size_t n) noexcept nogil:
    """1 where a present entry of ``level`` has reserved bits set (EPT: is misconfigured)."""
    cdef uint64_t present = codec_present_bits(paging)
    # Of this level alone, so that the loop asks nothing else: what ``rsvd_fault`` looks at.
    cdef uint64_t reserved[2]
    cdef uint64_t bad = paging.bad_mt_xwr
    cdef uint64_t wrong
    cdef size_t i
    reserved[0] = paging.rsvd[0][level]
    reserved[1] = paging.rsvd[1][level]
    for i in range(n):
        wrong = (entry[i] & reserved[(entry[i] >> 7) & 1]) | ((bad >> (entry[i] & 63)) & 1)
        # Not "and": entries are data, a branch on each would be guessed wrong half the time.
        out[i] = ((entry[i] & present) != 0) & (wrong != 0)
