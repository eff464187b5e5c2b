# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Bringing unsync shadow pages in line with the guest tables behind them."""

from libc.stdint cimport int16_t, int32_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.mmio cimport mmio_spte_gfn
from kvmmmu.bits.paging cimport FMT_32, Paging
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_is_mmio, spte_pfn, spte_present
from kvmmmu.engine.guest cimport gpte_gfn, gpte_load, guest_host_atomic
from kvmmmu.engine.leaf cimport leaf_make, leaf_mark_mmio
from kvmmmu.engine.lookup cimport vcpu_slot, vm_slot
from kvmmmu.engine.pages cimport (
    level_index, page_at, role_as_id, role_level, spte_at, spte_gfn, spte_set_shadowed, unsync_bit_clear,
)
from kvmmmu.engine.prefetch cimport gpte_clean_access, gpte_unusable, page_gpte_gpa, prefetch_gpte
from kvmmmu.engine.sptes cimport spte_drop, spte_read, spte_update, spte_write, spte_zap
from kvmmmu.engine.state cimport PageList, ShadowPage, Slot, Vcpu, Vm
from kvmmmu.engine.tlb cimport flush_own_tlb, flush_remote_tlbs
from kvmmmu.engine.track cimport write_protect_gfn
from kvmmmu.engine.zap cimport list_init, page_unmark_unsync, unsync_child, unsync_next, zap_commit, zap_prepare

cdef enum:
    BATCH_PATH = 16   # path entries gathered before their pages are synchronised

cdef struct SyncBatch:
    # Unsync leaves under one page, each with the way down to it.
    int used           # path entries, shared parents counted once
    int n
    int32_t leaf[16]
    int32_t parent[16][6]   # [level] page on the way, 0 above the start
    int16_t entry[16][6]    # [level] its entry
    int32_t way_page[6]     # the way being walked
    int16_t way_entry[6]


cdef inline int sync_spte(Vcpu *vcpu, const ShadowPage *sp, uint64_t index, uint64_t gpte) noexcept nogil:
    """One entry against its guest entry.  1: a flush is owed.

    Linux 6.1 rewrites every entry as if prefetched, so A always falls.
    """
    cdef Vm *vm = vcpu.vm
    cdef const Paging *p = &vcpu.guest
    cdef uint64_t *sptep = spte_at(vm, index)
    cdef uint64_t spte, gfn, new_ = 0
    cdef uint32_t access
    cdef Slot *slot
    if gpte_unusable(vm, p, index, gpte):
        return 1
    gfn = gpte_gfn(p, gpte)
    access = gpte_clean_access(sp, p.format, gpte)
    spte = spte_read(sptep)
    if spte_is_mmio(&vm.masks, spte):
        if mmio_spte_gfn(&vm.masks, spte) != gfn:
            spte_write(sptep, 0)
        else:
            leaf_mark_mmio(vcpu, index, gfn, access)
        return 0
    slot = vcpu_slot(vcpu, gfn)
    if slot == NULL or not access and not vm.masks.present or gfn != spte_gfn(vm, index):
        spte_drop(vm, index)
        return 1
    spte_set_shadowed(vm, index, gfn, access)
    leaf_make(vm, vcpu.id, sp, slot, access, gfn, spte_pfn(&vm.masks, spte), spte, True, False,
              (spte & vm.masks.host_writable) != 0, &new_)
    return spte_update(vm, sptep, new_)


cdef inline int sync_page(Vcpu *vcpu, int32_t id) noexcept nogil:
    """-1: cannot be synchronised, zap it; 0; 1: a flush is owed.

    Every non-empty entry is visited, mmio sptes too.
    """
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, id)
    cdef uint64_t base = <uint64_t>id << 9
    cdef uint32_t ignored = (ROLE_LEVEL_MASK | ROLE_ACCESS_MASK | ROLE_QUADRANT_MASK | ROLE_PASSTHROUGH)
    cdef int i, flush = 0
    cdef bint empty = True
    cdef uint64_t spte
    cdef int size = 2 if vcpu.guest.format == FMT_32 else 3
    cdef uint8_t *host = NULL
    if vm.switches.era & ERA_LOOKUP_SYNCS:
        # Linux 3.1 compares the size of the guest's entries alone.
        ignored = ~ROLE_4BYTE_GPTE
    if (sp.role ^ vcpu.root_role) & ~ignored:
        return -1
    for i in range(ENTRIES):
        spte = spte_read(spte_at(vm, base + <uint64_t>i))
        if spte == 0 or vm.switches.era & ERA_MMIO_SURVIVES and spte_is_mmio(&vm.masks, spte):
            continue
        if host == NULL:
            # The guest's entries stand in one page: its slot is looked for once.
            host = guest_host_atomic(vcpu, page_gpte_gpa(sp, 0, vcpu.guest.format))
            if host == NULL:
                return -1
        flush |= sync_spte(vcpu, sp, base + <uint64_t>i, gpte_load(vcpu.guest.format, host + (i << size)))
        empty &= spte_read(spte_at(vm, base + <uint64_t>i)) == 0
    return -1 if empty and vm.switches.era & ERA_SYNC_EMPTY_ZAPS else flush

