# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Many accesses of one vCPU, one after the other: the same answers as single calls.

While the vCPU stays in the guest it may remember what its tables granted, as a processor does: whoever takes
something away makes a request and waits until the vCPU has left (``flush_remote_tlbs``), and requests are looked at
before each row.  Whatever is not plainly granted (a fault, an A or D bit to set, an access over a page's end) goes
to ``vcpu_access``, which may change anything, so what was remembered goes then.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FMT_32, FMT_64, FMT_EPT, FMT_NONE, FMT_PAE, Paging
from kvmmmu.engine.accept cimport accepted
from kvmmmu.engine.atomics cimport in_guest, ld_acquire_u32, ld_u64
from kvmmmu.engine.grants cimport GRANT_KINDS, Grants, grants_access, grants_init, grants_large
from kvmmmu.engine.hooks cimport MUTANT_DEAF_BATCH, POINT_HARDWARE, hook, mutant
from kvmmmu.engine.hostmem cimport vm_hostmem
from kvmmmu.engine.nested cimport nested_place
from kvmmmu.engine.nestedcache cimport Nested, nested_init
from kvmmmu.engine.pages cimport page_at, page_role, spte_page
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, FOUND_NOTHING, KVMMMU_PDE_LARGE, PDE_SLOTS, TABLE_RIGHTS, LargePage, PdeCache, leaf_load, leaf_place,
    pde_find, pde_init, pde_shift,
)
from kvmmmu.engine.quick cimport Quick, quick_memory
from kvmmmu.engine.ring cimport likely
from kvmmmu.engine.rows cimport other_page
from kvmmmu.engine.state cimport Access, MMU_SHADOW, OUTCOME_OK, ShadowPage, Vcpu, Vm
from kvmmmu.engine.vcpu cimport Hits, access_begin, access_hit, hits_begin, leaf_gpa, vcpu_access
from kvmmmu.engine.walk cimport walk_second_access

cdef extern from "kvmmmu/capi.h" nogil:
    enum:
        KVMMMU_WRITE
        KVMMMU_FETCH
        KVMMMU_IMPLICIT

cdef enum:
    RUN_LEAST = 48        # rows for which remembering is worth what it costs to begin
    CALM_LEAST = 32       # plain rows in a row before it is tried again,
    CALM_MOST = 1024      # more and more of them where it did not last
    GFN_LINEAR = 1        # in ``gfns``, beside a gpa
    PAGE_SLOTS = 1024     # as in Twice

cdef struct Run:
    const uint64_t *gvas
    const uint8_t *kinds  # capi.h's codes; below GRANT_KINDS: an explicit read, write or fetch
    int64_t n
    uint64_t va_mask      # of addresses as the guest forms them
    int size
    Access *out

cdef struct Flat:
    # One dimension: the tables KVM built from the guest's.
    PdeCache cache
    Grants grants
    uint64_t gfns[512]    # beside each table: the gpa of its first entry, or where KVM keeps each entry's gfn

cdef struct Twice:
    Nested nested
    Grants guest
    Grants final
    uint8_t kinds[512]    # of a large page of the second dimension: bit n, it is granted to kind n
    # What both dimensions granted, by page: two searches and two leaves for one look.
    uint64_t page_tag[1024]  # gva >> 12, above bits 2:0 of which bit n says: to kind n
    uint64_t page_gpa[1024]


cdef inline uint64_t how_access(uint32_t how) noexcept nogil:
    """PFERR_* of capi.h's code of an access."""
    cdef uint64_t access = grants_access(<int>(how & (KVMMMU_WRITE | KVMMMU_FETCH)))
    return access | PFERR_IMPLICIT if how & KVMMMU_IMPLICIT else access


