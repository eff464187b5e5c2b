# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Tracepoints: one helper per event, each a test of the mask when it is off.

The words of every kind are fixed here and rendered by ``kvmmmu/events.py``.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport SpteMasks, spte_executable
from kvmmmu.engine.state cimport *
from kvmmmu.engine.atomics cimport (cmpxchg_u64, fetch_add_u64, ld_acquire_u32, ld_acquire_u64, ld_u64,
                                    st_release_u32, st_release_u64)

cdef enum:
    EVENT_SHIFT_CREATED = 1
    EVENT_SHIFT_GEN = 8
    ISA_VMX = 1
    ISA_SVM = 2
    MMIO_READ_UNSATISFIED = 0
    MMIO_READ = 1
    MMIO_WRITE = 2


cdef inline bint event_on(const Vm *vm, int kind) noexcept nogil:
    """The whole cost of an event that nobody watches."""
    return (vm.events.mask >> kind) & 1


cdef inline void event_emit(Vm *vm, uint32_t vcpu_id, uint32_t kind, uint64_t w0, uint64_t w1, uint64_t w2, uint64_t w3,
                            uint64_t w4, uint64_t w5, uint64_t w6) noexcept nogil:
    """Record, if wanted."""
    # Apart from the rest, so that the compiler puts the test, and no call, where nobody watches.
    if event_on(vm, kind):
        event_record(vm, vcpu_id, kind, w0, w1, w2, w3, w4, w5, w6)


cdef inline void event_record(Vm *vm, uint32_t vcpu_id, uint32_t kind, uint64_t w0, uint64_t w1, uint64_t w2,
                              uint64_t w3, uint64_t w4, uint64_t w5, uint64_t w6) noexcept nogil:
    """If there is room; writers never wait for each other or for the reader."""
    cdef EventRing *ring = &vm.events
    cdef uint64_t at
    cdef Event *e
    while True:
        at = ld_u64(&ring.head)
        if at - ld_acquire_u64(&ring.tail) >= ring.capacity:
            fetch_add_u64(&ring.dropped, 1)
            return
        if cmpxchg_u64(&ring.head, at, at + 1):
            break
    e = &ring.ring[at & (ring.capacity - 1)]
    e.vcpu = vcpu_id
    e.w[0] = w0
    e.w[1] = w1
    e.w[2] = w2
    e.w[3] = w3
    e.w[4] = w4
    e.w[5] = w5
    e.w[6] = w6
    # The reader takes a record when its kind is there.
    st_release_u32(&e.kind, kind)


# ---- shadow pages: gfn, role | root_count << 32, unsync | created << 1 | generation << 8 -----

cdef inline void event_page(Vm *vm, uint32_t vcpu_id, uint32_t kind, int32_t page_id, bint created) noexcept nogil:
    cdef const ShadowPage *page
    cdef uint64_t flags
    if not event_on(vm, kind):
        return
    page = &vm.arena.page[page_id]
    flags = (1 if page.unsync else 0) | (<uint64_t>(1 if created else 0) << EVENT_SHIFT_CREATED)
    # Pages of the TDP MMU carry no generation.
    if not page.tdp:
        flags |= <uint64_t>page.valid_gen << EVENT_SHIFT_GEN
    event_emit(vm, vcpu_id, kind, page.gfn, page.role | <uint64_t><uint32_t>page.root_count << 32, flags, 0, 0, 0, 0)

cdef inline void ev_get_page(Vm *vm, uint32_t vcpu_id, int32_t page_id, bint created) noexcept nogil:
    event_page(vm, vcpu_id, EV_KVM_MMU_GET_PAGE, page_id, created)

cdef inline void ev_sync_page(Vm *vm, uint32_t vcpu_id, int32_t page_id) noexcept nogil:
    event_page(vm, vcpu_id, EV_KVM_MMU_SYNC_PAGE, page_id, False)

cdef inline void ev_unsync_page(Vm *vm, uint32_t vcpu_id, int32_t page_id) noexcept nogil:
    event_page(vm, vcpu_id, EV_KVM_MMU_UNSYNC_PAGE, page_id, False)

cdef inline void ev_prepare_zap_page(Vm *vm, uint32_t vcpu_id, int32_t page_id) noexcept nogil:
    event_page(vm, vcpu_id, EV_KVM_MMU_PREPARE_ZAP_PAGE, page_id, False)


# ---- guest walks ------------------------------------------------------------------------

