# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Shadow pages: the arena, the hash by gfn, the lists, and what a role says."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child
from kvmmmu.engine.state cimport (
    HASH_BITS, LIST_CACHED, LIST_FREE, LIST_NONE, PAGE_CACHE, PageList, ShadowPage, Vcpu, Vm,
)
from kvmmmu.engine.atomics cimport (
    ld_acquire_u64, ld_u16, ld_u32, ld_u64, ld_u8, spin_lock, spin_unlock, st_u16, st_u32, st_u64,
)

# ---- roles ------------------------------------------------------------------

cdef inline int role_level(uint32_t role) noexcept nogil:
    return <int>(role & ROLE_LEVEL_MASK)

cdef inline uint32_t role_access(uint32_t role) noexcept nogil:
    return (role & ROLE_ACCESS_MASK) >> ROLE_ACCESS_SHIFT

cdef inline uint32_t role_with_level(uint32_t role, int level) noexcept nogil:
    return (role & ~ROLE_LEVEL_MASK) | <uint32_t>level

cdef inline uint32_t role_with_access(uint32_t role, uint32_t access) noexcept nogil:
    return (role & ~ROLE_ACCESS_MASK) | (access << ROLE_ACCESS_SHIFT)

cdef inline int role_quadrant(uint32_t role) noexcept nogil:
    return <int>((role & ROLE_QUADRANT_MASK) >> ROLE_QUADRANT_SHIFT)

cdef inline uint32_t role_with_quadrant(uint32_t role, int quadrant) noexcept nogil:
    return (role & ~ROLE_QUADRANT_MASK) | (<uint32_t>quadrant << ROLE_QUADRANT_SHIFT)

cdef inline int role_as_id(uint32_t role) noexcept nogil:
    return <int>(role >> ROLE_SMM_SHIFT)

cdef inline bint role_has_gptes(uint32_t role) noexcept nogil:
    """A guest table stands behind the page."""
    return not role & (ROLE_DIRECT | ROLE_PASSTHROUGH)

# ---- pages ------------------------------------------------------------------

cdef inline ShadowPage *page_at(Vm *vm, int32_t id) noexcept nogil:
    return &vm.arena.page[id]

cdef inline uint64_t *page_sptes(Vm *vm, int32_t id) noexcept nogil:
    return vm.arena.sptes + (<uint64_t>id << 9)

cdef inline uint64_t *spte_at(Vm *vm, uint64_t index) noexcept nogil:
    return vm.arena.sptes + index

cdef inline int32_t spte_page(uint64_t index) noexcept nogil:
    return <int32_t>(index >> 9)

cdef inline int level_shift(int level) noexcept nogil:
    """log2 of the bytes an entry of ``level`` maps."""
    return 12 + 9 * (level - 1)

cdef inline int level_index(uint64_t address, int level) noexcept nogil:
    """Index of the 512-entry table slot that translates ``address`` at ``level``."""
    return <int>((address >> level_shift(level)) & 511)

cdef inline uint64_t spte_gfn(Vm *vm, uint64_t index) noexcept nogil:
    """The gfn an entry stands for: recorded where a guest table decides, linear elsewhere."""
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef uint32_t role = page_role(sp)
    if role & ROLE_PASSTHROUGH:
        return sp.gfn
    if not role & ROLE_DIRECT:
        return ld_u64(&vm.arena.shadowed[index]) >> 12
    return sp.gfn + ((index & 511) << (9 * (role_level(role) - 1)))

cdef inline void spte_set_shadowed(Vm *vm, uint64_t index, uint64_t gfn, uint32_t access) noexcept nogil:
    if role_has_gptes(page_at(vm, spte_page(index)).role):
        st_u64(&vm.arena.shadowed[index], (gfn << 12) | access)

cdef inline uint32_t page_role(const ShadowPage *sp) noexcept nogil:
    """For readers without mmu_lock: another thread may just be making the page invalid."""
    return ld_u32(&sp.role)

cdef inline bint page_obsolete(Vm *vm, const ShadowPage *sp) noexcept nogil:
    """Zapped, or left behind by a fast zap of everything."""
    if page_role(sp) & ROLE_INVALID:
        return True
    return not sp.tdp and sp.valid_gen != ld_u8(&vm.valid_gen)

cdef inline void page_invalidate(ShadowPage *sp) noexcept nogil:
    st_u32(&sp.role, sp.role | ROLE_INVALID)

