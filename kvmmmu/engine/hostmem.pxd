# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Which frame is this host byte?  Runs of host pages, their frame numbers, and the map from frames to bytes.

Frames are numbered per host byte, so overlapping buffers share them.  The runs
(``vm.ranges``, by host address) belong to slot changes alone; walks read the map
(``vm.hostmem``, by frame), which is replaced and never edited once published.
A change is planned first, where it may fail, then committed, where it cannot.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memmove, memset
from kvmmmu.engine.state cimport (ARENA_PAGES, ERR_INVAL, ERR_NOMEM, ERR_NONE, HOST_STATES, HostCpu, HostRange, MemMap,
                                  RANGE_PFN_ALIGN, Segment, Vm, WHY_BACKING, WHY_INCONGRUENT, WHY_NONE, WHY_NO_FRAMES,
                                  WHY_NO_MEMORY)
from kvmmmu.engine.memory cimport memmap_find
from kvmmmu.engine.memmap cimport memmap_clone, memmap_cut, memmap_index, memmap_insert
from kvmmmu.engine.atomics cimport ld_acquire_ptr, ld_u8, st_release_ptr


cdef struct HostPlan:
    # A change of the runs that is sure to succeed.
    uint8_t *hva
    uint64_t npages
    uint8_t writable
    uint8_t max_level
    MemMap *map           # the next map of frames; NULL: unchanged
    Segment *segments     # frames of the bytes asked for
    int n_segments
    int why               # WHY_* when refused
    uint64_t detail


cdef inline MemMap *vm_hostmem(const Vm *vm) noexcept nogil:
    """The map of frames now; good until the reader's mark is lifted."""
    return <MemMap *>ld_acquire_ptr(&vm.hostmem)


cdef inline uint8_t *pfn_to_host(const Vm *vm, uint64_t pfn, int *hint) noexcept nogil:
    """Host address of a frame, or NULL where no memory stands."""
    cdef const MemMap *m = vm_hostmem(vm)
    cdef int i = memmap_find(m, pfn, hint, m.host)
    return m.host[i] + ((pfn - m.first[i]) << 12) if i >= 0 else NULL


# ---- runs of host pages ---------------------------------------------------------

cdef inline uint8_t *range_end(const HostRange *r) noexcept nogil:
    return r.host + (r.npages << 12)


cdef inline int ranges_from(const Vm *vm, const uint8_t *hva) noexcept nogil:
    """Index of the first run that ends after ``hva``."""
    cdef int lo = 0
    cdef int hi = vm.n_ranges
    cdef int mid
    while lo < hi:
        mid = (lo + hi) >> 1
        if range_end(&vm.ranges[mid]) <= hva:
            lo = mid + 1
        else:
            hi = mid
    return lo


cdef inline int ranges_reserve(Vm *vm, int more) noexcept nogil:
    """Room for ``more`` runs, so that a commit cannot fail."""
    cdef int need = vm.n_ranges + more
    cdef HostRange *grown
    if need <= vm.ranges_capacity:
        return ERR_NONE
    need += need >> 1
    grown = <HostRange *>realloc(vm.ranges, <size_t>need * sizeof(HostRange))
    if grown == NULL:
        return ERR_NOMEM
    vm.ranges = grown
    vm.ranges_capacity = need
    return ERR_NONE


cdef inline void ranges_open_gap(Vm *vm, int at, int count) noexcept nogil:
    memmove(vm.ranges + at + count, vm.ranges + at, <size_t>(vm.n_ranges - at) * sizeof(HostRange))
    vm.n_ranges += count


cdef inline void ranges_split(Vm *vm, uint8_t *hva) noexcept nogil:
    """Make ``hva`` a border between runs, if it lies inside one."""
    cdef int i = ranges_from(vm, hva)
    cdef uint64_t before
    if i == vm.n_ranges or vm.ranges[i].host >= hva:
        return
    before = <uint64_t>(hva - vm.ranges[i].host) >> 12
    ranges_open_gap(vm, i, 1)
    vm.ranges[i].npages = before
    vm.ranges[i + 1].host = hva
    vm.ranges[i + 1].npages -= before
    vm.ranges[i + 1].base_pfn += before


cdef inline void ranges_join(Vm *vm, int lo, int hi) noexcept nogil:
    """Join neighbours among runs lo-1 .. hi that nothing tells apart any more."""
    cdef HostRange *a
    cdef HostRange *b
    cdef int i
    if lo < 1:
        lo = 1
    if hi > vm.n_ranges - 1:
        hi = vm.n_ranges - 1
    for i in range(hi, lo - 1, -1):
        a = &vm.ranges[i - 1]
        b = &vm.ranges[i]
        if (range_end(a) == b.host and a.base_pfn + a.npages == b.base_pfn and a.users == b.users
                and a.max_level == b.max_level and a.writable == b.writable):
            a.npages += b.npages
            ranges_open_gap(vm, i + 1, -1)


# ---- giving out frames ------------------------------------------------------------

cdef inline uint64_t align_up(uint64_t value, uint64_t alignment) noexcept nogil:
    return (value + alignment - 1) & ~(alignment - 1)


