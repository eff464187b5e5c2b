# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""KVM's software walk of the guest's tables, over memslots.

The loop round the pure step: what is KVM's own here is where entries come from (a
visible slot, else "not present"), what it traces, and how A and D are written back.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport (
    FAULT_PF, WALK_FAULT, WALK_LEAF, WALK_NEXT, Walk, walk_begin, walk_finish, walk_step,
)
from kvmmmu.bits.paging cimport FMT_32, FMT_64, FMT_NONE, FMT_PAE, Paging, paging_pdptr_bad
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.atomics cimport cmpxchg_u32, cmpxchg_u64, ld_u32, ld_u64, ld_u8
from kvmmmu.engine.events cimport (
    ev_paging_element, ev_pagetable_walk, ev_set_accessed_bit, ev_set_dirty_bit, ev_walker_error,
)
from kvmmmu.engine.hooks cimport MUTANT_NO_REREAD, mutant
from kvmmmu.engine.hostpages cimport HOSTPAGE_ABSENT, HOSTPAGE_STATE, host_read, host_state, host_write
from kvmmmu.engine.lookup cimport slot_mark_dirty, vcpu_slot
from kvmmmu.engine.memslots cimport slot_host, slot_pfn, slot_visible
from kvmmmu.engine.pfns cimport slot_readonly
from kvmmmu.engine.state cimport Slot, VSTAT_GUEST_WALK, Vcpu


cdef inline uint8_t *guest_host(Vcpu *vcpu, uint64_t gpa) noexcept nogil:
    """Host address of a guest byte for KVM's own reads, or NULL."""
    cdef Slot *slot = vcpu_slot(vcpu, gpa >> 12)
    if not slot_visible(slot):
        return NULL
    host_read(vcpu.vm, slot, gpa >> 12)
    return slot_host(slot, gpa >> 12) + (gpa & 4095)

cdef inline uint8_t *guest_host_atomic(Vcpu *vcpu, uint64_t gpa) noexcept nogil:
    """The same for a reader that holds mmu_lock and may not wait: NULL too where the host has no page yet."""
    cdef Slot *slot = vcpu_slot(vcpu, gpa >> 12)
    if not slot_visible(slot):
        return NULL
    if (ld_u8(&vcpu.vm.host_states_used)
            and host_state(vcpu.vm, slot_pfn(slot, gpa >> 12)) & HOSTPAGE_STATE == HOSTPAGE_ABSENT):
        return NULL
    return slot_host(slot, gpa >> 12) + (gpa & 4095)

cdef inline uint64_t gpte_load(int fmt, const uint8_t *host) noexcept nogil:
    if fmt == FMT_32:
        return ld_u32(<const uint32_t *>host)
    return ld_u64(<const uint64_t *>host)

cdef inline bint gpte_cmpxchg(int fmt, uint8_t *host, uint64_t old, uint64_t new_) noexcept nogil:
    if fmt == FMT_32:
        return cmpxchg_u32(<uint32_t *>host, <uint32_t>old, <uint32_t>new_)
    return cmpxchg_u64(<uint64_t *>host, old, new_)

cdef inline uint32_t gpte_access(int fmt, uint64_t gpte) noexcept nogil:
    """ACC rights one present guest entry grants."""
    cdef uint32_t access = <uint32_t>(gpte & (PT_WRITABLE_MASK | PT_USER_MASK))
    if fmt == FMT_32 or not gpte & PT64_NX_MASK:
        access |= ACC_X
    return access

cdef inline uint64_t gpte_gfn(const Paging *p, uint64_t gpte) noexcept nogil:
    """gfn of a level-1 guest entry."""
    return (gpte & p.addr_mask) >> 12


