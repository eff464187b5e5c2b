# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The lockless walk against one change of an spte: C1 to C14 of ``docs/lockless-walk.md``."""

from libc.stdint cimport uint64_t, uint8_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_is_mmio, spte_pfn, spte_present, spte_writable
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim, vcpu_release
from kvmmmu.engine.fault cimport walk_sptes
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport slot_pfn
from kvmmmu.engine.notifier cimport unmap_hva_range
from kvmmmu.engine.pages cimport root_table, spte_at
from kvmmmu.engine.roots cimport vcpu_invlpg
from kvmmmu.engine.sptes cimport spte_read, spte_write
from kvmmmu.engine.state cimport OUTCOME_MMIO, OUTCOME_OK, VSTAT_MMIO_SLOW
from kvmmmu.engine.vcpu cimport vcpu_access
from kvmmmu.engine.zap cimport zap_oldest
from turns cimport *
from world cimport *

cdef enum:
    R = 0   # the reader's thread
    W = 1   # the writer's
    LARGE = 0x600000    # a guest address for a 2 MiB page
    WINDOW = 0x800000   # and one through which the guest stores to a table

cdef inline void walker_main(void *arg) noexcept nogil:
    cdef Walker *k = <Walker *>arg
    cdef int top
    k.leaf = walk_sptes(k.vcpu, k.address, k.sptes, &top)

cdef inline void toucher_main(void *arg) noexcept nogil:
    cdef Toucher *t = <Toucher *>arg
    t.a = world_access(t.vcpu, t.gva, t.access)

cdef inline void store_main(void *arg) noexcept nogil:
    """A guest store of eight bytes, which stand in ``access``."""
    cdef Toucher *t = <Toucher *>arg
    if vcpu_claim(t.vcpu) == CLAIM_OK:
        vcpu_access(t.vcpu, t.gva, PFERR_WRITE, 8, <uint8_t *>&t.access, &t.a)
        vcpu_release(t.vcpu)

cdef inline void unmap_main(void *arg) noexcept nogil:
    """The host takes the page behind DATA away."""
    cdef World *w = <World *>arg
    unmap_hva_range(w.vm, w.ram + DATA, w.ram + DATA + 4096)

cdef inline void shrink_main(void *arg) noexcept nogil:
    """Every shadow page that is no root in use goes, as when the quota shrinks."""
    cdef World *w = <World *>arg
    mmu_write_lock(w.vm)
    zap_oldest(w.vm, -1, 1000)
    mmu_write_unlock(w.vm)

cdef inline void create_main(void *arg) noexcept nogil:
    extra_create(<World *>arg, 0)

cdef inline void delete_main(void *arg) noexcept nogil:
    extra_delete(<World *>arg)

cdef inline void log_main(void *arg) noexcept nogil:
    extra_flags(<World *>arg, MEM_LOG_DIRTY_PAGES)

cdef inline void unlog_main(void *arg) noexcept nogil:
    extra_flags(<World *>arg, 0)

cdef inline uint64_t leaf_index(World *w, int vcpu, uint64_t address, int level) noexcept nogil:
    """Which entry of a vCPU's tree translates an address at a level; 0 if the tree does not reach there."""
    cdef int at
    cdef uint64_t table = <uint64_t>root_table(w.vm, w.vcpu[vcpu].root.page, address, &at)
    cdef uint64_t spte
    while at > level:
        spte = spte_read(spte_at(w.vm, (table << 9) + ((address >> (12 + 9 * (at - 1))) & 511)))
        if not spte_present(spte) or spte_is_last(spte, at):
            return 0
        table = <uint64_t>spte_child(spte)
        at -= 1
    return (table << 9) + ((address >> (12 + 9 * (level - 1))) & 511)

cdef inline uint64_t leaf_of(World *w, int vcpu, uint64_t address) noexcept nogil:
    cdef uint64_t index = leaf_index(w, vcpu, address, 1)
    return spte_read(spte_at(w.vm, index)) if index else 0

cdef inline uint64_t vstat(World *w, int vcpu, int stat) noexcept nogil:
    return w.vcpu[vcpu].stats[stat]

cdef inline void walks(World *w, int thread, int vcpu, uint64_t address) noexcept nogil:
    """The thread will walk sptes without a lock."""
    w.walker[thread].vcpu = w.vcpu[vcpu]
    w.walker[thread].address = address
    turns_thread(thread, walker_main, &w.walker[thread])

