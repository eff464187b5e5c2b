# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One instruction with its memory operands: the processor's attempt, and KVM's emulator behind it.

What the emulator does besides moving data: it fetches the instruction by software, may resume
the guest instead ("unprotect and retry"), and leaves for user space at MMIO, to be continued.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk
from kvmmmu.bits.paging cimport FAULT_NONE
from kvmmmu.engine.atomics cimport cmpxchg_u32, cmpxchg_u64, guest_store
from kvmmmu.engine.emulate cimport PIECE_FAULT, PIECE_MEMORY, emulate_transfer, inject_guest_fault
from kvmmmu.engine.events cimport MMIO_READ, MMIO_READ_UNSATISFIED, ev_emulate_insn, ev_mmio
from kvmmmu.engine.guest cimport guest_host, guest_walk
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.hostpages cimport host_write
from kvmmmu.engine.lookup cimport slot_mark_dirty, vcpu_slot
from kvmmmu.engine.memslots cimport slot_host, slot_visible
from kvmmmu.engine.mmiocache cimport mmio_match_gpa, mmio_match_gva
from kvmmmu.engine.pfns cimport gfn_to_pfn, pfn_is_error, slot_readonly
from kvmmmu.engine.leaf cimport RET_PF_EMULATE
from kvmmmu.engine.roles cimport tdp_enabled
from kvmmmu.engine.state cimport (
    Access, INSN_ADD, INSN_CMPXCHG, INSN_FETCH, INSN_LOAD, INSN_MOVS, INSN_STORE, Insn, MmioExit, OUTCOME_HANG,
    OUTCOME_INTERNAL_ERROR, OUTCOME_MMIO, OUTCOME_OK, PATH_EMULATED, PATH_FAULT, SUBERROR_EMULATION, Slot,
    VSTAT_INSN_EMULATION, VSTAT_INSN_EMULATION_FAIL, Vcpu,
)
from kvmmmu.engine.vcpu cimport (
    MAX_EXITS, access_begin, access_move, enter_ends, exit_ends, guest_own_fault, handle_exit, hardware_access,
)
from kvmmmu.engine.write cimport track_write
from kvmmmu.engine.zap cimport unprotect_gfn

cdef enum:
    STEP_DONE = 0
    STEP_FAULT = 1    # ``out`` holds the guest's fault
    STEP_EXIT = 2     # an MMIO read waits for its data

cdef enum:
    ENDED = 0         # ``out`` says how
    DECODED = 1
    RESUME = 2        # the guest runs on from where it was

cdef struct Operand:
    # One translated memory operand, in up to two pieces.
    uint64_t hpa[2]
    int first         # bytes of the first piece


cdef inline uint64_t user_bit(const Vcpu *vcpu) noexcept nogil:
    return PFERR_USER if vcpu.cpl == 3 else 0

# ---- the processor ----------------------------------------------------------------

cdef inline int operand_translate(Vcpu *vcpu, uint64_t gva, uint64_t access, int size, Operand *o, uint64_t *here,
                                  Access *out) noexcept nogil:
    cdef uint64_t gpa = 0
    cdef int fault
    o.first = 4096 - <int>(gva & 4095)
    if o.first > size:
        o.first = size
    # Outside 64-bit code addresses have 32 bits; a direct fault would take the rest for a gfn.
    here[0] = gva & vcpu.guest.va_mask
    fault = hardware_access(vcpu, here[0], access, &gpa, &o.hpa[0])
    out.gpa = gpa
    if fault == FAULT_NONE and o.first < size:
        here[0] = (gva + <uint64_t>o.first) & vcpu.guest.va_mask
        fault = hardware_access(vcpu, here[0], access, &gpa, &o.hpa[1])
    return fault

cdef inline void operand_move(Vcpu *vcpu, const Operand *o, uint64_t access, int size, uint8_t *data) noexcept nogil:
    access_move(vcpu, o.hpa[0], access, o.first, data)
    if o.first < size:
        access_move(vcpu, o.hpa[1], access, size - o.first, data + o.first)


cdef inline uint64_t insn_mask(const Insn *insn) noexcept nogil:
    return ALL_ONES >> (64 - 8 * insn.size)

