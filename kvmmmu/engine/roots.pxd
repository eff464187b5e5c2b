# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Roots: building, dropping, switching, synchronising; what happens at VM entry."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FMT_32, va_canonical
from kvmmmu.bits.spte cimport spte_child
from kvmmmu.engine.atomics cimport guest_enter, guest_exit, in_guest, ld_acquire_u32, st_u32
from kvmmmu.engine.locks cimport (
    ld_acquire_u32, mmu_write_lock, mmu_write_unlock, request, request_take,
)
from kvmmmu.engine.lookup cimport vcpu_slot
from kvmmmu.engine.memslots cimport slot_visible
from kvmmmu.engine.mmiocache cimport mmio_cache_clear_all, mmio_cache_clear_gva
from kvmmmu.engine.pages cimport (
    cache_drop, page_alloc, page_at, page_lags, page_obsolete, page_role, page_sptes,
    role_level, role_with_level, role_with_quadrant, root_table,
)
from kvmmmu.engine.rewrite cimport table_rewrite
from kvmmmu.engine.roles cimport hw_root, is_long_mode, roles_refresh, tdp_enabled
from kvmmmu.engine.shadow cimport page_get
from kvmmmu.engine.state cimport (
    ERR_NOSPC, PREV_ROOTS, PageList, REQ_FREE_OBSOLETE_ROOTS, REQ_LOAD_PGD, REQ_MMU_SYNC, REQ_TLB_FLUSH,
    REQ_KICK, REQ_TLB_FLUSH_CURRENT, REQ_TLB_FLUSH_GUEST, REQ_TRIPLE_FAULT, Root, ShadowPage, VSTAT_INVLPG,
    VSTAT_TLB_FLUSH, Vcpu, Vm,
)
from kvmmmu.engine.sync cimport sync_children, sync_gva
from kvmmmu.engine.tlb cimport flush_own_tlb
from kvmmmu.engine.tdp cimport tdp_root_get, tdp_root_put, tdp_zap_everything
from kvmmmu.engine.tlbflush cimport tlb_flush_all, tlb_flush_guest, tlb_flush_gva, tlb_invlpg
from kvmmmu.engine.zap cimport list_init, make_pages_available, zap_commit, zap_everything, zap_prepare

cdef enum:
    ENTER_OK = 0
    ENTER_SHUTDOWN = 1

cdef enum:
    ROOT_CURRENT = 8     # bits 0..2: previous roots
    ROOTS_ALL = 15


# ---- dropping -----------------------------------------------------------------

cdef inline void root_page_put(Vm *vm, int vcpu_id, int32_t id, PageList *invalid) noexcept nogil:
    """One reference less; a root zapped while in use goes with the last one."""
    cdef ShadowPage *sp = page_at(vm, id)
    if sp.tdp:
        tdp_root_put(vm, id)
        return
    sp.root_count -= 1
    if sp.root_count == 0 and sp.role & ROLE_INVALID:
        zap_prepare(vm, vcpu_id, id, invalid)

cdef inline void root_drop(Vcpu *vcpu, Root *root, PageList *invalid) noexcept nogil:
    cdef Vm *vm = vcpu.vm
    cdef uint64_t *entries
    cdef int i
    if root.page == 0:
        return
    if page_at(vm, root.page).special:
        entries = page_sptes(vm, root.page)
        for i in range(4):
            if entries[i]:
                root_page_put(vm, vcpu.id, spte_child(entries[i]), invalid)
            entries[i] = 0
    else:
        root_page_put(vm, vcpu.id, root.page, invalid)
    root.page = 0

cdef inline void roots_free(Vcpu *vcpu, int which) noexcept nogil:
    """Drop the named roots, previous ones first, under one commit."""
    cdef PageList invalid
    cdef int i
    cdef bint any = which & ROOT_CURRENT and vcpu.root.page
    for i in range(PREV_ROOTS):
        any |= which & (1 << i) and vcpu.prev_roots[i].page
    if not any:
        return
    list_init(&invalid)
    mmu_write_lock(vcpu.vm)
    for i in range(PREV_ROOTS):
        if which & (1 << i):
            root_drop(vcpu, &vcpu.prev_roots[i], &invalid)
    if which & ROOT_CURRENT:
        root_drop(vcpu, &vcpu.root, &invalid)
    zap_commit(vcpu.vm, &invalid)
    mmu_write_unlock(vcpu.vm)