cdef inline bint run_stops(Vcpu *vcpu, uint64_t gva, uint64_t kind, int size) noexcept nogil:
    """A row that is not for here."""
    return (kind >= GRANT_KINDS or (gva & 0xfff) + <uint64_t>size > 4096
            or ld_acquire_u32(&vcpu.requests) != 0 and not mutant(vcpu.vm, MUTANT_DEAF_BATCH))


cdef inline void run_write(Access *out, int size, uint64_t gpa) noexcept nogil:
    access_begin(out, size)
    out.gpa = gpa


cdef inline int64_t run_repeat(Vcpu *vcpu, const Run *r, int64_t i, uint64_t move) noexcept nogil:
    """Rows from ``i`` on that are of the kind and in the page of the one before; the first that is not."""
    cdef const uint64_t *gvas = r.gvas
    cdef const uint8_t *kinds = r.kinds
    cdef Access *out = r.out
    cdef uint64_t page = gvas[i] >> 12
    cdef uint8_t kind = kinds[i - 1]
    cdef int64_t n = r.n
    cdef int size = r.size
    while i < n and gvas[i] >> 12 == page and kinds[i] == kind and not run_stops(vcpu, gvas[i], kind, size):
        hook(vcpu, POINT_HARDWARE)
        run_write(&out[i], size, gvas[i] + move)
        i += 1
    return i


cdef inline bint run_goes_on(const uint64_t *gvas, int64_t i, int64_t n) noexcept nogil:
    """The next row is in the page of row ``i``."""
    return not likely(i + 1 == n or other_page(gvas[i], gvas[i + 1]))


# ---- one dimension ----------------------------------------------------------------------

cdef inline uint64_t table_gfns(Vm *vm, const uint8_t *table) noexcept nogil:
    """Where the gfns of a table's entries come from (``spte_gfn``), or 0."""
    cdef uint64_t index = <uint64_t>(table - <const uint8_t *>vm.arena.sptes) >> 3
    cdef const ShadowPage *sp
    if index >> 9 >= <uint64_t>vm.arena.limit:
        return 0
    sp = page_at(vm, spte_page(index))
    if page_role(sp) & ROLE_PASSTHROUGH:
        return 0
    if page_role(sp) & ROLE_DIRECT:
        return (sp.gfn << 12) | GFN_LINEAR
    return <uint64_t>&vm.arena.shadowed[index]


cdef inline uint64_t table_gpa(uint64_t gfns, uint64_t va) noexcept nogil:
    """The gpa of a lowest table's page."""
    if gfns & GFN_LINEAR:
        return (gfns & ~<uint64_t>GFN_LINEAR) + (va & 0x1ff000)
    return ld_u64(<const uint64_t *>(gfns + ((va >> 9) & 0xff8))) & ~<uint64_t>0xfff


cdef inline bint flat_find(Vcpu *vcpu, Flat *f, uint64_t va, int kind) noexcept nogil:
    """Remember what leads to an address.  False: that is unusual."""
    cdef PdeCache *c = &f.cache
    cdef uint64_t slot = (va >> pde_shift(FMT_64)) & (PDE_SLOTS - 1), found
    cdef LargePage *large = &c.large[slot]
    cdef Quick q
    c.access = f.grants.access[kind]
    found = pde_find(FMT_64, c, va) if c.paging.format == FMT_64 else pde_find(FMT_PAE, c, va)
    if found > FOUND_LARGE:
        f.gfns[slot] = table_gfns(vcpu.vm, <const uint8_t *>(found & ~<uint64_t>TABLE_RIGHTS))
        if f.gfns[slot]:
            return True
    elif found == FOUND_LARGE:
        if quick_memory(c.paging, c.map, c.hint, &c.window, va, c.access, c.ac, True, &q):
            large.base = leaf_gpa(vcpu, &q) & ~large.offset
            return True
    c.pdes.tag[slot] = ALL_ONES
    return False


