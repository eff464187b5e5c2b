# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One vCPU at work: the processor tries, KVM repairs, until the access ends somewhere."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk
from kvmmmu.bits.paging cimport (
    FAULT_EPT_MISCONFIG, FAULT_EPT_VIOLATION, FAULT_GP, FAULT_NONE, FAULT_NPF, FAULT_PF, FMT_64, Paging,
)
from kvmmmu.engine.atomics cimport cpu_pause, guest_load, guest_store, in_guest, ld_acquire_u32
from kvmmmu.engine.claim cimport vcpu_busy
from kvmmmu.engine.emulate cimport emulate_access, inject_guest_fault
from kvmmmu.engine.events cimport ISA_SVM, ISA_VMX, ev_exit, ev_page_fault
from kvmmmu.engine.fault cimport FAULT_INJECT, page_fault
from kvmmmu.engine.guest cimport guest_walk
from kvmmmu.engine.hooks cimport POINT_EMULATE, POINT_EXIT, POINT_HARDWARE, hook
from kvmmmu.engine.hostmem cimport pfn_to_host, vm_hostmem
from kvmmmu.engine.leaf cimport RET_PF_EMULATE
from kvmmmu.engine.locks cimport guest_leave, mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.nestedpaths cimport flat_quick, nested_quick
from kvmmmu.engine.quick cimport QUICK_FINAL, QUICK_YES, Quick
from kvmmmu.engine.pages cimport spte_gfn
from kvmmmu.engine.roots cimport ENTER_OK, ENTER_SHUTDOWN, vcpu_enter
from kvmmmu.engine.state cimport (
    Access, MMU_SHADOW, MemMap, OUTCOME_ERROR, OUTCOME_GP, OUTCOME_HANG, OUTCOME_INTERNAL_ERROR, OUTCOME_PF,
    OUTCOME_SHUTDOWN, OUTCOME_VE, SUBERROR_DELIVERY_EV, PATH_EMULATED, PATH_FAULT, TlbEntry, Vcpu, Vm,
)
from kvmmmu.engine.tlbcache cimport tlb_offset
from kvmmmu.engine.tlbwalk cimport shadow_gpa, tlb_access, tlb_hit, tlb_tables
from kvmmmu.engine.walk cimport walk_memory, walk_nested
from kvmmmu.engine.zap cimport unprotect_gfn

cdef enum:
    MAX_EXITS = 64   # of one access; real progress needs far fewer
    FEW_EXITS = 8    # so many need no look at who else is there


cdef inline uint64_t ept_error_code(uint64_t qualification) noexcept nogil:
    """An EPT violation as a page-fault code."""
    cdef uint64_t code = 0
    if qualification & EPT_VIOLATION_ACC_READ:
        code |= PFERR_USER
    if qualification & EPT_VIOLATION_ACC_WRITE:
        code |= PFERR_WRITE
    if qualification & EPT_VIOLATION_ACC_INSTR:
        code |= PFERR_FETCH
    if qualification & EPT_VIOLATION_PROT_MASK:
        code |= PFERR_PRESENT
    if qualification & EPT_VIOLATION_GVA_VALID:
        code |= PFERR_GUEST_FINAL if qualification & EPT_VIOLATION_GVA_TRANSLATED else PFERR_GUEST_PAGE
    return code


cdef inline uint64_t leaf_gpa(Vcpu *vcpu, const Quick *q) noexcept nogil:
    """As ``shadow_gpa``, of a walk that kept no record."""
    return (spte_gfn(vcpu.vm, q.entry_gpa >> 3) << 12) + (q.gpa & ((ONE << (3 + 9 * q.level)) - 1))


cdef inline int hardware_access(Vcpu *vcpu, uint64_t gva, uint64_t access, uint64_t *gpa, uint64_t *hpa) noexcept nogil:
    """What the processor does with an address; FAULT_NONE, or FAULT_* with the details in the walks.

    Small, so that the compiler puts it where it is called: two dimensions save many registers, one needs none of that.
    An inner guest's accesses pass by the TLB.
    """
    cdef const MemMap *mem
    cdef int fault
    cdef Quick q
    if vcpu.vm.mmu != MMU_SHADOW or vcpu.tlb != NULL and not vcpu.guest_mode:
        return hardware_access_nested(vcpu, gva, access, gpa, hpa)
    mem = vm_hostmem(vcpu.vm)
    access |= vcpu.hw.final_access
    # The page that was MMIO last very likely still is: that walk needs its record.
    if (vcpu.hw.format == FMT_64 and gva & ~<uint64_t>4095 != vcpu.mmio.gva
            and flat_quick(vcpu.paths, &vcpu.hw, mem, &vcpu.table_hint, gva, access, vcpu.ac, &q)):
        hpa[0] = q.gpa
        gpa[0] = leaf_gpa(vcpu, &q)
        return FAULT_NONE
    fault = walk_memory(&vcpu.hw, mem, &vcpu.table_hint, &vcpu.nested, gva, access, vcpu.ac, True)
    if fault == FAULT_NONE:
        hpa[0] = vcpu.nested.gpa
        gpa[0] = shadow_gpa(vcpu)
    return fault


