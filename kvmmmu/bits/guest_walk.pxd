# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One step of a page walk: begin, step(entry) -> NEXT | LEAF | FAULT, finish.

Pure over words: the caller fetches the entry at ``walk.entry_gpa`` (4 bytes in
FMT_32, else 8) and hands it in.  Every walk of the project is a loop round this.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.paging cimport Paging

cdef enum:
    WALK_NEXT = 0   # fetch the entry at entry_gpa and step
    WALK_LEAF = 1   # the leaf is in hand: finish
    WALK_FAULT = 2  # fault, error_code say what

cdef enum:
    FAULT_NONE = 0
    FAULT_PF = 1              # #PF(error_code)
    FAULT_GP = 2              # #GP(0): address not canonical
    FAULT_EPT_VIOLATION = 4   # error_code holds qualification bits
    FAULT_EPT_MISCONFIG = 5
    FAULT_NPF = 6             # error_code holds EXITINFO1

cdef struct Walk:
    uint64_t va           # the address asked for
    uint64_t access       # PFERR_WRITE | USER | FETCH | IMPLICIT
    uint8_t ac            # EFLAGS.AC
    int level             # level of the entry to fetch next, then of the leaf
    uint64_t entry_gpa    # where that entry stands
    uint32_t acc          # ACC rights accumulated over the entries seen
    uint64_t accessed     # AND of the A bits seen (as the format's bit)
    uint64_t entries[6]   # [level] the entries seen
    uint64_t entry_gpas[6]  # [level] where they stand
    uint32_t acc_above[6]   # [level] rights accumulated above that entry
    int top               # level of the first entry
    int fault             # FAULT_*
    uint64_t error_code
    uint64_t gpa          # result: byte address
    int page_shift        # result: 12, 21, 22 or 30
    uint32_t pte_access   # result: ACC rights of the translation

cdef inline int walk_begin(const Paging *p, Walk *w, uint64_t va, uint64_t access, bint ac) noexcept nogil:
    return WALK_FAULT
cdef inline int walk_step(int fmt, const Paging *p, Walk *w, uint64_t entry) noexcept nogil:
    return WALK_FAULT
cdef inline int walk_finish(const Paging *p, Walk *w) noexcept nogil:
    return WALK_FAULT
