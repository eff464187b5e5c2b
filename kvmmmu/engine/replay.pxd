# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A recorded run, event by event: each is done by the vCPU and compared with its record."""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport CpuRegs
from kvmmmu.engine.locks cimport guest_leave
from kvmmmu.engine.moves cimport vcpu_move_to_cr
from kvmmmu.engine.registers cimport REG_OK, set_sregs
from kvmmmu.engine.roots cimport roots_sync, vcpu_invlpg
from kvmmmu.engine.state cimport (
    Access, OUTCOME_MMIO, OUTCOME_OK, OUTCOME_PF, VSTAT_MMIO_CACHE_HIT, VSTAT_MMIO_SPTE_HIT, VSTAT_TLB_HIT, Vcpu,
)
from kvmmmu.engine.tlbflush cimport tlb_flush_guest
from kvmmmu.engine.vcpu cimport Hits, access_hit, access_move, hits_begin, vcpu_access

# The kinds of the trace format, by number.
cdef enum:
    TRACE_MEM = 0
    TRACE_FETCH = 1
    TRACE_STATE = 2
    TRACE_PF = 3
    TRACE_INVLPG = 4
    TRACE_MOVCR = 5
    TRACE_MEMHI = 8
    TRACE_PTSTORE = 10

cdef enum:
    FLAG_STORE = 1
    FLAG_MMIO = 2
    FLAG_CROSSES = 4

cdef enum:
    DIFFER_NOTHING = 0
    DIFFER_OUTCOME = 1    # expected and got are OUTCOME_*
    DIFFER_GPA = 2
    DIFFER_ERROR_CODE = 3
    DIFFER_FAULT_ADDRESS = 4
    DIFFER_REGISTER = 5   # the model refused a register value the guest loaded
    DIFFER_KIND = 6       # no such event

cdef struct TraceColumns:
    const uint64_t *a
    const uint64_t *b
    const uint64_t *c
    const uint8_t *kind
    const uint8_t *size
    const uint8_t *flags
    const uint8_t *cpl

cdef struct ReplayTotals:
    uint64_t events
    uint64_t disagreements
    uint64_t by_kind[16]
    uint64_t mmio           # MMIO accesses
    uint64_t mmio_cache     # served by the vCPU's record of the last page
    uint64_t mmio_spte      # by an mmio spte
    uint64_t mmio_slow      # by a memslot search
    uint64_t page_faults    # guest #PF reproduced
    uint64_t exits          # of all accesses
    # the first disagreement
    int what                # DIFFER_*
    uint64_t index          # of the record in its chunk
    uint64_t gva
    uint64_t expected
    uint64_t got
    Access access


cdef inline void replay_differ(ReplayTotals *t, int what, uint64_t index, uint64_t gva, uint64_t expected, uint64_t got,
                               const Access *a) noexcept nogil:
    t.disagreements += 1
    if t.what != DIFFER_NOTHING:
        return
    t.what = what
    t.index = index
    t.gva = gva
    t.expected = expected
    t.got = got
    t.access = a[0]


cdef inline void replay_access(Vcpu *vcpu, ReplayTotals *t, uint64_t i, uint64_t gva, uint64_t gpa, uint64_t access,
                               int size, uint8_t *data, bint mmio) noexcept nogil:
    """An access that succeeded in the recording: the same gpa, and MMIO exactly where it was MMIO."""
    cdef Access a
    cdef uint64_t cache = vcpu.stats[<int>VSTAT_MMIO_CACHE_HIT], spte = vcpu.stats[<int>VSTAT_MMIO_SPTE_HIT]
    cdef int expected = OUTCOME_MMIO if mmio else OUTCOME_OK
    vcpu_access(vcpu, gva, access, size, data, &a)
    t.exits += a.exits
    if a.outcome != expected:
        replay_differ(t, DIFFER_OUTCOME, i, gva, expected, a.outcome, &a)
        return
    if a.gpa != gpa:
        replay_differ(t, DIFFER_GPA, i, gva, gpa, a.gpa, &a)
        return
    if not mmio:
        return
    t.mmio += 1
    if vcpu.stats[<int>VSTAT_MMIO_CACHE_HIT] != cache:
        t.mmio_cache += 1
    elif vcpu.stats[<int>VSTAT_MMIO_SPTE_HIT] != spte:
        t.mmio_spte += 1
    else:
        t.mmio_slow += 1