cdef inline uint64_t frames_place(const MemMap *m, uint64_t npages, uint64_t offset, uint64_t limit) noexcept nogil:
    """Lowest free frames below ``limit``, or 0.

    A run starts ``offset`` pages into a 1 GiB block of its own; when no such block is
    left, into a 2 MiB block, then anywhere.
    """
    cdef uint64_t align = RANGE_PFN_ALIGN
    cdef uint64_t pfn
    cdef int i
    while True:
        offset &= align - 1
        pfn = align_up(ARENA_PAGES, align) + offset
        for i in range(1, m.n):
            if pfn + npages <= m.first[i]:
                break
            pfn = align_up(m.first[i] + m.npages[i], align) + offset
        if pfn < limit and npages <= limit - pfn:
            return pfn
        if align == 1:
            return 0
        align = 512 if align > 512 else 1


cdef inline void segment_add(HostPlan *plan, uint64_t first, uint64_t npages, uint64_t pfn,
                             uint8_t max_level) noexcept nogil:
    cdef Segment *last = &plan.segments[plan.n_segments - 1]
    if plan.n_segments and last.pfn + last.npages == pfn and last.max_level == max_level:
        last.npages += npages
        return
    plan.segments[plan.n_segments].first = first
    plan.segments[plan.n_segments].npages = npages
    plan.segments[plan.n_segments].pfn = pfn
    plan.segments[plan.n_segments].max_level = max_level
    plan.n_segments += 1


# ---- plan and commit ----------------------------------------------------------------

cdef inline int plan_refuse(HostPlan *plan, int err, int why, uint64_t detail) noexcept nogil:
    plan_drop(plan)
    plan.why = why
    plan.detail = detail
    return err


cdef inline void plan_drop(HostPlan *plan) noexcept nogil:
    """Forget a plan that will not be committed."""
    free(plan.map)
    free(plan.segments)
    plan.map = NULL
    plan.segments = NULL


cdef inline int host_frame_bits(const HostCpu *host) noexcept nogil:
    """Address bits of frames: none reaches the bit that marks encrypted memory."""
    return host.c_bit if host.c_bit and host.c_bit < host.phys_bits else host.phys_bits


cdef inline int hostmem_plan_bind(Vm *vm, HostPlan *plan, uint8_t *hva, uint64_t npages, bint writable, int max_level,
                                  uint64_t pfn_offset) noexcept nogil:
    """Plan that one more slot binds these bytes; gaps between known bytes get new frames."""
    cdef uint8_t *end = hva + (npages << 12)
    cdef uint8_t *at = hva
    cdef uint64_t limit = <uint64_t>1 << (host_frame_bits(&vm.host) - 12)
    cdef uint64_t n
    cdef uint64_t pfn
    cdef int lo = ranges_from(vm, hva)
    cdef int hi = lo
    cdef int gaps = 0
    cdef int upgrades = 0
    cdef HostRange *r
    plan.hva = hva
    plan.npages = npages
    plan.writable = writable
    plan.max_level = max_level if max_level else 1
    plan.map = NULL
    plan.segments = NULL
    plan.n_segments = 0
    plan.why = WHY_NONE
    plan.detail = 0
    while hi < vm.n_ranges and vm.ranges[hi].host < end:
        r = &vm.ranges[hi]
        if (<uint64_t>r.host ^ <uint64_t>hva) & 4095:
            return plan_refuse(plan, ERR_INVAL, WHY_INCONGRUENT, (<uint64_t>hva - <uint64_t>r.host) & 4095)
        if max_level and r.max_level != max_level:
            return plan_refuse(plan, ERR_INVAL, WHY_BACKING, r.max_level)
        gaps += at < r.host
        upgrades += writable and not r.writable
        at = range_end(r)
        hi += 1
    gaps += at < end
    if ranges_reserve(vm, gaps + 2) != ERR_NONE:
        return plan_refuse(plan, ERR_NOMEM, WHY_NO_MEMORY, 0)
    plan.segments = <Segment *>malloc(<size_t>(hi - lo + gaps) * sizeof(Segment))
    if plan.segments == NULL:
        return plan_refuse(plan, ERR_NOMEM, WHY_NO_MEMORY, 0)
    if gaps or upgrades:
        plan.map = memmap_clone(vm.hostmem, gaps + 2 * upgrades + 1)
        if plan.map == NULL:
            return plan_refuse(plan, ERR_NOMEM, WHY_NO_MEMORY, 0)
    at = hva
    while at < end:
        if lo < hi and vm.ranges[lo].host <= at:
            r = &vm.ranges[lo]
            n = <uint64_t>((range_end(r) if range_end(r) < end else end) - at) >> 12
            pfn = r.base_pfn + (<uint64_t>(at - r.host) >> 12)
            segment_add(plan, <uint64_t>(at - hva) >> 12, n, pfn, r.max_level)
            if writable and not r.writable:
                memmap_cut(plan.map, pfn, n)
                memmap_insert(plan.map, pfn, n, at, True)
            lo += 1
        else:
            n = <uint64_t>((vm.ranges[lo].host if lo < hi else end) - at) >> 12
            pfn = frames_place(plan.map, n, pfn_offset, limit)
            if pfn == 0:
                return plan_refuse(plan, ERR_NOMEM, WHY_NO_FRAMES, n)
            segment_add(plan, <uint64_t>(at - hva) >> 12, n, pfn, plan.max_level)
            memmap_insert(plan.map, pfn, n, at, writable)
        at += n << 12
    return ERR_NONE


