# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The life of tables, roots and slots beside the lockless walk: C15 to C34 of ``docs/lockless-walk.md``."""

from libc.stdint cimport int32_t, uint64_t, uint8_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport CpuRegs
from kvmmmu.bits.spte cimport spte_is_mmio, spte_masks_ept, spte_present, spte_writable
from kvmmmu.engine.emulate cimport piece_memory
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.leaf cimport acc_track_spte
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport slots_generation
from kvmmmu.engine.notifier cimport page_replaced
from kvmmmu.engine.pages cimport gfn_first_page, page_at, page_sptes, spte_at
from kvmmmu.engine.registers cimport set_sregs
from kvmmmu.engine.roles cimport roles_refresh
from kvmmmu.engine.roots cimport roots_sync, vcpu_invlpg
from kvmmmu.engine.state cimport (
    LIST_FREE, OUTCOME_MMIO, OUTCOME_OK, VSTAT_MMIO_CACHE_HIT, VSTAT_PF_FAST, VSTAT_PF_MMIO_SPTE_CREATED,
    VSTAT_PF_TAKEN,
)
from kvmmmu.engine.zap cimport zap_all_fast, zap_oldest
from turns cimport *
from world cimport *
from cases_walk cimport R, W, touches, unmap_main, walks

cdef enum:
    FAR = 4096 * 9    # outside the window that a fault of GVA fills ahead
    WRITE = 2         # PFERR_WRITE

# ---- what threads do ------------------------------------------------------------------

cdef inline void recycle_main(void *arg) noexcept nogil:
    """Room is wanted: every page that is no root goes."""
    cdef World *w = <World *>arg
    mmu_write_lock(w.vm)
    zap_oldest(w.vm, -1, 1000)
    mmu_write_unlock(w.vm)

cdef inline void zap_main(void *arg) noexcept nogil:
    """Every page goes, roots too."""
    cdef World *w = <World *>arg
    mmu_write_lock(w.vm)
    zap_all_fast(w.vm)
    mmu_write_unlock(w.vm)

cdef inline void create_main(void *arg) noexcept nogil:
    extra_create(<World *>arg, 0)

cdef inline void unlog_main(void *arg) noexcept nogil:
    extra_flags(<World *>arg, 0)

cdef inline void invlpg_main(void *arg) noexcept nogil:
    cdef Toucher *t = <Toucher *>arg
    vcpu_invlpg(t.vcpu, t.gva)

cdef inline void sync_main(void *arg) noexcept nogil:
    roots_sync((<Toucher *>arg).vcpu)

cdef inline void store_main(void *arg) noexcept nogil:
    """KVM's emulator stores the entry ``access`` at the guest address ``gva``."""
    cdef Toucher *t = <Toucher *>arg
    piece_memory(t.vcpu, t.gva, WRITE, 8, <uint8_t *>&t.access)

cdef inline void replaced_main(void *arg) noexcept nogil:
    """The host copies the page behind DATA on a write."""
    cdef World *w = <World *>arg
    page_replaced(w.vm, w.ram + DATA)

cdef inline void stores(World *w, int thread, int vcpu, uint64_t gpa, uint64_t entry) noexcept nogil:
    w.toucher[thread].vcpu = w.vcpu[vcpu]
    w.toucher[thread].gva = gpa
    w.toucher[thread].access = entry
    turns_thread(thread, store_main, &w.toucher[thread])

cdef inline uint64_t leaf_seen(World *w) noexcept nogil:
    return w.walker[R].sptes[w.walker[R].leaf]

cdef inline uint64_t taken(World *w, int vcpu) noexcept nogil:
    return w.vcpu[vcpu].stats[<int>VSTAT_PF_TAKEN]

# ---- tables and roots -----------------------------------------------------------------

cdef inline int c15_page_is_not_reused(World *w) noexcept nogil:
    """A table that a reader holds is not free before the reader has left, however long that takes."""
    cdef int32_t table
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    table = gfn_first_page(w.vm, gpte_gpa(w, GVA, 1) >> 12)
    walks(w, R, 0, GVA)
    turns_thread(W, recycle_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_UNLINKED) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    expect(w, page_at(w.vm, table).on_list != LIST_FREE, b"the table is not free while the reader may hold it")
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_FREED):
        return 1
    expect(w, page_at(w.vm, table).on_list == LIST_FREE, b"afterwards it is")
    return turns_step(W, POINT_END) or turns_step(R, POINT_END)


