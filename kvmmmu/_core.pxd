# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What other extensions may cimport: handles, and the functions of the C table on them.

The functions, structs and their rules are described in ``kvmmmu/capi.h``.  All of them but the
``_from`` three work without the GIL.  The classes hold one pointer each, so that a typed argument
(``VcpuHandle vcpu``) costs one test; ``VCpu`` is a ``VcpuHandle``, ``Paging`` a ``TablesHandle``.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "kvmmmu/capi.h" nogil:
    ctypedef struct kvmmmu_vm:
        pass
    ctypedef struct kvmmmu_vcpu:
        pass
    ctypedef struct kvmmmu_tables:
        pass

    enum:
        KVMMMU_OK
        KVMMMU_STOPPED
        KVMMMU_E_ARGUMENT
        KVMMMU_E_BUSY
        KVMMMU_E_CLOSED
        KVMMMU_E_GP

    enum:
        KVMMMU_READ
        KVMMMU_WRITE
        KVMMMU_FETCH
        KVMMMU_IMPLICIT
        KVMMMU_AC
        KVMMMU_SET_AD
        KVMMMU_OWN_CPL
        KVMMMU_MAX_ACCESS

    enum:
        KVMMMU_OUTCOME_OK
        KVMMMU_OUTCOME_MMIO
        KVMMMU_OUTCOME_PF
        KVMMMU_OUTCOME_GP
        KVMMMU_OUTCOME_INTERNAL_ERROR
        KVMMMU_OUTCOME_SHUTDOWN
        KVMMMU_OUTCOME_HANG
        KVMMMU_OUTCOME_ERROR
        KVMMMU_OUTCOME_VE

    enum:
        KVMMMU_PATH_HARDWARE
        KVMMMU_PATH_FAULT
        KVMMMU_PATH_EMULATED

    struct kvmmmu_access:
        uint64_t gpa
        uint64_t error_code
        uint64_t fault_gva
        uint64_t mmio_gpa[2]
        uint8_t mmio_size[2]
        uint8_t mmio_offset[2]
        uint8_t n_mmio
        uint8_t outcome
        uint8_t path
        uint8_t size
        uint32_t exits
        uint8_t suberror

    struct kvmmmu_translation:
        uint64_t gva
        uint64_t gpa
        uint64_t error_code
        uint64_t fault_gpa
        uint64_t entry
        uint8_t fault
        uint8_t page_shift
        uint8_t access
        uint8_t level

    struct kvmmmu_sregs:
        uint64_t cr0
        uint64_t cr3
        uint64_t cr4
        uint64_t efer
        uint32_t pkru
        uint8_t compat
        uint8_t cpl
        uint8_t ac
        uint8_t unused


cdef class VmHandle:
    cdef kvmmmu_vm *handle

cdef class VcpuHandle:
    cdef kvmmmu_vcpu *handle

cdef class TablesHandle:
    cdef kvmmmu_tables *handle


# Named as in the table, where ``vm_from`` is ``capi->vm_from``.
cdef kvmmmu_vm *kvmmmu_vm_from(object owner) except NULL
cdef kvmmmu_vcpu *kvmmmu_vcpu_from(object owner) except NULL
cdef kvmmmu_tables *kvmmmu_tables_from(object owner) except NULL

cdef int kvmmmu_make_access(kvmmmu_vcpu *vcpu, uint64_t gva, uint32_t how, uint32_t size, int cpl, void *data,
                            kvmmmu_access *result) noexcept nogil
cdef int kvmmmu_access_many(kvmmmu_vcpu *vcpu, const uint64_t *gvas, const uint8_t *how, size_t n, uint32_t size,
                            int cpl, kvmmmu_access *results) noexcept nogil
cdef int kvmmmu_read(kvmmmu_vcpu *vcpu, uint64_t gva, void *data, size_t size, int cpl, size_t *done,
                     kvmmmu_access *last) noexcept nogil
cdef int kvmmmu_write(kvmmmu_vcpu *vcpu, uint64_t gva, const void *data, size_t size, int cpl, size_t *done,
                      kvmmmu_access *last) noexcept nogil
cdef int kvmmmu_invlpg(kvmmmu_vcpu *vcpu, uint64_t gva) noexcept nogil
cdef int kvmmmu_load_cr3(kvmmmu_vcpu *vcpu, uint64_t value) noexcept nogil
cdef int kvmmmu_sync_roots(kvmmmu_vcpu *vcpu) noexcept nogil
cdef int kvmmmu_get_sregs(kvmmmu_vcpu *vcpu, kvmmmu_sregs *sregs) noexcept nogil
cdef int kvmmmu_set_sregs(kvmmmu_vcpu *vcpu, const kvmmmu_sregs *sregs) noexcept nogil
cdef int kvmmmu_vm_stat_index(const char *name) noexcept nogil
cdef int kvmmmu_vcpu_stat_index(const char *name) noexcept nogil
cdef const char *kvmmmu_vm_stat_name(int index) noexcept nogil
cdef const char *kvmmmu_vcpu_stat_name(int index) noexcept nogil
cdef int kvmmmu_vm_stat(kvmmmu_vm *vm, int index, uint64_t *value) noexcept nogil
cdef int kvmmmu_vcpu_stat(kvmmmu_vcpu *vcpu, int index, uint64_t *value) noexcept nogil
cdef int kvmmmu_translate(const kvmmmu_tables *tables, const uint64_t *gvas, size_t n, uint32_t how, int cpl,
                          kvmmmu_translation *results) noexcept nogil
cdef const char *kvmmmu_status_text(int status) noexcept nogil
