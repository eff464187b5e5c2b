# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Page faults: the MMIO short cut, the lockless repair, the real path."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk
from kvmmmu.bits.mmio cimport mmio_gen_valid, mmio_spte_access, mmio_spte_gen, mmio_spte_gfn
from kvmmmu.bits.paging cimport Paging, rsvd_fault
from kvmmmu.bits.shadow_walk cimport shadow_walk
from kvmmmu.bits.spte cimport (
    spte_acc_tracked, spte_child, spte_is_last, spte_is_mmio, spte_mmu_writable, spte_permits, spte_present,
    spte_writable,
)
from kvmmmu.engine.atomics cimport cmpxchg_u64, ld_acquire_u32, ld_acquire_u64
from kvmmmu.engine.events cimport (
    ev_check_mmio_spte, ev_fast_page_fault, ev_handle_mmio,
)
from kvmmmu.engine.guest cimport guest_walk
from kvmmmu.engine.hooks cimport (
    MUTANT_LATE_GENERATION, MUTANT_PLAIN_STORE, MUTANT_SECOND_READ, POINT_FAST_READ, POINT_FAULT_LOCKED,
    POINT_FAULT_PFN, POINT_MMIO_FRESH, POINT_SLOT_FOUND, hook, mutant,
)
from kvmmmu.engine.leaf cimport (
    LEAF_UNLOGGED, RET_PF_CONTINUE, RET_PF_EMULATE, RET_PF_FIXED, RET_PF_INVALID, RET_PF_RETRY, RET_PF_SPURIOUS,
    acc_track_restore,
    vcpu_generation,
)
from kvmmmu.engine.locks cimport (
    kvmmmu_reading_begin, kvmmmu_reading_end, mmu_read_lock, mmu_read_unlock, mmu_write_lock, mmu_write_unlock,
)
from kvmmmu.engine.lookup cimport slot_mark_dirty, vcpu_slot
from kvmmmu.engine.memslots cimport level_pages, slot_visible
from kvmmmu.engine.mmiocache cimport mmio_cache_fill, mmio_match_gpa, mmio_match_gva
from kvmmmu.engine.pages cimport cache_fill, page_at, page_obsolete, root_table
from kvmmmu.engine.pfns cimport gfn_to_pfn, host_max_level, pfn_is_error
from kvmmmu.engine.shadow cimport direct_map, flooding_clear_path, shadow_map
from kvmmmu.engine.state cimport (
    ERR_FAULT, ERR_INVAL, ERR_NOSPC, Fault, REQ_FREE_OBSOLETE_ROOTS, VSTAT_MMIO_CACHE_HIT, VSTAT_MMIO_REFILL,
    VSTAT_MMIO_SLOW, VSTAT_MMIO_SPTE_HIT,
    VSTAT_PF_EMULATE, VSTAT_PF_FAST, VSTAT_PF_FIXED, VSTAT_PF_SPURIOUS, VSTAT_PF_TAKEN, Vcpu, Vm,
)
from kvmmmu.engine.tdp cimport TDP_FAULT_PAGES, tdp_map, tdp_reap
from kvmmmu.engine.track cimport gfn_write_tracked
from kvmmmu.engine.zap cimport make_pages_available, unprotect_gfn

cdef enum:
    FAULT_INJECT = 100   # beside RET_PF_*: the guest's own tables fault, vcpu.walk says how
    FAST_TRIES = 5


# ---- MMIO -------------------------------------------------------------------------

cdef inline int walk_sptes(Vcpu *vcpu, uint64_t address, uint64_t *sptes, int *top) noexcept nogil:
    """The lockless walk from the current root; level of the last spte, 0 if there is no table."""
    cdef int level, leaf = 0
    # The root is the vCPU's own: it stands whether the vCPU reads or not.
    cdef int32_t table = root_table(vcpu.vm, vcpu.root.page, address, &level)
    top[0] = level
    kvmmmu_reading_begin(vcpu.line)
    if table:
        leaf = shadow_walk(vcpu.vm.arena.sptes, <uint64_t>table, level, address, sptes)
        if mutant(vcpu.vm, MUTANT_SECOND_READ):
            kvmmmu_reading_end(vcpu.line)
            shadow_walk(vcpu.vm.arena.sptes, <uint64_t>table, level, address, sptes)
    kvmmmu_reading_end(vcpu.line)
    return leaf


