# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What a batch remembers above the lowest tables: where each stands in host memory, and large pages.

Only what is as usual is remembered: entries that lead on, are present, have no reserved bit and, where
the batch sets them, their A (and D) bits.  Everything else is "nothing known": walk properly.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport WALK_LEAF, Walk, walk_entry_offset, walk_finish, walk_level_shift
from kvmmmu.bits.paging cimport FMT_32, FMT_64, FMT_EPT, Paging
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.atomics cimport ld_acquire_u32, ld_acquire_u64
from kvmmmu.engine.quick cimport Window, quick_begin, quick_entry, quick_last, window_host
from kvmmmu.engine.state cimport MemMap
from kvmmmu.engine.translate cimport row_end

cdef extern from "kvmmmu/batch.h" nogil:
    const uint64_t KVMMMU_PDE_LARGE
    struct Pdes "kvmmmu_pdes":
        uint64_t tag[512]
        uint64_t table[512]

cdef enum:
    PDE_SLOTS = 512   # as KVMMMU_PDES
    DIR_SLOTS = 64
    FOUND_NOTHING = 0
    FOUND_LARGE = 1   # beside addresses of tables, which are never that small
    FOUND_TABLE = 2
    TABLE_RIGHTS = 7  # of a table's address: the rights above it stand in bits that are 0

cdef struct LargePage:
    uint64_t entry
    uint64_t base         # its address
    uint64_t offset       # mask of the bits below it
    uint64_t end          # page size, ACC rights and level as a row's last word (``row_end``)

cdef struct PdeCache:
    const Paging *paging
    const MemMap *map
    int *hint
    Window window         # the area last read
    uint64_t access       # of every address of the batch
    bint ac
    bint set_ad           # entries whose A or D bits are to be set are unusual
    uint64_t dir_tag[64]  # as Pdes, for the tables one level up: address >> 30
    uint64_t dir_table[64]
    Pdes pdes
    LargePage large[512]  # beside a tag that says so


cdef inline void pde_forget(PdeCache *c) noexcept nogil:
    memset(c.dir_tag, 0xff, sizeof(c.dir_tag))
    memset(c.pdes.tag, 0xff, sizeof(c.pdes.tag))


cdef inline void pde_init(PdeCache *c, const Paging *p, const MemMap *m, int *hint, uint64_t access, bint ac,
                          bint set_ad) noexcept nogil:
    c.paging = p
    c.map = m
    c.hint = hint
    c.window.first = 0
    c.window.npages = 0
    c.access = access
    c.ac = ac
    c.set_ad = set_ad
    pde_forget(c)


cdef inline int pde_shift(int fmt) noexcept nogil:
    return walk_level_shift(fmt, LEVEL_2M)


cdef inline bint pde_judge(int fmt, const PdeCache *c, const uint8_t *host, int level, uint64_t *entry,
                           uint32_t *acc) noexcept nogil:
    """Fetch an entry above the lowest table.  False: it is unusual."""
    cdef uint64_t accessed = c.paging.accessed
    if not quick_entry(fmt, c.paging, host, level, entry, acc, &accessed):
        return False
    return not c.set_ad or accessed == c.paging.accessed


cdef inline uint64_t pde_pack(const uint8_t *host, uint32_t acc) noexcept nogil:
    """A table's address with the rights above it; 0 where no memory stands."""
    if host == NULL or <uint64_t>host & TABLE_RIGHTS:
        return FOUND_NOTHING
    return <uint64_t>host | acc


cdef inline uint64_t pde_large(int fmt, PdeCache *c, uint64_t va, int level, uint64_t entry,
                               uint32_t acc) noexcept nogil:
    """Remember a large page, as the walk's own finish judges it."""
    cdef uint64_t key = va >> pde_shift(fmt)
    cdef LargePage *large = &c.large[key & (PDE_SLOTS - 1)]
    cdef Walk w
    w.va = va
    w.access = c.access
    w.ac = c.ac
    w.level = level
    w.acc = acc
    w.entries[level] = entry
    if walk_finish(c.paging, &w) != WALK_LEAF:
        return FOUND_NOTHING
    if c.set_ad and c.access & PFERR_WRITE and c.paging.dirty & ~entry:
        return FOUND_NOTHING
    large.entry = entry
    large.offset = bits_between(w.page_shift - 1, 0)
    large.base = w.gpa & ~large.offset
    large.end = row_end(<uint32_t>w.page_shift, w.pte_access, <uint32_t>level)
    c.pdes.tag[key & (PDE_SLOTS - 1)] = key | KVMMMU_PDE_LARGE
    return FOUND_LARGE


