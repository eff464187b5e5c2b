# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""``cimport kvmmmu``: inline kernels over words, and the machine's functions on handles.

Kernels are compiled into the module that cimports them (``include_dirs=[kvmmmu.get_include()]``);
functions on handles are the installed extension's own.
"""

from kvmmmu._core cimport (
    KVMMMU_AC, KVMMMU_E_ARGUMENT, KVMMMU_E_BUSY, KVMMMU_E_CLOSED, KVMMMU_E_GP, KVMMMU_FETCH, KVMMMU_IMPLICIT,
    KVMMMU_MAX_ACCESS, KVMMMU_OK, KVMMMU_OUTCOME_ERROR, KVMMMU_OUTCOME_GP, KVMMMU_OUTCOME_HANG,
    KVMMMU_OUTCOME_INTERNAL_ERROR, KVMMMU_OUTCOME_MMIO, KVMMMU_OUTCOME_OK, KVMMMU_OUTCOME_PF, KVMMMU_OUTCOME_SHUTDOWN,
    KVMMMU_OUTCOME_VE, KVMMMU_OWN_CPL, KVMMMU_PATH_EMULATED, KVMMMU_PATH_FAULT, KVMMMU_PATH_HARDWARE, KVMMMU_READ,
    KVMMMU_SET_AD, KVMMMU_STOPPED, KVMMMU_WRITE, TablesHandle, VcpuHandle, VmHandle, kvmmmu_access, kvmmmu_access_many,
    kvmmmu_get_sregs, kvmmmu_invlpg, kvmmmu_load_cr3, kvmmmu_make_access, kvmmmu_read, kvmmmu_set_sregs, kvmmmu_sregs,
    kvmmmu_status_text, kvmmmu_sync_roots, kvmmmu_tables, kvmmmu_tables_from, kvmmmu_translate, kvmmmu_translation,
    kvmmmu_vcpu, kvmmmu_vcpu_from, kvmmmu_vcpu_stat, kvmmmu_vcpu_stat_index, kvmmmu_vcpu_stat_name, kvmmmu_vm,
    kvmmmu_vm_from, kvmmmu_vm_stat, kvmmmu_vm_stat_index, kvmmmu_vm_stat_name, kvmmmu_write,
)
from kvmmmu.bits.access cimport permission_fault_rule, permission_table, pkey_fault, pkru_table
from kvmmmu.bits.guest_walk cimport (
    WALK_FAULT, WALK_LEAF, WALK_NEXT, Walk, walk_ad_missing, walk_ad_wanted, walk_begin, walk_finish, walk_step,
)
from kvmmmu.bits.mmio cimport mmio_gen_valid, mmio_spte_access, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make
from kvmmmu.bits.paging cimport (
    CpuModel, CpuRegs, DIALECT_KVM, DIALECT_SDM, FAULT_EPT_MISCONFIG, FAULT_EPT_VIOLATION, FAULT_GP, FAULT_NONE,
    FAULT_NPF, FAULT_PDPTE, FAULT_PF, FMT_32, FMT_64, FMT_EPT, FMT_NONE, FMT_PAE, Paging, paging_init,
    paging_init_ept, paging_init_npt, permission_fault, rsvd_bits, rsvd_fault, va_canonical,
)
from kvmmmu.bits.shadow_walk cimport shadow_walk
from kvmmmu.bits.spte cimport (
    SpteMasks, spte_child, spte_is_last, spte_is_mmio, spte_masks_ept, spte_masks_legacy, spte_pfn, spte_present,
    spte_writable,
)