cdef inline bint root_obsolete(Vm *vm, const Root *root) noexcept nogil:
    if root.page == 0:
        return False
    return page_at(vm, root.page).special or page_obsolete(vm, page_at(vm, root.page))

cdef inline void roots_free_obsolete(Vcpu *vcpu) noexcept nogil:
    cdef int which = 0, i
    if root_obsolete(vcpu.vm, &vcpu.root):
        which |= ROOT_CURRENT
    for i in range(PREV_ROOTS):
        if root_obsolete(vcpu.vm, &vcpu.prev_roots[i]):
            which |= 1 << i
    roots_free(vcpu, which)


cdef inline void context_reset(Vcpu *vcpu) noexcept nogil:
    """The paging mode changed: no root of the old one may be used."""
    roots_free(vcpu, ROOTS_ALL)
    # (Linux 3.1 forgets the record when a paging guest gets its new root, and without paging not at all.)
    if not vcpu.vm.switches.era & ERA_ONE_ROOT:
        mmio_cache_clear_all(vcpu)
    roles_refresh(vcpu)

# ---- building -----------------------------------------------------------------

cdef inline int32_t root_page_new(Vcpu *vcpu, uint64_t gfn, int quadrant, int level) noexcept nogil:
    cdef int32_t id = page_get(vcpu, gfn, role_with_quadrant(role_with_level(vcpu.root_role, level), quadrant))
    if id:
        page_at(vcpu.vm, id).root_count += 1
    return id

cdef inline uint64_t pae_root_entry(const Vm *vm, int32_t id) noexcept nogil:
    """Of the four entries above tables of PAE paging, in the PDPTE's format."""
    return (<uint64_t>id << 12) | PT_PRESENT_MASK | vm.masks.me

cdef inline bint pae_root_ready(Vcpu *vcpu) noexcept nogil:
    if vcpu.pae_root == 0:
        vcpu.pae_root = page_alloc(vcpu.vm)
        if vcpu.pae_root == 0:
            return False
        page_at(vcpu.vm, vcpu.pae_root).special = 1
    return True

cdef inline int root_build_direct(Vcpu *vcpu) noexcept nogil:
    cdef int level = role_level(vcpu.root_role), i
    cdef int32_t id
    if vcpu.vm.switches.tdp_mmu and tdp_enabled(vcpu.vm):
        vcpu.root.page = tdp_root_get(vcpu)
        return 0 if vcpu.root.page else ERR_NOSPC
    if level >= 4:
        vcpu.root.page = root_page_new(vcpu, 0, 0, level)
        return 0 if vcpu.root.page else ERR_NOSPC
    for i in range(4):
        id = root_page_new(vcpu, <uint64_t>i << 18, 0, LEVEL_2M)
        if id == 0:
            return ERR_NOSPC
        page_sptes(vcpu.vm, vcpu.pae_root)[i] = pae_root_entry(vcpu.vm, id)
    vcpu.root.page = vcpu.pae_root
    return 0

cdef inline int root_build_shadow(Vcpu *vcpu) noexcept nogil:
    cdef int level = role_level(vcpu.root_role), i
    cdef int guest_levels = role_level(<uint32_t>vcpu.cpu_role)
    cdef uint64_t gfn = vcpu.guest.root >> 12
    cdef int32_t id
    if level >= 4:
        vcpu.root.page = root_page_new(vcpu, gfn, 0, level)
        return 0 if vcpu.root.page else ERR_NOSPC
    for i in range(4):
        if guest_levels == 3:
            if not vcpu.regs.pdptr[i] & PT_PRESENT_MASK:
                continue
            gfn = (vcpu.regs.pdptr[i] & PT_ADDR_MASK) >> 12
        id = root_page_new(vcpu, gfn, i if guest_levels == 2 else 0, LEVEL_2M)
        if id == 0:
            return ERR_NOSPC
        page_sptes(vcpu.vm, vcpu.pae_root)[i] = pae_root_entry(vcpu.vm, id)
    vcpu.root.page = vcpu.pae_root
    return 0

