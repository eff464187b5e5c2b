# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Batches of accesses beside writers: C42 and C44 of ``docs/lockless-walk.md``."""

from libc.stdint cimport uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim, vcpu_release
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.many cimport access_many
from kvmmmu.engine.state cimport Access, OUTCOME_OK, Vcpu
from turns cimport *
from world cimport *
from cases_walk cimport R, W, create_main, unmap_main

cdef enum:
    ROWS = 64         # enough that what is granted is remembered
    ELSEWHERE = DATA + 0x1000

cdef struct Rows:
    Vcpu *vcpu
    uint64_t[64] gvas
    uint8_t[64] kinds
    Access[64] out


cdef inline void rows_main(void *arg) noexcept nogil:
    cdef Rows *r = <Rows *>arg
    if vcpu_claim(r.vcpu) == CLAIM_OK:
        access_many(r.vcpu, r.gvas, r.kinds, ROWS, 1, r.out)
        vcpu_release(r.vcpu)


cdef inline void rows_prepare(World *w, Rows *r, int vcpu, uint64_t gpa) noexcept nogil:
    """Reads of one page of the guest, which is mapped to the gpa."""
    cdef int i
    r.vcpu = w.vcpu[vcpu]
    map_gva(w, GVA, gpa)
    for i in range(ROWS):
        r.gvas[i] = GVA + 8 * <uint64_t>i
        r.kinds[i] = 0


cdef inline int rows_started(Rows *r) noexcept nogil:
    """The reader's batch, past the rows that enter the guest and fill what is remembered."""
    cdef int _
    turns_thread(R, rows_main, r)
    for _ in range(6):
        if turns_step(R, POINT_HARDWARE):
            return 1
    return 0


cdef inline int c42_batch_leaves_at_a_request(World *w) noexcept nogil:
    """What the batch found is used until somebody asks; the flush waits for that row, and the next one walks."""
    cdef Rows *r = <Rows *>calloc(1, sizeof(Rows))  # a failed case leaves its threads behind
    cdef int i, faulted = 0
    rows_prepare(w, r, 0, DATA)
    world_access(r.vcpu, GVA, 0)
    if rows_started(r):
        return 1
    turns_thread(W, unmap_main, w)
    if turns_step(W, POINT_NOTIFIER) or turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_LOCK_WAIT):
        return 1
    if turns_step(W, POINT_END) or turns_step(R, POINT_END):
        return 1
    for i in range(ROWS):
        expect(w, r.out[i].outcome == OUTCOME_OK, b"every row is served")
        if r.out[i].exits:
            faulted = i
            expect(w, i == 5 or i == 6, b"the row after the request is the first to meet the zap, and the last")
    expect(w, faulted != 0, b"the page that went was faulted in again")
    free(r)
    return 0


cdef inline int rows_end(World *w, Rows *r) noexcept nogil:
    cdef int i
    if turns_step(R, POINT_END):
        return 1
    for i in range(ROWS):
        expect(w, r.out[i].outcome == OUTCOME_OK, b"every row is served")
    free(r)
    return 0


cdef inline int c44_update_asks_a_batch_to_leave(World *w) noexcept nogil:
    """A slot update sees the batch in the guest: it waits for one row, not for all."""
    cdef Rows *r = <Rows *>calloc(1, sizeof(Rows))
    rows_prepare(w, r, 0, DATA)
    world_access(r.vcpu, GVA, 0)
    if rows_started(r):
        return 1
    turns_thread(W, create_main, w)
    if turns_step(W, POINT_SYNC_WAIT) or turns_step(R, POINT_HARDWARE) or turns_step(W, POINT_END):
        return 1
    return rows_end(w, r)


cdef inline int c44_batch_enters_after_the_look(World *w) noexcept nogil:
    """A slot update sees the vCPU at a fault, which then enters: the update waits for the fault, not for the batch."""
    cdef Rows *r = <Rows *>calloc(1, sizeof(Rows))
    rows_prepare(w, r, 0, DATA)
    turns_thread(R, rows_main, r)
    turns_thread(W, create_main, w)
    if turns_step(R, POINT_FAULT_PFN) or turns_step(W, POINT_LINE_SEEN) or turns_step(R, POINT_HARDWARE):
        return 1
    if turns_step(W, POINT_END):
        return 1
    return rows_end(w, r)


cdef inline int c44_batch_is_back_before_the_look(World *w) noexcept nogil:
    """A batch leaves at a flush and is back before the flush looks at its line: it is asked once more."""
    cdef Rows *r = <Rows *>calloc(1, sizeof(Rows))
    map_gva(w, GVA, DATA)
    world_access(w.vcpu[0], GVA, 0)
    rows_prepare(w, r, 1, ELSEWHERE)
    world_access(r.vcpu, GVA, 0)
    if rows_started(r):
        return 1
    turns_thread(W, unmap_main, w)
    # The first vCPU's line is seen: both are asked to flush by then, and the second takes that at once.
    if turns_step(W, POINT_LINE_SEEN) or turns_step(R, POINT_HARDWARE) or turns_step(R, POINT_HARDWARE):
        return 1
    if turns_step(W, POINT_DRAIN_WAIT) or turns_step(R, POINT_HARDWARE) or turns_step(W, POINT_END):
        return 1
    return rows_end(w, r)