cdef inline int c16_root_in_use(World *w) noexcept nogil:
    """A root that is zapped while in use turns invalid and empty, and stays; the reader sees nothing in it."""
    cdef int32_t root
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    root = w.vcpu[0].root.page
    walks(w, R, 0, GVA)
    turns_thread(W, zap_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_UNLINKED) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, leaf_seen(w) == 0, b"the emptied root leads nowhere")
    expect(w, (page_at(w.vm, root).role & ROLE_INVALID) != 0, b"the root is invalid")
    expect(w, page_at(w.vm, root).on_list != LIST_FREE, b"and not free while the vCPU has it")
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"the next entry takes another root")
    return 0


cdef inline int c17_root_is_the_vcpus_own(World *w) noexcept nogil:
    """Others can only ask: the vCPU's root changes on its own thread, after the walk."""
    cdef int32_t root
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + FAR, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    world_access(w.vcpu[0], GVA + FAR, 0)
    root = w.vcpu[0].root.page
    # Another page in the record, so that the mmio spte is walked for.
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA + FAR, 0)
    turns_thread(W, zap_main, w)
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END):
        return 1
    expect(w, w.vcpu[0].root.page == root, b"the request has not changed the root of a vCPU that is in the handler")
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"the access is carried out")
    world_access(w.vcpu[0], GVA, 0)
    expect(w, not page_at(w.vm, w.vcpu[0].root.page).role & ROLE_INVALID, b"the next entry has a valid root")
    return 0


cdef inline int c18_tracked_leaf(World *w) noexcept nogil:
    """A tracked leaf is repaired by compare-exchange: one that went meanwhile is not brought back."""
    cdef uint64_t index
    w.vm.host.ept_ad = 0
    spte_masks_ept(&w.vm.masks, 46, 0, 46, 0, 1, 1)
    roles_refresh(w.vcpu[0])
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, DATA)
    # As ageing would leave it: rights set aside, still a present leaf.
    index = leaf_index(w, 0, DATA)
    spte_at(w.vm, index)[0] = acc_track_spte(&w.vm.masks, spte_at(w.vm, index)[0])
    touches(w, R, 0, GVA, 0)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_FAST_READ) or turns_step(W, POINT_NOTIFIER) or turns_step(R, POINT_LOCK_WAIT):
        return 1
    expect(w, spte_at(w.vm, index)[0] == 0, b"the leaf that went stays away")
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the real path serves the access")
    expect(w, w.vcpu[0].stats[<int>VSTAT_PF_FAST] == 0, b"nothing was repaired")
    return 0

cdef inline uint64_t leaf_index(World *w, int vcpu, uint64_t address) noexcept nogil:
    """Index of the level-1 spte of an address; its tables stand."""
    cdef uint64_t table = <uint64_t>w.vcpu[vcpu].root.page
    cdef int level = 4
    while level > 1:
        table = (page_sptes(w.vm, <int32_t>table)[(address >> (12 + 9 * (level - 1))) & 511] & PT_ADDR_MASK) >> 12
        level -= 1
    return (table << 9) + ((address >> 12) & 511)


cdef inline int c19_removed_is_seen(World *w) noexcept nogil:
    """A huge leaf on its way out is REMOVED: neither present nor MMIO, and only its owner goes on."""
    map_gva(w, GVA, EXTRA_GPA)
    w.vm.switches.eager_split = 0
    extra_create(w, 0)
    world_access(w.vcpu[0], GVA, 0)
    # The log makes the next write want a small page.
    extra_flags(w, MEM_LOG_DIRTY_PAGES)
    walks(w, R, 0, EXTRA_GPA)
    touches(w, W, 1, GVA, WRITE)
    if turns_step(W, POINT_TDP_REMOVED) or turns_step(R, POINT_WALK_READ):
        return 1
    expect(w, leaf_seen_now(w) == REMOVED_SPTE, b"the walk ends at REMOVED")
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, not spte_present(leaf_seen(w)) and not spte_is_mmio(&w.vm.masks, leaf_seen(w)), b"which means: again")
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the write is done by its own leaf")
    return 0

