# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The access an exit could not map, carried out by KVM: MMIO, read-only slots, shadowed tables."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FAULT_GP, permission_fault
from kvmmmu.engine.atomics cimport guest_load, guest_store
from kvmmmu.engine.events cimport MMIO_WRITE, ev_inj_exception, ev_match_mmio, ev_mmio
from kvmmmu.engine.guest cimport guest_walk
from kvmmmu.engine.hooks cimport POINT_STORED, hook
from kvmmmu.engine.hostpages cimport host_read, host_write
from kvmmmu.engine.lookup cimport slot_mark_dirty, vcpu_slot
from kvmmmu.engine.memslots cimport slot_host, slot_visible
from kvmmmu.engine.mmiocache cimport mmio_match_gpa, mmio_match_gva
from kvmmmu.engine.pfns cimport slot_readonly
from kvmmmu.engine.roles cimport is_paging
from kvmmmu.engine.roots cimport invlpg_root
from kvmmmu.engine.state cimport (
    Access, OUTCOME_GP, OUTCOME_INTERNAL_ERROR, OUTCOME_MMIO, OUTCOME_OK, OUTCOME_PF, OUTCOME_SHUTDOWN,
    SUBERROR_EMULATION, Slot, VSTAT_INSN_EMULATION,
    VSTAT_INSN_EMULATION_FAIL, VSTAT_MMIO_EXITS, VSTAT_PF_GUEST, Vcpu,
)
from kvmmmu.engine.tlbflush cimport tlb_flush_gva
from kvmmmu.engine.write cimport track_write

cdef enum:
    PIECE_MEMORY = 0
    PIECE_MMIO = 1
    PIECE_FAULT = 2

cdef enum:
    DF_VECTOR = 8
    PF_VECTOR = 14


cdef inline void inject_guest_fault(Vcpu *vcpu, uint64_t gva, Access *out) noexcept nogil:
    """Deliver the fault of ``vcpu.walk``.

    A permission fault drops the address from the current root first: an unsync leaf that
    still allows less than the guest's table would fault for ever.
    """
    cdef uint64_t code = vcpu.walk.error_code
    out.fault_gva = gva
    if vcpu.walk.fault == FAULT_GP:
        out.outcome = OUTCOME_GP
        out.error_code = 0
        return
    out.outcome = OUTCOME_PF
    out.error_code = code
    vcpu.written_times = 0
    if vcpu.guest_mode:
        # A nested page fault: an exit to L1, no exception of the guest that runs.
        out.error_code = code | PFERR_GUEST_FINAL
        return
    if (code & PFERR_PRESENT and not code & PFERR_RSVD and not vcpu.root_role & ROLE_DIRECT
            and not vcpu.vm.switches.era & ERA_FAULT_KEEPS):
        tlb_flush_gva(vcpu, gva)
        invlpg_root(vcpu, vcpu.root.page, gva)
    vcpu.stats[<int>VSTAT_PF_GUEST] += 1
    # A page fault while one is delivered is a double fault, and beyond that the guest is shut down.
    if vcpu.vectoring == DF_VECTOR:
        out.outcome = OUTCOME_SHUTDOWN
    elif vcpu.vectoring == PF_VECTOR:
        ev_inj_exception(vcpu.vm, vcpu.id, DF_VECTOR, True, 0, False)
    else:
        ev_inj_exception(vcpu.vm, vcpu.id, PF_VECTOR, True, code, False)


cdef inline bint mmio_cache_permits(Vcpu *vcpu, uint64_t access) noexcept nogil:
    """The record's rights allow the access."""
    cdef bint user = (access & PFERR_USER) != 0
    if vcpu.vm.switches.era & ERA_CACHE_SIMPLE:
        if access & PFERR_WRITE and not vcpu.mmio.access & ACC_W and (user or vcpu.regs.cr0 & CR0_WP):
            return False
        return not user or vcpu.mmio.access & ACC_U != 0
    return (not is_paging(vcpu)
            or not permission_fault(&vcpu.guest, access, vcpu.mmio.access | ACC_X, vcpu.ac, 0))


cdef inline int piece_gpa(Vcpu *vcpu, uint64_t gva, uint64_t access, uint64_t known_gpa, uint64_t *gpa) noexcept nogil:
    """Where one piece of an access goes.  ``known_gpa`` (all ones: none) is the address the exit gave."""
    cdef bint write = (access & PFERR_WRITE) != 0
    if known_gpa != ALL_ONES and not (known_gpa ^ gva) & 4095 and not vcpu.vm.switches.era & ERA_NO_SHORTCUT:
        gpa[0] = known_gpa
    elif mmio_match_gva(vcpu, gva) and not access & PFERR_FETCH and mmio_cache_permits(vcpu, access):
        gpa[0] = (vcpu.mmio.gfn << 12) | (gva & 4095)
        ev_match_mmio(vcpu.vm, vcpu.id, gva, gpa[0], write, False)
        return PIECE_MMIO
    elif guest_walk(vcpu, &vcpu.walk, gva, access):
        gpa[0] = vcpu.walk.gpa
    else:
        return PIECE_FAULT
    if gpa[0] >> 12 == APIC_DEFAULT_GFN:
        return PIECE_MMIO
    if mmio_match_gpa(vcpu, gpa[0]):
        ev_match_mmio(vcpu.vm, vcpu.id, gva, gpa[0], write, True)
        return PIECE_MMIO
    return PIECE_MEMORY


