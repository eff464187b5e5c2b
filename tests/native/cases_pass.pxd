# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The TDP MMU's passes over a slot beside faults: C35 to C41 of ``docs/lockless-walk.md``."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_is_last, spte_present, spte_writable
from kvmmmu.engine.dirty cimport dirty_get
from kvmmmu.engine.drain cimport slots_lock, slots_unlock
from kvmmmu.engine.counters cimport vm_stat
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.locks cimport mmu_read_lock, mmu_read_unlock, mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.pages cimport page_at, spte_at, spte_page
from kvmmmu.engine.sptes cimport spte_read
from kvmmmu.engine.state cimport (
    LIST_INVALID, OUTCOME_OK, STAT_PAGES_2M, STAT_PAGES_4K,
)
from kvmmmu.engine.tdp cimport tdp_defer, tdp_free, tdp_zap_entry, tdp_zap_page
from kvmmmu.engine.tlb cimport flush_remote_tlbs
from turns cimport *
from world cimport *
from cases_walk cimport R, W, leaf_index, leaf_of, log_main, touches, unlog_main

cdef enum:
    PAGE = 4096
    ELSEWHERE = GVA + 0x100000   # in the same table of the guest


cdef inline void prepare(World *w, uint32_t flags, int max_level) noexcept nogil:
    """The slot, GVA mapped to its begin; vCPU 0 has written there, vCPU 1 has a root and pages in hand."""
    cdef int i
    for i in range(16):
        map_gva(w, GVA + i * PAGE, EXTRA_GPA + i * PAGE)
    map_gva(w, ELSEWHERE, DATA)
    slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, flags, max_level)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    world_access(w.vcpu[1], ELSEWHERE, 0)

cdef inline uint64_t *extra_spte(World *w, int level) noexcept nogil:
    return spte_at(w.vm, leaf_index(w, 0, EXTRA_GPA, level))

cdef inline bint in_log(World *w) noexcept nogil:
    """The first page of the slot is."""
    return w.vm.slot_by_id[0][1].dirty[0] & 1

cdef inline bint leaves(World *w, uint64_t small, uint64_t huge) noexcept nogil:
    """What the VM counts."""
    return vm_stat(w.vm, STAT_PAGES_4K) == small and vm_stat(w.vm, STAT_PAGES_2M) == huge

cdef inline void protected(World *w) noexcept nogil:
    """The slot is not logged, and its leaf may not be written: what a log leaves behind."""
    cdef uint64_t words[16]
    prepare(w, MEM_LOG_DIRTY_PAGES, 1)
    slots_lock(w.vm)
    dirty_get(w.vm, 1, words, EXTRA_PAGES >> 6)
    slots_unlock(w.vm)
    extra_flags(w, 0)


cdef inline int c35_bits_come_between(World *w) noexcept nogil:
    """The processor sets A and D after the pass read the leaf: the pass looks again, and protects it with both."""
    prepare(w, 0, 1)
    extra_spte(w, 1)[0] &= ~(EPT_ACCESSED | EPT_DIRTY)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_WRITE)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"every page of the slot faults at its next write")
    expect(w, (leaf_of(w, 0, EXTRA_GPA) & EPT_DIRTY) != 0, b"the bit that came in between is not lost")
    return 0


cdef inline int c35_fault_takes_the_huge_leaf(World *w) noexcept nogil:
    """A fetch splits the huge leaf that the pass has just read: the pass goes into the fault's table."""
    w.vm.switches.nx_huge_pages = 1
    w.vm.switches.eager_split = 0
    prepare(w, 0, 2)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_FETCH)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the fault does not wait for the pass")
    expect(w, spte_writable(leaf_of(w, 0, EXTRA_GPA)) and in_log(w), b"its leaf may be written, and is in the log")
    if turns_step(W, POINT_END):
        return 1
    expect(w, spte_present(leaf_of(w, 0, EXTRA_GPA)), b"the small leaf stays")
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"and is protected")
    return 0


cdef inline int c36_pass_meets_removed(World *w) noexcept nogil:
    """A fault owns the entry: the pass leaves it alone, and what the fault makes there knows of the log."""
    w.vm.switches.nx_huge_pages = 1
    prepare(w, 0, 2)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_FETCH)
    if turns_step(W, POINT_SLOT_SETTLED) or turns_step(R, POINT_TDP_REMOVED) or turns_step(W, POINT_END):
        return 1
    expect(w, spte_read(extra_spte(w, 2)) == REMOVED_SPTE, b"the entry is still its owner's")
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the fault is served")
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)) or in_log(w), b"what may be written is in the log")
    return 0


