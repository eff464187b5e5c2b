# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Batches over kernels that Python has no door to, compiled as an embedder would, and a loop of C in Cython."""

cimport cython
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.shadow_walk cimport shadow_walk

cdef extern from "kvmmmu/atomics.h" nogil:
    uint64_t ld_u64 "kvmmmu_ld_u64"(const uint64_t *p)
    bint cmpxchg_u64 "kvmmmu_cmpxchg_u64"(uint64_t *p, uint64_t old, uint64_t new_)


def shadow_walks(const uint64_t[::1] arena, uint64_t root, int top, const uint64_t[::1] address, uint64_t[::1] spte,
                 uint8_t[::1] level):
    cdef Py_ssize_t i, n = address.shape[0]
    cdef uint64_t sptes[6]
    cdef int leaf
    assert spte.shape[0] == n and level.shape[0] == n
    with nogil:
        for i in range(n):
            leaf = shadow_walk(&arena[0], root, top, address[i], sptes)
            spte[i] = sptes[leaf]
            level[i] = <uint8_t>leaf


@cython.binding(False)
@cython.always_allow_keywords(False)
def no_walk(gva, /):
    """What any walker costs that is called from Python with an address and answers with another: no walk at all."""
    return <uint64_t>gva + 0x1000000


# ---- ref_walk.c line by line: what Cython costs, and nothing else

cdef struct Memory:
    uint32_t n
    uint32_t last
    uint64_t start[16]
    uint64_t end[16]
    uint8_t *host[16]

cdef struct Paging:
    uint64_t root
    uint64_t reserved[2][5]
    uint32_t wp, nx, smep, smap

cdef struct Translation:
    uint64_t gva, gpa, error_code, fault_gpa, entry
    uint8_t fault, page_shift, access, level
    uint32_t unused


cdef inline uint64_t *word(Memory *m, uint64_t address) noexcept nogil:
    cdef uint32_t i, at = m.last
    for i in range(m.n):
        if address >= m.start[at] and address <= m.end[at]:
            m.last = at
            return <uint64_t *>(m.host[at] + (address - m.start[at]))
        at = 0 if at + 1 == m.n else at + 1
    return NULL


cdef inline int refused(const Paging *p, uint64_t access, int user_page, int writable, int executable) noexcept nogil:
    cdef int user = (access & PFERR_USER) != 0
    cdef int write = (access & PFERR_WRITE) != 0
    cdef int fetch = (access & PFERR_FETCH) != 0
    if user and not user_page:
        return 1
    if write and not writable and (user or p.wp):
        return 1
    if fetch and not executable:
        return 1
    if not user and user_page and ((fetch and p.smep) or (not fetch and p.smap)):
        return 1
    return 0


cdef int walk(const Paging *p, Memory *m, uint64_t va, uint64_t access, int set_ad, Translation *t) noexcept nogil:
    cdef uint64_t table = p.root, entry, bits, old, wanted
    cdef uint64_t *slot
    cdef uint64_t *path[5]
    cdef int level = 4, i, rights_u = 1, rights_w = 1, rights_x = 1
    memset(t, 0, sizeof(t[0]))
    t.gva = va
    if <uint64_t>(<int64_t>(va << 16) >> 16) != va:
        t.fault = 2
        return 2
    bits = access & (PFERR_WRITE | PFERR_USER | (PFERR_FETCH if p.nx or p.smep else 0))
    while True:
        slot = word(m, table + ((va >> (12 + 9 * (level - 1)) & 511) << 3))
        entry = ld_u64(slot) if slot != NULL else 0
        path[level] = slot
        t.entry = entry
        t.level = <uint8_t>level
        if not entry & PT_PRESENT_MASK:
            t.fault = 1
            t.error_code = bits
            return 1
        if entry & p.reserved[(entry & PT_PAGE_SIZE_MASK) != 0][level]:
            t.fault = 1
            t.error_code = bits | PFERR_PRESENT | PFERR_RSVD
            return 1
        rights_w &= (entry & PT_WRITABLE_MASK) != 0
        rights_u &= (entry & PT_USER_MASK) != 0
        rights_x &= not entry & PT64_NX_MASK
        if level == 1 or entry & PT_PAGE_SIZE_MASK:
            break
        table = entry & PT_ADDR_MASK
        level -= 1
    if refused(p, access, rights_u, rights_w, rights_x or not p.nx):
        t.fault = 1
        t.error_code = bits | PFERR_PRESENT
        return 1
    t.page_shift = <uint8_t>(12 + 9 * (level - 1))
    bits = (ONE << t.page_shift) - 1
    t.gpa = (entry & PT_ADDR_MASK & ~bits) | (va & bits)
    t.access = <uint8_t>(rights_x | rights_w << 1 | rights_u << 2)
    if set_ad:
        for i in range(4, level - 1, -1):
            old = path[i][0]
            wanted = old | PT_ACCESSED_MASK | (PT_DIRTY_MASK if i == level and access & PFERR_WRITE else 0)
            if wanted != old:
                cmpxchg_u64(path[i], old, wanted)
    return 0


def same_loop(size_t paging, size_t memory, const uint64_t[::1] gvas, uint64_t access, size_t out):
    """``ref_translate`` of ``ref_walk.c``."""
    cdef Py_ssize_t i, n = gvas.shape[0]
    cdef const uint64_t *va = &gvas[0]
    cdef Translation *t = <Translation *>out
    with nogil:
        for i in range(n):
            walk(<Paging *>paging, <Memory *>memory, va[i], access, 0, &t[i])