cdef inline int64_t flat_rows(Vcpu *vcpu, Flat *f, const Run *r, int64_t i) noexcept nogil:
    cdef const Paging *p = f.cache.paging
    cdef const uint64_t *gvas = r.gvas
    cdef const uint8_t *kinds = r.kinds
    cdef Access *out = r.out
    cdef uint64_t va, key, tag, place, gpa, mask = r.va_mask & p.va_mask
    cdef const LargePage *large
    cdef int64_t n = r.n
    cdef int kind, size = r.size
    while i < n and not run_stops(vcpu, gvas[i], kinds[i], size):
        hook(vcpu, POINT_HARDWARE)
        kind = kinds[i]
        va = gvas[i] & mask
        key = va >> pde_shift(FMT_64)
        tag = f.cache.pdes.tag[key & (PDE_SLOTS - 1)]
        if likely(tag == key):
            place = leaf_place(FMT_64, f.cache.pdes.table[key & (PDE_SLOTS - 1)], va)
            if not accepted(FMT_64, p, &f.grants.leaf[kind], <uint32_t>place & TABLE_RIGHTS,
                            leaf_load(FMT_64, place, va)):
                break
            gpa = table_gpa(f.gfns[key & (PDE_SLOTS - 1)], va) | (va & 0xfff)
        elif tag == (key | KVMMMU_PDE_LARGE):
            large = &f.cache.large[key & (PDE_SLOTS - 1)]
            if not grants_large(&f.grants, kind, large):
                break
            gpa = large.base | (va & large.offset)
        elif flat_find(vcpu, f, va, kind):
            continue
        else:
            break
        run_write(&out[i], size, gpa)
        i = run_repeat(vcpu, r, i + 1, gpa - gvas[i]) if run_goes_on(gvas, i, n) else i + 1
    return i


cdef inline int64_t flat_run(Vcpu *vcpu, const Run *r, int64_t i, uint64_t[3] access) noexcept nogil:
    cdef Flat f
    pde_init(&f.cache, &vcpu.hw, vm_hostmem(vcpu.vm), &vcpu.table_hint, 0, vcpu.ac, True)
    grants_init(&f.grants, &vcpu.hw, access, vcpu.ac)
    return flat_rows(vcpu, &f, r, i)


# ---- two dimensions ---------------------------------------------------------------------

cdef inline bint final_fill(int host_fmt, Twice *t, uint64_t gpa, int kind) noexcept nogil:
    """Remember what leads to a gpa.  False: that is unusual."""
    cdef PdeCache *c = &t.nested.final
    cdef uint64_t slot = (gpa >> pde_shift(host_fmt)) & (PDE_SLOTS - 1), found
    c.access = t.final.access[kind]
    found = pde_find(host_fmt, c, gpa)
    if found == FOUND_LARGE:
        t.kinds[slot] = 0
        for kind in range(GRANT_KINDS):
            t.kinds[slot] |= <uint8_t>(grants_large(&t.final, kind, &c.large[slot]) << kind)
    return found != FOUND_NOTHING


cdef inline bint final_granted(int host_fmt, Twice *t, uint64_t gpa, int kind) noexcept nogil:
    """As ``second_find``, of any kind of access."""
    cdef PdeCache *c = &t.nested.final
    cdef uint64_t key = gpa >> pde_shift(host_fmt), place
    cdef uint64_t slot = key & (PDE_SLOTS - 1)
    if not likely(c.pdes.tag[slot] & ~KVMMMU_PDE_LARGE == key) and not final_fill(host_fmt, t, gpa, kind):
        return False
    if c.pdes.tag[slot] != key:
        return (t.kinds[slot] >> kind) & 1
    place = leaf_place(host_fmt, c.pdes.table[slot], gpa)
    return accepted(host_fmt, c.paging, &t.final.leaf[kind], <uint32_t>place & TABLE_RIGHTS,
                    leaf_load(host_fmt, place, gpa))