cdef inline void roots_undo(Vcpu *vcpu) noexcept nogil:
    """A PAE root that could be built only in part."""
    cdef PageList invalid
    list_init(&invalid)
    vcpu.root.page = vcpu.pae_root
    root_drop(vcpu, &vcpu.root, &invalid)
    zap_commit(vcpu.vm, &invalid)

cdef inline bint root_gfn_ok(Vcpu *vcpu, uint64_t gfn) noexcept nogil:
    """A root outside memory is a triple fault in Linux 6.1."""
    if slot_visible(vcpu_slot(vcpu, gfn)):
        return True
    request(vcpu, REQ_TRIPLE_FAULT)
    return False

cdef inline int root_load(Vcpu *vcpu) noexcept nogil:
    """Build the current root and synchronise it; 0, or ERR_NOSPC.

    Without a visible table there is no root: the pending triple fault ends the run.
    """
    cdef int error, i
    cdef bint direct = (vcpu.root_role & ROLE_DIRECT) != 0
    if not direct:
        if not root_gfn_ok(vcpu, vcpu.guest.root >> 12):
            return 0
        if role_level(<uint32_t>vcpu.cpu_role) == 3:
            for i in range(4):
                if vcpu.regs.pdptr[i] & PT_PRESENT_MASK:
                    if not root_gfn_ok(vcpu, (vcpu.regs.pdptr[i] & PT_ADDR_MASK) >> 12):
                        return 0
    mmu_write_lock(vcpu.vm)
    error = 0
    if role_level(vcpu.root_role) < 4 and not pae_root_ready(vcpu):
        error = ERR_NOSPC
    elif not make_pages_available(vcpu.vm, vcpu.id):
        error = ERR_NOSPC
    elif direct:
        error = root_build_direct(vcpu)
    else:
        error = root_build_shadow(vcpu)
    if error and vcpu.pae_root:
        roots_undo(vcpu)
    mmu_write_unlock(vcpu.vm)
    if error:
        return error
    vcpu.root.pgd = 0 if direct else vcpu.regs.cr3
    roots_sync(vcpu)
    hw_root(vcpu)
    # ``flush_tlb_current``: why giving up a root owes no flush.
    tlb_flush_all(vcpu)
    return 0

# ---- synchronising --------------------------------------------------------------

