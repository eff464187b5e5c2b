# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What a vCPU's registers make of its MMU: roles, and the formats of its walks."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport (
    CpuModel, CpuRegs, DIALECT_KVM, DIALECT_SDM, paging_encrypted, paging_init, paging_init_ept, paging_init_npt,
)
from kvmmmu.engine.pages cimport page_at, page_sptes, role_level
from kvmmmu.engine.state cimport MMU_EPT, MMU_NPT, MMU_SHADOW, Vcpu, Vm
from kvmmmu.engine.tlbcache cimport tlb_retag


cdef inline bint is_paging(const Vcpu *vcpu) noexcept nogil:
    return (vcpu.regs.cr0 & CR0_PG) != 0

cdef inline bint is_long_mode(const Vcpu *vcpu) noexcept nogil:
    return (vcpu.regs.efer & EFER_LMA) != 0

cdef inline bint is_pae_paging(const Vcpu *vcpu) noexcept nogil:
    return is_paging(vcpu) and vcpu.regs.cr4 & CR4_PAE and not is_long_mode(vcpu)

cdef inline bint tdp_enabled(const Vm *vm) noexcept nogil:
    return vm.mmu != MMU_SHADOW


cdef inline uint64_t cpu_role(const Vcpu *vcpu) noexcept nogil:
    """Base role of the guest's paging mode, extended role in the high half."""
    cdef uint64_t cr0 = vcpu.regs.cr0, cr4 = vcpu.regs.cr4, efer = vcpu.regs.efer
    cdef uint32_t base = (ACC_ALL << ROLE_ACCESS_SHIFT) | (<uint32_t>vcpu.smm << ROLE_SMM_SHIFT)
    cdef uint32_t ext = ROLE_EXT_VALID
    if not cr0 & CR0_PG:
        if vcpu.vm.switches.era & ERA_ROLE_PLAIN and cr0 & CR0_WP:
            base |= ROLE_CR0_WP
        return <uint64_t>(base | ROLE_DIRECT) | (<uint64_t>ext << 32)
    if efer & EFER_NX:
        base |= ROLE_EFER_NX
    if cr0 & CR0_WP:
        base |= ROLE_CR0_WP
    else:
        if cr4 & CR4_SMEP:
            base |= ROLE_SMEP_ANDNOT_WP
        if cr4 & CR4_SMAP:
            base |= ROLE_SMAP_ANDNOT_WP
    if not cr4 & CR4_PAE:
        base |= ROLE_4BYTE_GPTE
    if efer & EFER_LMA:
        base |= 5 if cr4 & CR4_LA57 else 4
        ext |= ROLE_EXT_LMA
        if cr4 & CR4_PKE:
            ext |= ROLE_EXT_PKE
        if cr4 & CR4_LA57:
            ext |= ROLE_EXT_LA57
    else:
        base |= 3 if cr4 & CR4_PAE else 2
    if vcpu.guest_mode:
        base |= ROLE_GUEST_MODE
    if cr4 & CR4_PSE:
        ext |= ROLE_EXT_PSE
    if cr4 & CR4_SMEP:
        ext |= ROLE_EXT_SMEP
    if cr4 & CR4_SMAP:
        ext |= ROLE_EXT_SMAP
    return <uint64_t>base | (<uint64_t>ext << 32)


cdef inline int tdp_level(const Vcpu *vcpu) noexcept nogil:
    if vcpu.vm.host.la57 and vcpu.model.maxphyaddr > 48:
        return 5
    return 4

cdef inline uint32_t calc_root_role(const Vcpu *vcpu) noexcept nogil:
    cdef uint32_t role = <uint32_t>vcpu.cpu_role
    cdef uint32_t fixed = (ACC_ALL << ROLE_ACCESS_SHIFT) | ROLE_EFER_NX
    if tdp_enabled(vcpu.vm):
        if vcpu.vm.switches.era & ERA_NX_BY_GUEST:
            fixed &= ~ROLE_EFER_NX
        if vcpu.vm.switches.era & ERA_ROLE_PLAIN:
            return fixed | ROLE_DIRECT | <uint32_t>tdp_level(vcpu) | (<uint32_t>vcpu.smm << ROLE_SMM_SHIFT)
        role = fixed | ROLE_DIRECT | ROLE_CR0_WP | <uint32_t>tdp_level(vcpu) | (<uint32_t>vcpu.smm << ROLE_SMM_SHIFT)
        return role | (0 if vcpu.vm.masks.ad_enabled else ROLE_AD_DISABLED)
    # KVM's own tables always run with NX, and at least three levels.
    if not vcpu.vm.switches.era & ERA_NX_BY_GUEST:
        role |= ROLE_EFER_NX
    else:
        role &= ~ROLE_EFER_NX
        if vcpu.role_nx:
            role |= ROLE_EFER_NX
    if role_level(role) < LEVEL_1G:
        role = (role & ~ROLE_LEVEL_MASK) | 3
    return role


