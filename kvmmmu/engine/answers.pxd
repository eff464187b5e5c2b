# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Records that cross the C table as they are: ``kvmmmu/capi.h`` has their only definition."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "kvmmmu/capi.h" nogil:
    enum:
        OUTCOME_OK "KVMMMU_OUTCOME_OK"
        OUTCOME_MMIO "KVMMMU_OUTCOME_MMIO"
        OUTCOME_PF "KVMMMU_OUTCOME_PF"
        OUTCOME_GP "KVMMMU_OUTCOME_GP"
        OUTCOME_INTERNAL_ERROR "KVMMMU_OUTCOME_INTERNAL_ERROR"
        OUTCOME_SHUTDOWN "KVMMMU_OUTCOME_SHUTDOWN"
        OUTCOME_HANG "KVMMMU_OUTCOME_HANG"
        OUTCOME_ERROR "KVMMMU_OUTCOME_ERROR"
        OUTCOME_VE "KVMMMU_OUTCOME_VE"
        PATH_HARDWARE "KVMMMU_PATH_HARDWARE"
        PATH_FAULT "KVMMMU_PATH_FAULT"
        PATH_EMULATED "KVMMMU_PATH_EMULATED"

    struct Access "kvmmmu_access":
        uint64_t gpa          # of the first byte, or that faulted with #VE; all ones where none is known
        uint64_t error_code   # of a #PF; the exit qualification of a #VE; an errno for OUTCOME_ERROR
        uint64_t fault_gva
        uint64_t mmio_gpa[2]  # pieces that no memory took, one per page
        uint8_t mmio_size[2]
        uint8_t mmio_offset[2]  # of the piece in the access
        uint8_t n_mmio
        uint8_t outcome       # OUTCOME_*
        uint8_t path          # PATH_*
        uint8_t size          # bytes of the access
        uint32_t exits
        uint8_t suberror      # of OUTCOME_INTERNAL_ERROR

    struct Translation "kvmmmu_translation":
        uint64_t gva
        uint64_t gpa          # of the byte; under a second dimension the address in host memory
        uint64_t error_code   # of the fault
        uint64_t fault_gpa    # guest-physical address that the second dimension refused
        uint64_t entry        # last entry read of the guest's tables: the leaf, or where the walk ended
        uint8_t fault         # FAULT_*
        uint8_t page_shift    # log2 of the guest's page size
        uint8_t access        # ACC rights of the guest's translation
        uint8_t level         # of that last entry; 0: none was read
        uint32_t unused
