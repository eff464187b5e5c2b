# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The state of a VM as one stream of words, for those who look at it from outside.

A stream is sections: a tag, a length in bytes, then the bytes padded to whole words.
``kvmmmu/check/snapshot.py`` reads it and knows the same tags and field orders.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.counters cimport vm_stat
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport dirty_words, slot_entries
from kvmmmu.engine.state cimport (
    ADDRESS_SPACES, Arena, HASH_BITS, PteDesc, REQ_KICK, Segment, ShadowPage, Slot, Vcpu, VM_STATS, Vm,
)

cdef enum:
    SNAP_VM = 1          # the scalars, in the order of ``snap_vm``
    SNAP_STATS = 2
    SNAP_PAGES = 3       # records of pages 0 .. top-1
    SNAP_SPTES = 4       # their entries
    SNAP_SHADOWED = 5
    SNAP_UNSYNC_BITS = 6
    SNAP_DESCS = 7       # list blocks 0 .. desc_top
    SNAP_HASH = 8
    SNAP_SPACE = 9       # opens an address space: its id, generation, number of slots
    SNAP_SLOT = 10       # opens a slot; the sections after it are its columns
    SNAP_SEGMENTS = 11
    SNAP_RMAP_4K = 12    # 12, 13, 14 by level
    SNAP_DISALLOW_2M = 15  # 15, 16 by level
    SNAP_WRITE_TRACK = 17
    SNAP_DIRTY = 18
    SNAP_VCPU = 19
    SNAP_RANGE = 20

cdef struct Stream:
    # Words go out as long as there is room; all of them are counted.
    uint64_t *out
    uint64_t room
    uint64_t n


cdef inline void snap_put(Stream *s, uint64_t tag, const void *data, uint64_t size) noexcept nogil:
    cdef uint64_t words = 2 + ((size + 7) >> 3)
    if s.n + words <= s.room:
        s.out[s.n] = tag
        s.out[s.n + 1] = size
        if words > 2:
            s.out[s.n + words - 1] = 0
        if size:
            memcpy(s.out + s.n + 2, data, <size_t>size)
    s.n += words


cdef inline void snap_vm(Vm *vm, Stream *s) noexcept nogil:
    cdef uint64_t stats[32]
    cdef int i
    cdef uint64_t *w = [
        <uint64_t>vm.mmu, <uint64_t>vm.used_pages, <uint64_t>vm.max_pages, <uint64_t>vm.indirect_pages, vm.valid_gen,
        vm.rmaps, <uint64_t>vm.tdp_roots, <uint64_t>vm.active.head, <uint64_t>vm.active.tail, <uint64_t>vm.active.n,
        <uint64_t>vm.arena.free, <uint64_t>vm.arena.top, <uint64_t>vm.arena.limit, vm.arena.desc_top,
        vm.arena.desc_free, vm.masks.present, vm.masks.user, vm.masks.nx, vm.masks.x, vm.masks.host_writable,
        vm.masks.mmu_writable, vm.masks.mmio_value, vm.masks.mmio_mask, vm.masks.nonpresent_or_rsvd,
        vm.masks.nonpresent_low_gfn, vm.masks.mmio_caching, vm.masks.ad_enabled, vm.switches.mmio_scheme,
        vm.switches.tdp_mmu, vm.total_pages, <uint64_t>vm.nx_head, <uint64_t>vm.nx_tail, vm.switches.nx_huge_pages,
        vm.switches.era, vm.masks.empty, vm.masks.address, vm.masks.me,
    ]
    snap_put(s, SNAP_VM, w, 37 * 8)
    for i in range(VM_STATS):
        stats[i] = vm_stat(vm, i)
    snap_put(s, SNAP_STATS, stats, VM_STATS * 8)


