# cython: boundscheck=False, wraparound=False, cdivision=True
"""A direct-mapped TLB in front of a vCPU, and a census of a host's mmio sptes.

Two ways into kvmmmu: the machine on a handle (``Tlb``), and kernels over words that are
compiled into this very module (``mmio_census``).
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from kvmmmu cimport (
    KVMMMU_OK, KVMMMU_OUTCOME_MMIO, KVMMMU_OUTCOME_OK, KVMMMU_OWN_CPL, KVMMMU_READ, KVMMMU_WRITE, SpteMasks,
    VcpuHandle, kvmmmu_access, kvmmmu_make_access, kvmmmu_status_text, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make,
    spte_is_mmio, spte_masks_ept,
)

cdef struct Entry:
    uint64_t page      # gva >> 12, plus 1 so that 0 is empty
    uint64_t gpa_page
    bint writable


cdef class Tlb:
    """Translations of 4 KiB pages, kept from one access to the next.

    Parameters
    ----------
    vcpu : kvmmmu.VCpu
    entries : int
        A power of two.
    """

    cdef readonly VcpuHandle vcpu
    cdef readonly uint64_t hits, misses, mmio, faults
    cdef Entry *entry
    cdef uint64_t mask

    def __cinit__(self, VcpuHandle vcpu not None, uint64_t entries=64):
        if entries == 0 or entries & (entries - 1):
            raise ValueError(f"entries is {entries}; a power of two is wanted")
        self.vcpu = vcpu
        self.mask = entries - 1
        self.entry = <Entry *>calloc(entries, sizeof(Entry))
        if self.entry == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self.entry)

    cdef int touch(self, uint64_t gva, bint write) noexcept nogil:
        cdef uint64_t page = gva >> 12
        cdef Entry *e = &self.entry[page & self.mask]
        cdef kvmmmu_access a
        cdef int status
        if e.page == page + 1 and (e.writable or not write):
            self.hits += 1
            return KVMMMU_OK
        self.misses += 1
        status = kvmmmu_make_access(self.vcpu.handle, gva, KVMMMU_WRITE if write else KVMMMU_READ, 1, KVMMMU_OWN_CPL,
                                    NULL, &a)
        if status != KVMMMU_OK:
            return status
        if a.outcome == KVMMMU_OUTCOME_OK:
            e.page = page + 1
            e.gpa_page = a.gpa >> 12
            e.writable = write  # a page that was only read may still be write-protected
        elif a.outcome == KVMMMU_OUTCOME_MMIO:
            self.mmio += 1
        else:
            self.faults += 1
        return KVMMMU_OK

    def run(self, const uint64_t[::1] gvas, const uint8_t[::1] writes):
        """Make accesses in order, without the GIL."""
        cdef Py_ssize_t i, n = gvas.shape[0]
        cdef int status = KVMMMU_OK
        if writes.shape[0] != n:
            raise ValueError(f"{n} addresses and {writes.shape[0]} kinds")
        with nogil:
            for i in range(n):
                status = self.touch(gvas[i], writes[i] != 0)
                if status != KVMMMU_OK:
                    break
        if status != KVMMMU_OK:
            raise RuntimeError(kvmmmu_status_text(status).decode())


def mmio_census(const uint64_t[::1] sptes, int maxphyaddr=46):
    """How many entries of an EPT host are mmio sptes, and the last of them as (gfn, generation)."""
    cdef SpteMasks masks
    cdef uint64_t gfn = 0, gen = 0
    cdef Py_ssize_t i, found = 0
    spte_masks_ept(&masks, maxphyaddr, False, maxphyaddr, True, True, True)
    for i in range(sptes.shape[0]):
        if spte_is_mmio(&masks, sptes[i]):
            found += 1
            gfn, gen = mmio_spte_gfn(&masks, sptes[i]), mmio_spte_gen(sptes[i])
    return found, (gfn, gen)


def mmio_make(uint64_t gfn, uint64_t gen, int maxphyaddr=46):
    """The mmio spte of a gfn on such a host."""
    cdef SpteMasks masks
    spte_masks_ept(&masks, maxphyaddr, False, maxphyaddr, True, True, True)
    return mmio_spte_make(&masks, gfn, 0, gen)