cdef inline int hostmem_plan_unbind(Vm *vm, HostPlan *plan, uint8_t *hva, uint64_t npages) noexcept nogil:
    """Plan that one slot lets go of these bytes; frames nobody binds any more leave the map."""
    cdef uint8_t *end = hva + (npages << 12)
    cdef uint8_t *from_
    cdef uint8_t *to
    cdef int lo = ranges_from(vm, hva)
    cdef int hi = lo
    cdef int gone = 0
    cdef int i
    cdef HostRange *r
    plan.hva = hva
    plan.npages = npages
    plan.map = NULL
    plan.segments = NULL
    plan.n_segments = 0
    plan.why = WHY_NONE
    plan.detail = 0
    while hi < vm.n_ranges and vm.ranges[hi].host < end:
        gone += vm.ranges[hi].users == 1
        hi += 1
    if ranges_reserve(vm, 2) != ERR_NONE:
        return plan_refuse(plan, ERR_NOMEM, WHY_NO_MEMORY, 0)
    if gone == 0:
        return ERR_NONE
    plan.map = memmap_clone(vm.hostmem, gone + 1)
    if plan.map == NULL:
        return plan_refuse(plan, ERR_NOMEM, WHY_NO_MEMORY, 0)
    for i in range(lo, hi):
        r = &vm.ranges[i]
        if r.users == 1:
            from_ = r.host if r.host > hva else hva
            to = range_end(r) if range_end(r) < end else end
            memmap_cut(plan.map, r.base_pfn + (<uint64_t>(from_ - r.host) >> 12), <uint64_t>(to - from_) >> 12)
    return ERR_NONE


cdef inline MemMap *hostmem_publish(Vm *vm, HostPlan *plan) noexcept nogil:
    """Publish the planned map; returns the old one, to be freed after a drain (NULL: none)."""
    cdef MemMap *old = vm.hostmem
    if plan.map == NULL:
        return NULL
    plan.map.serial = old.serial + 1
    memmap_index(plan.map)
    st_release_ptr(&vm.hostmem, plan.map)
    plan.map = NULL
    return old


cdef inline MemMap *hostmem_commit_bind(Vm *vm, HostPlan *plan) noexcept nogil:
    """Count the new slot in; ``plan.segments`` passes to the caller."""
    cdef uint8_t *end = plan.hva + (plan.npages << 12)
    cdef uint8_t *at = plan.hva
    cdef uint64_t n
    cdef int i
    cdef int lo
    cdef int s = 0
    cdef HostRange *r
    ranges_split(vm, plan.hva)
    ranges_split(vm, end)
    lo = ranges_from(vm, plan.hva)
    i = lo
    while at < end:
        if i == vm.n_ranges or vm.ranges[i].host > at:
            n = <uint64_t>((end if i == vm.n_ranges or vm.ranges[i].host > end else vm.ranges[i].host) - at) >> 12
            while plan.segments[s].first + plan.segments[s].npages <= <uint64_t>(at - plan.hva) >> 12:
                s += 1
            ranges_open_gap(vm, i, 1)
            r = &vm.ranges[i]
            r.host = at
            r.npages = n
            r.base_pfn = plan.segments[s].pfn + (<uint64_t>(at - plan.hva) >> 12) - plan.segments[s].first
            r.users = 0
            r.max_level = plan.max_level
            r.writable = plan.writable
        r = &vm.ranges[i]
        r.users += 1
        r.writable |= plan.writable
        at = range_end(r)
        i += 1
    ranges_join(vm, lo, i)
    return hostmem_publish(vm, plan)


cdef inline void states_forget(Vm *vm, uint64_t pfn, uint64_t npages) noexcept nogil:
    """Frames given back: whoever gets them next has pages that are there."""
    if ld_u8(&vm.host_states_used) and pfn < HOST_STATES:
        # No reader is left: the slots that held them are gone.
        memset(vm.host_states + pfn, 0, <size_t>(npages if npages < HOST_STATES - pfn else HOST_STATES - pfn))


cdef inline MemMap *hostmem_commit_unbind(Vm *vm, HostPlan *plan) noexcept nogil:
    cdef uint8_t *end = plan.hva + (plan.npages << 12)
    cdef int lo
    cdef int i
    ranges_split(vm, plan.hva)
    ranges_split(vm, end)
    lo = ranges_from(vm, plan.hva)
    i = lo
    while i < vm.n_ranges and vm.ranges[i].host < end:
        vm.ranges[i].users -= 1
        if vm.ranges[i].users == 0:
            states_forget(vm, vm.ranges[i].base_pfn, vm.ranges[i].npages)
            ranges_open_gap(vm, i + 1, -1)
        else:
            i += 1
    ranges_join(vm, lo, i)
    return hostmem_publish(vm, plan)
