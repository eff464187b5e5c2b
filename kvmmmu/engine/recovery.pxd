# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What the worker of nx_huge_pages_recovery does in one period: give the oldest split pages a new start."""

from libc.stdint cimport int32_t, uint64_t
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.nxpages cimport nx_forget
from kvmmmu.engine.pages cimport page_at
from kvmmmu.engine.state cimport PageList, STAT_NX_LPAGE_SPLITS, Vm
from kvmmmu.engine.tdp cimport tdp_free, tdp_zap_page
from kvmmmu.engine.tlb cimport flush_remote_tlbs
from kvmmmu.engine.zap cimport list_init, zap_commit, zap_prepare


cdef inline uint64_t nx_recover(Vm *vm, uint64_t ratio) noexcept nogil:
    """Zap one in ``ratio`` of the tables (rounded up, 0: none), oldest first; returns how many went.

    Linux 6.1: logged slots are no exception, and one flush serves all.
    """
    cdef PageList invalid
    cdef uint64_t want = 0, n = 0
    cdef int32_t id, doomed = 0
    cdef bint flush = False
    list_init(&invalid)
    mmu_write_lock(vm)
    if ratio:
        want = vm.stats[<int>STAT_NX_LPAGE_SPLITS]
        want = want // ratio + (want % ratio != 0)
    while n < want and vm.nx_head:
        id = vm.nx_head
        if not page_at(vm, id).tdp:
            zap_prepare(vm, -1, id, &invalid)
        elif tdp_zap_page(vm, id, &doomed):
            flush = True
        # A table whose link is gone already is being torn down by whoever took it.
        nx_forget(vm, id)
        n += 1
    if invalid.head:
        zap_commit(vm, &invalid)
    elif flush:
        flush_remote_tlbs(vm)
    tdp_free(vm, doomed)
    mmu_write_unlock(vm)
    return n
