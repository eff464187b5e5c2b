# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Paths that single reads took before, so that the next read on one need not wait for one entry after the other.

Every entry is still read at every walk: those above the leaf are compared with what they were, and how a compare
comes out a processor guesses ahead, while a load whose address another load gives it cannot.  Where one has
changed, or the leaf is not plainly granted, nothing is known: walk.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk, walk_level_shift
from kvmmmu.bits.paging cimport FAULT_NONE, FMT_64, FMT_NONE, Paging
from kvmmmu.engine.accept cimport Accept, accept_init, accepted
from kvmmmu.engine.atomics cimport ld_acquire_u64
from kvmmmu.engine.nestedpaths cimport Climb, nested_path_climb
from kvmmmu.engine.pdecache cimport FOUND_NOTHING, TABLE_RIGHTS, leaf_load, leaf_place, pde_pack
from kvmmmu.engine.quick cimport Quick
from kvmmmu.engine.rows cimport row_granted
from kvmmmu.engine.single cimport single_flat, single_walk
from kvmmmu.engine.state cimport MemMap, NestedPath, Translation
from kvmmmu.engine.translate cimport row_end, row_write, translate_done, translate_proper, walk_any

cdef enum:
    PATHS = 64        # 128 MiB of addresses side by side
    PATH_SHIFT = 21
    PATH_OFFSET = 0x1fffff
    PATH_ENTRIES = 4  # above a 4 KiB leaf, at most

cdef struct Path:
    uint64_t key                # address >> PATH_SHIFT; what no address has: no path
    uint64_t table              # the lowest table with the rights above it (``pde_pack``), or a large page's part
    uint64_t end                # of a large page's row (``row_end``); 0: there is a lowest table
    const uint64_t *at[PATH_ENTRIES]  # where each entry above the leaf stands (a large leaf among them)
    uint64_t entry[PATH_ENTRIES]      # and what it was, from the lowest up; where there are fewer, the first again

cdef struct Paths:
    Path path[PATHS]
    uint64_t met[PATHS]         # keys met once: a path is kept for who comes again
    Accept accept               # of supervisor reads
    bint flat                   # ``single_walk`` may be asked
    bint keep                   # paths are: nobody else is at work on this object


cdef inline void paths_init(Paths *c, const Paging *p, const Paging *host, const MemMap *m,
                            bint keep) noexcept nogil:
    memset(c.path, 0xff, sizeof(c.path))
    memset(c.met, 0xff, sizeof(c.met))
    accept_init(p, 0, False, False, &c.accept)
    c.flat = single_flat(p, host, m)
    c.keep = keep


cdef inline const Path *path_of(const Paths *c, uint64_t gva) noexcept nogil:
    """The path of an address, if all its entries are as they were, or NULL."""
    cdef const Path *path = &c.path[(gva >> PATH_SHIFT) & (PATHS - 1)]
    if (path.key != gva >> PATH_SHIFT or ld_acquire_u64(path.at[0]) != path.entry[0]
            or ld_acquire_u64(path.at[1]) != path.entry[1] or ld_acquire_u64(path.at[2]) != path.entry[2]
            or ld_acquire_u64(path.at[3]) != path.entry[3]):
        return NULL
    return path


cdef inline bint path_leaf(const Paths *c, const Paging *p, const Path *path, uint64_t gva,
                           uint64_t *entry, uint32_t *above) noexcept nogil:
    """Read the leaf of a path that has a lowest table; False: it is not plainly granted."""
    cdef uint64_t place = leaf_place(FMT_64, path.table, gva)
    above[0] = <uint32_t>place & TABLE_RIGHTS
    entry[0] = leaf_load(FMT_64, place, gva)
    return accepted(FMT_64, p, &c.accept, above[0], entry[0])


cdef inline bint path_gpa(const Paths *c, const Paging *p, uint64_t gva, uint64_t *gpa) noexcept nogil:
    """Where a supervisor read goes; False: nothing is known."""
    cdef const Path *path = path_of(c, gva)
    cdef uint64_t entry
    cdef uint32_t above
    if path == NULL:
        return False
    if path.end:
        gpa[0] = path.table | (gva & PATH_OFFSET)
        return True
    if not path_leaf(c, p, path, gva, &entry, &above):
        return False
    gpa[0] = (entry & p.addr_mask) | (gva & 0xfff)
    return True