cdef inline int c37_repair_by_the_old_slot(World *w) noexcept nogil:
    """A repair that knows nothing of the log is waited for; the pass takes back what it gave."""
    protected(w)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_WRITE)
    if turns_step(R, POINT_FAST_READ) or turns_step(W, POINT_SYNC_WAIT) or turns_step(R, POINT_END):
        return 1
    expect(w, spte_writable(leaf_of(w, 0, EXTRA_GPA)) and not in_log(w), b"the repair gave write, and told no log")
    if turns_step(W, POINT_END):
        return 1
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"the pass comes after it")
    return 0


cdef inline int c37_repair_by_the_new_slot(World *w) noexcept nogil:
    """A repair that knows of the log may end after the pass: its page is in the log, and the flush waits for it."""
    protected(w)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_WRITE)
    if turns_step(W, POINT_SLOT_SETTLED) or turns_step(R, POINT_FAST_READ) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"the pass found nothing to do")
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, spte_writable(leaf_of(w, 0, EXTRA_GPA)) and in_log(w), b"write was given back, and the log knows")
    return 0


cdef inline int c38_fault_is_first(World *w) noexcept nogil:
    """A fault takes the huge leaf while the table for it is being made: the fault's table stands, the other is free."""
    cdef int32_t unused
    w.vm.switches.nx_huge_pages = 1
    prepare(w, 0, 2)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_FETCH)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the fault does not wait for the pass")
    expect(w, not spte_present(leaf_of(w, 0, EXTRA_GPA + PAGE)), b"the fault's table has the fault's leaf alone")
    expect(w, not spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"which was protected")
    unused = w.vm.arena.free
    expect(w, unused != 0 and page_at(w.vm, unused).gfn == EXTRA_GPA >> 12, b"the table of the pass is free")
    expect(w, spte_read(spte_at(w.vm, <uint64_t>unused << 9)) == 0, b"and empty")
    return 0


cdef inline int c38_split_is_first(World *w) noexcept nogil:
    """The pass splits what a fault was about to take: the fault is taken again, and finds a leaf that serves it."""
    w.vm.switches.nx_huge_pages = 1
    prepare(w, 0, 2)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_FETCH)
    if turns_step(W, POINT_SLOT_SETTLED) or turns_step(R, POINT_TDP_SET) or turns_step(W, POINT_END):
        return 1
    expect(w, spte_present(leaf_of(w, 0, EXTRA_GPA + 511 * PAGE)), b"512 leaves translate as the huge one did")
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the fetch is done")
    expect(w, spte_present(leaf_of(w, 0, EXTRA_GPA + 511 * PAGE)), b"and has taken nothing away")
    return 0


cdef inline int c38_bits_come_between(World *w) noexcept nogil:
    """The processor sets A and D after the table was filled: it is filled again, and every leaf has them."""
    prepare(w, 0, 2)
    extra_spte(w, 2)[0] &= ~(EPT_ACCESSED | EPT_DIRTY)
    turns_thread(W, log_main, w)
    touches(w, R, 1, GVA, PFERR_WRITE)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, spte_present(leaf_of(w, 0, EXTRA_GPA)), b"the huge leaf was split all the same")
    expect(w, (leaf_of(w, 0, EXTRA_GPA + 7 * PAGE) & EPT_DIRTY) != 0, b"no bit was lost")
    return 0


cdef inline int c39_fault_in_the_table(World *w) noexcept nogil:
    """A fault stands in a table that is collapsed: the table is not free before it has left, and it leaves nothing."""
    cdef int32_t table
    cdef uint64_t small, index
    w.vm.switches.nx_huge_pages = 1
    prepare(w, MEM_LOG_DIRTY_PAGES, 2)
    small = vm_stat(w.vm, STAT_PAGES_4K)
    index = leaf_index(w, 0, EXTRA_GPA, 1)
    table = spte_page(index)
    turns_thread(W, unlog_main, w)
    touches(w, R, 1, GVA + PAGE, PFERR_FETCH)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_TDP_INSTALL) or turns_step(W, POINT_LOCK_WAIT):
        return 1
    expect(w, page_at(w.vm, table).on_list == LIST_INVALID, b"the table went, and is not free")
    expect(w, spte_read(spte_at(w.vm, index + 1)) == REMOVED_SPTE, b"its empty entries are claimed too")
    if turns_step(R, POINT_LOCK_WAIT):
        return 1
    expect(w, spte_read(spte_at(w.vm, index + 1)) == REMOVED_SPTE, b"the fault has put nothing there")
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the fault is served by another table")
    expect(w, leaves(w, small, 0), b"and every leaf is counted once")
    return 0


