# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Moves to control registers as guest code makes them: some exit to KVM, some do not.

Under EPT the processor carries out MOV to CR3, and changes of CR0.WP and of CR4 bits that the guest
owns, by itself; with PAE paging it then reads the PDPTEs through EPT, which may exit.
"""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FAULT_NONE, FAULT_PDPTE
from kvmmmu.engine.hostmem cimport vm_hostmem
from kvmmmu.engine.leaf cimport RET_PF_EMULATE
from kvmmmu.engine.locks cimport guest_leave
from kvmmmu.engine.registers cimport REG_GP, REG_OK, cr3_legal, load_cr3, mov_cr0, mov_cr4
from kvmmmu.engine.roles cimport guest_formats, is_pae_paging
from kvmmmu.engine.state cimport Access, MMU_EPT, Vcpu
from kvmmmu.engine.tlbflush cimport INVPCID_ALL, tlb_invpcid, tlb_mov_cr3
from kvmmmu.engine.vcpu cimport access_begin, enter_ends, exit_ends, handle_exit
from kvmmmu.engine.walk cimport load_pdptrs_nested


cdef inline int pdptrs_by_processor(Vcpu *vcpu, uint64_t cr3) noexcept nogil:
    """Read the PDPTEs through EPT, as plain reads without a linear address."""
    cdef uint64_t loaded[4]
    cdef uint64_t known = 0
    cdef Access out
    cdef int fault, result
    access_begin(&out, 32)
    while not enter_ends(vcpu, &out):
        fault = load_pdptrs_nested(&vcpu.hw, vm_hostmem(vcpu.vm), &vcpu.table_hint, &vcpu.nested, cr3, &vcpu.model,
                                   loaded, True)
        guest_leave(vcpu)
        if fault == FAULT_NONE:
            memcpy(vcpu.regs.pdptr, loaded, sizeof(loaded))
            guest_formats(vcpu)
            return REG_OK
        if fault == FAULT_PDPTE:
            return REG_GP
        out.exits += 1
        result = handle_exit(vcpu, fault, cr3, &known)
        if result == RET_PF_EMULATE or exit_ends(vcpu, result, cr3, &out):
            break
    # No memory stands at CR3, so the move never completes.
    return REG_GP


cdef inline uint64_t cr4_guest_owned() noexcept nogil:
    """CR4 bits whose change does not exit under EPT: they do not concern KVM's MMU, or only the guest's TLB."""
    return CR4_PGE

cdef inline int vcpu_move_to_cr(Vcpu *vcpu, int n, uint64_t value) noexcept nogil:
    """MOV to CR0, CR3 or CR4.  REG_GP: #GP(0), nothing changed."""
    cdef bint pae = is_pae_paging(vcpu)
    cdef int result
    if vcpu.guest_mode:
        return REG_GP
    guest_leave(vcpu)
    if vcpu.vm.mmu == MMU_EPT:
        if n == 3 and pae:
            if not cr3_legal(vcpu, value):
                return REG_GP
            result = pdptrs_by_processor(vcpu, value)
            if result == REG_OK:
                vcpu.regs.cr3 = value
                guest_formats(vcpu)
                tlb_mov_cr3(vcpu, False)
            return result
        if n == 0 and pae and not (value ^ vcpu.regs.cr0) & ~CR0_WP:
            result = pdptrs_by_processor(vcpu, vcpu.regs.cr3)
            return mov_cr0(vcpu, value) if result == REG_OK else result
        if n == 4 and not (value ^ vcpu.regs.cr4) & ~cr4_guest_owned():
            if pae:
                result = pdptrs_by_processor(vcpu, vcpu.regs.cr3)
                if result != REG_OK:
                    return result
            if (value ^ vcpu.regs.cr4) & CR4_PGE:
                tlb_invpcid(vcpu, INVPCID_ALL, 0, 0)
            vcpu.regs.cr4 = value
            guest_formats(vcpu)
            return REG_OK
    if n == 0:
        return mov_cr0(vcpu, value)
    if n == 3:
        return load_cr3(vcpu, value)
    return mov_cr4(vcpu, value)