cdef inline int hardware_access_nested(Vcpu *vcpu, uint64_t gva, uint64_t access, uint64_t *gpa,
                                       uint64_t *hpa) noexcept nogil:
    cdef const MemMap *mem = vm_hostmem(vcpu.vm)
    cdef int fault, quick
    cdef Quick q
    if vcpu.tlb != NULL and not vcpu.guest_mode:
        return tlb_access(vcpu, gva, access, gpa, hpa)
    quick = nested_quick(vcpu.paths, &vcpu.guest_hw, &vcpu.hw, mem, &vcpu.table_hint, &vcpu.mem_hint, &vcpu.nested,
                         gva, access, vcpu.ac, &q, hpa)
    if quick == QUICK_YES:
        gpa[0] = q.gpa
        return FAULT_NONE
    if quick == QUICK_FINAL:
        return vcpu.nested.fault
    fault = walk_nested(&vcpu.guest_hw, &vcpu.hw, mem, &vcpu.table_hint, &vcpu.mem_hint, &vcpu.walk, &vcpu.nested, gva,
                        access, vcpu.ac, True)
    if fault == FAULT_NONE:
        hpa[0] = vcpu.nested.gpa
        gpa[0] = vcpu.walk.gpa
    return fault


cdef enum:
    EXIT_DELIVERY_EV = 101  # beside RET_PF_*: an exit that KVM cannot handle during exception delivery
    VMX_EXCEPTION_NMI = 0
    VMX_EPT_VIOLATION = 48
    VMX_EPT_MISCONFIG = 49
    SVM_EXCEPTION_PF = 0x4e
    VMX_INTR_PF = 0x0b0e   # valid bit (31) is added where it is shown: an enum constant is an int
    SVM_NPF = 0x400

cdef inline uint64_t vmx_vectoring(const Vcpu *vcpu) noexcept nogil:
    """IDT-vectoring information: the exception whose delivery the exit broke off (SDM vol. 3C section 25.9.3)."""
    cdef uint64_t vector = vcpu.vectoring
    if vector == 0:
        return 0
    # Hardware exception, valid; with an error code or without.
    return (ONE << 31) | 0x300 | (0x800 if 10 <= vector <= 14 or vector == 8 or vector == 17 else 0) | vector


cdef inline void trace_exit(Vcpu *vcpu, int fault, uint64_t address, uint64_t code) noexcept nogil:
    """The exit as the processor reports it, and KVM's own line for a page fault."""
    cdef Vm *vm = vcpu.vm
    cdef bint vmx = not vm.host.amd
    if not vm.events.mask:
        return
    if fault == FAULT_PF:
        if vmx:
            ev_exit(vm, vcpu.id, ISA_VMX, VMX_EXCEPTION_NMI, vcpu.rip, address, vmx_vectoring(vcpu),
                    VMX_INTR_PF, <uint32_t>code)
        else:
            ev_exit(vm, vcpu.id, ISA_SVM, SVM_EXCEPTION_PF, vcpu.rip, code, address, 0, 0)
    elif fault == FAULT_NPF:
        ev_exit(vm, vcpu.id, ISA_SVM, SVM_NPF, vcpu.rip, code, address, 0, 0)
    elif fault == FAULT_EPT_VIOLATION:
        ev_exit(vm, vcpu.id, ISA_VMX, VMX_EPT_VIOLATION, vcpu.rip, code, vmx_vectoring(vcpu), 0, 0)
    else:
        ev_exit(vm, vcpu.id, ISA_VMX, VMX_EPT_MISCONFIG, vcpu.rip, 0, vmx_vectoring(vcpu), 0, 0)
        return
    ev_page_fault(vm, vcpu.id, vcpu.rip, address, code)


cdef inline uint64_t reported_code(const Vcpu *vcpu, uint64_t code) noexcept nogil:
    """An error code as this processor reports it."""
    if vcpu.vm.host.rsvd_alone and code & PFERR_RSVD:
        return code & ~PFERR_PRESENT
    return code


