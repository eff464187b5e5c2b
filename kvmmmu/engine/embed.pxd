# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The C door's side of the machine: arguments checked, the vCPU claimed, then the engine's own call.

Nothing has happened when a call returns an error; ``kvmmmu/capi.h`` says what each may be.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport CpuRegs, Paging
from kvmmmu.engine.batch cimport translate_many
from kvmmmu.engine.claim cimport CLAIM_BUSY, CLAIM_OK, vcpu_claim, vcpu_claim_enter, vcpu_release
from kvmmmu.engine.many cimport access_many, how_access
from kvmmmu.engine.registers cimport REG_OK, load_cr3, set_sregs
from kvmmmu.engine.roots cimport roots_sync, vcpu_invlpg
from kvmmmu.engine.state cimport Access, MemMap, OUTCOME_OK, Translation, Vcpu
from kvmmmu.engine.vcpu cimport vcpu_access

cdef extern from "kvmmmu/capi.h" nogil:
    enum:
        KVMMMU_OK
        KVMMMU_STOPPED
        KVMMMU_E_ARGUMENT
        KVMMMU_E_BUSY
        KVMMMU_E_CLOSED
        KVMMMU_E_GP
        KVMMMU_WRITE
        KVMMMU_FETCH
        KVMMMU_IMPLICIT
        KVMMMU_AC
        KVMMMU_SET_AD
        KVMMMU_OWN_CPL
        KVMMMU_MAX_ACCESS

    struct Sregs "kvmmmu_sregs":
        uint64_t cr0
        uint64_t cr3
        uint64_t cr4
        uint64_t efer
        uint32_t pkru
        uint8_t compat
        uint8_t cpl
        uint8_t ac
        uint8_t unused

cdef struct Tables:
    # What a handle of tables in plain memory stands for.
    const Paging *guest
    const Paging *host    # format FMT_NONE: no second dimension
    const MemMap *map
    int kernel            # BATCH_*


cdef inline bint how_legal(uint32_t how, uint32_t allowed) noexcept nogil:
    return how & 3 != 3 and not how & ~(3 | allowed)

cdef inline bint cpl_legal(int cpl) noexcept nogil:
    return KVMMMU_OWN_CPL <= cpl <= 3


cdef inline int embed_claim(Vcpu *vcpu) noexcept nogil:
    return embed_claimed(vcpu_claim(vcpu))

cdef inline int embed_claimed(int claim) noexcept nogil:
    if claim == CLAIM_OK:
        return KVMMMU_OK
    return KVMMMU_E_BUSY if claim == CLAIM_BUSY else KVMMMU_E_CLOSED


# ---- accesses -----------------------------------------------------------------------

cdef inline int embed_access(Vcpu *vcpu, uint64_t gva, uint32_t how, uint32_t size, int cpl, uint8_t *data,
                             Access *out) noexcept nogil:
    cdef int status
    cdef uint8_t own
    if (vcpu == NULL or out == NULL or size - 1 >= KVMMMU_MAX_ACCESS or not cpl_legal(cpl)
            or not how_legal(how, KVMMMU_IMPLICIT)):
        return KVMMMU_E_ARGUMENT
    status = embed_claimed(vcpu_claim_enter(vcpu))
    if status != KVMMMU_OK:
        return status
    own = vcpu.cpl
    if cpl != KVMMMU_OWN_CPL:
        vcpu.cpl = <uint8_t>cpl
    vcpu_access(vcpu, gva, how_access(how), <int>size, data, out)
    vcpu.cpl = own
    vcpu_release(vcpu)
    return KVMMMU_OK


cdef inline int embed_access_many(Vcpu *vcpu, const uint64_t *gvas, const uint8_t *how, size_t n, uint32_t size,
                                  int cpl, Access *out) noexcept nogil:
    cdef int status
    cdef uint8_t own
    cdef size_t i
    if vcpu == NULL or size - 1 >= KVMMMU_MAX_ACCESS or not cpl_legal(cpl):
        return KVMMMU_E_ARGUMENT
    if n and (gvas == NULL or how == NULL or out == NULL):
        return KVMMMU_E_ARGUMENT
    for i in range(n):
        if not how_legal(how[i], KVMMMU_IMPLICIT):
            return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status != KVMMMU_OK:
        return status
    own = vcpu.cpl
    if cpl != KVMMMU_OWN_CPL:
        vcpu.cpl = <uint8_t>cpl
    access_many(vcpu, gvas, how, <int64_t>n, <int>size, out)
    vcpu.cpl = own
    vcpu_release(vcpu)
    return KVMMMU_OK