cdef inline int guest_update_ad(Vcpu *vcpu, const Paging *p, Walk *w, bint write) noexcept nogil:
    """Set A on the path and D on the leaf of a written page.

    0 done; 1 an entry changed meanwhile: walk again.  A read-only slot is left alone.
    """
    cdef int level = w.top
    cdef uint64_t old, new_
    cdef uint8_t *host
    cdef Slot *slot
    while level >= w.level:
        old = w.entries[level]
        new_ = old
        if p.format != FMT_PAE or level < 3:
            if not old & PT_ACCESSED_MASK:
                ev_set_accessed_bit(vcpu.vm, vcpu.id, w.entry_gpas[level])
                new_ |= PT_ACCESSED_MASK
            if level == w.level and write and not old & PT_DIRTY_MASK:
                ev_set_dirty_bit(vcpu.vm, vcpu.id, w.entry_gpas[level])
                new_ |= PT_DIRTY_MASK
        if new_ != old:
            slot = vcpu_slot(vcpu, w.entry_gpas[level] >> 12)
            if not slot_visible(slot):
                return 1
            if not slot_readonly(slot):
                host_write(vcpu.vm, slot, w.entry_gpas[level] >> 12)
                host = slot_host(slot, w.entry_gpas[level] >> 12) + (w.entry_gpas[level] & 4095)
                if not gpte_cmpxchg(p.format, host, old, new_):
                    return 1
                slot_mark_dirty(slot, w.entry_gpas[level] >> 12)
                w.entries[level] = new_
        level -= 1
    return 0


cdef inline int guest_mark_early(Vcpu *vcpu, const Paging *p, Walk *w, int level, bint *refused) noexcept nogil:
    """Linux 3.1, after each entry: does it refuse the access, and if none did so far, its A bit is set.

    1: the entry changed meanwhile.  What a lower entry says comes first in the fault's code, but sets nothing more.
    """
    cdef uint64_t old = w.entries[level], access = w.access
    cdef bint user = (access & PFERR_USER) != 0
    cdef uint8_t *host
    cdef Slot *slot
    if p.format == FMT_PAE and level == 3:
        return 0
    if access & PFERR_WRITE and not old & PT_WRITABLE_MASK and (user or vcpu.regs.cr0 & CR0_WP):
        refused[0] = True
    if user and not old & PT_USER_MASK:
        refused[0] = True
    if access & PFERR_FETCH and p.format != FMT_32 and old & PT64_NX_MASK:
        refused[0] = True
    if refused[0] or old & PT_ACCESSED_MASK:
        return 0
    ev_set_accessed_bit(vcpu.vm, vcpu.id, w.entry_gpas[level])
    slot = vcpu_slot(vcpu, w.entry_gpas[level] >> 12)
    host_write(vcpu.vm, slot, w.entry_gpas[level] >> 12)
    host = slot_host(slot, w.entry_gpas[level] >> 12) + (w.entry_gpas[level] & 4095)
    if not gpte_cmpxchg(p.format, host, old, old | PT_ACCESSED_MASK):
        return 1
    slot_mark_dirty(slot, w.entry_gpas[level] >> 12)
    w.entries[level] = old | PT_ACCESSED_MASK
    return 0


cdef inline bint guest_walk_early(Vcpu *vcpu, const Paging *p, Walk *w, uint64_t gva, uint64_t access) noexcept nogil:
    """The walk as Linux 3.1 makes it: A bits on the way down."""
    cdef int state, level
    cdef uint8_t *host
    cdef uint64_t entry
    cdef bint refused, again
    while True:
        again = False
        refused = False
        state = walk_begin(p, w, gva, access, vcpu.ac)
        if p.format == FMT_PAE and state != WALK_FAULT or p.format == FMT_PAE and w.fault == FAULT_PF:
            ev_paging_element(vcpu.vm, vcpu.id, w.entries[3], 3)
        while state == WALK_NEXT and not again:
            level = w.level
            host = guest_host(vcpu, w.entry_gpa)
            entry = 0
            if host != NULL:
                entry = gpte_load(p.format, host)
                ev_paging_element(vcpu.vm, vcpu.id, entry, level)
            state = walk_step(p.format, p, w, entry)
            if state != WALK_FAULT:
                again = guest_mark_early(vcpu, p, w, level, &refused) != 0
        if again:
            continue
        if state == WALK_LEAF:
            state = walk_finish(p, w)
        if state == WALK_FAULT:
            return False
        # Only the leaf's D can be left.
        if guest_update_ad(vcpu, p, w, (access & PFERR_WRITE) != 0) == 0:
            return True