cdef inline int mmio_not_found(Vm *vm, bint direct, uint64_t spte) noexcept nogil:
    """No mmio spte behind a reserved-bit fault: somebody took it away, or the tables are broken.

    A guest's own tables may have been rewritten since; tables that translate linearly change by KVM's hand alone.
    """
    if direct and spte and (vm.switches.era & ERA_MMIO_BUG_OTHER
                            or vm.switches.era & ERA_MMIO_BUG_PRESENT and spte_present(spte)):
        return ERR_INVAL
    return RET_PF_INVALID if vm.switches.era & ERA_MMIO_MISS_FAULTS else RET_PF_RETRY


cdef inline bint walk_is_broken(const Paging *hw, const uint64_t *sptes, int leaf, int top) noexcept nogil:
    """A present entry of a walk has a reserved bit."""
    cdef int level
    # Links are present and map no page; almost always one look at all of them is enough.
    if (hw.bad_mt_xwr or sptes[0] & (hw.rsvd[0][LEVEL_2M] | hw.rsvd[0][LEVEL_1G] | hw.rsvd[0][LEVEL_512G]
                                     | hw.rsvd[0][LEVEL_256T])):
        for level in range(leaf + 1, top + 1):
            if rsvd_fault(hw, level, sptes[level]):
                return True
    return spte_present(sptes[leaf]) and rsvd_fault(hw, leaf, sptes[leaf]) != 0


cdef inline int handle_mmio_fault(Vcpu *vcpu, uint64_t address) noexcept nogil:
    """A reserved-bit fault: EMULATE, RETRY, INVALID (stale, take the real path) or ERR_INVAL (a bug).

    Nothing is decided from memory after the walk: only the values read count.
    """
    cdef Vm *vm = vcpu.vm
    cdef bint direct = (vcpu.root_role & ROLE_DIRECT) != 0
    cdef uint64_t sptes[6]
    cdef uint64_t spte, gfn, gen
    cdef uint32_t access
    cdef int leaf, top
    cdef bint cached
    if direct:
        cached = mmio_match_gpa(vcpu, address)
    elif vcpu.guest_mode:
        # What faulted is an L2 gpa, and the record holds none: only the spte can tell.
        cached = False
    else:
        cached = mmio_match_gva(vcpu, address)
    if cached:
        vcpu.stats[<int>VSTAT_MMIO_CACHE_HIT] += 1
        return RET_PF_EMULATE
    # Before the walk: a stale spte in hand would look new if the numbers went round in between.
    gen = vcpu_generation(vcpu)
    leaf = walk_sptes(vcpu, address, sptes, &top)
    if mutant(vm, MUTANT_LATE_GENERATION):
        gen = vcpu_generation(vcpu)
    if leaf == 0:
        return RET_PF_RETRY
    spte = sptes[leaf]
    if not vm.switches.era & (ERA_MMIO_BUG_OTHER | ERA_MMIO_BUG_PRESENT) and walk_is_broken(&vcpu.hw, sptes, leaf, top):
        return ERR_INVAL
    if not spte_is_mmio(&vm.masks, spte):
        return mmio_not_found(vm, direct, spte)
    gfn = mmio_spte_gfn(&vm.masks, spte)
    access = mmio_spte_access(&vm.masks, spte)
    if not vm.switches.era & (ERA_MMIO_WIDE | ERA_MMIO_CONSTANT):
        ev_check_mmio_spte(vm, vcpu.id, spte, gen & MMIO_GEN_MASK, mmio_spte_gen(spte))
        if not mmio_gen_valid(gen, spte):
            return RET_PF_INVALID
    hook(vcpu, POINT_MMIO_FRESH)
    if direct:
        address = 0
    ev_handle_mmio(vm, vcpu.id, address, gfn, access)
    if vcpu.mmio.gva == 0 and vcpu.mmio.gfn != 0 and not direct:
        vcpu.stats[<int>VSTAT_MMIO_REFILL] += 1
    mmio_cache_fill(vcpu, address, gfn, access)
    vcpu.stats[<int>VSTAT_MMIO_SPTE_HIT] += 1
    return RET_PF_EMULATE

# ---- the lockless repair ------------------------------------------------------------