cdef inline bint path_row(const Paths *c, const Paging *p, Translation *t) noexcept nogil:
    """The whole row of its ``gva``; False: nothing is known."""
    cdef const Path *path = path_of(c, t.gva)
    cdef uint64_t entry
    cdef uint32_t above
    if path == NULL:
        return False
    if path.end:
        row_write(t, t.gva, path.table | (t.gva & PATH_OFFSET), path.entry[0], path.end)
        return True
    if not path_leaf(c, p, path, t.gva, &entry, &above):
        return False
    row_granted(t, t.gva, p.addr_mask, above, entry)
    return True


cdef inline void path_keep(Path *path, const Paging *p, const MemMap *m, int *hint, uint64_t gva,
                           const Quick *q) noexcept nogil:
    """Take down the path of a read that ``single_walk`` just answered, unless its entries change meanwhile."""
    cdef NestedPath up
    cdef Climb c
    cdef int i, at
    c.path = &up
    c.map = m
    c.hint = hint
    path.key = ALL_ONES
    if not nested_path_climb(FMT_64, FMT_NONE, p, p, &c, gva):
        return
    path.end = 0
    if up.level > LEVEL_4K:
        if q.level != up.level or q.entry != up.entry or q.acc != up.acc:
            return
        path.end = row_end(<uint32_t>walk_level_shift(FMT_64, up.level), up.acc, <uint32_t>up.level)
        path.table = q.gpa & ~<uint64_t>PATH_OFFSET
    else:
        path.table = pde_pack(up.table, up.acc)
        if path.table == FOUND_NOTHING:
            return
    for i in range(PATH_ENTRIES):
        at = up.n - 1 - i if i < up.n else 0
        path.at[i] = up.at[at]
        path.entry[i] = up.word[at]
    path.key = gva >> PATH_SHIFT


cdef inline void path_met(Paths *c, const Paging *p, const MemMap *m, int *hint, uint64_t gva,
                          const Quick *q) noexcept nogil:
    """A read that no path answered: the second of its 2 MiB makes one, if it is not its leaf that is unusual."""
    cdef uint64_t key = gva >> PATH_SHIFT
    cdef uint64_t *met = &c.met[key & (PATHS - 1)]
    if met[0] == key and path_of(c, gva) == NULL:
        path_keep(&c.path[key & (PATHS - 1)], p, m, hint, gva, q)
    met[0] = key


# ---- where no path answers ---------------------------------------------------------------

cdef inline bint single_quick(Paths *c, const Paging *p, const MemMap *m, int *hint, uint64_t gva, uint64_t access,
                              bint ac, bint set_ad, Quick *q) noexcept nogil:
    """By ``single_walk``; a supervisor read is one for paths to come."""
    if not c.flat or not single_walk(p, m, hint[0], gva, access, ac, set_ad, q):
        return False
    if c.keep and not access and not ac and not set_ad:
        path_met(c, p, m, hint, gva, q)
    return True


cdef inline bint single_gpa(Paths *c, const Paging *p, const Paging *host, const MemMap *m, int *hint, uint64_t gva,
                            uint64_t access, bint ac, bint set_ad, uint64_t *gpa) noexcept nogil:
    """The address alone; False where the access faults."""
    cdef Walk w, hw
    cdef Quick q
    if single_quick(c, p, m, hint, gva, access, ac, set_ad, &q):
        gpa[0] = q.gpa
        return True
    if walk_any(p, host, m, hint, &w, &hw, gva, access, ac, set_ad) != FAULT_NONE:
        return False
    gpa[0] = w.gpa if host.format == FMT_NONE else hw.gpa
    return True


cdef inline void single_row(Paths *c, const Paging *p, const Paging *host, const MemMap *m, int *hint,
                            Translation *t) noexcept nogil:
    """The whole row of a supervisor read of its ``gva``."""
    cdef Quick q
    if single_quick(c, p, m, hint, t.gva, 0, False, False, &q):
        translate_done(p, &q, q.gpa, t)
    else:
        translate_proper(p, host, m, hint, t.gva, 0, False, False, t)