cdef inline uint64_t pde_lowest(int fmt, PdeCache *c, uint64_t va, const uint8_t *table, uint64_t *entry,
                                uint32_t *acc) noexcept nogil:
    """Read the entry of a level-2 table; FOUND_LARGE (remembered), FOUND_NOTHING, or FOUND_TABLE."""
    if not pde_judge(fmt, c, table + walk_entry_offset(fmt, va, LEVEL_2M), LEVEL_2M, entry, acc):
        return FOUND_NOTHING
    if quick_last(fmt, c.paging, LEVEL_2M, entry[0]):
        return pde_large(fmt, c, va, LEVEL_2M, entry[0], acc[0])
    return FOUND_TABLE


cdef inline uint64_t pde_keep(int fmt, PdeCache *c, uint64_t va, uint64_t table) noexcept nogil:
    cdef uint64_t key = va >> pde_shift(fmt)
    if table != FOUND_NOTHING:
        c.pdes.tag[key & (PDE_SLOTS - 1)] = key
        c.pdes.table[key & (PDE_SLOTS - 1)] = table
    return table


cdef inline uint64_t pde_fill(int fmt, PdeCache *c, uint64_t va) noexcept nogil:
    """Walk the upper tables to the lowest one, and remember it."""
    cdef const Paging *p = c.paging
    cdef uint64_t entry = 0, table = 0, found, key = va >> 30
    cdef uint32_t acc = ACC_ALL
    cdef int level = 0
    if fmt == FMT_64 or fmt == FMT_EPT:
        found = c.dir_table[key & (DIR_SLOTS - 1)]
        if c.dir_tag[key & (DIR_SLOTS - 1)] != key:
            if not quick_begin(fmt, p, &va, &table, &level):
                return FOUND_NOTHING
            while level > LEVEL_2M:
                if not pde_judge(fmt, c, window_host(c.map, c.hint, &c.window,
                                                     table | walk_entry_offset(fmt, va, level)), level, &entry, &acc):
                    return FOUND_NOTHING
                if quick_last(fmt, p, level, entry):
                    return pde_large(fmt, c, va, level, entry, acc) if level == LEVEL_1G else FOUND_NOTHING
                table = entry & p.addr_mask
                level -= 1
            found = pde_pack(window_host(c.map, c.hint, &c.window, table), acc)
            if found == FOUND_NOTHING:
                return FOUND_NOTHING
            c.dir_tag[key & (DIR_SLOTS - 1)] = key
            c.dir_table[key & (DIR_SLOTS - 1)] = found
    else:
        if not quick_begin(fmt, p, &va, &table, &level):
            return FOUND_NOTHING
        found = pde_pack(window_host(c.map, c.hint, &c.window, table), ACC_ALL)
        if found == FOUND_NOTHING:
            return FOUND_NOTHING
    acc = <uint32_t>found & TABLE_RIGHTS
    found = pde_lowest(fmt, c, va, <const uint8_t *>(found & ~<uint64_t>TABLE_RIGHTS), &entry, &acc)
    if found != FOUND_TABLE:
        return found
    return pde_keep(fmt, c, va, pde_pack(window_host(c.map, c.hint, &c.window, entry & p.addr_mask), acc))


cdef inline uint64_t pde_find(int fmt, PdeCache *c, uint64_t va) noexcept nogil:
    """The lowest table for an address: its packed address, FOUND_LARGE (in its slot), or FOUND_NOTHING."""
    cdef uint64_t key = va >> pde_shift(fmt)
    cdef uint64_t tag = c.pdes.tag[key & (PDE_SLOTS - 1)]
    if tag == key:
        return c.pdes.table[key & (PDE_SLOTS - 1)]
    if tag == (key | KVMMMU_PDE_LARGE):
        return FOUND_LARGE
    return pde_fill(fmt, c, va)


cdef inline const LargePage *pde_large_page(int fmt, const PdeCache *c, uint64_t va) noexcept nogil:
    return &c.large[(va >> pde_shift(fmt)) & (PDE_SLOTS - 1)]


# ---- the lowest table's entry -------------------------------------------------------

cdef inline uint64_t leaf_place(int fmt, uint64_t table, uint64_t va) noexcept nogil:
    """Address of the leaf's 8 bytes, the rights above it still in bits 2:0."""
    if fmt == FMT_32:
        return table + ((va >> 10) & 0xff8)
    return table + ((va >> 9) & 0xff8)


cdef inline uint64_t leaf_load(int fmt, uint64_t place, uint64_t va) noexcept nogil:
    cdef const uint8_t *host = <const uint8_t *>(place & ~<uint64_t>TABLE_RIGHTS)
    if fmt == FMT_32:
        return ld_acquire_u32(<const uint32_t *>(host + ((va >> 10) & 4)))
    return ld_acquire_u64(<const uint64_t *>host)
