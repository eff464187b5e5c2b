# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Batches of accesses beside writers: C42 of ``docs/lockless-walk.md``."""

from libc.stdint cimport uint64_t, uint8_t
from libc.stdlib cimport calloc, free
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim, vcpu_release
from kvmmmu.engine.hooks cimport *
from kvmmmu.engine.many cimport access_many
from kvmmmu.engine.state cimport Access, OUTCOME_OK, Vcpu
from turns cimport *
from world cimport *
from cases_walk cimport R, W, unmap_main

cdef enum:
    ROWS = 64         # enough that what is granted is remembered

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


cdef inline void rows_prepare(World *w, Rows *r) noexcept nogil:
    """Reads of one page that was touched before."""
    cdef int i
    r.vcpu = w.vcpu[0]
    map_gva(w, GVA, DATA)
    for i in range(ROWS):
        r.gvas[i] = GVA + 8 * <uint64_t>i
        r.kinds[i] = 0
    world_access(w.vcpu[0], GVA, 0)


cdef inline int c42_batch_leaves_at_a_request(World *w) noexcept nogil:
    """What the batch found is used until somebody asks; the flush waits for that row, and the next one walks."""
    cdef Rows *r = <Rows *>calloc(1, sizeof(Rows))  # a failed case leaves its threads behind
    cdef int i, _, faulted = 0
    rows_prepare(w, r)
    turns_thread(R, rows_main, r)
    # Past the rows that enter the guest and fill what is remembered.
    for _ in range(6):
        if turns_step(R, POINT_HARDWARE):
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