cdef inline int fast_page_fault(Vcpu *vcpu, const Fault *f) noexcept nogil:
    """Give W (or tracked rights) back without mmu_lock; INVALID: not a case for it.

    Direct tables only: the gfn behind an indirect spte may change under the reader.
    """
    cdef Vm *vm = vcpu.vm
    cdef uint64_t spte = 0, new_ = 0
    cdef uint64_t *sptep = NULL
    cdef int _tries, level, ret = RET_PF_INVALID
    if f.rsvd or f.present and not f.write or not f.present and vm.masks.ad_enabled:
        return RET_PF_INVALID
    kvmmmu_reading_begin(vcpu.line)
    for _tries in range(FAST_TRIES):
        sptep = last_sptep(vm, vcpu.root.page, f.addr, &level)
        if sptep == NULL:
            break
        spte = ld_acquire_u64(sptep)
        new_ = spte
        if not spte_present(spte) or not spte_is_last(spte, level):
            break
        if spte_permits(&vm.masks, spte, f.write, f.fetch):
            ret = RET_PF_SPURIOUS
            break
        if spte_acc_tracked(&vm.masks, spte):
            new_ = acc_track_restore(&vm.masks, new_)
        if f.write and spte_mmu_writable(&vm.masks, spte):
            # A huge page of a logged slot must be split first, or the log would miss its pages.
            if level > LEVEL_4K and f.slot != NULL and f.slot.flags & MEM_LOG_DIRTY_PAGES:
                break
            new_ |= PT_WRITABLE_MASK
        if new_ == spte or not spte_permits(&vm.masks, new_, f.write, f.fetch):
            new_ = spte  # nothing was written
            break
        hook(vcpu, POINT_FAST_READ)
        if mutant(vm, MUTANT_PLAIN_STORE):
            sptep[0] = new_
            ret = RET_PF_FIXED
            break
        if cmpxchg_u64(sptep, spte, new_):
            if f.slot != NULL and spte_writable(new_) and not spte_writable(spte):
                slot_mark_dirty(f.slot, f.gfn)
            ret = RET_PF_FIXED
            break
    ev_fast_page_fault(vm, vcpu.id, f.addr, f.error_code,
                       0 if sptep == NULL else <uint64_t>(sptep - vm.arena.sptes), spte, new_,
                       ret == RET_PF_SPURIOUS, ret == RET_PF_FIXED)
    kvmmmu_reading_end(vcpu.line)
    if ret != RET_PF_INVALID:
        vcpu.stats[<int>VSTAT_PF_FAST] += 1
    return ret

cdef inline uint64_t *last_sptep(Vm *vm, int32_t root, uint64_t address, int *level) noexcept nogil:
    """Address of the last spte of a walk; only for the owner of the READING mark."""
    cdef int32_t table = root_table(vm, root, address, level)
    cdef uint64_t *sptep = NULL
    cdef uint64_t spte
    while table:
        sptep = vm.arena.sptes + (<uint64_t>table << 9) + ((address >> (12 + 9 * (level[0] - 1))) & 511)
        spte = ld_acquire_u64(sptep)
        if level[0] == LEVEL_4K or not spte_present(spte) or spte & PT_PAGE_SIZE_MASK:
            return sptep
        table = spte_child(spte)
        level[0] -= 1
    return sptep

# ---- what stands behind the gfn --------------------------------------------------------

cdef inline int fault_pfn(Vcpu *vcpu, Fault *f) noexcept nogil:
    """Find the frame; CONTINUE, or how the fault ends without one."""
    cdef Vm *vm = vcpu.vm
    cdef bint direct
    hook(vcpu, POINT_SLOT_FOUND)
    if f.slot != NULL and not slot_visible(f.slot):
        # Being deleted or moved: nothing may be cached for it until that is over.
        return RET_PF_RETRY
    f.pfn = gfn_to_pfn(vm, f.slot, f.gfn, f.write, &f.map_writable)
    if f.slot == NULL:
        direct = (vcpu.root_role & ROLE_DIRECT) != 0 and vm.mmu != 0
        vcpu.stats[<int>VSTAT_MMIO_SLOW] += 1
        mmio_cache_fill(vcpu, 0 if direct else f.addr, f.gfn, f.access & <uint32_t>vm.masks.mmio_access)
        if not vm.masks.mmio_caching:
            return RET_PF_EMULATE
        if f.gfn >> (vm.host.phys_bits - 12):
            # No spte can hold such an address.
            return RET_PF_EMULATE
        return RET_PF_CONTINUE
    if f.pfn == PFN_ERR_RO_FAULT:
        return RET_PF_EMULATE
    if pfn_is_error(f.pfn):
        return ERR_FAULT
    return RET_PF_CONTINUE