cdef inline bint page_lags(const ShadowPage *sp) noexcept nogil:
    """It, or a page below it, is unsync; asked without mmu_lock."""
    return ld_u8(&sp.unsync) or ld_u16(&sp.unsync_children)

# ---- lists (doubly linked by id; 0 ends) --------------------------------------

cdef inline void list_add_head(Vm *vm, PageList *lst, int32_t id, uint8_t which) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    sp.list_prev = 0
    sp.list_next = lst.head
    if lst.head:
        page_at(vm, lst.head).list_prev = id
    else:
        lst.tail = id
    lst.head = id
    lst.n += 1
    sp.on_list = which

cdef inline void list_add_tail(Vm *vm, PageList *lst, int32_t id, uint8_t which) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    sp.list_next = 0
    sp.list_prev = lst.tail
    if lst.tail:
        page_at(vm, lst.tail).list_next = id
    else:
        lst.head = id
    lst.tail = id
    lst.n += 1
    sp.on_list = which

cdef inline void list_del(Vm *vm, PageList *lst, int32_t id) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    if sp.list_prev:
        page_at(vm, sp.list_prev).list_next = sp.list_next
    else:
        lst.head = sp.list_next
    if sp.list_next:
        page_at(vm, sp.list_next).list_prev = sp.list_prev
    else:
        lst.tail = sp.list_prev
    sp.list_prev = 0
    sp.list_next = 0
    sp.on_list = LIST_NONE
    lst.n -= 1

# ---- hash ---------------------------------------------------------------------

cdef inline uint32_t gfn_bucket(uint64_t gfn) noexcept nogil:
    return <uint32_t>((gfn * GFN_HASH_MULTIPLIER) >> (64 - HASH_BITS))

cdef inline void hash_add(Vm *vm, int32_t id) noexcept nogil:
    """At the head: pages of one gfn are met newest first."""
    cdef ShadowPage *sp = page_at(vm, id)
    cdef int32_t *head = &vm.hash[gfn_bucket(sp.gfn)]
    sp.hash_prev = 0
    sp.hash_next = head[0]
    if head[0]:
        page_at(vm, head[0]).hash_prev = id
    head[0] = id

cdef inline void hash_del(Vm *vm, int32_t id) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    if sp.hash_prev:
        page_at(vm, sp.hash_prev).hash_next = sp.hash_next
    else:
        vm.hash[gfn_bucket(sp.gfn)] = sp.hash_next
    if sp.hash_next:
        page_at(vm, sp.hash_next).hash_prev = sp.hash_prev
    sp.hash_prev = 0
    sp.hash_next = 0

cdef inline int32_t gfn_first_page(Vm *vm, uint64_t gfn) noexcept nogil:
    """The newest valid page with a guest table at ``gfn``, or 0."""
    return gfn_page_from(vm, vm.hash[gfn_bucket(gfn)], gfn)

cdef inline int32_t gfn_next_page(Vm *vm, int32_t id, uint64_t gfn) noexcept nogil:
    return gfn_page_from(vm, page_at(vm, id).hash_next, gfn)

cdef inline int32_t gfn_page_from(Vm *vm, int32_t id, uint64_t gfn) noexcept nogil:
    cdef ShadowPage *sp
    while id:
        sp = page_at(vm, id)
        if sp.gfn == gfn and role_has_gptes(sp.role) and not page_obsolete(vm, sp):
            return id
        id = sp.hash_next
    return 0

# ---- allocation -----------------------------------------------------------------

cdef inline int32_t page_take(Vm *vm) noexcept nogil:
    """The id of a page with 512 empty sptes; 0 at the hard limit."""
    cdef int32_t id
    cdef bint untouched = False
    spin_lock(&vm.arena.lock)
    id = vm.arena.free
    if id:
        vm.arena.free = page_at(vm, id).list_next
    elif vm.arena.top < vm.arena.limit:
        id = vm.arena.top
        vm.arena.top += 1
        untouched = True
    spin_unlock(&vm.arena.lock)
    if untouched:
        # Were it read first, the host would give a page of zeros, then another, and stop all threads in between.
        st_u64(page_sptes(vm, id), 0)
    return id

cdef inline int32_t page_ready(Vm *vm, int32_t id) noexcept nogil:
    """Zero the metadata of a page just taken."""
    if id:
        memset(page_at(vm, id), 0, sizeof(ShadowPage))
        memset(vm.arena.unsync_bits + (<uint64_t>id << 3), 0, 64)
    return id

