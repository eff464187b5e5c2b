# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What a batch in two dimensions remembers: the guest's tables as host addresses, and the tables below twice.

Twice because a guest table is read by one kind of access and the final address used by another: what is remembered
was granted to that one.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FMT_64, FMT_PAE, Paging, rsvd_fault
from kvmmmu.engine.accept cimport Accept, accept_init, accepted
from kvmmmu.engine.atomics cimport ld_acquire_u64
from kvmmmu.engine.pdecache cimport (
    DIR_SLOTS, FOUND_LARGE, FOUND_NOTHING, FOUND_TABLE, TABLE_RIGHTS, PdeCache, leaf_load, leaf_place, pde_find,
    pde_forget, pde_init, pde_judge, pde_keep, pde_large, pde_large_page, pde_lowest, pde_pack,
)
from kvmmmu.engine.quick cimport Window, quick_begin, quick_last, window_host
from kvmmmu.engine.rows cimport Batch
from kvmmmu.engine.state cimport MemMap
from kvmmmu.engine.walk cimport walk_second_access

cdef enum:
    TABLE_SLOTS = 64

cdef struct Nested:
    Batch guest
    PdeCache tables       # the second dimension as guest tables are read through it
    PdeCache final        # and as the address itself is used
    Accept table_accept
    Accept final_accept
    Window window         # the area of the guest table last found
    uint64_t frame[64]    # guest frames of tables; all ones: none
    const uint8_t *host[64]  # where they stand


cdef inline void nested_forget(Nested *n) noexcept nogil:
    pde_forget(&n.guest.cache)
    pde_forget(&n.tables)
    pde_forget(&n.final)
    memset(n.frame, 0xff, sizeof(n.frame))


cdef inline void nested_init(Nested *n, const Paging *p, const Paging *host, const MemMap *m, int *hint,
                             uint64_t access, bint ac, bint set_ad) noexcept nogil:
    pde_init(&n.guest.cache, p, m, hint, access, ac, set_ad)
    accept_init(p, access, ac, set_ad, &n.guest.accept)
    pde_init(&n.tables, host, m, hint + 1, host.table_access, False, set_ad)
    accept_init(host, host.table_access, False, set_ad, &n.table_accept)
    pde_init(&n.final, host, m, hint + 1, walk_second_access(host, access), False, set_ad)
    accept_init(host, n.final.access, False, set_ad, &n.final_accept)
    n.window.first = 0
    n.window.npages = 0
    memset(n.frame, 0xff, sizeof(n.frame))


cdef inline uint64_t second_find(int fmt, PdeCache *c, const Accept *a, uint64_t gpa) noexcept nogil:
    """A guest-physical address as a host one; all ones where it is not plainly granted."""
    cdef uint64_t found = pde_find(fmt, c, gpa), entry
    if found > FOUND_LARGE:
        found = leaf_place(fmt, found, gpa)
        entry = leaf_load(fmt, found, gpa)
        if not accepted(fmt, c.paging, a, <uint32_t>found & TABLE_RIGHTS, entry):
            return ALL_ONES
        return (entry & c.paging.addr_mask) | (gpa & 0xfff)
    if found == FOUND_LARGE:
        return pde_large_page(fmt, c, gpa).base | (gpa & pde_large_page(fmt, c, gpa).offset)
    return ALL_ONES


cdef inline const uint8_t *nested_table(int host_fmt, Nested *n, uint64_t gpa) noexcept nogil:
    """Where a byte of a guest table stands, or NULL."""
    cdef uint64_t frame = gpa >> 12, hpa
    cdef const uint8_t *host = n.host[frame & (TABLE_SLOTS - 1)]
    if n.frame[frame & (TABLE_SLOTS - 1)] != frame:
        hpa = second_find(host_fmt, &n.tables, &n.table_accept, gpa)
        if hpa == ALL_ONES:
            return NULL
        host = window_host(n.tables.map, n.guest.cache.hint, &n.window, hpa & ~<uint64_t>0xfff)
        if host == NULL:
            return NULL
        n.frame[frame & (TABLE_SLOTS - 1)] = frame
        n.host[frame & (TABLE_SLOTS - 1)] = host
    return host + (gpa & 0xfff)


cdef inline bint nested_pdpte(int host_fmt, Nested *n, uint64_t va, uint64_t *table) noexcept nogil:
    """Read the PDPTE of an address from memory, as under NPT (APM vol. 2 section 15.25).  False: that is unusual."""
    cdef const Paging *p = n.guest.cache.paging
    cdef const uint8_t *host = nested_table(host_fmt, n, p.root | ((va >> 30) << 3))
    cdef uint64_t entry
    if host == NULL:
        return False
    # It has neither rights nor A: nothing of it is left in what is remembered below.
    entry = ld_acquire_u64(<const uint64_t *>host)
    table[0] = entry & p.addr_mask
    return entry & PT_PRESENT_MASK != 0 and not rsvd_fault(p, LEVEL_1G, entry)


cdef inline uint64_t nested_fill(int fmt, int host_fmt, Nested *n, uint64_t va) noexcept nogil:
    """As ``pde_fill`` for the guest's tables."""
    cdef PdeCache *c = &n.guest.cache
    cdef const Paging *p = c.paging
    cdef uint64_t entry = 0, table = 0, found, key = va >> 30
    cdef uint32_t acc = ACC_ALL
    cdef const uint8_t *host
    cdef int level = 0
    found = c.dir_table[key & (DIR_SLOTS - 1)]
    if fmt != FMT_64 or c.dir_tag[key & (DIR_SLOTS - 1)] != key:
        if fmt == FMT_PAE and p.pdpte_in_memory:
            if not nested_pdpte(host_fmt, n, va, &table):
                return FOUND_NOTHING
            level = LEVEL_2M
        elif not quick_begin(fmt, p, &va, &table, &level):
            return FOUND_NOTHING
        while level > LEVEL_2M:
            host = nested_table(host_fmt, n, table)
            if host == NULL or not pde_judge(fmt, c, host + ((va >> (12 + 9 * (level - 1))) & 511) * 8, level, &entry,
                                             &acc):
                return FOUND_NOTHING
            if quick_last(fmt, p, level, entry):
                return pde_large(fmt, c, va, level, entry, acc) if level == LEVEL_1G else FOUND_NOTHING
            table = entry & p.addr_mask
            level -= 1
        found = pde_pack(nested_table(host_fmt, n, table), acc)
        if found == FOUND_NOTHING:
            return FOUND_NOTHING
        if fmt == FMT_64:
            c.dir_tag[key & (DIR_SLOTS - 1)] = key
            c.dir_table[key & (DIR_SLOTS - 1)] = found
    acc = <uint32_t>found & TABLE_RIGHTS
    found = pde_lowest(fmt, c, va, <const uint8_t *>(found & ~<uint64_t>TABLE_RIGHTS), &entry, &acc)
    if found != FOUND_TABLE:
        return found
    return pde_keep(fmt, c, va, pde_pack(nested_table(host_fmt, n, entry & p.addr_mask), acc))