cdef inline uint64_t insn_compute(Insn *insn, uint64_t memory) noexcept nogil:
    """What the instruction stores, given what its memory operand holds."""
    if insn.op == INSN_ADD:
        return (memory + insn.value) & insn_mask(insn)
    if insn.op == INSN_CMPXCHG:
        insn.result = memory
        # A failed compare writes back what it saw.
        return insn.value if memory == insn.expected & insn_mask(insn) else memory
    if insn.op == INSN_MOVS:
        return memory
    return insn.value


cdef inline int hardware_insn(Vcpu *vcpu, Insn *insn, uint64_t *here, Access *out) noexcept nogil:
    """Try it as the processor does: nothing is stored unless every operand translates."""
    cdef uint64_t user = user_bit(vcpu), memory = 0, stored
    cdef Operand src, dst
    cdef int fault, size = insn.size
    if insn.op == INSN_FETCH:
        return operand_translate(vcpu, insn.gva, user | PFERR_FETCH, 1, &dst, here, out)
    if insn.op == INSN_LOAD:
        fault = operand_translate(vcpu, insn.gva, user, size, &dst, here, out)
        if fault == FAULT_NONE:
            operand_move(vcpu, &dst, 0, size, <uint8_t *>&memory)
            insn.result = memory
        return fault
    if insn.op == INSN_MOVS:
        fault = operand_translate(vcpu, insn.src, user, size, &src, here, out)
        if fault != FAULT_NONE:
            return fault
        operand_move(vcpu, &src, 0, size, <uint8_t *>&memory)
    elif insn.op != INSN_STORE and insn.split_rmw:
        fault = operand_translate(vcpu, insn.gva, user, size, &dst, here, out)
        if fault != FAULT_NONE:
            return fault
    fault = operand_translate(vcpu, insn.gva, user | PFERR_WRITE, size, &dst, here, out)
    if fault != FAULT_NONE:
        return fault
    if insn.op == INSN_ADD or insn.op == INSN_CMPXCHG:
        operand_move(vcpu, &dst, 0, size, <uint8_t *>&memory)
    stored = insn_compute(insn, memory)
    operand_move(vcpu, &dst, PFERR_WRITE, size, <uint8_t *>&stored)
    return FAULT_NONE

# ---- the emulator -------------------------------------------------------------------

cdef inline void exits_add(Insn *insn, const Access *out, uint64_t data, bint write) noexcept nogil:
    cdef int i
    cdef MmioExit *e
    for i in range(out.n_mmio):
        e = &insn.exits[insn.n_exits]
        e.gpa = out.mmio_gpa[i]
        e.size = out.mmio_size[i]
        e.write = write
        e.data = (data >> (8 * out.mmio_offset[i])) & (ALL_ONES >> (64 - 8 * e.size)) if write else 0
        insn.n_exits += 1


cdef inline int last_piece(uint64_t gva, int size) noexcept nogil:
    """Bytes of an operand in the last page it touches: what the event about a pending read shows."""
    cdef int first = 4096 - <int>(gva & 4095)
    return size - first if first < size else size


cdef inline int emulate_read(Vcpu *vcpu, Insn *insn, uint64_t gva, uint64_t known_gpa, uint64_t *memory,
                             Access *out) noexcept nogil:
    """Read an operand; a completed MMIO read is taken as it came back."""
    cdef int kind
    if insn.read_done:
        memcpy(memory, insn.read_data, insn.size)
        ev_mmio(vcpu.vm, vcpu.id, MMIO_READ, insn.size, insn.read_gpa, memory[0])
        insn.read_done = 0
        insn.wants_data = 0
        return STEP_DONE
    kind = emulate_transfer(vcpu, gva, user_bit(vcpu), insn.size, <uint8_t *>memory, known_gpa, out)
    if kind == PIECE_FAULT:
        return STEP_FAULT
    if kind == PIECE_MEMORY:
        return STEP_DONE
    insn.read_gpa = out.mmio_gpa[0]
    memcpy(insn.read_data, memory, insn.size)
    ev_mmio(vcpu.vm, vcpu.id, MMIO_READ_UNSATISFIED,
            insn.size if vcpu.vm.switches.era & ERA_MMIO_WHOLE else last_piece(gva, insn.size), insn.read_gpa, 0)
    exits_add(insn, out, 0, False)
    insn.wants_data = 1
    return STEP_EXIT