cdef inline void touches(World *w, int thread, int vcpu, uint64_t gva, uint64_t access) noexcept nogil:
    """The thread will make one access."""
    w.toucher[thread].vcpu = w.vcpu[vcpu]
    w.toucher[thread].gva = gva
    w.toucher[thread].access = access
    turns_thread(thread, toucher_main, &w.toucher[thread])


cdef inline int c1_empty_to_present(World *w) noexcept nogil:
    """The reader is announced before, and reads after, a fault filled the leaf: it sees the new leaf whole."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 4096 * 9, DATA + 4096)
    # The tree stands; the leaf of GVA does not (9 pages on is outside the prefetched window).
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_SPTE_WRITE) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and spte_present(w.walker[R].sptes[1]), b"the leaf written meanwhile is seen")
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the fault was served beside a reader")
    return 0


cdef inline int c1_old_value(World *w) noexcept nogil:
    """The same, read before: the reader sees the empty entry, whatever stands there by now."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 4096 * 9, DATA + 4096)
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(W, POINT_SPTE_WRITE) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and w.walker[R].sptes[1] == 0, b"what was read before the fault stays as it was")
    return 0


cdef inline int c2_empty_to_mmio(World *w) noexcept nogil:
    """A fault writes an mmio spte under an announced reader, who sees it whole."""
    map_gva(w, GVA, MMIO_GPA)
    map_gva(w, GVA + 4096 * 9, DATA)
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_SPTE_WRITE) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and spte_is_mmio(&w.vm.masks, w.walker[R].sptes[1]), b"the mmio spte is seen")
    expect(w, w.toucher[W].a.outcome == OUTCOME_MMIO, b"the writer's own access is MMIO")
    return 0


cdef inline int c2_old_value(World *w) noexcept nogil:
    """A reader that found nothing says RETRY; its next exit finds the mmio spte and makes no memslot search."""
    map_gva(w, GVA, MMIO_GPA)
    map_gva(w, GVA + 4096 * 9, DATA)
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    world_access(w.vcpu[0], GVA, 0)
    shrink_main(w)
    world_access(w.vcpu[1], GVA + 4096 * 9, 0)
    walks(w, R, 1, GVA)
    touches(w, W, 0, GVA, 0)
    if turns_step(W, POINT_SPTE_WRITE) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].sptes[w.walker[R].leaf] == 0, b"what was read before stays as it was")
    expect(w, w.toucher[W].a.outcome == OUTCOME_MMIO, b"the writer's own access is MMIO")
    return 0


cdef inline int c3_link(World *w) noexcept nogil:
    """A child is linked while a reader is announced: it sees the link, and behind it entries that are empty."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 0x40000000, DATA)
    world_access(w.vcpu[0], GVA + 0x40000000, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_LINK) or turns_step(W, POINT_LINKED):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    # Two levels were missing; the upper one was just linked.
    expect(w, w.walker[R].leaf == 2 and spte_present(w.walker[R].sptes[3]), b"the link is seen")
    expect(w, w.walker[R].sptes[2] == 0, b"and the child behind it is empty")
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the fault was served")
    return 0


cdef inline int c3_before_link(World *w) noexcept nogil:
    """The same, read while the child is complete and not linked: nothing of it can be seen."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 0x40000000, DATA)
    world_access(w.vcpu[0], GVA + 0x40000000, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(W, POINT_LINK) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 3 and w.walker[R].sptes[3] == 0, b"the entry was empty")
    return 0


cdef inline int c4_freer_waits(World *w) noexcept nogil:
    """present to empty: the host takes the page away; the flush waits for the reader, who keeps the old leaf."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, spte_present(w.walker[R].sptes[1]), b"the reader keeps the value it read")
    return 0


cdef inline int c4_empty_seen(World *w) noexcept nogil:
    """The same, read after: the reader sees the empty entry although nothing was flushed yet."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_NOTIFIER) or turns_step(R, POINT_WALK_LEFT):
        return 1
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and w.walker[R].sptes[1] == 0, b"the entry was empty")
    return 0


cdef inline int c5_mmio_to_empty(World *w) noexcept nogil:
    """A page with an mmio spte is zapped under a reader that has it in hand: the access, legal when the
    processor faulted, is carried out, and the page is freed only after the reader left."""
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, shrink_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_UNLINKED) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    expect(w, turns_met(W, POINT_FREED) == 0, b"nothing is freed while the reader may hold it")
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_FREED) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO and w.toucher[R].a.exits == 1, b"emulated from what was read")
    return 0


cdef inline int c5_empty_seen(World *w) noexcept nogil:
    """The same, read after the unlinking: RETRY, then the real path, which waits for the one who zaps."""
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, shrink_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_UNLINKED) or turns_step(R, POINT_LOCK_WAIT):
        return 1
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO and w.toucher[R].a.exits == 2, b"retried, then emulated")
    return 0


