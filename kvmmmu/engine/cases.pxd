# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Many walks with known answers: each case brings its registers and its own little memory.

A case's memory is the 8-byte words it lists, everything else is 0.  The pages of one case are
laid out in scratch memory, walked with A/D updates, read back and wiped for the next.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport *
from kvmmmu.bits.paging cimport *
from kvmmmu.engine.batch cimport BATCH_WALK, translate_many
from kvmmmu.engine.memmap cimport memmap_index
from kvmmmu.engine.state cimport MemMap, Translation
from kvmmmu.engine.translate cimport translate_each
from kvmmmu.engine.walk cimport load_pdptrs, load_pdptrs_nested, walk_memory, walk_nested

cdef enum:
    STAGE_PLAIN = 0
    STAGE_OVER_EPT = 1
    STAGE_OVER_NPT = 2
    STAGE_EPT_ONLY = 3
    KIND_AT_ODDS = 255    # the rows of a batch differ

cdef struct WalkCase:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t gva
    uint64_t root2        # EPTP or nCR3
    uint64_t gpa_in       # STAGE_EPT_ONLY: the address
    uint32_t pkru
    uint8_t stage         # STAGE_*
    uint8_t access        # 0 read, 1 write, 2 fetch
    uint8_t cpl
    uint8_t implicit
    uint8_t ac
    uint8_t mode64
    uint8_t maxphyaddr
    uint8_t gbpages
    uint8_t exec_only
    uint8_t is_table      # STAGE_EPT_ONLY: a page walk's access
    uint8_t linear_valid  # STAGE_EPT_ONLY: not a PDPTE load
    uint8_t amd

cdef struct WalkAnswer:
    uint64_t pa
    uint64_t error_code
    uint64_t fault_gpa    # of a fault in the second dimension
    uint8_t kind          # FAULT_*
    uint8_t page_bits
    uint8_t unused[6]


cdef inline uint64_t case_access(const WalkCase *c) noexcept nogil:
    cdef uint64_t access = 0
    if c.access == 1:
        access |= PFERR_WRITE
    elif c.access == 2:
        access |= PFERR_FETCH
    if c.implicit:
        return access | PFERR_IMPLICIT
    if c.cpl == 3:
        access |= PFERR_USER
    return access


cdef inline void case_batch(const WalkCase *c, const Paging *guest, const Paging *host, const MemMap *m, int kernel,
                            WalkAnswer *a) noexcept nogil:
    """The case as the first row of a batch.  Rows after it must be what walking again gives; else the kind is none."""
    cdef uint64_t gvas[64]
    cdef Translation rows[64]
    cdef Translation again[64]
    cdef uint64_t other = c.gva ^ (ONE << 62)
    cdef int i
    # The same page is never next to itself; the other address is none (64-bit modes) or the same again.
    if va_canonical(other, guest.va_shift):
        other = c.gva ^ (ONE << 61)
    for i in range(64):
        gvas[i] = other if i & 1 else c.gva
    translate_many(guest, host, m, gvas, 64, case_access(c), c.ac, True, kernel, rows)
    translate_each(guest, host, m, gvas, 64, case_access(c), c.ac, True, again)
    a.kind = rows[0].fault
    a.pa = rows[0].gpa
    a.page_bits = rows[0].page_shift
    a.error_code = rows[0].error_code
    a.fault_gpa = rows[0].fault_gpa
    if memcmp(rows + 2, again + 2, 62 * sizeof(Translation)):
        a.kind = KIND_AT_ODDS


