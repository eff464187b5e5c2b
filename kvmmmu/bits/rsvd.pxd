# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Reserved bits of every entry format, as masks by [bit 7][level].

A mask table is twelve words: ``rsvd[bit7 * 6 + level]``.  The same builders serve the guest's
tables (the guest's MAXPHYADDR) and KVM's own (the host's).
SDM vol. 3A sections 4.3 to 4.5 and 4.6, vol. 3C section 29.3.2; APM vol. 2 section 5.3.
"""

from libc.stdint cimport uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport bits_between

cdef enum:
    RSVD_LEVELS = 6  # levels 0..5; 0 is never used


cdef inline void rsvd_set(uint64_t *rsvd, int level, uint64_t table, uint64_t leaf) noexcept nogil:
    rsvd[level] = table
    rsvd[RSVD_LEVELS + level] = leaf


cdef inline void rsvd_clear(uint64_t *rsvd) noexcept nogil:
    cdef int level
    for level in range(RSVD_LEVELS):
        rsvd_set(rsvd, level, 0, 0)


cdef inline uint64_t rsvd_large(int level) noexcept nogil:
    """Address bits below a large page; bit 12 is PAT there."""
    return bits_between(12 + 9 * (level - 1) - 1, 13)


cdef inline void rsvd_init_32(uint64_t *rsvd, bint pse, int pse36_bits) noexcept nogil:
    """32-bit paging: only a 4 MiB PDE has reserved bits, those between its last address bit and bit 22."""
    rsvd_clear(rsvd)
    if pse:
        rsvd_set(rsvd, LEVEL_2M, 0, bits_between(21, 13 + pse36_bits))


cdef inline uint64_t rsvd_pdpte(int maxphyaddr) noexcept nogil:
    """A PDPTE of PAE paging, checked when the register is loaded (in an SVM nested walk: when it is read)."""
    return bits_between(63, maxphyaddr) | bits_between(8, 5) | bits_between(2, 1)


cdef inline void rsvd_init_pae(uint64_t *rsvd, int maxphyaddr, bint nx) noexcept nogil:
    cdef uint64_t high = bits_between(62, maxphyaddr) | (0 if nx else PT64_NX_MASK)
    rsvd_clear(rsvd)
    rsvd_set(rsvd, LEVEL_1G, rsvd_pdpte(maxphyaddr), rsvd_pdpte(maxphyaddr))
    rsvd_set(rsvd, LEVEL_2M, high, high | rsvd_large(LEVEL_2M))
    rsvd_set(rsvd, LEVEL_4K, high, high)


cdef inline void rsvd_init_64(uint64_t *rsvd, int maxphyaddr, bint nx, bint gbpages, bint bit8) noexcept nogil:
    """4- and 5-level paging; ``bit8``: KVM's rule for AMD, bit 8 of the two topmost levels is reserved."""
    cdef uint64_t high = 0 if maxphyaddr > 51 else bits_between(51, maxphyaddr)
    cdef uint64_t top
    if not nx:
        high |= PT64_NX_MASK
    top = high | PT_PAGE_SIZE_MASK | (PT_GLOBAL_MASK if bit8 else 0)
    rsvd_clear(rsvd)
    rsvd_set(rsvd, LEVEL_256T, top, top)
    rsvd_set(rsvd, LEVEL_512G, top, top)
    rsvd_set(rsvd, LEVEL_1G, high, high | rsvd_large(LEVEL_1G) | (0 if gbpages else PT_PAGE_SIZE_MASK))
    rsvd_set(rsvd, LEVEL_2M, high, high | rsvd_large(LEVEL_2M))
    rsvd_set(rsvd, LEVEL_4K, high, high)


cdef inline void rsvd_init_ept(uint64_t *rsvd, int maxphyaddr, bint leaf_2m, bint leaf_1g) noexcept nogil:
    """EPT: what is wrong in an entry apart from its low six bits (``ept_bad_mt_xwr``)."""
    cdef uint64_t high = 0 if maxphyaddr > 51 else bits_between(51, maxphyaddr)
    cdef uint64_t top = high | bits_between(7, 3)
    cdef uint64_t table = high | bits_between(6, 3)
    rsvd_clear(rsvd)
    rsvd_set(rsvd, LEVEL_256T, top, top)
    rsvd_set(rsvd, LEVEL_512G, top, top)
    rsvd_set(rsvd, LEVEL_1G, table, high | bits_between(29, 12) | (0 if leaf_1g else EPT_PAGE_SIZE))
    rsvd_set(rsvd, LEVEL_2M, table, high | bits_between(20, 12) | (0 if leaf_2m else EPT_PAGE_SIZE))
    rsvd_set(rsvd, LEVEL_4K, high, high)


cdef inline uint64_t ept_bad_mt_xwr(bint exec_only) noexcept nogil:
    """Bit n is set when an entry whose bits 5:0 are n is misconfigured, whatever else it says.

    Memory types 2, 3 and 7 do not exist; write without read is never legal, execute alone only by capability.
    In an entry that points to a table bits 6:3 are reserved besides, so the memory type matters in leaves only.
    """
    cdef uint64_t bad = 0
    cdef uint64_t one = 1
    cdef int n, rwx, memtype
    for n in range(64):
        rwx = n & 7
        memtype = n >> 3
        if rwx == 0:
            continue  # not present: nothing else is looked at
        if memtype == 2 or memtype == 3 or memtype == 7:
            bad |= one << n
        if rwx == 2 or rwx == 6 or (rwx == 4 and not exec_only):
            bad |= one << n
    return bad
