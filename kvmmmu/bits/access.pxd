# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Permissions: one rule, and the tables made of it that walks look into.

The table is KVM's form: 16 bytes indexed by error-code bits 4:1, bit n of a byte says that
rights n (ACC_X | ACC_W | ACC_U) fault.  The place of RSVD in the index means "SMAP does not
apply to this access".  SDM vol. 3A section 4.6.1; protection keys section 4.6.2.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *

cdef enum:
    PERM_WP = 1      # supervisor writes obey W
    PERM_NX = 2      # fetches obey X
    PERM_SMEP = 4
    PERM_SMAP = 8
    PERM_EPT = 16    # R, W, X of an EPT entry; U stands for R, and nothing else counts


cdef inline bint permission_fault_rule(uint32_t mode, uint64_t access, uint32_t acc, bint smap_exempt) noexcept nogil:
    """Whether rights ``acc`` refuse an access (PFERR_WRITE, USER, FETCH) in a mode (PERM_*).

    ``smap_exempt``: EFLAGS.AC is 1 and the access is explicit.
    """
    cdef bint write = (access & PFERR_WRITE) != 0
    cdef bint user = (access & PFERR_USER) != 0
    cdef bint fetch = (access & PFERR_FETCH) != 0
    cdef bint page_x = (acc & ACC_X) != 0
    cdef bint page_w = (acc & ACC_W) != 0
    cdef bint page_u = (acc & ACC_U) != 0
    if mode & PERM_EPT:
        return (user and not page_u) or (write and not page_w) or (fetch and not page_x)
    if user and not page_u:
        return True
    if write and not page_w and (user or mode & PERM_WP):
        return True
    if fetch and not page_x and mode & PERM_NX:
        return True
    if not user and page_u:
        if fetch and mode & PERM_SMEP:
            return True
        if not fetch and mode & PERM_SMAP and not smap_exempt:
            return True
    return False


cdef inline void permission_table(uint8_t *table, uint32_t mode) noexcept nogil:
    """Tabulate the rule: 16 bytes."""
    cdef uint32_t index, acc, faults
    cdef uint64_t code
    for index in range(16):
        code = index << 1
        faults = 0
        for acc in range(8):
            if permission_fault_rule(mode, code, acc, (code & PFERR_RSVD) != 0):
                faults |= (<uint32_t>1) << acc
        table[index] = <uint8_t>faults


cdef inline uint32_t pkru_rule(uint64_t access, bint page_user, bint wp) noexcept nogil:
    """Which of a key's two bits (1 access-disable, 2 write-disable) can refuse this access."""
    if not page_user or access & PFERR_FETCH:
        return 0
    if access & PFERR_WRITE and (access & PFERR_USER or wp):
        return 3
    return 1


cdef inline uint32_t pkru_table(bint wp) noexcept nogil:
    """Two bits per index of the permission table; the place of RSVD means "the page is a user page"."""
    cdef uint32_t index, table = 0
    cdef uint64_t code
    for index in range(16):
        code = index << 1
        table |= pkru_rule(code, (code & PFERR_RSVD) != 0, wp) << (2 * index)
    return table


cdef inline uint32_t permission_index(uint64_t access, bint ac) noexcept nogil:
    cdef uint32_t index = <uint32_t>(access & (PFERR_WRITE | PFERR_USER | PFERR_FETCH)) >> 1
    if ac and not access & PFERR_IMPLICIT:
        index |= <uint32_t>PFERR_RSVD >> 1
    return index


cdef inline bint pkey_fault(uint32_t table, uint32_t pkru, uint64_t access, uint32_t acc, uint32_t pkey) noexcept nogil:
    """Whether protection key ``pkey`` of the leaf refuses a data access to a page with rights ``acc``."""
    cdef uint32_t index = <uint32_t>(access & (PFERR_WRITE | PFERR_USER | PFERR_FETCH)) >> 1
    if acc & ACC_U:
        index |= <uint32_t>PFERR_RSVD >> 1
    return ((table >> (2 * index)) & (pkru >> (2 * pkey)) & 3) != 0
