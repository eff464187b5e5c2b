# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What tables grant to reads, writes and fetches of one vCPU: for batches whose rows are of different kinds."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport Paging, permission_fault
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.accept cimport Accept, accept_init, accept_keys
from kvmmmu.engine.pdecache cimport LargePage

cdef enum:
    GRANT_KINDS = 3  # read, write, fetch: the codes of a column of kinds

cdef struct Grants:
    uint64_t access[3]    # PFERR_* of each kind
    Accept leaf[3]        # 4 KiB pages
    uint32_t large[3]     # larger pages: bit n, with ACC rights n they are granted
    uint64_t dirty[3]     # bits that their entries must have
    uint64_t key          # and that they must not: a protection key other than 0


cdef inline uint64_t grants_access(int kind) noexcept nogil:
    return PFERR_WRITE if kind == 1 else PFERR_FETCH if kind == 2 else 0


cdef inline void grants_init(Grants *g, const Paging *p, const uint64_t *access, bint ac) noexcept nogil:
    """``access``: of each kind, as these tables see it."""
    cdef uint32_t acc
    cdef int kind
    g.key = bits_between(62, 59) if p.pke else 0
    for kind in range(GRANT_KINDS):
        g.access[kind] = access[kind]
        accept_init(p, access[kind], ac, True, &g.leaf[kind])
        g.dirty[kind] = p.dirty if access[kind] & PFERR_WRITE else 0
        g.large[kind] = 0
        if p.pke and not accept_keys(p, access[kind]):
            continue
        for acc in range(8):
            if not permission_fault(p, access[kind], acc, ac, 0):
                g.large[kind] |= <uint32_t>1 << acc


cdef inline bint grants_large(const Grants *g, int kind, const LargePage *page) noexcept nogil:
    """A large page that another kind of access may have found."""
    # Its rights stand in the third byte of a row's last word (``row_end``).
    return ((g.large[kind] >> ((page.end >> 16) & ACC_ALL)) & 1 and not g.dirty[kind] & ~page.entry
            and not g.key & page.entry)