cdef inline void ev_pagetable_walk(Vm *vm, uint32_t vcpu_id, uint64_t gva, uint64_t pferr) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_PAGETABLE_WALK, gva, pferr, 0, 0, 0, 0, 0)

cdef inline void ev_paging_element(Vm *vm, uint32_t vcpu_id, uint64_t gpte, int level) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_PAGING_ELEMENT, gpte, level, 0, 0, 0, 0, 0)

cdef inline void ev_set_accessed_bit(Vm *vm, uint32_t vcpu_id, uint64_t gpa) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_SET_ACCESSED_BIT, gpa, 0, 0, 0, 0, 0, 0)

cdef inline void ev_set_dirty_bit(Vm *vm, uint32_t vcpu_id, uint64_t gpa) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_SET_DIRTY_BIT, gpa, 0, 0, 0, 0, 0, 0)

cdef inline void ev_walker_error(Vm *vm, uint32_t vcpu_id, uint64_t pferr) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_WALKER_ERROR, pferr, 0, 0, 0, 0, 0, 0)


# ---- sptes: ``sptep`` is the spte's index in the arena -----------------------------------

cdef inline void ev_set_spte(Vm *vm, uint32_t vcpu_id, uint64_t gfn, uint64_t spte, uint64_t sptep,
                             int level) noexcept nogil:
    """Words: gfn, spte, sptep, level, r | x << 1 | u << 2 | (there is a user bit) << 3."""
    cdef const SpteMasks *m = &vm.masks
    cdef uint64_t rights
    if not event_on(vm, EV_KVM_MMU_SET_SPTE):
        return
    # Without a present mask (EPT with execute-only) the entry itself says whether it can be read.
    rights = 1 if m.present or spte & PT_PRESENT_MASK else 0
    if spte_executable(m, spte):
        rights |= 2
    if m.user:
        rights |= 8
        if spte & m.user:
            rights |= 4
    event_emit(vm, vcpu_id, EV_KVM_MMU_SET_SPTE, gfn, spte, sptep, level, rights, 0, 0)

cdef inline void ev_spte_requested(Vm *vm, uint32_t vcpu_id, uint64_t gfn, uint64_t pfn, int level) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_SPTE_REQUESTED, gfn, pfn, level, 0, 0, 0, 0)

cdef inline void ev_tdp_spte_changed(Vm *vm, uint32_t vcpu_id, uint64_t gfn, uint64_t old_spte, uint64_t new_spte,
                                     int level, int as_id) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_TDP_MMU_SPTE_CHANGED, gfn, old_spte, new_spte, level, as_id, 0, 0)

cdef inline void ev_split_huge_page(Vm *vm, uint32_t vcpu_id, uint64_t gfn, uint64_t spte, int level,
                                    int err) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_MMU_SPLIT_HUGE_PAGE, gfn, spte, level, <uint64_t><int64_t>err, 0, 0, 0)

cdef inline void ev_zap_all_fast(Vm *vm, uint64_t valid_gen, uint64_t used_pages) noexcept nogil:
    """Both as they were before the zap."""
    event_emit(vm, ~<uint32_t>0, EV_KVM_MMU_ZAP_ALL_FAST, valid_gen, used_pages, 0, 0, 0, 0, 0)


# ---- faults and MMIO ----------------------------------------------------------------------

cdef inline void ev_page_fault(Vm *vm, uint32_t vcpu_id, uint64_t rip, uint64_t address,
                               uint64_t error_code) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_PAGE_FAULT, rip, address, error_code, 0, 0, 0, 0)

cdef inline void ev_fast_page_fault(Vm *vm, uint32_t vcpu_id, uint64_t gva, uint64_t error_code, uint64_t sptep,
                                    uint64_t old_spte, uint64_t new_spte, bint spurious, bint fixed) noexcept nogil:
    event_emit(vm, vcpu_id, EV_FAST_PAGE_FAULT, gva, error_code, sptep, old_spte, new_spte, spurious, fixed)

cdef inline void ev_mark_mmio_spte(Vm *vm, uint32_t vcpu_id, uint64_t sptep, uint64_t gfn, uint64_t access,
                                   uint64_t gen) noexcept nogil:
    event_emit(vm, vcpu_id, EV_MARK_MMIO_SPTE, sptep, gfn, access, gen, 0, 0, 0)

cdef inline void ev_handle_mmio(Vm *vm, uint32_t vcpu_id, uint64_t gva, uint64_t gfn, uint64_t access) noexcept nogil:
    event_emit(vm, vcpu_id, EV_HANDLE_MMIO_PAGE_FAULT, gva, gfn, access, 0, 0, 0, 0)