cdef inline int handle_exit(Vcpu *vcpu, int fault, uint64_t gva, uint64_t *known_gpa) noexcept nogil:
    """KVM's handler for what the processor reported; the result of ``page_fault``, or EXIT_DELIVERY_EV."""
    cdef uint64_t address = gva, code = vcpu.nested.error_code
    guest_leave(vcpu)
    hook(vcpu, POINT_EXIT)
    if fault == FAULT_PF or fault == FAULT_NPF:
        code = reported_code(vcpu, code)
    if fault != FAULT_PF:
        address = vcpu.nested.va
    if vcpu.guest_mode:
        code |= PFERR_GUEST_FINAL
    trace_exit(vcpu, fault, address, code)
    if fault == FAULT_EPT_VIOLATION:
        code = ept_error_code(code)
    elif fault == FAULT_EPT_MISCONFIG:
        if vcpu.vectoring:
            return EXIT_DELIVERY_EV
        code = PFERR_RSVD
    elif fault == FAULT_PF and vcpu.vectoring:
        # The table behind the faulting address may be write-protected for shadowing; the event
        # could then never be delivered.
        unprotect_gva(vcpu, address)
    # Direct tables translate what faulted: the emulator may use it as it is.
    known_gpa[0] = address if vcpu.root_role & ROLE_DIRECT else ALL_ONES
    return page_fault(vcpu, address, code)


cdef inline bint raises_ve(const Vcpu *vcpu) noexcept nogil:
    """An EPT violation that the guest gets itself (SDM vol. 3C section 26.5.7.1); the TDX module has #VE switched on.

    The guest always has read what the last one left in its information area.
    """
    cdef const Walk *w = &vcpu.nested
    return (vcpu.vm.tdx and w.seen and not w.entries[w.seen] & EPT_SUPPRESS_VE
            and vcpu.regs.cr0 & CR0_PE and not vcpu.vectoring)


