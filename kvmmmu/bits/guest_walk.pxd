# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One step of a page walk: begin, step(entry) -> NEXT | LEAF | FAULT, finish.

Pure over words: the caller fetches the entry at ``walk.entry_gpa`` (4 bytes in
FMT_32, else 8) and hands it in.  Every walk of the project is a loop round this.
The two dialects differ by what stands in ``Paging``, and in one rule of ``walk_finish``.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport *
from kvmmmu.bits.spte cimport bits_between

cdef enum:
    WALK_NEXT = 0   # fetch the entry at entry_gpa and step
    WALK_LEAF = 1   # the leaf is in hand: finish
    WALK_FAULT = 2  # fault, error_code say what

cdef struct Walk:
    uint64_t va           # the address asked for, cut to the mode's width
    uint64_t access       # PFERR_WRITE | USER | FETCH | IMPLICIT; EPT: USER means "reads"
    uint8_t ac            # EFLAGS.AC
    int level             # level of the entry to fetch next, then of the leaf
    uint64_t entry_gpa    # where that entry stands
    uint32_t acc          # ACC rights accumulated over the entries seen
    uint64_t accessed     # AND of the A bits seen (as the format's bit)
    uint64_t entries[6]   # [level] the entries seen
    uint64_t entry_gpas[6]  # [level] where they stand
    uint32_t acc_above[6]   # [level] rights accumulated above that entry
    int top               # level of the first entry fetched from memory
    int seen              # level of the last entry looked at; 0: the walk ended before one
    int fault             # FAULT_*
    uint64_t error_code
    uint64_t gpa          # result: byte address; like the next two, 0 on a fault
    int page_shift        # result: 12, 21, 22 or 30 (12 without paging)
    uint32_t pte_access   # result: ACC rights of the translation
    uint8_t stored        # 1 once a loop round the steps has set A or D in memory; never cleared here


cdef inline int walk_level_shift(int fmt, int level) noexcept nogil:
    """Address bits below the index of a level."""
    return 12 + (10 if fmt == FMT_32 else 9) * (level - 1)


cdef inline uint64_t walk_entry_offset(int fmt, uint64_t va, int level) noexcept nogil:
    """Where in its table the entry for an address stands, in bytes."""
    if fmt == FMT_32:
        return ((va >> walk_level_shift(FMT_32, level)) & 0x3ff) << 2
    return ((va >> walk_level_shift(fmt, level)) & 0x1ff) << 3


cdef inline uint32_t walk_rights(int fmt, uint64_t entry) noexcept nogil:
    """What an entry alone allows, as ACC bits (EPT: U stands for R)."""
    if fmt == FMT_EPT:
        return <uint32_t>(((entry & EPT_READ) << 2) | (entry & EPT_WRITE) | ((entry & EPT_EXEC) >> 2))
    return <uint32_t>((entry & (PT_WRITABLE_MASK | PT_USER_MASK)) | ((entry >> 63) ^ 1))


cdef inline bint walk_present(int fmt, uint64_t entry) noexcept nogil:
    return (entry & (EPT_RWX if fmt == FMT_EPT else PT_PRESENT_MASK)) != 0


cdef inline int walk_fault(const Paging *p, Walk *w, uint64_t cause) noexcept nogil:
    """End a walk; ``cause`` is 0 (not present) or PRESENT with RSVD or PK."""
    w.fault = p.fault_kind
    if p.format == FMT_EPT:
        if cause & PFERR_RSVD:
            w.fault = FAULT_EPT_MISCONFIG
            w.error_code = 0
        else:
            w.error_code = (((w.access & PFERR_USER) >> 2) | (w.access & PFERR_WRITE) | ((w.access & PFERR_FETCH) >> 2)
                            | ((<uint64_t>(((w.acc & ACC_U) >> 2) | (w.acc & ACC_W) | ((w.acc & ACC_X) << 2)))
                               << EPT_VIOLATION_PROT_SHIFT))
    else:
        w.error_code = (w.access & (PFERR_WRITE | PFERR_USER | p.fetch_bit)) | cause
    return WALK_FAULT