cdef inline void replay_fault(Vcpu *vcpu, ReplayTotals *t, uint64_t i, uint64_t gva, uint64_t code) noexcept nogil:
    """The access that faulted, made again from what its error code says of it."""
    cdef Access a
    cdef uint8_t cpl = vcpu.cpl
    vcpu.cpl = 3 if code & PFERR_USER else 0
    vcpu_access(vcpu, gva, code & (PFERR_WRITE | PFERR_FETCH), 1, NULL, &a)
    vcpu.cpl = cpl
    t.exits += a.exits
    if a.outcome != OUTCOME_PF:
        replay_differ(t, DIFFER_OUTCOME, i, gva, OUTCOME_PF, a.outcome, &a)
    elif a.error_code != code:
        replay_differ(t, DIFFER_ERROR_CODE, i, gva, code, a.error_code, &a)
    elif a.fault_gva != gva:
        replay_differ(t, DIFFER_FAULT_ADDRESS, i, gva, gva, a.fault_gva, &a)
    else:
        t.page_faults += 1


cdef inline bint replay_state(Vcpu *vcpu, uint64_t cr3, uint64_t cr0_cr4, uint64_t efer_flags,
                              uint8_t cpl) noexcept nogil:
    """Registers as recorded at a block start; those that differ are loaded as the guest would."""
    cdef uint64_t cr0 = cr0_cr4 & (ALL_ONES >> 32), cr4 = cr0_cr4 >> 32, efer = efer_flags & (ALL_ONES >> 32)
    cdef CpuRegs regs = vcpu.regs
    vcpu.cpl = cpl
    vcpu.ac = (efer_flags >> 50) & 1
    if regs.cr0 == cr0 and regs.cr3 == cr3 and regs.cr4 == cr4 and regs.efer == efer:
        return True
    guest_leave(vcpu)
    if regs.cr0 == cr0 and regs.cr4 == cr4 and regs.efer == efer:
        return vcpu_move_to_cr(vcpu, 3, cr3) == REG_OK
    regs.cr0 = cr0
    regs.cr3 = cr3
    regs.cr4 = cr4
    regs.efer = efer
    return set_sregs(vcpu, &regs) == REG_OK


cdef inline bint replay_movcr(Vcpu *vcpu, int n, uint64_t value) noexcept nogil:
    if n == 0 or n == 3 or n == 4:
        return vcpu_move_to_cr(vcpu, n, value) == REG_OK
    return True  # CR2 and CR8 do not concern the MMU


cdef inline int record_size(const TraceColumns *e, uint64_t i) noexcept nogil:
    """Bytes that a data access moves.

    A record holds 8 bytes of value; the rest of a wider store follows as MEMHI, or is not known.
    """
    cdef int shift = e.size[i] & 7
    return 8 if shift > 3 or e.kind[i] == TRACE_MEMHI else 1 << shift


cdef inline uint64_t first_bad_cpl(const TraceColumns *e, uint64_t n) noexcept nogil:
    """The first record whose CPL no processor has, or ``n``."""
    cdef uint64_t i
    cdef uint8_t every = 0
    # Without a way out of the loop the compiler takes many at once.
    for i in range(n):
        every |= e.cpl[i]
    if every <= 3:
        return n
    for i in range(n):
        if e.cpl[i] > 3:
            return i
    return n