cdef inline int c6_slot_created(World *w) noexcept nogil:
    """mmio to present: a reader holds a current mmio spte when a slot is published over it.

    The update is in flight, so the spte is not believed: the real path finds the slot.
    """
    map_gva(w, GVA, EXTRA_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_SLOT_PUBLISHED) or turns_step(W, POINT_SYNC_WAIT):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"memory, not the device that was there before")
    return 0


cdef inline int c6_after_update(World *w) noexcept nogil:
    """Once the call that created the slot is over, no stale mmio spte is emulated."""
    map_gva(w, GVA, EXTRA_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(W, POINT_SLOT_PUBLISHED) or turns_step(R, POINT_HARDWARE) or turns_step(W, POINT_SYNC_WAIT):
        return 1
    # The processor's fault, and KVM's walk, come after the update is complete for everybody else.
    expect(w, turns_met(W, POINT_SLOT_SETTLED) == 0, b"the update waits for whoever runs")
    if turns_step(R, POINT_WALK_LEFT) or turns_step(R, POINT_END) or turns_step(W, POINT_SLOT_SETTLED):
        return 1
    if turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"memory during the update")
    expect(w, world_access(w.vcpu[1], GVA, 0).outcome == OUTCOME_OK, b"memory after it")
    return 0


cdef inline int c6_generation(World *w) noexcept nogil:
    """An mmio spte of the generation before is not believed after the update, by whatever vCPU."""
    map_gva(w, GVA, EXTRA_GPA)
    world_access(w.vcpu[0], GVA, 0)
    touches(w, R, 0, GVA, 0)
    turns_thread(W, create_main, w)
    if turns_step(W, POINT_SLOT_DRAINED) or turns_step(W, POINT_SLOT_SETTLED) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_WALK_READ) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"neither the spte nor the vCPU's record is current")
    return 0


cdef inline int c7_slot_deleted(World *w) noexcept nogil:
    """present to mmio: between zapping and the last swap the slot is INVALID, and a fault only tries again."""
    map_gva(w, GVA, EXTRA_GPA)
    extra_create(w, 0)
    expect(w, world_access(w.vcpu[0], GVA, 0).outcome == OUTCOME_OK, b"memory before")
    touches(w, R, 0, GVA, 0)
    turns_thread(W, delete_main, w)
    if turns_step(W, POINT_SLOT_INVALID) or turns_step(W, POINT_SLOT_ZAPPED):
        return 1
    # Twice: the first time it found the slot INVALID and went round.
    if turns_step(R, POINT_SLOT_FOUND) or turns_step(R, POINT_SLOT_FOUND):
        return 1
    # The last swap waits: the fault holds the slot that is about to be freed.
    if turns_step(W, POINT_SYNC_WAIT) or turns_step(R, POINT_SLOT_FOUND) or turns_step(W, POINT_SLOT_SETTLED):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"a device, once the slot is gone for all")
    return 0


cdef inline int c8_new_generation(World *w) noexcept nogil:
    """mmio to mmio: the reader's value is of an old generation; the new one, written meanwhile, is not looked at."""
    cdef uint64_t slow
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    extra_create(w, 0)
    slow = vstat(w, 0, VSTAT_MMIO_SLOW)
    touches(w, R, 0, GVA, 0)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_SPTE_WRITE) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"emulated in the end")
    expect(w, vstat(w, 0, VSTAT_MMIO_SLOW) == slow + 1, b"decided from the value read once: stale, so the slow path")
    return 0


cdef inline int c9_both_give_write(World *w) noexcept nogil:
    """Two vCPUs give W back without a lock: the loser of the exchange finds the work done, the page is logged once."""
    map_gva(w, GVA, EXTRA_GPA)
    extra_create(w, 0)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    world_access(w.vcpu[1], GVA, PFERR_WRITE)
    extra_flags(w, MEM_LOG_DIRTY_PAGES)
    world_access(w.vcpu[0], GVA, 0)
    touches(w, R, 0, GVA, PFERR_WRITE)
    touches(w, W, 1, GVA, PFERR_WRITE)
    if turns_step(R, POINT_FAST_READ) or turns_step(W, POINT_FAST_READ) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK and w.toucher[W].a.outcome == OUTCOME_OK, b"both stores succeed")
    expect(w, spte_writable(leaf_of(w, 0, EXTRA_GPA)), b"the leaf may be written")
    expect(w, w.vm.slot_by_id[0][1].dirty[0] & 1 == 1, b"the page is in the log")
    return 0


