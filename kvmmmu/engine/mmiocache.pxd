# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The per-vCPU record of the last MMIO page: a gva half and a gpa half."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.memslots cimport slots_generation, vm_slots
from kvmmmu.engine.state cimport MMIO_UNGUARDED, MMIO_ZAP_ALL, Vcpu


cdef inline uint64_t mmio_cache_generation(Vcpu *vcpu) noexcept nogil:
    """Address space 0 whatever the vCPU's own, as in KVM."""
    return slots_generation(vm_slots(vcpu.vm, 0))

cdef inline void mmio_cache_fill(Vcpu *vcpu, uint64_t gva, uint64_t gfn, uint32_t access) noexcept nogil:
    """Refused while a memslot update is in flight: what is true now may not be after it."""
    cdef uint64_t gen = mmio_cache_generation(vcpu)
    if gen & GEN_UPDATE_IN_PROGRESS:
        return
    # In guest mode the address is an L2 gpa: no gva that an instruction could name.
    vcpu.mmio.gva = 0 if vcpu.guest_mode else gva & ~<uint64_t>4095
    vcpu.mmio.gfn = gfn
    vcpu.mmio.access = access
    vcpu.mmio.generation = gen

cdef inline bint mmio_cache_fresh(Vcpu *vcpu) noexcept nogil:
    # The eras before generations did not stamp it.
    if vcpu.vm.switches.mmio_scheme == MMIO_ZAP_ALL or vcpu.vm.switches.mmio_scheme == MMIO_UNGUARDED:
        return True
    return vcpu.mmio.generation == mmio_cache_generation(vcpu)

cdef inline bint mmio_match_gva(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    return vcpu.mmio.gva != 0 and vcpu.mmio.gva == gva & ~<uint64_t>4095 and mmio_cache_fresh(vcpu)

cdef inline bint mmio_match_gpa(Vcpu *vcpu, uint64_t gpa) noexcept nogil:
    return vcpu.mmio.gfn != 0 and vcpu.mmio.gfn == gpa >> 12 and mmio_cache_fresh(vcpu)

cdef inline void mmio_cache_clear_gva(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    """INVLPG of one page; the gpa half does not depend on the guest's tables and stays."""
    if vcpu.mmio.gva == gva & ~<uint64_t>4095:
        vcpu.mmio.gva = 0

cdef inline void mmio_cache_clear_all(Vcpu *vcpu) noexcept nogil:
    vcpu.mmio.gva = 0
