# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Sptes of a 32-bit host: 64 bits that are stored and read as two halves, one step at a time.

A mapping changes only by way of empty, so a reader that saw the page's count of clears stand still, and the
low half with it, has a whole value; one exception is an entry caught in the middle of being cleared (Linux 3.1,
``__get_spte_lockless`` and ``__update_clear_spte_fast``).  A step is one memory access; barriers keep their order.
"""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport SpteMasks, spte_present

cdef enum:
    SPLIT_READ_STEPS = 4

cdef struct SplitSpte:
    uint32_t low
    uint32_t high
    uint32_t clears    # of the shadow page: moves when an entry of it became empty

cdef struct SplitRead:
    uint32_t clears
    uint32_t low
    uint32_t high


cdef inline uint32_t spte_low(uint64_t spte) noexcept nogil:
    return <uint32_t>spte

cdef inline uint32_t spte_high(uint64_t spte) noexcept nogil:
    return <uint32_t>(spte >> 32)

cdef inline uint64_t spte_whole(uint32_t low, uint32_t high) noexcept nogil:
    return (<uint64_t>high << 32) | low


cdef inline bint split_set_step(SplitSpte *s, uint64_t spte, int step) noexcept nogil:
    """Fill an empty entry: the half with the present bit last.  True: that was the last step."""
    if step == 0:
        s.high = spte_high(spte)
        return False
    s.low = spte_low(spte)
    return True


cdef inline bint split_clear_step(SplitSpte *s, uint64_t spte, int step) noexcept nogil:
    """Take an entry away: the half with the present bit first.  True: that was the last step."""
    if step == 0:
        s.low = spte_low(spte)
        return False
    if step == 1:
        s.high = spte_high(spte)
        return spte_present(spte)
    s.clears += 1
    return True


cdef inline bint split_read_step(const SplitSpte *s, SplitRead *r, int step) noexcept nogil:
    """Steps 0 to 3; False: begin again from step 0."""
    if step == 0:
        r.clears = s.clears
    elif step == 1:
        r.low = s.low
    elif step == 2:
        r.high = s.high
    else:
        return s.low == r.low and s.clears == r.clears
    return True


cdef inline bint split_being_zapped(const SpteMasks *m, uint64_t spte) noexcept nogil:
    """Empty, or an mmio spte of which only the low half is gone yet: no reason to distrust the tables."""
    cdef uint32_t mask = spte_high(m.mmio_mask)
    return spte == 0 or spte_low(spte) == 0 and mask != 0 and (spte_high(spte) & mask) == mask