cdef inline uint64_t guest_granted(int fmt, int host_fmt, Twice *t, uint64_t va, int kind) noexcept nogil:
    """The gpa that the guest's tables grant, or all ones."""
    cdef PdeCache *c = &t.nested.guest.cache
    cdef uint64_t key = va >> pde_shift(fmt), place, entry
    cdef uint64_t slot = key & (PDE_SLOTS - 1)
    if fmt == FMT_NONE:
        return va
    if not likely(c.pdes.tag[slot] & ~KVMMMU_PDE_LARGE == key):
        c.access = t.guest.access[kind]
        if nested_place(fmt, host_fmt, &t.nested, va) == <uint64_t>&t.nested.guest.nothing:
            return ALL_ONES
    if c.pdes.tag[slot] != key:
        return (c.large[slot].base | (va & c.large[slot].offset) if grants_large(&t.guest, kind, &c.large[slot])
                else ALL_ONES)
    place = leaf_place(fmt, c.pdes.table[slot], va)
    entry = leaf_load(fmt, place, va)
    if not likely(accepted(FMT_64, c.paging, &t.guest.leaf[kind], <uint32_t>place & TABLE_RIGHTS, entry)):
        return ALL_ONES
    return (entry & c.paging.addr_mask) | (va & 0xfff)


cdef inline bint page_granted(const Twice *t, uint64_t gva, int kind) noexcept nogil:
    cdef uint64_t page = gva >> 12, tag = t.page_tag[page & (PAGE_SLOTS - 1)]
    return tag >> 3 == page and (tag >> kind) & 1


cdef inline void page_grant(Twice *t, uint64_t gva, int kind, uint64_t gpa) noexcept nogil:
    cdef uint64_t page = gva >> 12, slot = page & (PAGE_SLOTS - 1)
    if t.page_tag[slot] >> 3 != page or t.page_gpa[slot] != gpa & ~<uint64_t>0xfff:
        t.page_tag[slot] = page << 3
        t.page_gpa[slot] = gpa & ~<uint64_t>0xfff
    t.page_tag[slot] |= <uint64_t>1 << kind


cdef inline int64_t twice_rows(int fmt, int host_fmt, Vcpu *vcpu, Twice *t, const Run *r, int64_t i) noexcept nogil:
    cdef uint64_t gpa, mask = r.va_mask & t.nested.guest.cache.paging.va_mask
    cdef const uint64_t *gvas = r.gvas
    cdef Access *out = r.out
    cdef const uint8_t *kinds = r.kinds
    cdef int64_t n = r.n
    cdef int size = r.size
    while i < n and not run_stops(vcpu, gvas[i], kinds[i], size):
        hook(vcpu, POINT_HARDWARE)
        if likely(page_granted(t, gvas[i], kinds[i])):
            gpa = t.page_gpa[(gvas[i] >> 12) & (PAGE_SLOTS - 1)] | (gvas[i] & 0xfff)
        else:
            gpa = guest_granted(fmt, host_fmt, t, gvas[i] & mask, kinds[i])
            if gpa == ALL_ONES or not final_granted(host_fmt, t, gpa, kinds[i]):
                break
            page_grant(t, gvas[i], kinds[i], gpa)
        run_write(&out[i], size, gpa)
        i = run_repeat(vcpu, r, i + 1, gpa - gvas[i]) if run_goes_on(gvas, i, n) else i + 1
    return i


cdef inline int64_t twice_formats(int host_fmt, Vcpu *vcpu, Twice *t, const Run *r, int64_t i) noexcept nogil:
    cdef int fmt = vcpu.guest_hw.format
    # Literals: each loop is compiled for its format.
    if fmt == FMT_64:
        return twice_rows(FMT_64, host_fmt, vcpu, t, r, i)
    if fmt == FMT_PAE:
        return twice_rows(FMT_PAE, host_fmt, vcpu, t, r, i)
    if fmt == FMT_32:
        return twice_rows(FMT_32, host_fmt, vcpu, t, r, i)
    return twice_rows(FMT_NONE, host_fmt, vcpu, t, r, i)