cdef inline void roots_sync(Vcpu *vcpu) noexcept nogil:
    """After this the current root shows the guest's tables as they are (``sync_roots``)."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp
    cdef uint64_t *entries
    cdef int i
    if vcpu.root_role & ROLE_DIRECT or vcpu.root.page == 0:
        return
    mmio_cache_clear_all(vcpu)
    sp = page_at(vm, vcpu.root.page)
    if not sp.special:
        if page_lags(sp):
            mmu_write_lock(vm)
            sync_children(vcpu, vcpu.root.page)
            mmu_write_unlock(vm)
        return
    mmu_write_lock(vm)
    entries = page_sptes(vm, vcpu.root.page)
    for i in range(4):
        if entries[i]:
            sync_children(vcpu, spte_child(entries[i]))
    mmu_write_unlock(vm)

cdef inline void prev_roots_free_unsync(Vcpu *vcpu) noexcept nogil:
    cdef int i, which = 0
    cdef ShadowPage *sp
    for i in range(PREV_ROOTS):
        if vcpu.prev_roots[i].page:
            sp = page_at(vcpu.vm, vcpu.prev_roots[i].page)
            if sp.special or page_lags(sp):
                which |= 1 << i
    roots_free(vcpu, which)

cdef inline void invlpg_root(Vcpu *vcpu, int32_t root, uint64_t gva) noexcept nogil:
    cdef int level
    cdef int32_t table
    cdef uint64_t gpte_gpa
    mmio_cache_clear_gva(vcpu, gva)
    if root == 0:
        return
    mmu_write_lock(vcpu.vm)
    table = root_table(vcpu.vm, root, gva, &level)
    if table:
        gpte_gpa = sync_gva(vcpu, table, level, gva)
        if gpte_gpa != ALL_ONES:
            table_rewrite(vcpu, gpte_gpa, 4 if vcpu.guest.format == FMT_32 else 8)
    mmu_write_unlock(vcpu.vm)

cdef inline void vcpu_invlpg(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    """INVLPG as KVM intercepts it: current root, then each previous one.  Under TDP it does not exit."""
    cdef int i
    if tdp_enabled(vcpu.vm):
        tlb_invlpg(vcpu, gva)
        return
    if vcpu.guest_mode:
        return
    gva &= vcpu.guest.va_mask
    vcpu.stats[<int>VSTAT_INVLPG] += 1
    if vcpu.vm.switches.era & ERA_COUNT_OLD:
        flush_own_tlb(vcpu)
    if not va_canonical(gva, vcpu.guest.va_shift):
        return
    tlb_flush_gva(vcpu, gva)
    if vcpu.root_role & ROLE_DIRECT:
        # Without paging nothing depends on the guest's tables, the record of the last MMIO page included.
        return
    invlpg_root(vcpu, vcpu.root.page, gva)
    for i in range(PREV_ROOTS):
        if vcpu.prev_roots[i].page:
            invlpg_root(vcpu, vcpu.prev_roots[i].page, gva)

# ---- switching --------------------------------------------------------------------

cdef inline bint root_usable(Vcpu *vcpu, const Root *root, uint64_t pgd) noexcept nogil:
    if root.page == 0 or page_at(vcpu.vm, root.page).special:
        return False
    if not vcpu.root_role & ROLE_DIRECT and root.pgd != pgd:
        return False
    return page_role(page_at(vcpu.vm, root.page)) == vcpu.root_role

cdef inline void root_swap(Root *a, Root *b) noexcept nogil:
    cdef Root keep = a[0]
    a[0] = b[0]
    b[0] = keep

cdef inline bint root_rotate(Vcpu *vcpu, uint64_t pgd) noexcept nogil:
    """Bring the root of ``pgd`` to the front; the others move back one place each.

    On a miss the least recently used one ends up in front and is dropped.
    """
    cdef int i
    if vcpu.root.page:
        if root_usable(vcpu, &vcpu.root, pgd):
            return True
        for i in range(PREV_ROOTS):
            root_swap(&vcpu.root, &vcpu.prev_roots[i])
            if root_usable(vcpu, &vcpu.root, pgd):
                return True
        roots_free(vcpu, ROOT_CURRENT)
        return False
    for i in range(PREV_ROOTS):
        if root_usable(vcpu, &vcpu.prev_roots[i], pgd):
            root_swap(&vcpu.root, &vcpu.prev_roots[i])
            while i < PREV_ROOTS - 1:
                vcpu.prev_roots[i] = vcpu.prev_roots[i + 1]
                i += 1
            vcpu.prev_roots[PREV_ROOTS - 1].page = 0
            return True
    return False

cdef inline void root_switch(Vcpu *vcpu, uint64_t pgd) noexcept nogil:
    """CR3 takes another value: reuse a root if one is kept, else leave none."""
    if vcpu.vm.switches.era & ERA_ONE_ROOT:
        if not vcpu.root_role & ROLE_DIRECT:
            roots_free(vcpu, ROOT_CURRENT)
        return
    if vcpu.root.page and page_at(vcpu.vm, vcpu.root.page).special:
        roots_free(vcpu, ROOT_CURRENT)
    if not root_rotate(vcpu, pgd):
        return
    request(vcpu, REQ_LOAD_PGD)
    mmio_cache_clear_all(vcpu)
    if not page_at(vcpu.vm, vcpu.root.page).tdp:
        st_u32(&page_at(vcpu.vm, vcpu.root.page).flooding, 0)

# ---- the end of the VM --------------------------------------------------------------

cdef inline void vm_teardown(Vm *vm) noexcept nogil:
    """All shadow pages go, newest first, then the roots that vCPUs still held."""
    cdef int i
    mmu_write_lock(vm)
    zap_everything(vm)
    tdp_zap_everything(vm)
    mmu_write_unlock(vm)
    for i in range(vm.n_vcpus):
        roots_free(vm.vcpus[i], ROOTS_ALL)
        cache_drop(vm.vcpus[i])

cdef inline void vcpu_reset(Vcpu *vcpu) noexcept nogil:
    """Registers of a reset, paging off.  VMX flushes once before the vCPU first runs on a processor.

    The TDX module begins in protected mode.
    """
    if vcpu.vm.tdx:
        vcpu.regs.cr0 = CR0_PE
    roles_refresh(vcpu)
    if not vcpu.vm.host.amd:
        request(vcpu, REQ_TLB_FLUSH)

cdef inline bint vcpu_set_guest_mode(Vcpu *vcpu, bint on, uint64_t ncr3) noexcept nogil:
    """Enter or leave the guest of L1 (VMRUN, #VMEXIT).  False: L1's mode, or the MMU, has no shadow nested tables.

    Every root goes: KVM keeps L1's and L2's in two MMU contexts, one vCPU here has one.
    """
    if on and (tdp_enabled(vcpu.vm) or not is_long_mode(vcpu) or ncr3 & ~PT_ADDR_MASK
               or ncr3 >> vcpu.model.maxphyaddr):
        return False
    vcpu.guest_mode = on
    vcpu.ncr3 = ncr3 if on else 0
    context_reset(vcpu)
    return True

cdef inline void vcpu_set_smm(Vcpu *vcpu, bint on) noexcept nogil:
    """Enter or leave SMM: memory is what the slots of the other address space say (``kvm_smm_changed``)."""
    if vcpu.smm != on:
        vcpu.smm = on
        context_reset(vcpu)

cdef inline void vcpu_init(Vcpu *vcpu) noexcept nogil:
    """INIT: SVM's answer to a guest that shut down; every root goes."""
    vcpu.guest_mode = 0
    vcpu.smm = 0
    vcpu.regs.cr0 = CR0_CD | CR0_NW
    vcpu.regs.cr3 = 0
    vcpu.regs.cr4 = 0
    vcpu.regs.efer = 0
    vcpu.cpl = 0
    vcpu.ac = 0
    context_reset(vcpu)

# ---- VM entry -----------------------------------------------------------------------

cdef inline int requests_serve(Vcpu *vcpu) noexcept nogil:
    """Pending requests, in the order KVM looks at them."""
    request_take(vcpu, REQ_KICK)
    if request_take(vcpu, REQ_FREE_OBSOLETE_ROOTS):
        roots_free_obsolete(vcpu)
    if request_take(vcpu, REQ_MMU_SYNC):
        roots_sync(vcpu)
    if request_take(vcpu, REQ_LOAD_PGD) and vcpu.root.page:
        hw_root(vcpu)
    cdef int counted = 0 if vcpu.vm.switches.era & ERA_COUNT_OLD else 1
    if request_take(vcpu, REQ_TLB_FLUSH):
        vcpu.stats[<int>VSTAT_TLB_FLUSH] += counted
        tlb_flush_all(vcpu)
        request_take(vcpu, REQ_TLB_FLUSH_CURRENT)
    if request_take(vcpu, REQ_TLB_FLUSH_CURRENT):
        vcpu.stats[<int>VSTAT_TLB_FLUSH] += counted
        tlb_flush_all(vcpu)
    if request_take(vcpu, REQ_TLB_FLUSH_GUEST):
        vcpu.stats[<int>VSTAT_TLB_FLUSH] += counted
        if not tdp_enabled(vcpu.vm):
            roots_sync(vcpu)
            prev_roots_free_unsync(vcpu)
        tlb_flush_guest(vcpu)
    if request_take(vcpu, REQ_TRIPLE_FAULT):
        return ENTER_SHUTDOWN
    return ENTER_OK

cdef inline int vcpu_enter_slow(Vcpu *vcpu) noexcept nogil:
    cdef int result
    while True:
        if ld_acquire_u32(&vcpu.requests):
            result = requests_serve(vcpu)
            if result:
                return result
        if vcpu.root.page == 0:
            result = root_load(vcpu)
            if result:
                return result
        # The line says GUEST before the requests are read a last time: who asks and then waits is seen or seen to.
        guest_enter(vcpu.line)
        if not ld_acquire_u32(&vcpu.requests):
            return ENTER_OK
        guest_exit(vcpu.line)

cdef inline int vcpu_enter(Vcpu *vcpu) noexcept nogil:
    """Into the guest: no request pending, a root loaded.  ENTER_* or an error, then outside.

    A vCPU that is in the guest stays there, access after access, until an exit or a request.
    """
    if in_guest(vcpu.line):
        if not ld_acquire_u32(&vcpu.requests):
            return ENTER_OK
        guest_exit(vcpu.line)
    return vcpu_enter_slow(vcpu)