cdef inline int32_t page_alloc(Vm *vm) noexcept nogil:
    """A page with 512 empty sptes and zeroed metadata; 0 at the hard limit."""
    return page_ready(vm, page_take(vm))

cdef inline void page_give(Vm *vm, int32_t id) noexcept nogil:
    """The page, empty again, goes to the free list."""
    spin_lock(&vm.arena.lock)
    page_at(vm, id).on_list = LIST_FREE
    page_at(vm, id).list_next = vm.arena.free
    vm.arena.free = id
    spin_unlock(&vm.arena.lock)

cdef inline void page_fill(Vm *vm, int32_t id, uint64_t spte) noexcept nogil:
    """Where an empty entry is not 0: of a page that nobody else has seen yet."""
    cdef uint64_t *sptes = page_sptes(vm, id)
    cdef int i
    for i in range(ENTRIES):
        sptes[i] = spte

cdef inline void page_free(Vm *vm, int32_t id) noexcept nogil:
    """Only after a flush: walkers may hold the page until then."""
    memset(page_sptes(vm, id), 0, 4096)
    page_give(vm, id)


cdef inline void cache_fill(Vcpu *vcpu, int n) noexcept nogil:
    """Take up to ``n`` free pages (at most PAGE_CACHE) before mmu_lock: under it no fault touches the arena."""
    cdef int32_t id
    while vcpu.n_free_pages < n:
        id = page_take(vcpu.vm)
        if id == 0:
            return
        page_at(vcpu.vm, id).on_list = LIST_CACHED
        vcpu.free_pages[vcpu.n_free_pages] = id
        vcpu.n_free_pages += 1

cdef inline int32_t cache_alloc(Vcpu *vcpu) noexcept nogil:
    if vcpu.n_free_pages == 0:
        return 0
    vcpu.n_free_pages -= 1
    return page_ready(vcpu.vm, vcpu.free_pages[vcpu.n_free_pages])

cdef inline void cache_return(Vcpu *vcpu, int32_t id) noexcept nogil:
    """A page that was never linked, so nobody else has seen it; all its entries are empty."""
    if vcpu.vm.masks.empty:
        page_fill(vcpu.vm, id, 0)  # as every page is that waits for its use
    page_at(vcpu.vm, id).on_list = LIST_CACHED
    vcpu.free_pages[vcpu.n_free_pages] = id
    vcpu.n_free_pages += 1

cdef inline void cache_drop(Vcpu *vcpu) noexcept nogil:
    while vcpu.n_free_pages:
        vcpu.n_free_pages -= 1
        page_give(vcpu.vm, vcpu.free_pages[vcpu.n_free_pages])

# ---- the top of a walk ----------------------------------------------------------------

cdef inline int32_t root_table(Vm *vm, int32_t root, uint64_t address, int *level) noexcept nogil:
    """First table to index and its level; 0 where a PAE root has no entry.

    A PAE root is four words in the processor's PDPTE format, not a shadow page.
    """
    cdef uint64_t pdpte
    if not page_at(vm, root).special:
        level[0] = role_level(page_role(page_at(vm, root)))
        return root
    pdpte = ld_acquire_u64(page_sptes(vm, root) + ((address >> 30) & 3))
    level[0] = LEVEL_2M
    return spte_child(pdpte)

# ---- unsync bookkeeping of a parent -----------------------------------------------

cdef inline uint64_t *page_unsync_bits(Vm *vm, int32_t id) noexcept nogil:
    return vm.arena.unsync_bits + (<uint64_t>id << 3)

cdef inline bint unsync_bit_set(Vm *vm, int32_t id, int entry) noexcept nogil:
    """True if the bit was clear before."""
    cdef uint64_t *word = page_unsync_bits(vm, id) + (entry >> 6)
    cdef uint64_t bit = ONE << (entry & 63)
    if word[0] & bit:
        return False
    word[0] |= bit
    st_u16(&page_at(vm, id).unsync_children, page_at(vm, id).unsync_children + 1)
    return True

cdef inline void unsync_bit_clear(Vm *vm, int32_t id, int entry) noexcept nogil:
    cdef uint64_t *word = page_unsync_bits(vm, id) + (entry >> 6)
    cdef uint64_t bit = ONE << (entry & 63)
    if word[0] & bit:
        word[0] &= ~bit
        st_u16(&page_at(vm, id).unsync_children, page_at(vm, id).unsync_children - 1)