cdef inline uint64_t leaf_seen_now(World *w) noexcept nogil:
    """The walker stands behind its reads: the 2 MiB level is where it ended."""
    return w.walker[R].sptes[2]


cdef inline int c21_pae_root_entry_is_missing(World *w) noexcept nogil:
    """Where the PAE root has no entry the walk does not start: the fault is taken again."""
    cdef CpuRegs regs = w.vcpu[0].regs
    regs.cr0 = CR0_PE
    regs.cr4 = 0
    regs.efer = 0
    set_sregs(w.vcpu[0], &regs)
    world_access(w.vcpu[0], DATA, 0)
    page_sptes(w.vm, w.vcpu[0].root.page)[3] = 0
    walks(w, R, 0, 0xfee00000)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 0, b"no level was walked")
    return 0

# ---- slots and generations --------------------------------------------------------------

cdef inline int c22_generation_moves_before_the_record(World *w) noexcept nogil:
    """The spte was current; before it is recorded an update is published: nothing is recorded, and the update waits."""
    map_gva(w, GVA, EXTRA_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    w.vcpu[0].mmio.gfn = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(R, POINT_MMIO_FRESH) or turns_step(W, POINT_SLOT_PUBLISHED) or turns_step(W, POINT_SYNC_WAIT):
        return 1
    if turns_step(R, POINT_EMULATE):
        return 1
    expect(w, w.vcpu[0].mmio.gfn == 0, b"nothing is recorded while an update is in flight")
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"after the update the page is memory")
    return 0


cdef inline int c32_slot_comes_between_hit_and_emulation(World *w) noexcept nogil:
    """The record hit; before the emulator looks, a slot is published there: MMIO or memory, and the update waits."""
    map_gva(w, GVA, EXTRA_GPA)
    world_access(w.vcpu[0], GVA, 0)
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(R, POINT_EMULATE) or turns_step(W, POINT_SLOT_PUBLISHED) or turns_step(W, POINT_SYNC_WAIT):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    # The record is refused while the update is in flight; the slot is there.
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the emulator goes by the new table")
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"after the update the page is memory")
    return 0


cdef inline int c34_generation_goes_round(World *w) noexcept nogil:
    """A stale spte in hand while the stored number comes round to its own: it is not believed."""
    map_gva(w, GVA, EXTRA_GPA)
    w.vm.slots[0].generation = 0
    world_access(w.vcpu[0], GVA, 0)
    w.vm.slots[0].generation = (1 << 19) - 2
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(W, POINT_SLOT_DRAINED) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_SLOT_SETTLED) or turns_step(R, POINT_END):
        return 1
    if turns_step(W, POINT_END):
        return 1
    expect(w, slots_generation(w.vm.slots[0]) & MMIO_GEN_MASK == 0, b"the number has come round")
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the access reaches the memory that stands there by now")
    return 0

# ---- shadow paging ------------------------------------------------------------------------

cdef inline void lagging_table(World *w) noexcept nogil:
    """GVA is a device in a table that the guest may write: its page is unsync."""
    # A root that is loaded is synchronised: the other vCPU's comes first.
    map_gva(w, GVA + FAR, DATA)
    world_access(w.vcpu[1], GVA + FAR, 0)
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    map_gva(w, GVA + (1 << 21), gpte_gpa(w, GVA, 1) & PT_ADDR_MASK)
    world_access(w.vcpu[0], GVA + (1 << 21), WRITE)
    w.vcpu[0].mmio.gva = 0
    w.vcpu[0].mmio.gfn = 0


cdef inline int c23_remapped_and_not_flushed(World *w) noexcept nogil:
    """Another CPU maps memory at the gva, this one has not flushed: the device is still allowed, like a TLB entry."""
    lagging_table(w)
    touches(w, R, 0, GVA, 0)
    if turns_step(R, POINT_WALK_MARKED):
        return 1
    map_gva(w, GVA, DATA)
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"until the flush the old translation may be used")
    vcpu_invlpg(w.vcpu[0], GVA)
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"after it the new one is")
    return 0


