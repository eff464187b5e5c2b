# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A VM and its vCPUs come into being and go: every main, the Python door or a native one, begins here."""

from libc.stdint cimport uint32_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memset
from kvmmmu.bits.spte cimport (
    spte_masks_ept, spte_masks_era, spte_masks_legacy, spte_masks_mmio, spte_masks_sme, spte_masks_ve,
)
from kvmmmu.engine.atomics cimport LINE_PLAIN, membarrier_register, reader_protocol, st_release_u32
from kvmmmu.engine.drain cimport slots_lock, slots_unlock
from kvmmmu.engine.notifier cimport page_replaced
from kvmmmu.engine.region cimport vm_slots_free, vm_slots_init
from kvmmmu.engine.reserve cimport vm_memory_free, vm_memory_init
from kvmmmu.engine.roots cimport vcpu_reset
from kvmmmu.engine.state cimport (
    MAX_VCPUS, MMIO_OFF, MMU_EPT, MMU_SHADOW, NestedPaths, Vcpu, Vm, kvmmmu_line, kvmmmu_rwlock,
)

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    BIRTH_OK = 0
    BIRTH_NO_MEMORY = 1      # of the heap
    BIRTH_NO_SLOTS = 2       # for the tables of slots
    BIRTH_NO_ADDRESSES = 3   # for the arena
    BIRTH_TOO_MANY = 4       # vCPUs


cdef inline void *lines_new(size_t size) noexcept nogil:
    """Zeroed memory that shares no cache line with other memory: what one thread writes, another need not wait for."""
    cdef size_t whole = (size + 63) & ~<size_t>63
    cdef void *p = aligned_alloc(64, whole)
    if p != NULL:
        memset(p, 0, whole)
    return p


cdef inline void line_begin(const Vm *vm, kvmmmu_line *line) noexcept nogil:
    if vm.plain_marks:
        line.mode = LINE_PLAIN


cdef inline int vm_birth(Vm *vm) noexcept nogil:
    """Make a zeroed ``vm`` work, whose ``mmu``, ``host`` and ``switches`` are set.  BIRTH_*; ``vm_bury`` either way."""
    if vm.mmu == MMU_SHADOW:
        vm.switches.tdp_mmu = 0
    vm.notify_replaced = page_replaced
    vm.rmaps = not vm.switches.tdp_mmu
    if vm.mmu == MMU_EPT:
        spte_masks_ept(&vm.masks, vm.host.phys_bits, vm.host.l1tf, vm.host.cache_bits, vm.host.ept_ad,
                       vm.host.ept_exec_only, vm.switches.mmio_scheme != MMIO_OFF)
    else:
        spte_masks_legacy(&vm.masks, vm.host.maxphyaddr, vm.host.phys_bits, vm.host.l1tf, vm.host.cache_bits,
                          vm.switches.mmio_scheme != MMIO_OFF)
        if vm.host.c_bit:
            spte_masks_sme(&vm.masks, vm.host.phys_bits, vm.host.c_bit, vm.host.sme,
                           vm.switches.mmio_scheme != MMIO_OFF)
    if vm.host.mmio_by_hand:
        spte_masks_mmio(&vm.masks, vm.host.mmio_value if vm.switches.mmio_scheme != MMIO_OFF else 0,
                        vm.host.mmio_mask, vm.host.mmio_access)
    if vm.switches.mmio_scheme != MMIO_OFF:
        spte_masks_era(&vm.masks, vm.switches.era, vm.host.maxphyaddr, vm.mmu == MMU_EPT)
    if vm.tdx:
        spte_masks_ve(&vm.masks)
    vm.mmu_lock = <kvmmmu_rwlock *>lines_new(sizeof(kvmmmu_rwlock))
    vm.lines[0] = <kvmmmu_line *>lines_new(sizeof(kvmmmu_line))
    vm.n_lines = 1
    if vm.mmu_lock == NULL or vm.lines[0] == NULL:
        return BIRTH_NO_MEMORY
    vm.plain_marks = vm.plain_marks and membarrier_register()
    line_begin(vm, vm.lines[0])
    vm.reader_protocol = <uint8_t>reader_protocol(vm.lines[0])
    if not vm_slots_init(vm):
        return BIRTH_NO_SLOTS
    return BIRTH_OK if vm_memory_init(vm) else BIRTH_NO_ADDRESSES


cdef inline void vm_bury(Vm *vm) noexcept nogil:
    """Give back everything, ``vm`` itself too.  Nobody else holds it any more."""
    cdef int i
    vm_slots_free(vm)
    vm_memory_free(vm)
    free(vm.events.ring)
    for i in range(vm.n_vcpus):
        free(vm.vcpus[i].tlb)
        free(vm.vcpus[i].paths)
        free(vm.vcpus[i])
    for i in range(vm.n_lines):
        free(vm.lines[i])
    free(vm.mmu_lock)
    free(vm)


cdef inline int vcpu_birth(Vm *vm, Vcpu *vcpu) noexcept nogil:
    """Give a zeroed vCPU, whose ``model`` and absent features are set, its number.  BIRTH_*; the VM then owns it."""
    cdef int born = BIRTH_TOO_MANY
    vcpu.vm = vm
    vcpu.line = <kvmmmu_line *>lines_new(sizeof(kvmmmu_line))
    if vcpu.line == NULL:
        return BIRTH_NO_MEMORY
    line_begin(vm, vcpu.line)
    vcpu.paths = <NestedPaths *>lines_new(sizeof(NestedPaths))
    if vcpu.paths == NULL:
        free(vcpu.line)
        return BIRTH_NO_MEMORY
    # Nothing was met yet: paths of formats 0 are of none.
    memset(vcpu.paths.guest_met, 0xff, sizeof(vcpu.paths.guest_met))
    memset(vcpu.paths.final_met, 0xff, sizeof(vcpu.paths.final_met))
    slots_lock(vm)
    if vm.n_vcpus < MAX_VCPUS:
        born = BIRTH_OK
        vcpu.id = vm.n_vcpus
        vcpu_reset(vcpu)
        vm.vcpus[vcpu.id] = vcpu
        vm.lines[vcpu.id + 1] = vcpu.line
        # Those who wait for all vCPUs find the line before the vCPU can run.
        st_release_u32(<uint32_t *>&vm.n_lines, <uint32_t>(vcpu.id + 2))
        st_release_u32(<uint32_t *>&vm.n_vcpus, <uint32_t>(vcpu.id + 1))
    slots_unlock(vm)
    if born != BIRTH_OK:
        free(vcpu.paths)
        free(vcpu.line)
    return born