cdef inline int embed_copy(Vcpu *vcpu, uint64_t gva, uint32_t how, uint8_t *data, size_t size, int cpl, size_t *done,
                           Access *last) noexcept nogil:
    """Read or write ``size`` bytes, piece by piece, until one does not end in memory."""
    cdef int status
    cdef uint8_t own
    cdef uint32_t now
    if vcpu == NULL or done == NULL or last == NULL or not cpl_legal(cpl) or data == NULL and size:
        return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status != KVMMMU_OK:
        return status
    done[0] = 0
    memset(last, 0, sizeof(Access))
    last.gpa = ALL_ONES
    own = vcpu.cpl
    if cpl != KVMMMU_OWN_CPL:
        vcpu.cpl = <uint8_t>cpl
    while done[0] < size:
        now = <uint32_t>min(size - done[0], <size_t>KVMMMU_MAX_ACCESS)
        vcpu_access(vcpu, gva + done[0], how_access(how), <int>now, data + done[0], last)
        if last.outcome != OUTCOME_OK:
            status = KVMMMU_STOPPED
            break
        done[0] += now
    vcpu.cpl = own
    vcpu_release(vcpu)
    return status


# ---- what a guest or its monitor does -------------------------------------------------

cdef inline int embed_invlpg(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    cdef int status
    if vcpu == NULL:
        return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status == KVMMMU_OK:
        vcpu_invlpg(vcpu, gva)
        vcpu_release(vcpu)
    return status


cdef inline int embed_sync_roots(Vcpu *vcpu) noexcept nogil:
    cdef int status
    if vcpu == NULL:
        return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status == KVMMMU_OK:
        roots_sync(vcpu)
        vcpu_release(vcpu)
    return status


cdef inline int embed_load_cr3(Vcpu *vcpu, uint64_t value) noexcept nogil:
    cdef int status
    if vcpu == NULL:
        return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status == KVMMMU_OK:
        if load_cr3(vcpu, value) != REG_OK:
            status = KVMMMU_E_GP
        vcpu_release(vcpu)
    return status


cdef inline int embed_get_sregs(Vcpu *vcpu, Sregs *out) noexcept nogil:
    cdef int status
    if vcpu == NULL or out == NULL:
        return KVMMMU_E_ARGUMENT
    status = embed_claim(vcpu)
    if status != KVMMMU_OK:
        return status
    out.cr0 = vcpu.regs.cr0
    out.cr3 = vcpu.regs.cr3
    out.cr4 = vcpu.regs.cr4
    out.efer = vcpu.regs.efer
    out.pkru = vcpu.regs.pkru
    out.compat = vcpu.regs.compat
    out.cpl = vcpu.cpl
    out.ac = vcpu.ac
    out.unused = 0
    vcpu_release(vcpu)
    return KVMMMU_OK


cdef inline int embed_set_sregs(Vcpu *vcpu, const Sregs *new_) noexcept nogil:
    cdef CpuRegs regs
    cdef int status
    if vcpu == NULL or new_ == NULL or new_.compat > 1 or new_.cpl > 3 or new_.ac > 1 or new_.unused:
        return KVMMMU_E_ARGUMENT
    if new_.cr4 & vcpu.cr4_absent or new_.efer & vcpu.efer_absent:
        return KVMMMU_E_ARGUMENT
    memset(&regs, 0, sizeof(regs))
    regs.cr0 = new_.cr0
    regs.cr3 = new_.cr3
    regs.cr4 = new_.cr4
    regs.efer = new_.efer
    regs.pkru = new_.pkru
    regs.compat = new_.compat
    status = embed_claim(vcpu)
    if status != KVMMMU_OK:
        return status
    if set_sregs(vcpu, &regs) == REG_OK:
        vcpu.cpl = new_.cpl
        vcpu.ac = new_.ac
    else:
        status = KVMMMU_E_GP
    vcpu_release(vcpu)
    return status


# ---- tables in plain memory --------------------------------------------------------------

cdef inline int embed_translate(const Tables *tables, const uint64_t *gvas, size_t n, uint32_t how, int cpl,
                                Translation *out) noexcept nogil:
    cdef uint64_t access
    if tables == NULL or tables.guest == NULL or not how_legal(how, KVMMMU_IMPLICIT | KVMMMU_AC | KVMMMU_SET_AD):
        return KVMMMU_E_ARGUMENT
    if cpl < 0 or cpl > 3 or n and (gvas == NULL or out == NULL):
        return KVMMMU_E_ARGUMENT
    access = how_access(how)
    if cpl == 3 and not how & KVMMMU_IMPLICIT:
        access |= PFERR_USER
    translate_many(tables.guest, tables.host, tables.map, gvas, <int64_t>n, access, how & KVMMMU_AC != 0,
                   how & KVMMMU_SET_AD != 0, tables.kernel, out)
    return KVMMMU_OK


cdef inline const char *embed_status_text(int status) noexcept nogil:
    if status == KVMMMU_OK:
        return "done"
    if status == KVMMMU_STOPPED:
        return "stopped before the end: the last access says why"
    if status == KVMMMU_E_ARGUMENT:
        return "an argument is null or outside its range"
    if status == KVMMMU_E_BUSY:
        return "another thread uses this vCPU"
    if status == KVMMMU_E_CLOSED:
        return "the VM was closed"
    if status == KVMMMU_E_GP:
        return "the processor refuses the register value with #GP(0)"
    return "not a status of kvmmmu"
