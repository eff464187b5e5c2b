# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The lockless walk against one change of an spte: C1 to C14 of ``docs/lockless-walk.md``."""

from libc.stdint cimport uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_is_mmio, spte_present
from kvmmmu.engine.fault cimport walk_sptes
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.leaf cimport RET_PF_EMULATE, RET_PF_INVALID, RET_PF_RETRY
from kvmmmu.engine.notifier cimport unmap_hva_range
from kvmmmu.engine.state cimport MMU_EPT, MMU_SHADOW, OUTCOME_MMIO, OUTCOME_OK, Vcpu
from turns cimport *
from world cimport *

cdef enum:
    R = 0   # the reader's thread
    W = 1   # the writer's

cdef inline void walker_main(void *arg) noexcept nogil:
    cdef Walker *k = <Walker *>arg
    cdef int top
    k.leaf = walk_sptes(k.vcpu, k.address, k.sptes, &top)

cdef inline void toucher_main(void *arg) noexcept nogil:
    cdef Toucher *t = <Toucher *>arg
    t.a = world_access(t.vcpu, t.gva, t.access)

cdef inline void unmap_main(void *arg) noexcept nogil:
    """The host takes the page behind DATA away."""
    cdef World *w = <World *>arg
    unmap_hva_range(w.vm, w.ram + DATA, w.ram + DATA + 4096)

cdef inline void walks(World *w, int thread, int vcpu, uint64_t address) noexcept nogil:
    """The thread will walk sptes without a lock."""
    w.walker[thread].vcpu = w.vcpu[vcpu]
    w.walker[thread].address = address
    turns_thread(thread, walker_main, &w.walker[thread])

cdef inline void touches(World *w, int thread, int vcpu, uint64_t gva, uint64_t access) noexcept nogil:
    """The thread will make one access."""
    w.toucher[thread].vcpu = w.vcpu[vcpu]
    w.toucher[thread].gva = gva
    w.toucher[thread].access = access
    turns_thread(thread, toucher_main, &w.toucher[thread])


cdef inline int c1_empty_to_present(World *w) noexcept nogil:
    """The reader is announced before, and reads after, a fault filled the leaf: it sees the new leaf whole."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 4096 * 9, DATA + 4096)
    # The tree stands; the leaf of GVA does not (9 pages on is outside the prefetched window).
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(R, POINT_WALK_MARKED) or turns_step(W, POINT_SPTE_WRITE) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and spte_present(w.walker[R].sptes[1]), b"the leaf written meanwhile is seen")
    expect(w, w.toucher[W].a.outcome == OUTCOME_OK, b"the fault was served beside a reader")
    return 0


cdef inline int c1_old_value(World *w) noexcept nogil:
    """The same, read before: the reader sees the empty entry, whatever stands there by now."""
    map_gva(w, GVA, DATA)
    map_gva(w, GVA + 4096 * 9, DATA + 4096)
    world_access(w.vcpu[0], GVA + 4096 * 9, 0)
    walks(w, R, 0, GVA)
    touches(w, W, 1, GVA, 0)
    if turns_step(W, POINT_SPTE_WRITE) or turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_END):
        return 1
    if turns_step(R, POINT_END):
        return 1
    expect(w, w.walker[R].leaf == 1 and w.walker[R].sptes[1] == 0, b"what was read before the fault stays as it was")
    return 0


cdef inline int c4_freer_waits(World *w) noexcept nogil:
    """present to empty: the host takes the page away; the flush waits for the reader, who keeps the old leaf."""
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    walks(w, R, 0, GVA)
    turns_thread(W, unmap_main, w)
    if turns_step(R, POINT_WALK_READ) or turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT):
        return 1
    if turns_step(R, POINT_WALK_LEFT) or turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    expect(w, spte_present(w.walker[R].sptes[1]), b"the reader keeps the value it read")
    return 0