cdef inline int c39_fault_over_the_table(World *w) noexcept nogil:
    """A fault wants the huge page whose table is being collapsed: it goes by the entry that it read, and loses."""
    cdef uint64_t small
    prepare(w, MEM_LOG_DIRTY_PAGES, 2)
    small = vm_stat(w.vm, STAT_PAGES_4K)
    turns_thread(W, unlog_main, w)
    touches(w, R, 1, GVA + PAGE, 0)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_TDP_INSTALL) or turns_step(W, POINT_TDP_REMOVED):
        return 1
    if turns_step(R, POINT_EXIT):
        return 1
    expect(w, spte_read(extra_spte(w, 2)) == REMOVED_SPTE, b"the fault is taken again, the entry is the pass' own")
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, spte_is_last(spte_read(extra_spte(w, 2)), 2), b"then the huge page is mapped")
    expect(w, leaves(w, small - 1, 1), b"and counted")
    return 0


cdef inline void zap_above_main(void *arg) noexcept nogil:
    """Something takes the whole GiB away, as a fault for one large page does."""
    cdef World *w = <World *>arg
    cdef uint64_t index = leaf_index(w, 1, EXTRA_GPA, 3)
    cdef int32_t doomed = 0
    mmu_read_lock(w.vcpu[1])
    tdp_zap_entry(w.vm, index, spte_read(spte_at(w.vm, index)), &doomed)
    tdp_defer(w.vm, doomed)
    mmu_read_unlock(w.vcpu[1])

cdef inline int c40_table_goes_around_a_removed_entry(World *w) noexcept nogil:
    """A table with a REMOVED entry of somebody else's goes: that one has the last word but one, or it would stay empty.

    An empty entry in a table that went is one into which a fault installs.
    """
    cdef uint64_t index
    prepare(w, MEM_LOG_DIRTY_PAGES, 2)
    index = leaf_index(w, 0, EXTRA_GPA, 2)
    turns_thread(W, unlog_main, w)
    turns_thread(R, zap_above_main, w)
    if turns_step(W, POINT_TDP_REMOVED) or turns_step(R, POINT_REMOVED_WAIT) or turns_step(W, POINT_LOCK_WAIT):
        return 1
    expect(w, spte_read(spte_at(w.vm, index)) == 0, b"its owner has emptied the entry")
    if turns_step(R, POINT_END):
        return 1
    expect(w, spte_read(spte_at(w.vm, index)) == REMOVED_SPTE, b"and who takes the table down has it now")
    if turns_step(W, POINT_END):
        return 1
    expect(w, world_access(w.vcpu[0], GVA, PFERR_WRITE).outcome == OUTCOME_OK, b"the next fault builds a new table")
    return 0


cdef inline void zap_table_main(void *arg) noexcept nogil:
    """A writer takes the slot's first table away, as the recovery of huge pages does."""
    cdef World *w = <World *>arg
    cdef int32_t doomed = 0
    mmu_write_lock(w.vm)
    tdp_zap_page(w.vm, spte_page(leaf_index(w, 0, EXTRA_GPA, 1)), &doomed)
    flush_remote_tlbs(w.vm)
    tdp_free(w.vm, doomed)
    mmu_write_unlock(w.vm)

cdef inline int c41_writer_is_let_in(World *w) noexcept nogil:
    """A writer waits: the pass lets it in, and then looks for its place from the root; the table has changed hands."""
    cdef int32_t table
    prepare(w, 0, 1)
    table = spte_page(leaf_index(w, 0, EXTRA_GPA, 1))
    map_gva(w, ELSEWHERE + PAGE, 0x600000 + 5 * PAGE)
    turns_thread(W, log_main, w)
    turns_thread(R, zap_table_main, w)
    if turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_LOCK_WAIT) or turns_step(W, POINT_LOCK_WAIT):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, world_access(w.vcpu[1], ELSEWHERE + PAGE, PFERR_WRITE).outcome == OUTCOME_OK, b"somebody faults")
    expect(w, spte_page(leaf_index(w, 1, 0x600000, 1)) == table, b"the table is used for other gfns")
    if turns_step(W, POINT_END):
        return 1
    expect(w, spte_writable(leaf_of(w, 1, 0x600000 + 5 * PAGE)), b"the pass touches nothing outside its slot")
    return 0