cdef inline int emulate_write(Vcpu *vcpu, Insn *insn, uint64_t data, uint64_t known_gpa, Access *out) noexcept nogil:
    if emulate_transfer(vcpu, insn.gva, user_bit(vcpu) | PFERR_WRITE, insn.size, <uint8_t *>&data, known_gpa,
                        out) == PIECE_FAULT:
        return STEP_FAULT
    exits_add(insn, out, data, True)
    return STEP_DONE


cdef inline int emulate_locked(Vcpu *vcpu, Insn *insn, uint64_t seen, uint64_t data, uint64_t known_gpa,
                               Access *out) noexcept nogil:
    """The store of a locked instruction: a compare-exchange in memory where there is memory.

    It walks for write once more before anything else is looked at.
    """
    cdef Slot *slot
    cdef uint8_t *host
    cdef uint64_t gpa
    cdef bint same = True
    if not guest_walk(vcpu, &vcpu.walk, insn.gva, user_bit(vcpu) | PFERR_WRITE):
        return emulate_write(vcpu, insn, data, known_gpa, out)
    gpa = vcpu.walk.gpa
    slot = vcpu_slot(vcpu, gpa >> 12)
    if (gpa >> 12 == APIC_DEFAULT_GFN or (gpa & 4095) + insn.size > 4096 or not slot_visible(slot)
            or slot_readonly(slot)):
        return emulate_write(vcpu, insn, data, known_gpa, out)
    host_write(vcpu.vm, slot, gpa >> 12)
    host = slot_host(slot, gpa >> 12) + (gpa & 4095)
    if insn.size == 8 and not gpa & 7:
        same = cmpxchg_u64(<uint64_t *>host, seen, data)
    elif insn.size == 4 and not gpa & 3:
        same = cmpxchg_u32(<uint32_t *>host, <uint32_t>seen, <uint32_t>data)
    else:
        guest_store(host, &data, insn.size)
    slot_mark_dirty(slot, gpa >> 12)
    if same:
        track_write(vcpu, gpa, insn.size)
    return STEP_DONE


cdef inline int emulate_operands(Vcpu *vcpu, Insn *insn, Access *out) noexcept nogil:
    cdef uint64_t memory = 0, known = insn.known_gpa if insn.known else ALL_ONES
    cdef int step
    if insn.op == INSN_STORE:
        return emulate_write(vcpu, insn, insn.value, known, out)
    # With two memory operands the address of the exit could be either's.
    if insn.op == INSN_MOVS:
        known = ALL_ONES
    step = emulate_read(vcpu, insn, insn.src if insn.op == INSN_MOVS else insn.gva, known, &memory, out)
    if (step == STEP_FAULT and (insn.op == INSN_ADD or insn.op == INSN_CMPXCHG)
            and not vcpu.vm.switches.era & ERA_RMW_FAULT_READS):
        vcpu.walk.error_code |= PFERR_WRITE
    if step != STEP_DONE:
        return step
    if insn.op == INSN_LOAD:
        insn.result = memory
        return STEP_DONE
    if insn.op == INSN_CMPXCHG:
        return emulate_locked(vcpu, insn, memory, insn_compute(insn, memory), known, out)
    return emulate_write(vcpu, insn, insn_compute(insn, memory), known, out)


cdef inline void emulate_run(Vcpu *vcpu, Insn *insn, Access *out) noexcept nogil:
    """Carry the operands out, from the start or again after an MMIO read came back."""
    cdef int step
    out.outcome = OUTCOME_OK
    step = emulate_operands(vcpu, insn, out)
    if step == STEP_FAULT:
        inject_guest_fault(vcpu, out.fault_gva, out)
    elif step == STEP_EXIT:
        out.outcome = OUTCOME_MMIO
    else:
        out.outcome = OUTCOME_OK