cdef inline int c23_flushed_by_another(World *w) noexcept nogil:
    """The same with INVLPG on another vCPU before the walk reads: the shared table already shows memory."""
    lagging_table(w)
    touches(w, R, 0, GVA, 0)
    w.toucher[W].vcpu = w.vcpu[1]
    w.toucher[W].gva = GVA
    turns_thread(W, invlpg_main, &w.toucher[W])
    if turns_step(R, POINT_WALK_MARKED):
        return 1
    map_gva(w, GVA, DATA)
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"no mmio spte any more: again, and memory")
    return 0


cdef inline int c24_unsync_before_writable(World *w) noexcept nogil:
    """Between the mark and the writable leaf a sync finds the mark, and waits for the fault."""
    cdef uint64_t gva = GVA + (1 << 21)
    cdef uint64_t table
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    table = gpte_gpa(w, GVA, 1)
    map_gva(w, gva, table & PT_ADDR_MASK)
    # The tables of gva stand; its leaf does not.
    map_gva(w, gva + FAR, DATA + 4096)
    world_access(w.vcpu[1], gva + FAR, 0)
    touches(w, W, 1, gva, WRITE)
    w.toucher[R].vcpu = w.vcpu[0]
    turns_thread(R, sync_main, &w.toucher[R])
    if turns_step(W, POINT_UNSYNC):
        return 1
    expect(w, page_at(w.vm, gfn_first_page(w.vm, table >> 12)).unsync != 0, b"the page is marked")
    expect(w, not spte_writable(spte_at(w.vm, leaf_index(w, 1, gva))[0]), b"and cannot be written yet")
    if turns_step(R, POINT_LOCK_WAIT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, page_at(w.vm, gfn_first_page(w.vm, table >> 12)).unsync == 0, b"the sync found it")
    expect(w, not spte_writable(spte_at(w.vm, leaf_index(w, 1, gva))[0]), b"and protected the table again")
    return 0


cdef inline int c25_table_counted_then_reread(World *w) noexcept nogil:
    """The emulator stored before the fault counted the table: it sees no table, and the fault sees the store."""
    map_gva(w, GVA, DATA)
    touches(w, R, 0, GVA, 0)
    stores(w, W, 1, gpte_gpa(w, GVA, 1), (DATA + 4096) | FLAGS)
    if turns_step(R, POINT_FAULT_PFN) or turns_step(W, POINT_STORED) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_ACCOUNTED) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.gpa == DATA + 4096, b"what was read before the store is not mapped")
    return 0


cdef inline int c25_written_while_a_fault_waits(World *w) noexcept nogil:
    """The table is shadowed: the store is emulated and its spte zapped while a fault that walked before waits."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + FAR, DATA)
    world_access(w.vcpu[0], GVA + FAR, 0)
    touches(w, R, 0, GVA, 0)
    stores(w, W, 1, gpte_gpa(w, GVA, 1), (DATA + 4096) | FLAGS)
    if turns_step(R, POINT_FAULT_PFN) or turns_step(W, POINT_STORED) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.gpa == DATA + 4096, b"the old entry does not come back")
    expect(w, world_access(w.vcpu[1], GVA, 0).gpa == DATA + 4096, b"for anyone")
    return 0


cdef inline int c26_notifier_between_frame_and_lock(World *w) noexcept nogil:
    """The host takes the page away after the fault found its frame: the fault is taken again."""
    cdef uint64_t before
    map_gva(w, GVA, DATA)
    touches(w, R, 0, GVA, 0)
    before = taken(w, 0)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_FAULT_PFN) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the access is done")
    expect(w, taken(w, 0) == before + 2, b"by the second fault")
    return 0


cdef inline int c27_flush_waits_for_the_processor(World *w) noexcept nogil:
    """A processor between entry and its last store may use what it cached: the flush waits until it has left."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, WRITE)
    touches(w, R, 0, GVA, WRITE)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_HARDWARE) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    # The leaf is gone by now: the processor faults, and the handler waits for the lock.
    if turns_step(R, POINT_LOCK_WAIT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the access is done after the flush")
    return 0


cdef inline int c28_two_install_one_spte(World *w) noexcept nogil:
    """TDP: both read the empty entry; one exchange wins, the other is taken again and finds the winner's."""
    map_gva(w, GVA, MMIO_GPA)
    map_gva(w, GVA + FAR, MMIO_GPA + FAR)
    world_access(w.vcpu[0], GVA + FAR, 0)
    world_access(w.vcpu[1], GVA + FAR, 0)
    touches(w, R, 0, GVA, 0)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_TDP_SET) or turns_step(W, POINT_TDP_SET) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO and w.toucher[W].a.outcome == OUTCOME_MMIO, b"both are MMIO")
    expect(w, w.vcpu[0].stats[<int>VSTAT_PF_MMIO_SPTE_CREATED] == 1, b"the loser made none")
    expect(w, w.vcpu[0].stats[<int>VSTAT_MMIO_CACHE_HIT] == 1,
           b"its second exit finds the winner's, and its own record")
    return 0


