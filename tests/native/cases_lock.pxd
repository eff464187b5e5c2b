# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""mmu_lock: who waits stands back, and whoever has waited long goes first."""

from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.locks cimport mmu_read_lock, mmu_read_unlock, mmu_write_lock, mmu_write_unlock
from turns cimport *
from world cimport *

cdef enum:
    HOLDER = 0
    WAITER = 1
    LATE = 2
    LONG = 66    # looks: more than a waiter has patience for (KVMMMU_PATIENCE)


cdef inline void write_main(void *arg) noexcept nogil:
    cdef World *w = <World *>arg
    mmu_write_lock(w.vm)
    hook(w.vm, POINT_FAULT_LOCKED)
    mmu_write_unlock(w.vm)

cdef inline void read_main(void *arg) noexcept nogil:
    cdef World *w = <World *>arg
    mmu_read_lock(w.vcpu[0])
    hook(w.vm, POINT_FAULT_LOCKED)
    mmu_read_unlock(w.vcpu[0])

cdef inline int waits(World *w, int looks) noexcept nogil:
    """The holder has the lock, the waiter has looked so often, the lock is free again."""
    cdef int _look
    if turns_step(HOLDER, POINT_FAULT_LOCKED):
        return 1
    for _look in range(looks):
        if turns_step(WAITER, POINT_LOCK_WAIT):
            return 1
    return turns_step(HOLDER, POINT_END)

cdef inline int long_wait(World *w) noexcept nogil:
    if waits(w, LONG) or turns_step(LATE, POINT_LOCK_WAIT) or turns_step(WAITER, POINT_FAULT_LOCKED):
        return 1
    return turns_step(WAITER, POINT_END) or turns_step(LATE, POINT_FAULT_LOCKED) or turns_step(LATE, POINT_END)


cdef inline int l1_long_wait_goes_first(World *w) noexcept nogil:
    """A lock that is free is left alone by who comes while another has waited long."""
    turns_thread(HOLDER, write_main, w)
    turns_thread(WAITER, write_main, w)
    turns_thread(LATE, write_main, w)
    return long_wait(w)

cdef inline int l1_reader_goes_first(World *w) noexcept nogil:
    """A reader too: writers that follow each other cannot keep it out."""
    turns_thread(HOLDER, write_main, w)
    turns_thread(WAITER, read_main, w)
    turns_thread(LATE, write_main, w)
    return long_wait(w)

cdef inline int l2_short_wait_does_not(World *w) noexcept nogil:
    """Before that nobody steps back: the holder of a moment ago may go on with what its cache holds."""
    turns_thread(HOLDER, write_main, w)
    turns_thread(WAITER, write_main, w)
    turns_thread(LATE, write_main, w)
    if waits(w, 2) or turns_step(LATE, POINT_FAULT_LOCKED) or turns_step(WAITER, POINT_LOCK_WAIT):
        return 1
    return turns_step(LATE, POINT_END) or turns_step(WAITER, POINT_FAULT_LOCKED) or turns_step(WAITER, POINT_END)