cdef inline int64_t twice_run(Vcpu *vcpu, const Run *r, int64_t i, uint64_t[3] access) noexcept nogil:
    cdef int[2] hint = [vcpu.mem_hint, vcpu.table_hint]
    cdef uint64_t[3] second
    cdef Twice t
    cdef int kind
    for kind in range(GRANT_KINDS):
        second[kind] = walk_second_access(&vcpu.hw, access[kind])
    nested_init(&t.nested, &vcpu.guest_hw, &vcpu.hw, vm_hostmem(vcpu.vm), hint, 0, vcpu.ac, True)
    t.nested.guest.nothing = 0
    memset(t.page_tag, 0, sizeof(t.page_tag))
    grants_init(&t.guest, &vcpu.guest_hw, access, vcpu.ac)
    grants_init(&t.final, &vcpu.hw, second, False)
    if vcpu.hw.format == FMT_EPT:
        return twice_formats(FMT_EPT, vcpu, &t, r, i)
    return twice_formats(FMT_64, vcpu, &t, r, i) if vcpu.hw.format == FMT_64 else i


# ---- any --------------------------------------------------------------------------------

cdef inline int64_t run_plain(Vcpu *vcpu, const Run *r, int64_t i) noexcept nogil:
    """Rows from ``i`` to the first that is not plain; the vCPU is in the guest and stays there."""
    cdef uint64_t[3] access
    cdef int kind
    for kind in range(GRANT_KINDS):
        access[kind] = grants_access(kind) | (PFERR_USER if vcpu.cpl == 3 else 0)
    if vcpu.vm.mmu != MMU_SHADOW:
        return twice_run(vcpu, r, i, access)
    if vcpu.hw.format == FMT_64 or vcpu.hw.format == FMT_PAE:
        return flat_run(vcpu, r, i, access)
    return i


cdef inline int64_t run_cached(Vcpu *vcpu, const Run *r, int64_t i) noexcept nogil:
    """The same by the vCPU's TLB."""
    cdef uint64_t gpa = 0, hpa = 0, user = PFERR_USER if vcpu.cpl == 3 else 0
    cdef Hits h
    if not hits_begin(vcpu, &h):
        return i
    while (i < r.n and r.kinds[i] < GRANT_KINDS
           and access_hit(vcpu, &h, r.gvas[i], grants_access(r.kinds[i]) | user, r.size, &gpa, &hpa)):
        run_write(&r.out[i], r.size, gpa)
        i += 1
    return i


cdef inline void access_many(Vcpu *vcpu, const uint64_t *gvas, const uint8_t *kinds, int64_t n, int size,
                             Access *out) noexcept nogil:
    """``kinds``: KVMMMU_READ, _WRITE or _FETCH of capi.h, with KVMMMU_IMPLICIT or without."""
    cdef int64_t i = 0, end
    cdef int calm = 1, again = CALM_LEAST
    cdef Run r
    r.gvas = gvas
    r.kinds = kinds
    r.n = n
    r.va_mask = vcpu.guest.va_mask
    r.size = size
    r.out = out
    while i < n:
        if vcpu.tlb != NULL and not vcpu.guest_mode:
            i = run_cached(vcpu, &r, i)
            if i == n:
                return
        elif calm == 0 and n - i >= RUN_LEAST and in_guest(vcpu.line) and not vcpu.guest_mode:
            end = run_plain(vcpu, &r, i)
            again = CALM_LEAST if end - i >= 2 * CALM_LEAST else min(2 * again, CALM_MOST)
            calm = again
            i = end
            continue
        vcpu_access(vcpu, gvas[i], how_access(kinds[i]), size, NULL, &out[i])
        if out[i].exits or out[i].outcome != OUTCOME_OK:
            calm = again
        elif calm:
            calm -= 1
        i += 1
