# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One thread's part of a contest: all begin at once, and the first to end stops the rest.

So every access that counts was made while the others worked.  Built twice from the engine's rooms: as they are, and
with KVMMMU_NO_LOCKS, the control.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, CLOCK_THREAD_CPUTIME_ID, clock_gettime, clockid_t, timespec
from kvmmmu._core cimport kvmmmu_vcpu_from
from kvmmmu.bits.constants cimport PFERR_WRITE
from kvmmmu.engine.atomics cimport cpu_pause, fetch_add_u32, ld_acquire_u32, st_release_u32
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim, vcpu_release
from kvmmmu.engine.state cimport Access, Vcpu
from kvmmmu.engine.vcpu cimport vcpu_access

cdef enum:
    CHUNK = 64   # accesses between two looks at the others


cdef inline double now(clockid_t clock) noexcept nogil:
    cdef timespec t
    clock_gettime(clock, &t)
    return <double>t.tv_sec + 1e-9 * <double>t.tv_nsec


def run(object owner, const uint64_t[::1] gvas, bint write, uint32_t[::1] gate, int threads):
    """Accesses made, CPU seconds, wall seconds.  ``gate``: two words, zero before the threads come."""
    cdef Vcpu *vcpu = <Vcpu *>kvmmmu_vcpu_from(owner)
    cdef Access out
    cdef Py_ssize_t i = 0, n = gvas.shape[0]
    cdef double cpu, wall
    cdef uint64_t access = PFERR_WRITE if write else 0
    if vcpu_claim(vcpu) != CLAIM_OK:
        raise AssertionError("somebody else has the vCPU")
    with nogil:
        fetch_add_u32(&gate[0], 1)
        while ld_acquire_u32(&gate[0]) < <uint32_t>threads:
            cpu_pause(0)
        cpu = now(CLOCK_THREAD_CPUTIME_ID)
        wall = now(CLOCK_MONOTONIC)
        while i < n and (i % CHUNK or not ld_acquire_u32(&gate[1])):
            vcpu_access(vcpu, gvas[i], access, 4, NULL, &out)
            i += 1
        st_release_u32(&gate[1], 1)
        wall = now(CLOCK_MONOTONIC) - wall
        cpu = now(CLOCK_THREAD_CPUTIME_ID) - cpu
    vcpu_release(vcpu)
    return i, cpu, wall