cdef inline void case_walk(const WalkCase *c, int dialect, const MemMap *m, int kernel, WalkAnswer *a) noexcept nogil:
    cdef CpuRegs regs
    cdef CpuModel model
    cdef Paging guest, host
    cdef Walk gw, hw
    cdef int hint = 0, guest_hint = 0
    cdef int fault = FAULT_NONE
    cdef uint64_t access = case_access(c)
    cdef uint64_t second
    memset(&regs, 0, sizeof(regs))
    memset(&model, 0, sizeof(model))
    memset(&host, 0, sizeof(host))
    memset(a, 0, sizeof(WalkAnswer))
    regs.cr0 = c.cr0
    regs.cr3 = c.cr3
    regs.cr4 = c.cr4
    regs.efer = c.efer
    regs.pkru = c.pkru
    regs.compat = not c.mode64
    model.maxphyaddr = c.maxphyaddr
    model.gbpages = c.gbpages
    model.amd = c.amd
    model.exec_only = c.exec_only
    model.ept_2m = 1
    model.ept_1g = c.gbpages
    paging_init(&guest, &regs, &model, dialect)
    if c.stage == STAGE_OVER_EPT or c.stage == STAGE_EPT_ONLY:
        paging_init_ept(&host, c.root2, &model, dialect)
    elif c.stage == STAGE_OVER_NPT:
        paging_init_npt(&host, c.root2, 4, &model, dialect)
        guest.pdpte_in_memory = 1

    if c.stage == STAGE_EPT_ONLY:
        if c.is_table:
            # The access is given, whoever walks: A/D on makes reading a table a write, but not loading PDPTEs.
            second = PFERR_USER | (PFERR_WRITE if c.linear_valid and host.accessed else 0)
        else:
            second = PFERR_USER if c.access == 0 else access & ~PFERR_USER
        fault = walk_memory(&host, m, &hint, &hw, c.gpa_in, second, False, True)
        if fault == FAULT_EPT_VIOLATION and c.linear_valid:
            hw.error_code |= host.table_note if c.is_table else host.final_note
        case_answer(a, fault, &hw, &hw, c.gpa_in)
        return
    if c.stage == STAGE_PLAIN:
        if guest.format == FMT_PAE and load_pdptrs(m, &hint, c.cr3, &model, guest.pdptr) >= 0:
            a.kind = FAULT_PDPTE
            return
        if kernel != BATCH_WALK:
            case_batch(c, &guest, &host, m, kernel, a)
            return
        fault = walk_memory(&guest, m, &hint, &gw, c.gva, access, c.ac, True)
        case_answer(a, fault, &gw, &gw, 0)
        return
    if guest.format == FMT_PAE and not guest.pdpte_in_memory:
        fault = load_pdptrs_nested(&host, m, &hint, &hw, c.cr3, &model, guest.pdptr, True)
        if fault == FAULT_PDPTE:
            a.kind = FAULT_PDPTE
            return
        if fault != FAULT_NONE:
            case_answer(a, fault, &hw, &hw, hw.va)
            return
    if kernel != BATCH_WALK:
        case_batch(c, &guest, &host, m, kernel, a)
        return
    fault = walk_nested(&guest, &host, m, &hint, &guest_hint, &gw, &hw, c.gva, access, c.ac, True)
    case_answer(a, fault, &gw, &hw, hw.va)


cdef inline void case_answer(WalkAnswer *a, int fault, const Walk *w, const Walk *last,
                             uint64_t fault_gpa) noexcept nogil:
    a.kind = <uint8_t>fault
    if fault == FAULT_NONE:
        a.pa = last.gpa
        a.page_bits = <uint8_t>w.page_shift
        return
    a.error_code = w.error_code
    if fault >= FAULT_EPT_VIOLATION:
        a.fault_gpa = fault_gpa


cdef inline void case_pages(const uint64_t *pa, int64_t n, MemMap *m) noexcept nogil:
    """Fill the map, which has room for ``n``, with the pages of the words' addresses in ascending order."""
    cdef int64_t i
    cdef int j, k
    cdef uint64_t frame
    m.n = 0
    for i in range(n):
        frame = pa[i] >> 12
        j = m.n
        while j > 0 and m.first[j - 1] > frame:
            j -= 1
        if j > 0 and m.first[j - 1] == frame:
            continue
        m.npages[m.n] = 1
        m.n += 1
        for k in range(m.n - 1, j, -1):
            m.first[k] = m.first[k - 1]
        m.first[j] = frame
    memmap_index(m)


cdef inline uint64_t *case_word(const MemMap *m, uint64_t pa) noexcept nogil:
    cdef int j = 0
    while m.first[j] != pa >> 12:
        j += 1
    return <uint64_t *>(m.host[j] + (pa & 0xfff))


cdef inline void cases_run(const WalkCase *cases, int64_t n, const int64_t *offsets, const uint64_t *words_pa,
                           const uint64_t *words, uint64_t *words_after, int dialect, int kernel, MemMap *scratch,
                           WalkAnswer *answers) noexcept nogil:
    """Walk every case; ``words_after`` gets its memory as the walk left it.

    ``scratch`` has its pages' host addresses filled in and zeroed, one for each word of the longest case.
    """
    cdef int64_t i, j, first, count
    for i in range(n):
        first = offsets[i]
        count = offsets[i + 1] - first
        case_pages(words_pa + first, count, scratch)
        for j in range(first, first + count):
            case_word(scratch, words_pa[j])[0] = words[j]
        case_walk(&cases[i], dialect, scratch, kernel, &answers[i])
        for j in range(first, first + count):
            words_after[j] = case_word(scratch, words_pa[j])[0]
        for j in range(first, first + count):
            case_word(scratch, words_pa[j])[0] = 0
