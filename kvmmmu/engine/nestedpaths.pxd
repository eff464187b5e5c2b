# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Paths that accesses of a vCPU took before, mostly in two dimensions: as ``paths.pxd``, of up to 29 entries.

The path of a guest's 2 MiB is every entry that leads to its lowest table, of the guest's tables and of those that
translate their addresses; the path of 2 MiB of guest-physical memory is every entry above its leaves.  All are read
again and compared at each access, in the order of the walk, so that no entry is looked at that those before it do
not lead to.  A leaf is fetched and judged as the walk does it (``quick.pxd``).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk, walk_entry_offset
from kvmmmu.bits.paging cimport FMT_32, FMT_64, FMT_EPT, FMT_NONE, FMT_PAE, Paging
from kvmmmu.engine.atomics cimport ld_acquire_u64
from kvmmmu.engine.quick cimport (
    QUICK_FINAL, QUICK_NO, QUICK_YES, Quick, Window, quick_begin, quick_entry, quick_final, quick_finish, quick_last,
    quick_nested, quick_walk, window_host,
)
from kvmmmu.engine.single cimport single_walk
from kvmmmu.engine.state cimport MemMap, NESTED_ENTRIES, NESTED_PATHS, NestedPath, NestedPaths
from kvmmmu.engine.walk cimport walk_second_access

cdef enum:
    NESTED_SHIFT = 21


cdef inline uint64_t nested_path_slot(uint64_t root, uint64_t key) noexcept nogil:
    """Roots take turns under shadow paging: paths of one should be there when it comes back."""
    return (key ^ (root >> 12)) & (NESTED_PATHS - 1)


cdef struct Climb:
    # Where a path is being taken down.
    NestedPath *path
    const MemMap *map
    int *hint
    Window window
    uint64_t accessed
    uint32_t acc


cdef inline bint nested_path_note(NestedPath *path, const uint8_t *host, uint64_t entry, int width) noexcept nogil:
    """Remember an entry that was read; once where it was met before."""
    # Whole words: the other half of one may change too, and then nothing is known.
    cdef const uint64_t *at = <const uint64_t *>(<uint64_t>host & ~<uint64_t>7)
    cdef uint64_t word = ld_acquire_u64(at)
    cdef uint64_t now = word >> ((<uint64_t>host & 7) << 3)
    cdef int i
    if width == 4:
        now = <uint32_t>now
    if now != entry or <uint64_t>host & <uint64_t>(width - 1):
        return False
    for i in range(path.n):
        if path.at[i] == at:
            return path.word[i] == word
    if path.n == NESTED_ENTRIES:
        return False
    path.at[path.n] = at
    path.word[path.n] = word
    path.n += 1
    return True


cdef inline bint climb_entry(int fmt, const Paging *p, Climb *c, const uint8_t *host, int level,
                             uint64_t *entry) noexcept nogil:
    """Fetch an entry on the way up and note it.  False: it is unusual, or changes."""
    return (quick_entry(fmt, p, host, level, entry, &c.acc, &c.accessed)
            and nested_path_note(c.path, host, entry[0], 4 if fmt == FMT_32 else 8))


cdef inline bint climb_second(int host_fmt, const Paging *host, Climb *c, uint64_t *gpa) noexcept nogil:
    """Translate the address of a guest table's entry, and note all that did, the leaf among it."""
    cdef Climb own
    cdef Quick q
    cdef uint64_t address = gpa[0], table, entry = 0
    cdef int level
    if not quick_begin(host_fmt, host, &address, &table, &level):
        return False
    own = c[0]
    own.accessed = host.accessed
    own.acc = ACC_ALL
    while True:
        if not climb_entry(host_fmt, host, &own, window_host(
                own.map, own.hint, &own.window, table | walk_entry_offset(host_fmt, address, level)), level, &entry):
            return False
        if quick_last(host_fmt, host, level, entry):
            break
        table = entry & host.addr_mask
        level -= 1
    q.entry = entry
    q.level = level
    q.acc = own.acc
    if not quick_finish(host_fmt, host, address, host.table_access, False, True, own.accessed, &q):
        return False
    c.window = own.window
    gpa[0] = q.gpa
    return True