cdef inline bint piece_memory(Vcpu *vcpu, uint64_t gpa, uint64_t access, int size, uint8_t *data) noexcept nogil:
    """Touch guest memory inside one page.  False: no memory takes it, so it is MMIO."""
    cdef Slot *slot = vcpu_slot(vcpu, gpa >> 12)
    cdef uint8_t *host
    if not slot_visible(slot):
        return False
    host = slot_host(slot, gpa >> 12) + (gpa & 4095)
    if not access & PFERR_WRITE:
        host_read(vcpu.vm, slot, gpa >> 12)
        if data != NULL:
            guest_load(data, host, <unsigned>size)
        return True
    if slot_readonly(slot):
        return False
    host_write(vcpu.vm, slot, gpa >> 12)
    if data != NULL:
        guest_store(host, data, <unsigned>size)
    slot_mark_dirty(slot, gpa >> 12)
    hook(vcpu, POINT_STORED)
    track_write(vcpu, gpa, size)
    return True


cdef inline int emulate_transfer(Vcpu *vcpu, uint64_t gva, uint64_t access, int size, uint8_t *data,
                                 uint64_t known_gpa, Access *out) noexcept nogil:
    """Move one operand, split where it crosses a page; the worst PIECE_* met.

    Pieces that no memory takes are listed in ``out``, for the caller to complete; none is when
    a later piece faults, so a fault in the second page hides the first.
    """
    cdef int done = 0, now, kind, shown
    cdef uint64_t gpa = 0, value = 0, here
    cdef bint whole = (vcpu.vm.switches.era & ERA_MMIO_WHOLE) != 0
    out.n_mmio = 0
    while done < size:
        here = (gva + <uint64_t>done) & vcpu.guest.va_mask
        now = size - done
        if now > 4096 - <int>(here & 4095):
            now = 4096 - <int>(here & 4095)
        if done and whole and not access & PFERR_WRITE:
            kind = PIECE_MEMORY if guest_walk(vcpu, &vcpu.walk, here, access) else PIECE_FAULT
            gpa = vcpu.walk.gpa
        else:
            kind = piece_gpa(vcpu, here, access, known_gpa, &gpa)
            if kind == PIECE_MEMORY and whole and not access & PFERR_WRITE:
                # Linux 3.1 first asks whether this is MMIO, then reads by address: two walks.
                guest_walk(vcpu, &vcpu.walk, here, access)
        if kind == PIECE_FAULT:
            # (Linux 3.1 forgets the first page's exit as well, but not what was stored there.)
            out.n_mmio = 0
            out.fault_gva = here
            return PIECE_FAULT
        if done == 0:
            out.gpa = gpa
        if kind == PIECE_MMIO or not piece_memory(vcpu, gpa, access, now, NULL if data == NULL else data + done):
            if whole and not access & PFERR_WRITE:
                # One exit from the first byte on; what the second page is nobody asks.
                if done:
                    gpa = out.gpa
                    done = 0
                now = size
            if whole:
                out.n_mmio = 0
            out.mmio_gpa[out.n_mmio] = gpa
            out.mmio_size[out.n_mmio] = <uint8_t>now
            out.mmio_offset[out.n_mmio] = <uint8_t>done
            out.n_mmio += 1
            if access & PFERR_WRITE and data != NULL:
                # Traced as it is queued, even if a later piece faults and nothing leaves.
                # The tracepoint has room for eight bytes of however wide a store.
                value = 0
                # (Linux 3.1 shows what follows the piece as well.)
                shown = size - done if whole else now
                memcpy(&value, data + done, shown if shown < 8 else 8)
                ev_mmio(vcpu.vm, vcpu.id, MMIO_WRITE, now, gpa, value)
        done += now
    if out.n_mmio:
        out.outcome = OUTCOME_MMIO
        vcpu.stats[<int>VSTAT_MMIO_EXITS] += 1
        return PIECE_MMIO
    return PIECE_MEMORY


cdef inline void emulate_access(Vcpu *vcpu, uint64_t gva, uint64_t access, int size, uint8_t *data,
                                uint64_t known_gpa, Access *out) noexcept nogil:
    """Carry out a bare load, store or fetch of the guest, whose instruction is not known."""
    vcpu.stats[<int>VSTAT_INSN_EMULATION] += 1
    out.outcome = OUTCOME_OK
    if access & PFERR_FETCH:
        # KVM reads the instruction by the guest's tables: it may find that the guest faults, a table of its own
        # being what no memory holds.  Else there is nothing to decode where no memory is.
        if not guest_walk(vcpu, &vcpu.walk, gva, access):
            inject_guest_fault(vcpu, gva, out)
            return
        vcpu.stats[<int>VSTAT_INSN_EMULATION_FAIL] += 1
        out.outcome = OUTCOME_INTERNAL_ERROR
        out.suberror = SUBERROR_EMULATION
        return
    if emulate_transfer(vcpu, gva, access, size, data, known_gpa, out) == PIECE_FAULT:
        inject_guest_fault(vcpu, out.fault_gva, out)