cdef inline bint fault_stale(Vcpu *vcpu, const Fault *f) noexcept nogil:
    """The root, or the host's page, went away between the fault and the lock."""
    cdef int32_t root = vcpu.root.page
    if f.slot != NULL and (vcpu.vm.notifier_active or f.seq != vcpu.vm.notifier_seq):
        return True
    if root == 0:
        return True
    if page_at(vcpu.vm, root).special:
        # Four entries without a shadow page: whether any went, only the request tells.
        return (ld_acquire_u32(&vcpu.requests) & REQ_FREE_OBSOLETE_ROOTS) != 0
    return page_obsolete(vcpu.vm, page_at(vcpu.vm, root))

# ---- the real path ------------------------------------------------------------------

cdef inline bint fault_write_tracked(const Fault *f) noexcept nogil:
    return f.present and f.write and not f.rsvd and gfn_write_tracked(f.slot, f.gfn)

cdef inline int direct_page_fault(Vcpu *vcpu, Fault *f) noexcept nogil:
    """A gpa fault: TDP, or a guest without paging."""
    cdef Vm *vm = vcpu.vm
    cdef int ret
    f.gfn = f.addr >> 12
    f.slot = vcpu_slot(vcpu, f.gfn)
    f.access = ACC_ALL
    if f.addr & vcpu.hw.va_limit:
        # The tables are not deep enough for this address: an entry made for it would be another address's.
        return RET_PF_EMULATE
    f.max_level = host_max_level(vm) if vm.mmu else <int>LEVEL_2M
    if not vm.switches.era & ERA_PROTECT_LATE and fault_write_tracked(f):
        return RET_PF_EMULATE
    if not vm.switches.era & ERA_NO_FAST_FAULT:
        ret = fast_page_fault(vcpu, f)
        if ret != RET_PF_INVALID:
            return ret
    ret = fault_pfn(vcpu, f)
    if ret != RET_PF_CONTINUE:
        return ret
    hook(vcpu, POINT_FAULT_PFN)
    if page_at(vm, vcpu.root.page).tdp:
        cache_fill(vcpu, TDP_FAULT_PAGES)
        mmu_read_lock(vcpu)
        hook(vcpu, POINT_FAULT_LOCKED)
        ret = RET_PF_RETRY if fault_stale(vcpu, f) else tdp_map(vcpu, f)
        mmu_read_unlock(vcpu)
        tdp_reap(vm)
        return ret
    mmu_write_lock(vm)
    hook(vcpu, POINT_FAULT_LOCKED)
    ret = RET_PF_RETRY
    if not fault_stale(vcpu, f):
        ret = direct_map(vcpu, f) if make_pages_available(vm, vcpu.id) else ERR_NOSPC
    mmu_write_unlock(vm)
    return ret


cdef inline bint fault_hits_own_tables(Vcpu *vcpu, Fault *f, const Walk *w) noexcept nogil:
    """The write may change a table of its own walk; also notes whether it surely does.

    Then the page is mapped 4 KiB at a time, or the huge mapping would protect the table
    and the data together and the guest could never make progress.
    """
    # A block of KVM's own tables: half of a 4 MiB guest page.
    cdef uint64_t mask = ~(level_pages(w.level) - 1)
    cdef uint64_t table
    cdef int level, top = vcpu.guest.levels
    cdef bint inside = False
    if not (w.pte_access & ACC_W or not vcpu.regs.cr0 & CR0_WP and not f.user):
        return False
    if top == 3:
        top = 2
    for level in range(w.level, top + 1):
        table = w.entry_gpas[level] >> 12
        inside |= ((f.gfn ^ table) & mask) == 0
        f.self_change |= f.gfn == table
    return inside