cdef inline bint climb_place(int host_fmt, const Paging *host, Climb *c, uint64_t address,
                             const uint8_t **place) noexcept nogil:
    """Host memory at an address of the tables being walked; ``host_fmt`` FMT_NONE: they stand there themselves."""
    if host_fmt != FMT_NONE and not climb_second(host_fmt, host, c, &address):
        return False
    place[0] = window_host(c.map, c.hint, &c.window, address)
    return place[0] != NULL


cdef inline bint nested_path_climb(int fmt, int host_fmt, const Paging *p, const Paging *host, Climb *c,
                                   uint64_t va) noexcept nogil:
    """Take down everything above a leaf.  False: something is unusual, or changes meanwhile."""
    cdef const uint8_t *place
    cdef uint64_t table, entry = 0
    cdef int level
    c.path.n = 0
    c.acc = ACC_ALL
    c.accessed = p.accessed
    c.window.first = 0
    c.window.npages = 0
    if not quick_begin(fmt, p, &va, &table, &level):
        return False
    while level > LEVEL_4K:
        if (not climb_place(host_fmt, host, c, table | walk_entry_offset(fmt, va, level), &place)
                or not climb_entry(fmt, p, c, place, level, &entry)):
            return False
        if quick_last(fmt, p, level, entry):
            table |= walk_entry_offset(fmt, va, level)
            break
        table = entry & p.addr_mask
        level -= 1
    c.path.place = table
    if level == LEVEL_4K and not climb_place(host_fmt, host, c, table, &c.path.table):
        return False
    c.path.entry = entry
    c.path.level = level
    c.path.acc = c.acc
    c.path.accessed = c.accessed
    return True


cdef inline bint nested_path_holds(const NestedPaths *paths, const NestedPath *path, const MemMap *m, uint64_t root,
                                   uint64_t key) noexcept nogil:
    """Every entry is what it was."""
    cdef int i
    if path.key != key or path.formats != paths.formats or path.serial != m.serial or path.root != root:
        return False
    for i in range(path.n):
        if ld_acquire_u64(path.at[i]) != path.word[i]:
            return False
    return True


cdef inline bint nested_path_leaf(int fmt, const Paging *p, const NestedPath *path, uint64_t va, uint64_t access,
                                  bint ac, Quick *q) noexcept nogil:
    """The walk's last step."""
    cdef uint64_t accessed = path.accessed, offset
    va &= p.va_mask
    q.acc = path.acc
    q.level = path.level
    q.entry = path.entry
    q.entry_gpa = path.place
    if path.level == LEVEL_4K:
        offset = walk_entry_offset(fmt, va, LEVEL_4K)
        q.entry_gpa += offset
        if not quick_entry(fmt, p, path.table + offset, LEVEL_4K, &q.entry, &q.acc, &accessed):
            return False
    return quick_finish(fmt, p, va, access, ac, True, accessed, q)


cdef inline NestedPath *nested_path_met(NestedPaths *paths, NestedPath *of, uint64_t *met, const MemMap *m,
                                        uint64_t root, uint64_t key) noexcept nogil:
    """Where to keep the path of a walk that none answered, once it is met again; else NULL."""
    cdef uint64_t slot = nested_path_slot(root, key)
    cdef bint again = met[slot] == key
    met[slot] = key
    if not again:
        return NULL
    of[slot].key = ALL_ONES
    of[slot].formats = paths.formats
    of[slot].serial = m.serial
    of[slot].root = root
    return &of[slot]


# ---- both dimensions --------------------------------------------------------------------
#
# The loop of ``climb_second`` and the choice of formats in ``nested_known_any`` stand in quick.pxd too.  Made one with
# those there (a walk that takes down its entries where there is a path, a path tried where the walk begins), replays
# take 4 % more instructions in two dimensions and 0.7 % in one.

cdef inline void nested_path_keep(NestedPath *path, int host_fmt, const Paging *p, const Paging *host, const MemMap *m,
                                  int *hint, uint64_t va) noexcept nogil:
    cdef Climb c
    if path == NULL:
        return
    c.path = path
    c.map = m
    c.hint = hint
    if nested_path_climb(p.format, host_fmt, p, host, &c, va):
        path.key = va >> NESTED_SHIFT