cdef inline void snap_arena(Vm *vm, Stream *s) noexcept nogil:
    cdef const Arena *a = &vm.arena
    cdef uint64_t top = <uint64_t>a.top
    snap_put(s, SNAP_PAGES, a.page, top * sizeof(ShadowPage))
    snap_put(s, SNAP_SPTES, a.sptes, top << 12)
    snap_put(s, SNAP_SHADOWED, a.shadowed, top << 12)
    snap_put(s, SNAP_UNSYNC_BITS, a.unsync_bits, top << 6)
    snap_put(s, SNAP_DESCS, a.desc, (<uint64_t>a.desc_top + 1) * sizeof(PteDesc))
    snap_put(s, SNAP_HASH, vm.hash, <uint64_t>4 << HASH_BITS)


cdef inline void snap_slot(const Slot *slot, Stream *s) noexcept nogil:
    cdef uint64_t *w = [slot.as_id, slot.id, slot.base_gfn, slot.npages, slot.flags, slot.base_pfn]
    cdef int level
    snap_put(s, SNAP_SLOT, w, 6 * 8)
    snap_put(s, SNAP_SEGMENTS, slot.segments, <uint64_t>slot.n_segments * sizeof(Segment))
    for level in range(LEVEL_4K, LEVEL_1G + 1):
        snap_put(s, SNAP_RMAP_4K + level - 1, slot.rmap[level - 1], slot_entries(slot, level) * 8)
    for level in range(LEVEL_2M, LEVEL_1G + 1):
        snap_put(s, SNAP_DISALLOW_2M + level - 2, slot.disallow[level - 2], slot_entries(slot, level) * 4)
    snap_put(s, SNAP_WRITE_TRACK, slot.write_track, slot.npages * 2)
    if slot.dirty != NULL:
        snap_put(s, SNAP_DIRTY, slot.dirty, dirty_words(slot.npages) * 8)


cdef inline void snap_slots(Vm *vm, Stream *s) noexcept nogil:
    cdef uint64_t space[3]
    cdef int as_id, i
    for as_id in range(ADDRESS_SPACES):
        space[0] = <uint64_t>as_id
        space[1] = vm.slots[as_id].generation
        space[2] = <uint64_t>vm.slots[as_id].map.n
        snap_put(s, SNAP_SPACE, space, sizeof(space))
        for i in range(vm.slots[as_id].map.n):
            snap_slot(vm.slots[as_id].slot[i], s)
    for i in range(vm.n_ranges):
        space[0] = vm.ranges[i].base_pfn
        space[1] = vm.ranges[i].npages
        space[2] = vm.ranges[i].max_level
        snap_put(s, SNAP_RANGE, space, sizeof(space))


cdef inline void snap_vcpu(const Vcpu *v, Stream *s) noexcept nogil:
    # A kick that came too late for its batch says nothing of the vCPU.
    cdef uint64_t *w = [
        <uint64_t>v.id, v.smm, v.requests & ~<uint32_t>REQ_KICK, v.cpu_role, v.root_role, <uint64_t>v.pae_root,
        v.mmio.gva, v.mmio.gfn, v.mmio.access, v.mmio.generation, <uint64_t>v.root.page, v.root.pgd,
        <uint64_t>v.prev_roots[0].page, v.prev_roots[0].pgd, <uint64_t>v.prev_roots[1].page, v.prev_roots[1].pgd,
        <uint64_t>v.prev_roots[2].page, v.prev_roots[2].pgd,
    ]
    snap_put(s, SNAP_VCPU, w, 18 * 8)


cdef inline uint64_t vm_snapshot(Vm *vm, uint64_t *out, uint64_t room) noexcept nogil:
    """Write the whole state if ``room`` words hold it; returns the words it takes.

    The caller holds slots_lock.  It is consistent when no vCPU runs.
    """
    cdef Stream s
    cdef int i
    s.out = out
    s.room = room
    s.n = 0
    mmu_write_lock(vm)
    snap_vm(vm, &s)
    snap_arena(vm, &s)
    snap_slots(vm, &s)
    for i in range(vm.n_vcpus):
        snap_vcpu(vm.vcpus[i], &s)
    mmu_write_unlock(vm)
    return s.n