cdef inline int c9_zapped_meanwhile(World *w) noexcept nogil:
    """A leaf is zapped between the lockless repair's read and its exchange: the exchange fails, nothing comes back."""
    map_gva(w, GVA, DATA)
    slot_set(w, 0, 0, RAM_PAGES, w.ram, MEM_LOG_DIRTY_PAGES, 0)
    world_access(w.vcpu[0], GVA, 0)
    slot_set(w, 0, 0, RAM_PAGES, w.ram, 0, 0)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    slot_set(w, 0, 0, RAM_PAGES, w.ram, MEM_LOG_DIRTY_PAGES, 0)
    world_access(w.vcpu[0], GVA, 0)
    touches(w, R, 0, GVA, PFERR_WRITE)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_FAST_READ) or turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_WALK_LEFT):
        return 1
    expect(w, leaf_of(w, 0, DATA) == 0, b"what was zapped stays zapped")
    if turns_step(R, POINT_LOCK_WAIT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the store is done over a new leaf")
    return 0


cdef inline int c10_processor_sets_bits(World *w) noexcept nogil:
    """The processor sets A in a leaf that is being zapped: its exchange fails and it faults; the flush waits for it."""
    cdef uint64_t index
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    index = leaf_index(w, 0, GVA, 1)
    spte_write(spte_at(w.vm, index), spte_read(spte_at(w.vm, index)) & ~PT_ACCESSED_MASK)
    touches(w, R, 0, GVA, 0)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_BITS_SET) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_LOCK_WAIT):
        return 1
    expect(w, spte_read(spte_at(w.vm, index)) == 0, b"A came too late and is not stored into an empty entry")
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"the access succeeds over a new leaf")
    return 0


cdef inline int c11_page_unlinked(World *w) noexcept nogil:
    """non-leaf to empty: a reader went through the old link; the page behind it is not freed before it left."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, shrink_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_UNLINKED) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    expect(w, turns_met(W, POINT_FREED) == 0, b"nothing is freed while the reader may hold it")
    if turns_step(R, POINT_END) or turns_step(W, POINT_FLUSHED) or turns_step(W, POINT_FREED):
        return 1
    if turns_step(W, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and spte_present(w.walker[R].sptes[1]), b"the old link and the old leaf were seen")
    return 0


cdef inline int c11_empty_seen(World *w) noexcept nogil:
    """The same, read after: the walk ends at the empty entry."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, shrink_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_UNLINKED) or turns_step(R, POINT_WALK_LEFT):
        return 1
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf > 1 and w.walker[R].sptes[w.walker[R].leaf] == 0, b"the walk ends where the link was")
    return 0


cdef inline int c12_collapse(World *w) noexcept nogil:
    """non-leaf to huge: the table is REMOVED first, then freed, and only a later fault makes the huge leaf."""
    map_gva(w, GVA, EXTRA_GPA)
    extra_create(w, MEM_LOG_DIRTY_PAGES)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    walks(w, R, 0, EXTRA_GPA)
    turns_thread(W, unlog_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_TDP_REMOVED) or turns_step(R, POINT_WALK_READ):
        return 1
    expect(w, w.walker[R].leaf == 0, b"the reader has not left")
    if turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 2 and w.walker[R].sptes[2] == REMOVED_SPTE, b"neither a table nor a leaf")
    world_access(w.vcpu[0], GVA, 0)
    expect(w, spte_is_last(spte_read(spte_at(w.vm, leaf_index(w, 0, EXTRA_GPA, 2))), 2), b"huge at the next fault")
    return 0


cdef inline int c12_old_table(World *w) noexcept nogil:
    """The same, read before: the old table is memory until the reader left."""
    map_gva(w, GVA, EXTRA_GPA)
    extra_create(w, MEM_LOG_DIRTY_PAGES)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    walks(w, R, 0, EXTRA_GPA)
    turns_thread(W, unlog_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_TDP_REMOVED) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and spte_present(w.walker[R].sptes[1]), b"the small leaf was seen")
    return 0


