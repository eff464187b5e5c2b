# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Slots by gfn for the machine: a vCPU's own lookup, the VM's, and what hangs from a gfn."""

from libc.stdint cimport uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.atomics cimport fetch_or_u64
from kvmmmu.engine.memslots cimport gfn_to_disallow, slot_find, vm_slots
from kvmmmu.engine.state cimport Slot, VSTAT_SLOT_SEARCH, Vcpu, Vm


cdef inline Slot *vcpu_slot(Vcpu *vcpu, uint64_t gfn) noexcept nogil:
    """The slot of a gfn in the vCPU's address space, or NULL."""
    vcpu.stats[<int>VSTAT_SLOT_SEARCH] += 1
    return slot_find(vm_slots(vcpu.vm, vcpu.smm), gfn, &vcpu.slot_hint)

cdef inline Slot *vm_slot(Vm *vm, int as_id, uint64_t gfn) noexcept nogil:
    """The same for whoever holds mmu_lock for write: the hint is the VM's."""
    return slot_find(vm_slots(vm, as_id), gfn, &vm.slot_hint[as_id])


cdef inline void slot_mark_dirty(Slot *slot, uint64_t gfn) noexcept nogil:
    """Note a write in the slot's log, if it has one."""
    cdef uint64_t page = gfn - slot.base_gfn
    if slot.dirty != NULL:
        fetch_or_u64(&slot.dirty[page >> 6], ONE << (page & 63))

cdef inline void slot_forbid_large(Slot *slot, uint64_t gfn) noexcept nogil:
    gfn_to_disallow(slot, gfn, LEVEL_2M)[0] += 1
    gfn_to_disallow(slot, gfn, LEVEL_1G)[0] += 1

cdef inline void slot_allow_large(Slot *slot, uint64_t gfn) noexcept nogil:
    gfn_to_disallow(slot, gfn, LEVEL_2M)[0] -= 1
    gfn_to_disallow(slot, gfn, LEVEL_1G)[0] -= 1