cdef inline uint64_t replay_hits(Vcpu *vcpu, ReplayTotals *t, const TraceColumns *e, uint64_t i, uint64_t n,
                                 bint values) noexcept nogil:
    """Plain accesses from record ``i`` on that the TLB serves as recorded; the first that is none, or another.

    Nothing of an access's own record is asked for.
    """
    cdef uint64_t gpa = 0, hpa = 0, access, first = i
    cdef int kind, size
    cdef Hits h
    if not hits_begin(vcpu, &h):
        return i
    while i < n:
        kind = e.kind[i]
        if kind == TRACE_MEM:
            if e.flags[i] & FLAG_MMIO:
                break
            access = PFERR_WRITE if e.flags[i] & FLAG_STORE else 0
            size = record_size(e, i)
        elif kind == TRACE_FETCH and not e.flags[i] & FLAG_CROSSES:
            access = PFERR_FETCH
            size = 1
        else:
            break
        vcpu.cpl = e.cpl[i]
        if vcpu.cpl == 3:
            access |= PFERR_USER
        if not access_hit(vcpu, &h, e.a[i], access, size, &gpa, &hpa):
            break
        if gpa != e.b[i]:
            # It is made again, with a record of its own.
            vcpu.stats[<int>VSTAT_TLB_HIT] -= 1
            break
        if access & PFERR_WRITE and values:
            access_move(vcpu, hpa, access, size, <uint8_t *>&e.c[i])
        t.by_kind[kind] += 1
        i += 1
    t.events += i - first
    return i


cdef inline void replay_event(Vcpu *vcpu, ReplayTotals *t, const TraceColumns *e, uint64_t i,
                              bint values) noexcept nogil:
    cdef uint64_t a = e.a[i], b = e.b[i], c = e.c[i], access = 0
    cdef int kind = e.kind[i], flags = e.flags[i]
    cdef bint ok = True
    if kind == TRACE_MEM or kind == TRACE_MEMHI or kind == TRACE_PTSTORE:
        vcpu.cpl = e.cpl[i]
        if flags & FLAG_STORE:
            access = PFERR_WRITE
        replay_access(vcpu, t, i, a, b, access, record_size(e, i),
                      <uint8_t *>&c if access and (values or kind == TRACE_PTSTORE) else NULL, (flags & FLAG_MMIO) != 0)
    elif kind == TRACE_FETCH:
        vcpu.cpl = e.cpl[i]
        replay_access(vcpu, t, i, a, b, PFERR_FETCH, 1, NULL, False)
        if flags & FLAG_CROSSES:
            replay_fetch_next(vcpu, t, i, (a | 4095) + 1)
    elif kind == TRACE_STATE:
        ok = replay_state(vcpu, a, b, c, e.cpl[i])
    elif kind == TRACE_PF:
        replay_fault(vcpu, t, i, a, b)
    elif kind == TRACE_INVLPG:
        guest_leave(vcpu)
        if b & 1:
            vcpu_invlpg(vcpu, a)
        else:
            roots_sync(vcpu)
            tlb_flush_guest(vcpu)
    elif kind == TRACE_MOVCR:
        ok = replay_movcr(vcpu, <int>b, a)
    else:
        replay_differ(t, DIFFER_KIND, i, 0, 0, <uint64_t>kind, &t.access)
    if not ok:
        replay_differ(t, DIFFER_REGISTER, i, a, b, c, &t.access)
    t.by_kind[kind & 15] += 1
    t.events += 1


cdef inline void replay_fetch_next(Vcpu *vcpu, ReplayTotals *t, uint64_t i, uint64_t gva) noexcept nogil:
    """The page a block runs into: it must be executable, its gpa is not recorded."""
    cdef Access a
    vcpu_access(vcpu, gva, PFERR_FETCH, 1, NULL, &a)
    t.exits += a.exits
    if a.outcome != OUTCOME_OK:
        replay_differ(t, DIFFER_OUTCOME, i, gva, OUTCOME_OK, a.outcome, &a)


cdef inline void replay_run(Vcpu *vcpu, const TraceColumns *e, uint64_t n, bint values, uint64_t stop_after,
                            ReplayTotals *t) noexcept nogil:
    """``n`` records; ends early once ``stop_after`` (0: never) disagreements were seen."""
    cdef uint64_t i = 0
    while i < n:
        if vcpu.tlb != NULL:
            i = replay_hits(vcpu, t, e, i, n, values)
            if i == n:
                return
        replay_event(vcpu, t, e, i, values)
        i += 1
        if stop_after and t.disagreements >= stop_after:
            return