cdef inline void unprotect_gva(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    if vcpu.root_role & ROLE_DIRECT:
        return
    if guest_walk(vcpu, &vcpu.walk, gva, PFERR_USER if vcpu.cpl == 3 else 0):
        mmu_write_lock(vcpu.vm)
        unprotect_gfn(vcpu.vm, vcpu.id, vcpu.walk.gpa >> 12)
        mmu_write_unlock(vcpu.vm)


cdef inline bint exit_ends(Vcpu *vcpu, int result, uint64_t gva, Access *out) noexcept nogil:
    """What the handler's result means for the access; False: the guest goes on (or KVM emulates)."""
    if result == FAULT_INJECT:
        inject_guest_fault(vcpu, gva, out)
        return True
    if result == EXIT_DELIVERY_EV:
        out.outcome = OUTCOME_INTERNAL_ERROR
        out.suberror = SUBERROR_DELIVERY_EV
        return True
    if result < 0:
        out.outcome = OUTCOME_ERROR
        out.error_code = <uint64_t>(-result)
        return True
    if out.exits > FEW_EXITS and no_progress(vcpu, out.exits) and result != RET_PF_EMULATE:
        out.outcome = OUTCOME_HANG
        return True
    return False


cdef inline bint no_progress(Vcpu *vcpu, uint32_t exits) noexcept nogil:
    """So many exits, and nobody else who could have undone what the handler did, or held it up."""
    if exits == FEW_EXITS + 1:
        vcpu.lonely_exits = 0
    if vm_others(vcpu):
        vcpu.lonely_exits = 0
        cpu_pause(exits)
    else:
        vcpu.lonely_exits += 1
    return exits >= MAX_EXITS and (vcpu.lonely_exits >= MAX_EXITS - FEW_EXITS or exits >= MAX_EXITS << 10)


cdef inline bint vm_others(const Vcpu *vcpu) noexcept nogil:
    """Somebody besides this vCPU is at work in its VM."""
    cdef const Vm *vm = vcpu.vm
    cdef int i
    if ld_acquire_u32(&vm.slots_lock) or ld_acquire_u32(&vm.mmu_lock.writer):
        return True
    for i in range(vm.n_vcpus):
        if vm.vcpus[i] != vcpu and vcpu_busy(vm.vcpus[i]):
            return True
    return False


cdef inline bint enter_ends(Vcpu *vcpu, Access *out) noexcept nogil:
    """Make ready to run guest code.  True: it cannot run."""
    cdef int result = vcpu_enter(vcpu)
    if result == ENTER_OK:
        return False
    if result == ENTER_SHUTDOWN:
        out.outcome = OUTCOME_SHUTDOWN
    else:
        out.outcome = OUTCOME_ERROR
        out.error_code = <uint64_t>(-result)
    return True


cdef inline bint guest_own_fault(Vcpu *vcpu, int fault, uint64_t gva, Access *out) noexcept nogil:
    """A fault that reaches the guest without an exit."""
    if fault == FAULT_GP:
        out.outcome = OUTCOME_GP
    elif vcpu.vm.mmu == MMU_SHADOW:
        return False
    elif fault == FAULT_PF:
        out.outcome = OUTCOME_PF
        out.error_code = reported_code(vcpu, vcpu.walk.error_code)
    elif fault == FAULT_EPT_VIOLATION and raises_ve(vcpu):
        out.outcome = OUTCOME_VE
        out.error_code = vcpu.nested.error_code
        out.gpa = vcpu.nested.va
    else:
        return False
    out.fault_gva = gva
    return True


cdef inline void access_move(Vcpu *vcpu, uint64_t hpa, uint64_t access, int size, uint8_t *data) noexcept nogil:
    """Move the bytes of one piece between the host frame and the caller."""
    cdef uint8_t *host
    if data == NULL:
        return
    host = pfn_to_host(vcpu.vm, hpa >> 12, &vcpu.mem_hint)
    if host == NULL:
        return
    host += hpa & 4095
    if access & PFERR_WRITE:
        guest_store(host, data, <unsigned>size)
    else:
        guest_load(data, host, <unsigned>size)


cdef inline void access_begin(Access *out, int size) noexcept nogil:
    """All zero is: done, by the processor alone.  Every byte is set, so that columns can be compared as they are."""
    memset(out, 0, sizeof(Access))
    out.size = <uint8_t>size
    out.gpa = ALL_ONES


cdef struct Hits:
    # What stays as it is while a vCPU does nothing but accesses that its TLB serves.
    const Paging *tables
    uint64_t va_mask

cdef inline bint hits_begin(const Vcpu *vcpu, Hits *h) noexcept nogil:
    """A vCPU with a TLB: ``access_hit`` may be asked while nothing else is done.  In the guest a root is loaded."""
    if vcpu.guest_mode or not in_guest(vcpu.line):
        return False
    h.tables = tlb_tables(vcpu)
    h.va_mask = h.tables.va_mask & vcpu.guest.va_mask
    return True


cdef inline bint access_hit(Vcpu *vcpu, const Hits *h, uint64_t gva, uint64_t access, int size, uint64_t *gpa,
                            uint64_t *hpa) noexcept nogil:
    """An access inside one page that the TLB serves; False: nothing happened, ``vcpu_access`` is to do it.

    PFERR_USER must be in ``access`` already.  The bytes are the caller's to move.
    """
    cdef const TlbEntry *e
    # A flush that somebody waits for is a request first.
    if ld_acquire_u32(&vcpu.requests):
        return False
    gva &= h.va_mask
    if <int>(gva & 4095) + size > 4096:
        return False
    e = tlb_hit(vcpu, h.tables, gva, access)
    if e == NULL:
        return False
    gva = tlb_offset(e, gva)
    gpa[0] = e.gpa + gva
    hpa[0] = e.hpa + gva
    return True


cdef inline void vcpu_access(Vcpu *vcpu, uint64_t gva, uint64_t access, int size, uint8_t *data,
                             Access *out) noexcept nogil:
    """One load, store or fetch of ``size`` bytes (1 to 64) with everything it causes.

    ``access`` holds PFERR_WRITE, PFERR_FETCH, PFERR_IMPLICIT; PFERR_USER comes from the CPL.
    ``data`` may be NULL: then nothing is moved, but every check and exit happens.
    """
    cdef int fault, result, first
    cdef uint64_t gpa = 0, hpa = 0, hpa2 = 0, gpa2 = 0, known_gpa = ALL_ONES, here
    # Outside 64-bit code the processor forms 32-bit addresses: nobody ever sees the bits above.
    gva &= vcpu.guest.va_mask
    access_begin(out, size)
    if vcpu.cpl == 3 and not access & PFERR_IMPLICIT:
        access |= PFERR_USER
    first = 4096 - <int>(gva & 4095)
    if first > size:
        first = size
    while True:
        if enter_ends(vcpu, out):
            return
        hook(vcpu, POINT_HARDWARE)
        here = gva
        fault = hardware_access(vcpu, here, access, &gpa, &hpa)
        if fault == FAULT_NONE and first < size:
            here = (gva + <uint64_t>first) & vcpu.guest.va_mask
            fault = hardware_access(vcpu, here, access, &gpa2, &hpa2)
        if fault == FAULT_NONE:
            access_move(vcpu, hpa, access, first, data)
            if first < size:
                access_move(vcpu, hpa2, access, size - first, NULL if data == NULL else data + first)
            out.gpa = gpa
            return
        if guest_own_fault(vcpu, fault, here, out):
            return
        out.exits += 1
        out.path = PATH_FAULT
        result = handle_exit(vcpu, fault, here, &known_gpa)
        if exit_ends(vcpu, result, here, out):
            return
        if result == RET_PF_EMULATE:
            hook(vcpu, POINT_EMULATE)
            out.path = PATH_EMULATED
            emulate_access(vcpu, gva, access, size, data, known_gpa, out)
            return