cdef inline bint resume_undecoded(Vcpu *vcpu, uint64_t address) noexcept nogil:
    """KVM cannot read the instruction.  True: unprotected what it wrote to, the guest may execute it itself."""
    cdef Walk w   # the fault of the fetch stays in vcpu.walk
    cdef uint64_t gpa = address
    cdef uint8_t writable = 0
    if not vcpu.root_role & ROLE_DIRECT:
        if not guest_walk(vcpu, &w, address, user_bit(vcpu) | PFERR_WRITE):
            return True
        gpa = w.gpa
    if pfn_is_error(gfn_to_pfn(vcpu.vm, vcpu_slot(vcpu, gpa >> 12), gpa >> 12, True, &writable)):
        return False
    mmu_write_lock(vcpu.vm)
    unprotect_gfn(vcpu.vm, vcpu.id, gpa >> 12)
    mmu_write_unlock(vcpu.vm)
    return True


cdef inline bint resume_undecoded_2011(Vcpu *vcpu, uint64_t address) noexcept nogil:
    """Linux 3.1 lets the guest try again if the address it faulted at has memory behind it, once unprotected."""
    cdef bint direct = (vcpu.root_role & ROLE_DIRECT) != 0
    cdef int64_t zapped = 0
    if tdp_enabled(vcpu.vm):
        return False
    if not direct:
        if guest_walk(vcpu, &vcpu.walk, address, user_bit(vcpu)):
            mmu_write_lock(vcpu.vm)
            zapped = unprotect_gfn(vcpu.vm, vcpu.id, vcpu.walk.gpa >> 12)
            mmu_write_unlock(vcpu.vm)
        if zapped:
            return True
        if not guest_walk(vcpu, &vcpu.walk, address, 0):
            return True
        address = vcpu.walk.gpa
    return slot_visible(vcpu_slot(vcpu, address >> 12))


cdef inline int decode(Vcpu *vcpu, Insn *insn, uint64_t address, bint retry, Access *out) noexcept nogil:
    """Fetch the instruction by software: DECODED, ENDED (it ended here), or RESUME.

    ``retry``: a fault at ``address`` may be retried instead.
    """
    cdef uint8_t *host = NULL
    cdef bint fails = (vcpu.vm.switches.era & ERA_FETCH_FAULT_FAILS) != 0
    cdef Slot *slot
    cdef int size = insn.code_size
    cdef int bits = 64 if vcpu.regs.efer & EFER_LMA and not vcpu.regs.compat else 32
    vcpu.stats[<int>VSTAT_INSN_EMULATION] += 1
    # An event that was being delivered is forgotten once an instruction is emulated.
    vcpu.vectoring = 0
    if guest_walk(vcpu, &vcpu.walk, vcpu.rip, user_bit(vcpu) | PFERR_FETCH):
        host = guest_host(vcpu, vcpu.walk.gpa)
    elif not fails:
        ev_emulate_insn(vcpu.vm, vcpu.id, 0, vcpu.rip, NULL, 0, bits, False)
        if retry and resume_undecoded(vcpu, address):
            return RESUME
        inject_guest_fault(vcpu, vcpu.rip, out)
        return ENDED
    if host != NULL:
        if (vcpu.walk.gpa & 4095) + <uint64_t>size > 4096:
            # The rest may stand elsewhere, or nowhere.
            slot = vcpu_slot(vcpu, vcpu.walk.gpa >> 12)
            if slot != vcpu_slot(vcpu, (vcpu.walk.gpa >> 12) + 1):
                size = 4096 - <int>(vcpu.walk.gpa & 4095)
        ev_emulate_insn(vcpu.vm, vcpu.id, 0, vcpu.rip, host, size, bits, False)
        return DECODED
    ev_emulate_insn(vcpu.vm, vcpu.id, 0, vcpu.rip, NULL, 0, bits, False)
    if fails:
        if resume_undecoded_2011(vcpu, address):
            return RESUME
    elif retry and resume_undecoded(vcpu, address):
        return RESUME
    ev_emulate_insn(vcpu.vm, vcpu.id, 0, vcpu.rip, NULL, 0, bits, True)
    vcpu.stats[<int>VSTAT_INSN_EMULATION_FAIL] += 1
    out.outcome = OUTCOME_INTERNAL_ERROR
    out.suberror = SUBERROR_EMULATION
    return ENDED


