# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Rows in flight: their leaves are on the way from memory; each is taken up again sixteen rows later, in order."""

from libc.stdint cimport int64_t, uint64_t

cdef enum:
    RING_ROWS = 16
    RING_FREE = -1

cdef struct Ring:
    int64_t row[16]       # RING_FREE: no row
    uint64_t place[16]    # of its leaf (``leaf_place``)


cdef inline void ring_init(Ring *ring) noexcept nogil:
    cdef int k
    for k in range(RING_ROWS):
        ring.row[k] = RING_FREE