cdef inline int guest_walk_format(int fmt, Vcpu *vcpu, const Paging *p, Walk *w, uint64_t gva,
                                  uint64_t access) noexcept nogil:
    cdef int state
    cdef uint8_t *host
    cdef uint64_t entry
    while True:
        state = walk_begin(p, w, gva, access, vcpu.ac)
        if fmt == FMT_PAE and state != WALK_FAULT or fmt == FMT_PAE and w.fault == FAULT_PF:
            ev_paging_element(vcpu.vm, vcpu.id, w.entries[3], 3)
        while state == WALK_NEXT:
            host = guest_host(vcpu, w.entry_gpa)
            entry = 0
            if host != NULL:
                entry = gpte_load(fmt, host)
                ev_paging_element(vcpu.vm, vcpu.id, entry, w.level)
            # A table that no slot holds reads as "not present".
            state = walk_step(fmt, p, w, entry)
        if state == WALK_LEAF:
            state = walk_finish(p, w)
        if state == WALK_FAULT:
            return False
        if fmt == FMT_NONE or guest_update_ad(vcpu, p, w, (access & PFERR_WRITE) != 0) == 0:
            return True


cdef inline bint guest_pdpte_bad(const Vcpu *vcpu, uint64_t pdpte) noexcept nogil:
    """A PDPTE that KVM would not load."""
    if vcpu.vm.switches.era & ERA_PDPTE_LAX:
        pdpte &= ~(PT_ACCESSED_MASK | PT_DIRTY_MASK)
    return paging_pdptr_bad(pdpte, &vcpu.model)


cdef inline void pdptes_refresh(Vcpu *vcpu) noexcept nogil:
    """Take the four PDPTEs as they stand in memory, if the processor could load them."""
    cdef uint8_t *host = guest_host(vcpu, vcpu.regs.cr3 & bits_between(31, 5))
    cdef uint64_t loaded[4]
    cdef int i
    if host == NULL:
        return
    for i in range(4):
        loaded[i] = ld_u64(<const uint64_t *>host + i)
        if guest_pdpte_bad(vcpu, loaded[i]):
            return
    for i in range(4):
        vcpu.regs.pdptr[i] = loaded[i]
        vcpu.guest.pdptr[i] = loaded[i]


cdef inline bint guest_walk(Vcpu *vcpu, Walk *w, uint64_t gva, uint64_t access) noexcept nogil:
    """Translate for KVM.  False: ``w`` holds the #PF to inject.

    ``access`` may be a fault's whole error code: the tracepoint shows it so, the walk takes W, U and F.
    """
    cdef const Paging *p = &vcpu.guest
    cdef bint ok
    vcpu.stats[<int>VSTAT_GUEST_WALK] += 1
    if p.format == FMT_PAE and vcpu.vm.switches.era & ERA_PDPTES_FRESH and vcpu.vm.host.amd:
        pdptes_refresh(vcpu)
    # L1's nested tables see user accesses only.
    access |= p.final_access
    if p.format != FMT_NONE:
        ev_pagetable_walk(vcpu.vm, vcpu.id, gva, access)
    access &= PFERR_WRITE | PFERR_USER | PFERR_FETCH
    if vcpu.vm.switches.era & ERA_ACCESSED_EARLY and p.format != FMT_NONE:
        ok = guest_walk_early(vcpu, p, w, gva, access)
    elif p.format == FMT_64:
        ok = guest_walk_format(FMT_64, vcpu, p, w, gva, access)
    elif p.format == FMT_PAE:
        ok = guest_walk_format(FMT_PAE, vcpu, p, w, gva, access)
    elif p.format == FMT_32:
        ok = guest_walk_format(FMT_32, vcpu, p, w, gva, access)
    else:
        ok = guest_walk_format(FMT_NONE, vcpu, p, w, gva, access)
    if not ok:
        ev_walker_error(vcpu.vm, vcpu.id, w.error_code)
        return False
    return True


cdef inline bint gpte_changed(Vcpu *vcpu, const Walk *w, int level) noexcept nogil:
    """The guest rewrote the entry of ``level`` since the walk read it."""
    cdef uint8_t *host = guest_host_atomic(vcpu, w.entry_gpas[level])
    if mutant(vcpu.vm, MUTANT_NO_REREAD):
        return False
    return host == NULL or gpte_load(vcpu.guest.format, host) != w.entries[level]
