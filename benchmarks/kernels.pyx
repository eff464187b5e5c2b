# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Batches over kernels that Python has no door to, compiled as an embedder would: by ``cimport``."""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.shadow_walk cimport shadow_walk


def shadow_walks(const uint64_t[::1] arena, uint64_t root, int top, const uint64_t[::1] address, uint64_t[::1] spte,
                 uint8_t[::1] level):
    cdef Py_ssize_t i, n = address.shape[0]
    cdef uint64_t sptes[6]
    cdef int leaf
    assert spte.shape[0] == n and level.shape[0] == n
    with nogil:
        for i in range(n):
            leaf = shadow_walk(&arena[0], root, top, address[i], sptes)
            spte[i] = sptes[leaf]
            level[i] = <uint8_t>leaf
