# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One compare for a whole leaf: present, nothing reserved, A and D as they should be, the access granted.

The answer is derived from the format's own tables: where the rule is no conjunction of bits, or is beyond
a compare, nothing is accepted, and the caller judges the entry by the walk's step.
"""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.access cimport permission_index, pkey_fault
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport DIALECT_KVM, FMT_EPT, Paging
from kvmmmu.bits.spte cimport bits_between

cdef extern from "kvmmmu/batch.h" nogil:
    struct Accept "kvmmmu_accept":
        uint64_t mask[8]
        uint64_t want[8]


cdef inline uint64_t accept_rights(int fmt, uint32_t acc) noexcept nogil:
    """The entry bits in which rights stand."""
    if fmt == FMT_EPT:
        return ((EPT_READ if acc & ACC_U else 0) | (EPT_WRITE if acc & ACC_W else 0)
                | (EPT_EXEC if acc & ACC_X else 0))
    return ((PT_USER_MASK if acc & ACC_U else 0) | (PT_WRITABLE_MASK if acc & ACC_W else 0)
            | (PT64_NX_MASK if acc & ACC_X else 0))


cdef inline bint accept_keys(const Paging *p, uint64_t access) noexcept nogil:
    """Protection key 0 refuses nothing; the other keys are left to the walk's own finish."""
    return not (pkey_fault(p.pkru_mask, p.pkru, access, 0, 0) or pkey_fault(p.pkru_mask, p.pkru, access, ACC_U, 0))


cdef inline void accept_one(const Paging *p, uint64_t access, bint ac, bint set_ad, uint32_t above, uint64_t *mask,
                            uint64_t *want) noexcept nogil:
    cdef uint32_t refused = p.permissions[permission_index(access, ac)]
    cdef uint32_t needed = ACC_ALL, barred = ACC_ALL, own
    cdef uint64_t bits
    # Nothing equals this.
    mask[0] = 0
    want[0] = 1
    for own in range(8):
        if not (refused >> (own & above)) & 1:
            needed &= own
            barred &= ~own
    for own in range(8):
        if ((own & needed) == needed and not own & barred) == ((refused >> (own & above)) & 1):
            return
    if needed & barred or p.rsvd[0][1] != p.rsvd[1][1]:
        return
    if p.format == FMT_EPT:
        if not needed:
            return
        bits = accept_rights(FMT_EPT, needed)
        mask[0] = bits | accept_rights(FMT_EPT, barred)
        want[0] = bits
    else:
        # X is the absence of NX.
        mask[0] = PT_PRESENT_MASK | accept_rights(p.format, needed | barred)
        want[0] = PT_PRESENT_MASK | accept_rights(p.format, (needed & ~ACC_X) | (barred & ACC_X))
    mask[0] |= p.rsvd[0][1]
    if set_ad:
        mask[0] |= p.accessed
        want[0] |= p.accessed
    # KVM's dialect takes W from a clean leaf: no plain grant either.
    if access & PFERR_WRITE and set_ad or p.dialect == DIALECT_KVM and not access & PFERR_WRITE:
        mask[0] |= p.dirty
        want[0] |= p.dirty
    if p.pke:
        mask[0] |= bits_between(62, 59)


cdef inline void accept_init(const Paging *p, uint64_t access, bint ac, bint set_ad, Accept *a) noexcept nogil:
    cdef uint32_t above
    for above in range(8):
        if p.pke and not accept_keys(p, access):
            a.mask[above] = 0
            a.want[above] = 1
        else:
            accept_one(p, access, ac, set_ad, above, &a.mask[above], &a.want[above])


cdef inline bint accepted(int fmt, const Paging *p, const Accept *a, uint32_t above, uint64_t entry) noexcept nogil:
    return ((entry & a.mask[above]) == a.want[above]
            and (fmt != FMT_EPT or not (p.bad_mt_xwr >> (entry & 63)) & 1))