cdef inline void guest_formats(Vcpu *vcpu) noexcept nogil:
    """The guest's tables for both readers: KVM's walker and, under TDP, the processor."""
    if vcpu.guest_mode:
        paging_init_npt(&vcpu.guest, vcpu.ncr3, role_level(<uint32_t>vcpu.cpu_role), &vcpu.model, DIALECT_KVM)
        return
    paging_init(&vcpu.guest, &vcpu.regs, &vcpu.model, DIALECT_KVM)
    if tdp_enabled(vcpu.vm):
        vcpu.paths.formats += 1
        paging_init(&vcpu.guest_hw, &vcpu.regs, &vcpu.model, DIALECT_SDM)
        # SVM reads PDPTEs from memory at each walk; VMX has them in registers.
        vcpu.guest_hw.pdpte_in_memory = vcpu.vm.mmu == MMU_NPT
        vcpu.guest_hw.ad_first = vcpu.vm.host.ad_first
    tlb_retag(vcpu)


cdef inline void hw_format(Vcpu *vcpu) noexcept nogil:
    """The tables the processor walks while the guest runs; the root comes with ``hw_root``."""
    cdef Vm *vm = vcpu.vm
    cdef CpuRegs regs
    cdef CpuModel model
    cdef int level = role_level(vcpu.root_role)
    vcpu.paths.formats += 1
    memset(&regs, 0, sizeof(regs))
    memset(&model, 0, sizeof(model))
    # Where memory can be encrypted the bits above the reduced width are reserved, but for the C-bit.
    model.maxphyaddr = vm.host.phys_bits if vm.host.c_bit else vm.host.maxphyaddr
    model.gbpages = vm.host.gbpages
    model.amd = 1
    model.exec_only = vm.host.ept_exec_only
    model.ept_2m = vm.host.ept_2m
    model.ept_1g = vm.host.ept_1g
    model.no_pse36 = 0
    if vm.mmu == MMU_EPT:
        paging_init_ept(&vcpu.hw, (EPTP_AD if vm.masks.ad_enabled else 0) | <uint64_t>((level - 1) << 3) | 6, &model,
                        DIALECT_SDM)
        if not vm.host.ept_checks_updates:
            vcpu.hw.update_access = 0
        return
    # Shadow paging forces these whatever the guest runs with, so that every store KVM must see faults.
    regs.cr0 = CR0_PE | CR0_PG | CR0_WP
    regs.cr4 = CR4_PAE
    regs.efer = EFER_NX
    if vm.switches.era & ERA_NX_BY_GUEST:
        regs.efer = vcpu.regs.efer & EFER_NX
    regs.pkru = vcpu.regs.pkru
    # The width of linear addresses is the guest's own, whoever made the tables.
    regs.compat = vcpu.regs.compat
    if level >= 4:
        regs.efer |= EFER_LME | EFER_LMA
    if level == 5:
        regs.cr4 |= CR4_LA57
    if vm.mmu == MMU_NPT or vcpu.guest_mode:
        paging_init_npt(&vcpu.hw, 0, level, &model, DIALECT_SDM)
    else:
        if is_paging(vcpu):
            regs.cr4 |= vcpu.regs.cr4 & (CR4_SMEP | CR4_SMAP | CR4_PKE)
        paging_init(&vcpu.hw, &regs, &model, DIALECT_SDM)
    if vm.host.c_bit:
        paging_encrypted(&vcpu.hw, vm.host.c_bit)


cdef inline void hw_root(Vcpu *vcpu) noexcept nogil:
    """Point the processor at the current root (``load_pgd``)."""
    cdef int i
    vcpu.last_root = vcpu.root.page
    vcpu.hw.root = <uint64_t>vcpu.root.page << 12
    if page_at(vcpu.vm, vcpu.root.page).special:
        for i in range(4):
            vcpu.hw.pdptr[i] = page_sptes(vcpu.vm, vcpu.root.page)[i]
    tlb_retag(vcpu)


cdef inline void roles_refresh(Vcpu *vcpu) noexcept nogil:
    vcpu.cpu_role = cpu_role(vcpu)
    vcpu.root_role = calc_root_role(vcpu)
    guest_formats(vcpu)
    hw_format(vcpu)
    if vcpu.root.page:
        hw_root(vcpu)
