# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Faults, slot lookups and shadow pages timed inside the machine, where no door's cost is in the figure.

The engine's rooms are inlined here as in the extension itself; this is built from a checkout only.
"""

from libc.stdint cimport int32_t, uint64_t
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from kvmmmu._core cimport kvmmmu_vcpu_from
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_is_last, spte_present
from kvmmmu.engine.fault cimport last_sptep, page_fault
from kvmmmu.engine.leaf cimport RET_PF_RETRY
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport slot_find, vm_slots
from kvmmmu.engine.pages cimport page_at
from kvmmmu.engine.roots cimport vcpu_enter
from kvmmmu.engine.sptes cimport page_stats, spte_drop, spte_write
from kvmmmu.engine.state cimport Slot, SlotSet, Vcpu, Vm
from kvmmmu.engine.sync cimport sync_page


cdef double now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)
    return <double>t.tv_sec + 1e-9 * <double>t.tv_nsec


cdef Vcpu *vcpu_of(object vcpu) except NULL:
    return <Vcpu *>kvmmmu_vcpu_from(vcpu)


cdef bint drop(Vcpu *vcpu, uint64_t address) noexcept nogil:
    """Take a leaf out again, as whoever zaps it would; the caller flushes nothing, since nothing is cached."""
    cdef Vm *vm = vcpu.vm
    cdef int level
    cdef uint64_t *sptep = last_sptep(vm, vcpu.root.page, address, &level)
    if sptep == NULL or not spte_present(sptep[0]) or not spte_is_last(sptep[0], level):
        return False
    if page_at(vm, vcpu.root.page).tdp:
        spte_write(sptep, 0)
        page_stats(vm, level, -1)
    else:
        spte_drop(vm, <uint64_t>(sptep - vm.arena.sptes))
    return True


def installs(object owner, const uint64_t[::1] address, uint64_t error_code, int repeat):
    """Seconds that the handler takes to install a leaf for each address, the tables being there; checked."""
    cdef Vcpu *vcpu = vcpu_of(owner)
    cdef Py_ssize_t i, n = address.shape[0], wrong = 0
    cdef int r
    cdef double began, spent = 0
    with nogil:
        vcpu_enter(vcpu)
        for r in range(repeat + 1):
            began = now()
            for i in range(n):
                wrong += page_fault(vcpu, address[i], error_code) != RET_PF_RETRY
            # The first round builds the tables.
            spent += now() - began if r else 0
            for i in range(n):
                wrong += not drop(vcpu, address[i])
    if wrong:
        raise AssertionError(f"{wrong} faults did not install a leaf")
    return spent


def lookups(object owner, const uint64_t[::1] gfn):
    """Seconds, and how many of the gfns a slot holds."""
    cdef Vcpu *vcpu = vcpu_of(owner)
    cdef const SlotSet *slots = vm_slots(vcpu.vm, 0)
    cdef Py_ssize_t i, n = gfn.shape[0], found = 0
    cdef double began
    with nogil:
        began = now()
        for i in range(n):
            found += slot_find(slots, gfn[i], &vcpu.slot_hint) != NULL
        began = now() - began
    return began, found


def syncs(object owner, uint64_t address, int repeat):
    """Seconds to bring the page whose leaf maps an address in line with the guest's table."""
    cdef Vcpu *vcpu = vcpu_of(owner)
    cdef int level, r
    cdef uint64_t *sptep
    cdef double began
    with nogil:
        sptep = last_sptep(vcpu.vm, vcpu.root.page, address, &level)
        mmu_write_lock(vcpu.vm)
        began = now()
        for r in range(repeat):
            sync_page(vcpu, <int32_t>((sptep - vcpu.vm.arena.sptes) >> 9))
        began = now() - began
        mmu_write_unlock(vcpu.vm)
    return began