cdef inline int c28_shadow_serialises(World *w) noexcept nogil:
    """Shadow paging: the second waits for mmu_lock and writes the same."""
    map_gva(w, GVA, MMIO_GPA)
    map_gva(w, GVA + FAR, MMIO_GPA + FAR)
    world_access(w.vcpu[0], GVA + FAR, 0)
    world_access(w.vcpu[1], GVA + FAR, 0)
    touches(w, R, 0, GVA, 0)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_SPTE_WRITE) or turns_step(W, POINT_LOCK_WAIT) or turns_step(R, POINT_END):
        return 1
    if turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO and w.toucher[W].a.outcome == OUTCOME_MMIO, b"both are MMIO")
    return 0

# ---- what the list of 2011 did not have --------------------------------------------------

cdef inline int c29_root_goes_before_the_walk(World *w) noexcept nogil:
    """Everything is zapped between the reserved-bit fault and the walk: again, and then the real path."""
    cdef uint64_t before
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    w.vcpu[0].mmio.gfn = 0
    before = taken(w, 0)
    touches(w, R, 0, GVA, 0)
    turns_thread(W, zap_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_WALK_LEFT):
        return 1
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"the access is MMIO all the same")
    expect(w, taken(w, 0) == before + 1, b"by one fault of the real path, in the new tree")
    return 0


cdef inline int c30_prefetch_over_an_mmio_spte(World *w) noexcept nogil:
    """A neighbour's fault maps memory over the mmio spte that the walk has just read: emulated by what was read."""
    lagging_table(w)
    # In the same window of eight, and not shadowed yet.
    map_gva(w, GVA + 4096 * 2, DATA + 4096)
    touches(w, R, 0, GVA, 0)
    touches(w, W, 1, GVA + 4096 * 2, 0)
    if turns_step(R, POINT_WALK_READ):
        return 1
    map_gva(w, GVA, DATA)
    if turns_step(W, POINT_SPTE_WRITE) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"the value in hand decides")
    expect(w, spte_present(spte_at(w.vm, leaf_index(w, 0, GVA))[0]), b"memory stands there by now")
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"and is used by the next access")
    return 0


cdef inline int c31_read_only_frame_replaced(World *w) noexcept nogil:
    """The host copies a page: the reader's old leaf is a number it never follows, the flush waits for it."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, replaced_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, spte_present(leaf_seen(w)), b"the value in hand stays as it was read")
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"the next access faults the new frame in")
    return 0


cdef inline int c33_collapse(World *w) noexcept nogil:
    """Logging ends: the table of small leaves is REMOVED, flushed, emptied; a reader meets old, REMOVED or nothing."""
    map_gva(w, GVA, EXTRA_GPA)
    extra_create(w, MEM_LOG_DIRTY_PAGES)
    world_access(w.vcpu[0], GVA, WRITE)
    walks(w, R, 0, EXTRA_GPA)
    turns_thread(W, unlog_main, w)
    if turns_step(W, POINT_TDP_REMOVED) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    expect(w, leaf_seen_now(w) == REMOVED_SPTE, b"the walk ends at REMOVED")
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, world_access(w.vcpu[0], GVA, WRITE).outcome == OUTCOME_OK, b"the next fault maps the large page")
    return 0