cdef inline int sync_or_zap(Vcpu *vcpu, int32_t id, PageList *invalid) noexcept nogil:
    cdef int result = sync_page(vcpu, id)
    if result < 0:
        zap_prepare(vcpu.vm, vcpu.id, id, invalid)
    return result


cdef inline bint batch_gather(Vm *vm, int32_t id, SyncBatch *b) noexcept nogil:
    """Collect unsync pages below ``id`` in index order.  False: the batch is full."""
    cdef int level = role_level(page_at(vm, id).role)
    cdef int i = unsync_next(vm, id, 0), j, k
    cdef int32_t child
    cdef bint known
    while i < ENTRIES:
        child = unsync_child(vm, id, i)
        if child:
            b.way_page[level] = id
            b.way_entry[level] = <int16_t>i
            if page_at(vm, child).unsync_children:
                b.used += 1
                if b.used == BATCH_PATH:
                    return False
                if not batch_gather(vm, child, b):
                    return False
            else:
                known = False
                for j in range(b.n):
                    known |= b.leaf[j] == child
                if not known:
                    j = b.n
                    b.leaf[j] = child
                    for k in range(6):
                        b.parent[j][k] = b.way_page[k]
                        b.entry[j][k] = b.way_entry[k]
                    b.n += 1
                    b.used += 1
                    if b.used == BATCH_PATH:
                        return False
        i = unsync_next(vm, id, i + 1)
    return True

cdef inline void batch_clear_parents(Vm *vm, const SyncBatch *b, int j) noexcept nogil:
    cdef int level = 2
    while level < 6 and b.parent[j][level]:
        unsync_bit_clear(vm, b.parent[j][level], b.entry[j][level])
        if page_at(vm, b.parent[j][level]).unsync_children:
            return
        level += 1


cdef inline void sync_children(Vcpu *vcpu, int32_t id) noexcept nogil:
    """Synchronise every unsync page below ``id``.

    Per batch: all gfns are write-protected first (one flush if anything changed), then
    each page is marked in sync and rewritten, then one flush if any rewrite needs it.
    """
    cdef Vm *vm = vcpu.vm
    cdef SyncBatch b
    cdef PageList invalid
    cdef ShadowPage *sp
    cdef Slot *slot
    cdef bint changed, flush
    cdef int j, level, result
    while page_at(vm, id).unsync_children:
        b.used = 1
        b.n = 0
        for level in range(6):
            b.way_page[level] = 0
            b.way_entry[level] = 0
        batch_gather(vm, id, &b)
        if b.n == 0:
            continue
        list_init(&invalid)
        changed = False
        for j in range(b.n):
            sp = page_at(vm, b.leaf[j])
            slot = vm_slot(vm, role_as_id(sp.role), sp.gfn)
            if slot != NULL:
                changed |= write_protect_gfn(vm, slot, sp.gfn, LEVEL_4K)
        flush = changed
        if changed:
            flush_remote_tlbs(vm)
            flush = False
        for j in range(b.n):
            if page_at(vm, b.leaf[j]).unsync:
                page_unmark_unsync(vm, vcpu.id, b.leaf[j])
                result = sync_or_zap(vcpu, b.leaf[j], &invalid)
                flush |= result > 0
                if result >= 0 and vm.switches.era & ERA_COUNT_OLD:
                    flush_own_tlb(vcpu)
            batch_clear_parents(vm, &b, j)
        if invalid.head:
            zap_commit(vm, &invalid)
        elif flush:
            flush_remote_tlbs(vm)


cdef inline uint64_t sync_gva(Vcpu *vcpu, int32_t table, int level, uint64_t gva) noexcept nogil:
    """INVLPG in one root: drop the leaf of an unsync page and map what the guest says now.

    A page in sync cannot be stale, so nothing below it is touched.  Where the entry itself is to be taken anew by
    every page of its table (2011), its address comes back; else all ones.
    """
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp
    cdef uint64_t index, spte
    cdef uint8_t *host
    while True:
        sp = page_at(vm, table)
        index = (<uint64_t>table << 9) + <uint64_t>level_index(gva, level)
        spte = spte_read(spte_at(vm, index))
        if level == LEVEL_4K or spte_present(spte) and spte_is_last(spte, level):
            if not sp.unsync:
                return ALL_ONES
            if vm.switches.era & ERA_INVLPG_REWRITES:
                if spte_present(spte) or not vm.switches.era & ERA_MMIO_SURVIVES:
                    if spte_zap(vm, index):
                        flush_remote_tlbs(vm)
                elif spte:
                    return ALL_ONES
                return page_gpte_gpa(sp, <int>(index & 511), vcpu.guest.format)
            host = guest_host_atomic(vcpu, page_gpte_gpa(sp, <int>(index & 511), vcpu.guest.format))
            if spte_zap(vm, index):
                flush_remote_tlbs(vm)
            if host != NULL:
                prefetch_gpte(vcpu, index, gpte_load(vcpu.guest.format, host), True)
            return ALL_ONES
        if not sp.unsync_children or not spte_present(spte):
            return ALL_ONES
        table = spte_child(spte)
        level -= 1