cdef inline int nested_known(int fmt, int host_fmt, NestedPaths *paths, const Paging *guest, const Paging *host,
                             const MemMap *m, int *hint, uint64_t gva, uint64_t access, bint ac, Quick *q,
                             uint64_t *hpa) noexcept nogil:
    """As ``quick_nested_walk``, where the guest's tables are on a path."""
    cdef uint64_t key = gva >> NESTED_SHIFT, second = walk_second_access(host, access)
    cdef const NestedPath *path = &paths.guest[nested_path_slot(host.root, key)]
    cdef Window window
    cdef Quick last
    if (not nested_path_holds(paths, path, m, host.root, key)
            or not nested_path_leaf(fmt, guest, path, gva, access, ac, q)):
        return QUICK_NO
    key = q.gpa >> NESTED_SHIFT
    path = &paths.final[nested_path_slot(host.root, key)]
    if nested_path_holds(paths, path, m, host.root, key):
        if not nested_path_leaf(host_fmt, host, path, q.gpa, second, False, &last):
            return QUICK_FINAL
    else:
        window.first = 0
        window.npages = 0
        if not quick_walk(host_fmt, host, m, hint, &window, q.gpa, second, False, True, &last):
            return QUICK_FINAL
        nested_path_keep(nested_path_met(paths, paths.final, paths.final_met, m, host.root, key), FMT_NONE, host, host,
                         m, hint, q.gpa)
    hpa[0] = last.gpa
    return QUICK_YES


cdef inline int nested_known_any(NestedPaths *paths, const Paging *guest, const Paging *host, const MemMap *m,
                                 int *hint, uint64_t gva, uint64_t access, bint ac, Quick *q,
                                 uint64_t *hpa) noexcept nogil:
    # Literals: each is compiled for its formats.
    if host.format == FMT_EPT:
        if guest.format == FMT_64:
            return nested_known(FMT_64, FMT_EPT, paths, guest, host, m, hint, gva, access, ac, q, hpa)
        if guest.format == FMT_PAE:
            return nested_known(FMT_PAE, FMT_EPT, paths, guest, host, m, hint, gva, access, ac, q, hpa)
        if guest.format == FMT_32:
            return nested_known(FMT_32, FMT_EPT, paths, guest, host, m, hint, gva, access, ac, q, hpa)
    elif host.format == FMT_64:
        if guest.format == FMT_64:
            return nested_known(FMT_64, FMT_64, paths, guest, host, m, hint, gva, access, ac, q, hpa)
        if guest.format == FMT_32:
            return nested_known(FMT_32, FMT_64, paths, guest, host, m, hint, gva, access, ac, q, hpa)
    return QUICK_NO


cdef inline int nested_quick(NestedPaths *paths, const Paging *guest, const Paging *host, const MemMap *m, int *hint,
                             int *guest_hint, Walk *hw, uint64_t gva, uint64_t access, bint ac, Quick *q,
                             uint64_t *hpa) noexcept nogil:
    """``quick_nested`` for accesses that set A and D bits, and are likely to come again."""
    cdef uint64_t key = gva >> NESTED_SHIFT
    cdef int r = nested_known_any(paths, guest, host, m, hint, gva, access, ac, q, hpa)
    if r == QUICK_FINAL:
        return quick_final(host, m, hint, hw, access, True, q, hpa)
    if r == QUICK_NO:
        r = quick_nested(guest, host, m, hint, guest_hint, hw, gva, access, ac, True, q, hpa)
        if r != QUICK_NO:
            nested_path_keep(nested_path_met(paths, paths.guest, paths.guest_met, m, host.root, key), host.format,
                             guest, host, m, hint, gva)
    return r


# ---- shadow tables ----------------------------------------------------------------------

cdef inline bint flat_quick(NestedPaths *paths, const Paging *p, const MemMap *m, int *hint, uint64_t va,
                            uint64_t access, bint ac, Quick *q) noexcept nogil:
    """``single_walk`` for accesses that set A and D bits, and are likely to come again."""
    cdef uint64_t key = va >> NESTED_SHIFT
    cdef const NestedPath *path = &paths.guest[nested_path_slot(p.root, key)]
    if nested_path_holds(paths, path, m, p.root, key):
        return nested_path_leaf(FMT_64, p, path, va, access, ac, q)
    if hint[0] >= m.n or not single_walk(p, m, hint[0], va, access, ac, True, q):
        return False
    nested_path_keep(nested_path_met(paths, paths.guest, paths.guest_met, m, p.root, key), FMT_NONE, p, p, m, hint, va)
    return True