cdef inline int shadow_page_fault(Vcpu *vcpu, Fault *f) noexcept nogil:
    """A gva fault of a paging guest."""
    cdef Vm *vm = vcpu.vm
    cdef Walk *w = &vcpu.walk
    cdef int ret
    # The reserved bit was the shadow table's, not the guest's.
    if not guest_walk(vcpu, w, f.addr, f.error_code & ~PFERR_RSVD):
        return FAULT_INJECT
    f.gfn = w.gpa >> 12
    f.slot = vcpu_slot(vcpu, f.gfn)
    f.max_level = w.level
    if not vm.switches.era & ERA_PROTECT_LATE:
        if fault_write_tracked(f):
            flooding_clear_path(vcpu, f.addr)
            return RET_PF_EMULATE
        if fault_hits_own_tables(vcpu, f, w):
            f.max_level = LEVEL_4K
    f.access = w.pte_access
    ret = fault_pfn(vcpu, f)
    if ret != RET_PF_CONTINUE:
        return ret
    # CR0.WP=0: a supervisor store to a read-only page needs W, which then must be the
    # supervisor's alone.  Not for MMIO, whose access bits are cached.
    if f.write and not w.pte_access & ACC_W and not vcpu.regs.cr0 & CR0_WP and not f.user and f.slot != NULL:
        # Pages between a large guest entry and its small leaves: of the guest's own rights, or (later) of these.
        f.access = w.pte_access
        w.pte_access = (w.pte_access | ACC_W) & ~<uint32_t>ACC_U
        if vm.switches.era & ERA_WP0_UNLOGGED:
            w.pte_access |= LEAF_UNLOGGED
        if vcpu.regs.cr4 & CR4_SMEP:
            w.pte_access &= ~<uint32_t>ACC_X
    hook(vcpu, POINT_FAULT_PFN)
    mmu_write_lock(vm)
    hook(vcpu, POINT_FAULT_LOCKED)
    ret = RET_PF_RETRY
    if not fault_stale(vcpu, f):
        ret = shadow_map(vcpu, f, w) if make_pages_available(vm, vcpu.id) else ERR_NOSPC
    mmu_write_unlock(vm)
    return ret


cdef inline int page_fault(Vcpu *vcpu, uint64_t address, uint64_t error_code) noexcept nogil:
    """The top of the handler (``kvm_mmu_page_fault``).

    Returns RET_PF_RETRY to resume the guest, RET_PF_EMULATE, FAULT_INJECT, or an error.
    """
    cdef Vm *vm = vcpu.vm
    cdef Fault f
    cdef int ret = RET_PF_INVALID
    cdef bint direct = (vcpu.root_role & ROLE_DIRECT) != 0
    vcpu.mmio_hit = 0
    if error_code & PFERR_RSVD:
        ret = handle_mmio_fault(vcpu, address)
        if ret == RET_PF_EMULATE:
            vcpu.mmio_hit = 1
            return ret
    if ret == RET_PF_INVALID:
        f.addr = address
        f.error_code = error_code
        f.write = (error_code & PFERR_WRITE) != 0
        f.fetch = (error_code & PFERR_FETCH) != 0
        f.user = (error_code & PFERR_USER) != 0
        f.present = (error_code & PFERR_PRESENT) != 0
        f.rsvd = (error_code & PFERR_RSVD) != 0
        f.seq = ld_acquire_u32(&vm.notifier_seq)
        f.prefetch = 0
        f.map_writable = 0
        f.self_change = 0
        f.huge_page_disallowed = 0
        f.req_level = LEVEL_4K
        f.goal_level = LEVEL_4K
        f.slot = NULL
        f.pfn = 0
        f.access = ACC_ALL
        vcpu.stats[<int>VSTAT_PF_TAKEN] += 1
        ret = direct_page_fault(vcpu, &f) if direct else shadow_page_fault(vcpu, &f)
        if vm.switches.era & ERA_COUNT_OLD:
            if ret == RET_PF_EMULATE or ret == RET_PF_SPURIOUS:
                vcpu.stats[<int>VSTAT_PF_FIXED] += 1
            if ret != RET_PF_EMULATE:
                # A fault that the guest's own use of its tables explains: not one of a row of stores.
                vcpu.written_times = 0
        if ret == RET_PF_FIXED:
            vcpu.stats[<int>VSTAT_PF_FIXED] += 1
        elif ret == RET_PF_EMULATE:
            vcpu.stats[<int>VSTAT_PF_EMULATE] += 1
        elif ret == RET_PF_SPURIOUS:
            vcpu.stats[<int>VSTAT_PF_SPURIOUS] += 1
    if ret < 0 or ret == FAULT_INJECT:
        return ret
    if ret != RET_PF_EMULATE:
        return RET_PF_RETRY
    # The processor wrote to a guest table that is only protected because it is shadowed.
    if direct and (error_code & (PFERR_GUEST_PAGE | PFERR_WRITE | PFERR_PRESENT)) == (
            PFERR_GUEST_PAGE | PFERR_WRITE | PFERR_PRESENT):
        mmu_write_lock(vm)
        unprotect_gfn(vm, vcpu.id, address >> 12)
        mmu_write_unlock(vm)
        return RET_PF_RETRY
    # KVM sees no register of a TDX guest, who tries again instead, for a #VE.
    return RET_PF_RETRY if vm.tdx else RET_PF_EMULATE