cdef inline int c13_split(World *w) noexcept nogil:
    """huge to non-leaf: the reader sees the one or the other, and both translate the same."""
    cdef uint64_t pfn
    map_gva(w, GVA, EXTRA_GPA + 5 * 4096)
    extra_create(w, 0)
    world_access(w.vcpu[0], GVA, PFERR_WRITE)
    pfn = slot_pfn(w.vm.slot_by_id[0][1], (EXTRA_GPA >> 12) + 5)
    walks(w, R, 0, EXTRA_GPA + 5 * 4096)
    walks(w, 2, 1, EXTRA_GPA + 5 * 4096)
    world_access(w.vcpu[1], GVA, 0)
    turns_thread(W, log_main, w)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_TDP_SET) or turns_step(R, POINT_WALK_READ):
        return 1
    if turns_step(2, POINT_WALK_MARKED) or turns_step(W, POINT_DRAIN_WAIT) or turns_step(2, POINT_END):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 2 and spte_pfn(&w.vm.masks, w.walker[R].sptes[2]) == pfn - 5,
           b"before: the huge leaf")
    expect(w, w.walker[2].leaf == 1 and spte_pfn(&w.vm.masks, w.walker[2].sptes[1]) == pfn,
           b"after: the small one, same frame")
    return 0


cdef inline int c14_other_table(World *w) noexcept nogil:
    """non-leaf to another non-leaf: never at once; a reader in between finds the entry empty."""
    cdef uint64_t before
    ram_word(w, gpte_gpa(w, LARGE, 2))[0] = DATA | RW_TABLE | PT_PAGE_SIZE_MASK
    # Not dirty, so what is built first may not be written; the store below needs another direct table.
    world_access(w.vcpu[0], LARGE, 0)
    world_access(w.vcpu[1], LARGE, 0)
    before = spte_read(spte_at(w.vm, leaf_index(w, 0, LARGE, 2)))
    walks(w, R, 0, LARGE)
    touches(w, W, 1, LARGE, PFERR_WRITE)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_UNLINKED) or turns_step(R, POINT_WALK_READ):
        return 1
    if turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 2 and w.walker[R].sptes[2] == 0, b"empty in between")
    expect(w, spte_read(spte_at(w.vm, leaf_index(w, 0, LARGE, 2))) != before, b"another table now")
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the store is done")
    return 0


cdef inline int c29_request_follows_invalidation(World *w) noexcept nogil:
    """Roots are invalid before vCPUs are asked to drop them: who serves the request at once finds them so.

    The other way round a vCPU would look, find nothing, and fault for ever in a root that turns invalid after.
    """
    map_gva(w, GVA, DATA)
    extra_create(w, 0)
    world_access(w.vcpu[0], GVA, 0)
    touches(w, R, 0, GVA, 0)
    turns_thread(W, delete_main, w)
    if turns_step(W, POINT_ROOTS_REQUESTED) or turns_step(R, POINT_LOCK_WAIT) or turns_step(W, POINT_SLOT_ZAPPED):
        return 1
    if turns_step(R, POINT_END) or turns_step(W, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK, b"a new root serves the access")
    return 0


cdef inline int r7_zapped_before_walk(World *w) noexcept nogil:
    """Review remark 7: another CPU zaps the table between the processor's fault and KVM's walk: retried, no bug."""
    map_gva(w, GVA, MMIO_GPA)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    turns_thread(W, shrink_main, w)
    if turns_step(R, POINT_EXIT) or turns_step(W, POINT_UNLINKED) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_WALK_READ) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[R].a.outcome == OUTCOME_MMIO, b"MMIO in the end")
    expect(w, w.toucher[R].a.exits == 2, b"the first exit was resumed, the second built the spte anew")
    return 0


cdef inline int r7_remapped_before_walk(World *w) noexcept nogil:
    """Review remark 7: the guest remaps the address to RAM on another vCPU after the processor faulted.

    The store hits a shadowed table and takes the mmio spte with it, so the walk finds no mmio and tries again.
    """
    cdef uint64_t value = DATA | FLAGS
    map_gva(w, GVA, MMIO_GPA)
    map_gva(w, WINDOW, gpte_gpa(w, GVA, 1) & ~<uint64_t>4095)
    world_access(w.vcpu[0], GVA, 0)
    w.vcpu[0].mmio.gva = 0
    touches(w, R, 0, GVA, 0)
    w.toucher[W].vcpu = w.vcpu[1]
    w.toucher[W].gva = WINDOW + (gpte_gpa(w, GVA, 1) & 4095)
    w.toucher[W].access = value
    turns_thread(W, store_main, &w.toucher[W])
    if turns_step(R, POINT_EXIT) or turns_step(W, POINT_UNSYNC) or turns_step(W, POINT_END):
        return 1
    vcpu_invlpg(w.vcpu[1], GVA)
    if turns_step(R, POINT_WALK_READ) or turns_step(R, POINT_END):
        return 1
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the guest's store is done")
    expect(w, w.toucher[R].a.outcome == OUTCOME_OK and w.toucher[R].a.gpa == DATA, b"RAM, where the guest says it is")
    return 0
