# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""KVM's handler of MMIO faults called from a compiled loop, as the engine's own exits call it."""

from libc.stdint cimport uint64_t
from kvmmmu._core cimport VcpuHandle
from kvmmmu.bits.constants cimport ACC_ALL, PFERR_WRITE, ROLE_DIRECT
from kvmmmu.engine.fault cimport (
    FAULT_INJECT, fault_hits_own_tables, fault_pfn, fault_write_tracked, handle_mmio_fault, page_fault,
)
from kvmmmu.engine.guest cimport guest_walk
from kvmmmu.engine.leaf cimport RET_PF_EMULATE
from kvmmmu.engine.state cimport Fault, Slot, VSTAT_PF_EMULATE, VSTAT_PF_TAKEN, Vcpu, Walk

cdef extern from "ref_slot_search.c" nogil:
    cdef struct ref_slot:
        uint64_t base_gfn
    const ref_slot *ref_binary(const ref_slot *slots, size_t n, uint64_t gfn)
    const ref_slot *ref_linear(const ref_slot *slots, size_t n, uint64_t gfn)

# What a fault is served by.
cdef enum:
    CACHED = 0     # the record of the last page, or the mmio spte
    SLOW = 1       # the real path
    BINARY = 2     # the same with the search of ref_slot_search.c
    LINEAR = 3

# None of the four is inlined into its loop: an exit calls a function.
ctypedef int (*handler)(Vcpu *, uint64_t, const ref_slot *, size_t) noexcept nogil


cdef int cached(Vcpu *vcpu, uint64_t address, const ref_slot *slots, size_t n) noexcept nogil:
    """``handle_mmio_page_fault``, whole: record, mark, walk, reserved bits, generation, fill."""
    return handle_mmio_fault(vcpu, address)

cdef int slow(Vcpu *vcpu, uint64_t address, const ref_slot *slots, size_t n) noexcept nogil:
    """From the top of the handler: guest walk, slot, record."""
    return page_fault(vcpu, address, PFERR_WRITE)

cdef inline int slow_by(Vcpu *vcpu, uint64_t address, const ref_slot *slots, size_t n, bint linear) noexcept nogil:
    """The same steps, but for the search: ``page_fault`` down to ``fault_pfn`` where no slot is found."""
    cdef Fault f
    cdef int result
    cdef bint direct = (vcpu.root_role & ROLE_DIRECT) != 0
    vcpu.mmio_hit = 0
    f.addr = address
    f.error_code = PFERR_WRITE
    f.write = 1
    f.fetch = 0
    f.user = 0
    f.present = 0
    f.rsvd = 0
    f.seq = vcpu.vm.notifier_seq
    f.self_change = 0
    f.access = ACC_ALL
    vcpu.stats[<int>VSTAT_PF_TAKEN] += 1
    f.gfn = address >> 12
    if not direct:
        if not guest_walk(vcpu, &vcpu.walk, address, PFERR_WRITE):
            return FAULT_INJECT
        f.gfn = vcpu.walk.gpa >> 12
    f.slot = <Slot *>(ref_linear(slots, n, f.gfn) if linear else ref_binary(slots, n, f.gfn))
    if fault_write_tracked(&f):
        return -1
    if not direct:
        fault_hits_own_tables(vcpu, &f, &vcpu.walk)
        f.access = vcpu.walk.pte_access
    result = fault_pfn(vcpu, &f)
    vcpu.stats[<int>VSTAT_PF_EMULATE] += result == RET_PF_EMULATE
    return result

cdef int slow_binary(Vcpu *vcpu, uint64_t address, const ref_slot *slots, size_t n) noexcept nogil:
    return slow_by(vcpu, address, slots, n, False)

cdef int slow_linear(Vcpu *vcpu, uint64_t address, const ref_slot *slots, size_t n) noexcept nogil:
    return slow_by(vcpu, address, slots, n, True)


def faults(VcpuHandle owner, const uint64_t[::1] addresses, int how, const uint64_t[:, ::1] slots):
    """How many of the faults end in EMULATE.  ``slots``: rows of eight words, base_gfn and npages first."""
    cdef Vcpu *vcpu = <Vcpu *>owner.handle
    cdef handler run = cached
    cdef Py_ssize_t i, n = addresses.shape[0], emulated = 0
    assert slots.shape[1] == 8
    if how != CACHED:
        run = slow if how == SLOW else slow_binary if how == BINARY else slow_linear
    with nogil:
        for i in range(n):
            emulated += run(vcpu, addresses[i], <const ref_slot *>&slots[0, 0], <size_t>slots.shape[0]) == RET_PF_EMULATE
    return emulated