cdef inline void insn_fetch(Vcpu *vcpu, Insn *insn, Access *out) noexcept nogil:
    """The fetch alone, of an instruction without memory operands."""
    access_begin(out, insn.code_size)
    vcpu.rip = insn.code_gva
    vcpu.retry_rip = 0
    vcpu.retry_address = 0
    out.path = PATH_EMULATED
    decode(vcpu, insn, 0, False, out)


cdef inline bint retry_instead(Vcpu *vcpu, const Insn *insn, uint64_t address, bint allowed) noexcept nogil:
    """Unprotect the page and let the guest run again, once per (rip, address).

    Only for instructions that do not usually write page tables: plain stores and CMPXCHG do.
    """
    cdef uint64_t rip = vcpu.retry_rip, last = vcpu.retry_address
    cdef uint64_t gpa = address
    vcpu.retry_rip = 0
    vcpu.retry_address = 0
    if vcpu.vm.switches.era & ERA_NO_RETRY:
        return False
    if not allowed or insn.op == INSN_STORE or insn.op == INSN_CMPXCHG:
        return False
    if rip == vcpu.rip and last == address:
        return False
    vcpu.retry_rip = vcpu.rip
    vcpu.retry_address = address
    if not vcpu.root_role & ROLE_DIRECT:
        if not guest_walk(vcpu, &vcpu.walk, address, user_bit(vcpu) | PFERR_WRITE):
            return True
        gpa = vcpu.walk.gpa
    mmu_write_lock(vcpu.vm)
    unprotect_gfn(vcpu.vm, vcpu.id, gpa >> 12)
    mmu_write_unlock(vcpu.vm)
    return True


cdef inline void insn_execute(Vcpu *vcpu, Insn *insn, Access *out) noexcept nogil:
    """Run one instruction to its end or to an MMIO exit.

    ``out.outcome`` MMIO with ``wants_data``: put the bytes into ``read_data`` and call
    ``insn_continue``.  MMIO writes are listed in ``exits`` and need nothing.
    """
    cdef int fault, result, decoded
    cdef uint64_t here = 0, known = ALL_ONES, address
    cdef bint cached, retry
    cdef Operand code
    access_begin(out, insn.size)
    insn.n_exits = 0
    insn.wants_data = 0
    insn.read_done = 0
    insn.known = 0
    vcpu.rip = insn.code_gva
    while True:
        if enter_ends(vcpu, out):
            return
        fault = FAULT_NONE
        if insn.refetch and out.exits:
            # Its translation is not cached any more: the processor fetches the instruction again.
            fault = operand_translate(vcpu, insn.code_gva, user_bit(vcpu) | PFERR_FETCH, 1, &code, &here, out)
        if fault == FAULT_NONE:
            fault = hardware_insn(vcpu, insn, &here, out)
            if fault == FAULT_NONE:
                return
        if guest_own_fault(vcpu, fault, here, out):
            return
        out.exits += 1
        out.path = PATH_FAULT
        result = handle_exit(vcpu, fault, here, &known)
        if exit_ends(vcpu, result, here, out):
            return
        if result == RET_PF_EMULATE:
            address = here if known == ALL_ONES else known
            insn.known = known != ALL_ONES
            insn.known_gpa = known
            out.path = PATH_EMULATED
            if vcpu.root_role & ROLE_DIRECT:
                cached = mmio_match_gpa(vcpu, address)
            else:
                cached = mmio_match_gva(vcpu, address)
            retry = not cached and not vcpu.mmio_hit
            decoded = decode(vcpu, insn, address, retry, out)
            if decoded == ENDED:
                return
            if decoded == DECODED and not retry_instead(vcpu, insn, address, retry):
                emulate_run(vcpu, insn, out)
                return
            if out.exits >= MAX_EXITS:
                out.outcome = OUTCOME_HANG
                return


cdef inline void insn_continue(Vcpu *vcpu, Insn *insn, Access *out) noexcept nogil:
    """After user space answered an MMIO read: the instruction runs again, without being fetched again."""
    vcpu.retry_rip = 0
    vcpu.retry_address = 0
    insn.read_done = 1
    emulate_run(vcpu, insn, out)