cdef inline void ev_check_mmio_spte(Vm *vm, uint32_t vcpu_id, uint64_t spte, uint64_t kvm_gen,
                                    uint64_t spte_gen) noexcept nogil:
    event_emit(vm, vcpu_id, EV_CHECK_MMIO_SPTE, spte, kvm_gen, spte_gen, 0, 0, 0, 0)

cdef inline void ev_match_mmio(Vm *vm, uint32_t vcpu_id, uint64_t gva, uint64_t gpa, bint write,
                               bint gpa_match) noexcept nogil:
    event_emit(vm, vcpu_id, EV_VCPU_MATCH_MMIO, gva, gpa, write, gpa_match, 0, 0, 0)

cdef inline void ev_mmio(Vm *vm, uint32_t vcpu_id, int type, int length, uint64_t gpa, uint64_t value) noexcept nogil:
    """``type``: MMIO_READ_UNSATISFIED, MMIO_READ or MMIO_WRITE."""
    event_emit(vm, vcpu_id, EV_KVM_MMIO, type, length, gpa, value, 0, 0, 0)


# ---- around the MMU -------------------------------------------------------------------------

cdef inline void ev_inj_exception(Vm *vm, uint32_t vcpu_id, int vector, bint has_error, uint64_t error_code,
                                  bint reinjected) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_INJ_EXCEPTION, vector, has_error, error_code, reinjected, 0, 0, 0)

cdef inline void ev_emulate_insn(Vm *vm, uint32_t vcpu_id, uint64_t csbase, uint64_t rip, const uint8_t *bytes,
                                 int length, int mode_bits, bint failed) noexcept nogil:
    """Words: csbase, rip, bytes 0..7, bytes 8..15, length, mode (0 real, 16, 32, 64), failed."""
    cdef uint64_t low = 0
    cdef uint64_t high = 0
    cdef int i
    if not event_on(vm, EV_KVM_EMULATE_INSN):
        return
    for i in range(length):
        if i < 8:
            low |= <uint64_t>bytes[i] << (8 * i)
        else:
            high |= <uint64_t>bytes[i] << (8 * (i - 8))
    event_emit(vm, vcpu_id, EV_KVM_EMULATE_INSN, csbase, rip, low, high, length, mode_bits, failed)

cdef inline void ev_exit(Vm *vm, uint32_t vcpu_id, uint32_t isa, uint64_t reason, uint64_t rip, uint64_t info1,
                         uint64_t info2, uint32_t intr, uint32_t err) noexcept nogil:
    event_emit(vm, vcpu_id, EV_KVM_EXIT, isa, reason, rip, info1, info2, intr, err)

cdef inline void ev_unmap_hva_range(Vm *vm, uint64_t start_hva, uint64_t end_hva) noexcept nogil:
    event_emit(vm, ~<uint32_t>0, EV_KVM_UNMAP_HVA_RANGE, start_hva, end_hva, 0, 0, 0, 0, 0)

cdef inline void ev_age_page(Vm *vm, uint64_t hva, uint64_t gfn, bint young) noexcept nogil:
    event_emit(vm, ~<uint32_t>0, EV_KVM_AGE_PAGE, hva, gfn, young, 0, 0, 0, 0)

cdef inline void ev_set_spte_hva(Vm *vm, uint64_t hva) noexcept nogil:
    event_emit(vm, ~<uint32_t>0, EV_KVM_SET_SPTE_HVA, hva, 0, 0, 0, 0, 0, 0)


# ---- the reader's side ------------------------------------------------------------------------

cdef inline uint64_t events_copy(EventRing *ring, Event *out, uint64_t room, bint consume) noexcept nogil:
    """Copy up to ``room`` finished records, oldest first; one reader at a time."""
    cdef uint64_t at = ring.tail
    cdef uint64_t head = ld_acquire_u64(&ring.head)
    cdef uint64_t n = 0
    cdef Event *e
    while at != head and n < room:
        e = &ring.ring[at & (ring.capacity - 1)]
        out[n].kind = ld_acquire_u32(&e.kind)
        if out[n].kind == EV_NONE:
            break
        out[n].vcpu = e.vcpu
        memcpy(out[n].w, e.w, sizeof(e.w))
        n += 1
        at += 1
        if consume:
            st_release_u32(&e.kind, EV_NONE)
            st_release_u64(&ring.tail, at)
    return n