cdef inline int walk_begin(const Paging *p, Walk *w, uint64_t va, uint64_t access, bint ac) noexcept nogil:
    cdef uint64_t pdpte
    va &= p.va_mask
    w.va = va
    w.access = access
    w.ac = ac
    w.level = p.levels
    w.top = p.levels
    w.seen = 0
    w.acc = ACC_ALL
    w.accessed = p.accessed
    w.fault = FAULT_NONE
    w.error_code = 0
    w.gpa = 0
    w.page_shift = 0
    w.pte_access = 0
    w.entry_gpa = 0
    if not va_canonical(va, p.va_shift):
        w.fault = FAULT_GP
        return WALK_FAULT
    if va & p.va_limit:
        w.acc = 0  # no entry allows anything there
        return walk_fault(p, w, 0)
    if p.format == FMT_NONE:
        return WALK_LEAF
    if p.format == FMT_PAE:
        w.entry_gpa = p.root | ((va >> 30) << 3)
        if p.pdpte_in_memory:
            return WALK_NEXT
        pdpte = p.pdptr[va >> 30]
        w.entries[LEVEL_1G] = pdpte
        w.entry_gpas[LEVEL_1G] = w.entry_gpa
        w.acc_above[LEVEL_1G] = ACC_ALL
        w.top = LEVEL_2M
        w.seen = LEVEL_1G
        if not pdpte & PT_PRESENT_MASK:
            return walk_fault(p, w, 0)
        w.level = LEVEL_2M
        w.entry_gpa = (pdpte & p.addr_mask) | walk_entry_offset(FMT_PAE, va, LEVEL_2M)
        return WALK_NEXT
    w.entry_gpa = p.root | walk_entry_offset(p.format, va, p.levels)
    return WALK_NEXT


cdef inline int walk_step(int fmt, const Paging *p, Walk *w, uint64_t entry) noexcept nogil:
    """Take the entry at ``w.entry_gpa``.  ``fmt`` is p.format, a literal where speed counts."""
    cdef int level = w.level
    w.seen = level
    w.entries[level] = entry
    w.entry_gpas[level] = w.entry_gpa
    w.acc_above[level] = w.acc
    if fmt == FMT_PAE and level == LEVEL_1G:
        # A PDPTE has neither rights nor A/D bits.
        if not entry & PT_PRESENT_MASK:
            return walk_fault(p, w, 0)
        if rsvd_fault(p, level, entry):
            return walk_fault(p, w, PFERR_PRESENT | PFERR_RSVD)
    else:
        w.acc &= walk_rights(fmt, entry)
        if not walk_present(fmt, entry):
            return walk_fault(p, w, 0)
        if rsvd_fault(p, level, entry):
            return walk_fault(p, w, PFERR_PRESENT | PFERR_RSVD)
        w.accessed &= entry
        if level == LEVEL_4K or (entry & PT_PAGE_SIZE_MASK and (fmt != FMT_32 or p.pse)):
            return WALK_LEAF
    w.level = level - 1
    w.entry_gpa = (entry & p.addr_mask) | walk_entry_offset(fmt, w.va, level - 1)
    return WALK_NEXT


cdef inline int walk_finish(const Paging *p, Walk *w) noexcept nogil:
    """Judge the leaf in hand: permissions, then the translation.  A/D bits are the caller's (``walk_ad_missing``)."""
    cdef uint64_t entry, refused, offset_mask
    if p.format == FMT_NONE:
        w.gpa = w.va
        w.page_shift = 12
        w.pte_access = ACC_ALL
        return WALK_LEAF
    entry = w.entries[w.level]
    refused = permission_fault(p, w.access, w.acc, w.ac, <uint32_t>((entry >> PT_PKEY_SHIFT) & 15))
    if refused:
        return walk_fault(p, w, refused)
    w.page_shift = walk_level_shift(p.format, w.level)
    offset_mask = bits_between(w.page_shift - 1, 0)
    w.gpa = (entry & p.addr_mask & ~offset_mask) | (w.va & offset_mask)
    if p.format == FMT_32 and w.level == LEVEL_2M and p.pse36_bits:
        w.gpa |= ((entry >> 13) & bits_between(p.pse36_bits - 1, 0)) << 32
    w.pte_access = w.acc
    # KVM gives no W for a clean leaf until something writes, so that the first write is seen.
    if p.dialect == DIALECT_KVM and p.dirty and not w.access & PFERR_WRITE and not entry & p.dirty:
        w.pte_access &= ~<uint32_t>ACC_W
    return WALK_LEAF


cdef inline bint walk_ad_wanted(const Paging *p, const Walk *w) noexcept nogil:
    """After a finish: some A bit on the path is 0, or the access writes and D is 0."""
    if w.accessed != p.accessed:
        return True
    return w.level != 0 and (w.access & PFERR_WRITE) != 0 and (p.dirty & ~w.entries[w.level]) != 0


cdef inline uint64_t walk_ad_missing(const Paging *p, const Walk *w, int level) noexcept nogil:
    """The A and D bits to set in the entry of a level: A everywhere, D in the leaf of a write."""
    cdef uint64_t wanted = p.accessed
    if p.format == FMT_PAE and level == LEVEL_1G:
        return 0
    if level == w.level and w.access & PFERR_WRITE:
        wanted |= p.dirty
    return wanted & ~w.entries[level]
