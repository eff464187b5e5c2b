# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The door: owns memory, binds the engine to Python and C, checks every argument once."""

from kvmmmu.bits.mmio cimport mmio_spte_make
from kvmmmu.bits.spte cimport SpteMasks, spte_masks_legacy
from kvmmmu.engine.state cimport Vm, Vcpu

def probe():
    cdef SpteMasks m
    spte_masks_legacy(&m, 46, 46, False, 46, True)
    cdef Vm vm
    return mmio_spte_make(&m, 0xfee00, 7, 2), sizeof(Vm), sizeof(Vcpu)


# ---- memory, memslots, events, counters ------------------------------------------

from cpython.buffer cimport (Py_buffer, PyBUF_RECORDS_RO, PyBuffer_IsContiguous,
                             PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer)
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_masks_ept
from kvmmmu.engine.state cimport *
from kvmmmu.engine.atomics cimport ld_u32, ld_u64, st_release_u64
from kvmmmu.engine.drain cimport slots_lock, slots_unlock
from kvmmmu.engine.events cimport event_emit, events_copy
from kvmmmu.engine.memslots cimport gfn_to_disallow, slot_find, slot_host_level, slot_pfn, slots_generation
from kvmmmu.engine.region cimport slot_id_free, vm_set_region, vm_slots_free, vm_slots_init
from kvmmmu.engine.reserve cimport vm_memory_free, vm_memory_init

import operator

import numpy as np

from kvmmmu.errors import ArgumentError, VmBusyError, VmClosedError

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

VM_STATS_ORDER = (
    "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss",
    "mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits", "max_mmu_rmap_size",
    "max_mmu_page_hash_collisions", "remote_tlb_flush", "remote_tlb_flush_requests",
)
VCPU_STATS_ORDER = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush",
    "invlpg", "mmio_exits", "insn_emulation", "insn_emulation_fail", "mmio_cache_hit", "mmio_spte_hit", "mmio_slow",
    "slot_search", "guest_walk",
)
# By number: the tracepoint of EV_*.
EVENT_KINDS = (
    None, "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit",
    "kvm_mmu_walker_error", "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
    "kvm_mmu_prepare_zap_page", "mark_mmio_spte", "handle_mmio_page_fault", "check_mmio_spte", "fast_page_fault",
    "kvm_mmu_zap_all_fast", "kvm_mmu_set_spte", "kvm_mmu_spte_requested", "kvm_tdp_mmu_spte_changed",
    "kvm_mmu_split_huge_page", "kvm_page_fault", "vcpu_match_mmio", "kvm_mmio", "kvm_fast_mmio",
    "kvm_inj_exception", "kvm_emulate_insn", "kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva",
    "kvm_test_age_hva", "kvm_exit", "kvm_cr", "kvm_msr",
)
EVENT_DTYPE = np.dtype([("kind", np.uint32), ("vcpu", np.uint32), ("w", np.uint64, (7,))])
# By number: why a region was refused (WHY_*).
REGION_REASONS = (
    None, "id", "flags", "size_align", "gpa_align", "hva_align", "as_id", "wrap", "too_many_pages", "no_slot",
    "total_pages", "hva_changed", "size_changed", "readonly_changed", "overlap", "max_gfn", "no_memory",
    "incongruent", "backing", "no_frames", "closed",
)
assert len(VM_STATS_ORDER) == VM_STATS and len(VCPU_STATS_ORDER) == VCPU_STATS and len(EVENT_KINDS) == EV_KINDS
assert len(REGION_REASONS) == WHY_CLOSED + 1 and EVENT_DTYPE.itemsize == sizeof(Event)


cdef uint64_t as_word(object value, str name, int bits=64) except? 0:
    """An integer of the machine, or an OverflowError that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < 0 or number >> bits:
        raise OverflowError(f"{name} = {number} is outside 0 ... 2^{bits}-1")
    return number


cdef class Export:
    """One buffer export, held until nothing of the engine points into it."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, object memory):
        self.held = False
        if not PyObject_CheckBuffer(memory):
            raise TypeError(f"memory must be a buffer (NumPy array, mmap, bytearray), not {type(memory).__name__}")
        try:
            PyObject_GetBuffer(memory, &self.view, PyBUF_RECORDS_RO)
        except BufferError as why:
            raise ArgumentError(f"memory cannot be exported: {why}") from None
        except ValueError as why:
            # NumPy's answer to a dtype that no buffer format can name.
            raise ArgumentError(f"memory cannot be exported: {why}") from None
        self.held = True
        if not PyBuffer_IsContiguous(&self.view, b"C"):
            raise ArgumentError("memory is not C-contiguous: one block of bytes in order is needed")
        kind = (self.view.format or b"B").decode().lstrip("@=<>!")
        if kind not in ("B", "b", "c", "H", "h", "I", "i", "L", "l", "Q", "q", "N", "n"):
            raise ArgumentError(f"memory has items of format {kind!r}: bytes or integers are needed, uint8 is usual")

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    @property
    def obj(self):
        return <object>self.view.obj


cdef class VmCore:
    """Owner of one ``Vm``: its arena, its tables, and the buffers its slots point into."""

    cdef Vm *vm
    cdef bint closed
    cdef dict exports
    cdef uint64_t next_token

    def __cinit__(self, int mmu, tuple host, int mmio_scheme, bint tdp_mmu, bint nx_huge_pages):
        cdef Vm *vm = <Vm *>calloc(1, sizeof(Vm))
        if vm == NULL:
            raise MemoryError("no memory for a VM")
        self.vm = vm
        self.closed = False
        self.exports = {}
        self.next_token = 1
        vm.mmu = mmu
        (vm.host.maxphyaddr, vm.host.phys_bits, vm.host.gbpages, vm.host.l1tf, vm.host.cache_bits, vm.host.ept_ad,
         vm.host.ept_exec_only, vm.host.ept_1g, vm.host.ept_2m, vm.host.amd, vm.host.la57) = host
        vm.switches.mmio_scheme = mmio_scheme
        vm.switches.tdp_mmu = tdp_mmu and mmu != MMU_SHADOW
        vm.switches.nx_huge_pages = nx_huge_pages
        vm.rmaps = not vm.switches.tdp_mmu
        if mmu == MMU_EPT:
            spte_masks_ept(&vm.masks, vm.host.phys_bits, vm.host.l1tf, vm.host.cache_bits, vm.host.ept_ad,
                           vm.host.ept_exec_only, mmio_scheme != MMIO_OFF)
        else:
            spte_masks_legacy(&vm.masks, vm.host.maxphyaddr, vm.host.phys_bits, vm.host.l1tf, vm.host.cache_bits,
                              mmio_scheme != MMIO_OFF)
        vm.mmu_lock = <kvmmmu_rwlock *>aligned_alloc(64, 64)
        if vm.mmu_lock == NULL:
            raise MemoryError("no memory for a VM")
        memset(vm.mmu_lock, 0, 64)
        if not vm_slots_init(vm):
            raise MemoryError("no memory for the tables of slots")
        if not vm_memory_init(vm):
            raise MemoryError("no address space for shadow pages (about 10 GiB are reserved, not used)")

    def __dealloc__(self):
        cdef Vm *vm = self.vm
        cdef int i
        if vm == NULL:
            return
        vm_slots_free(vm)
        vm_memory_free(vm)
        free(vm.events.ring)
        for i in range(vm.n_vcpus):
            free(vm.lines[i])
            free(vm.vcpus[i])
        free(vm.mmu_lock)
        free(vm)

    cdef int check_open(self) except -1:
        if self.closed:
            raise VmClosedError("the VM was closed")
        return 0

    cdef int check_idle(self, str what) except -1:
        cdef int i
        for i in range(self.vm.n_vcpus):
            if ld_u32(&self.vm.vcpus[i].busy):
                raise VmBusyError(f"vCPU {i} is running: {what} needs every vCPU stopped")
        return 0

    def close(self):
        """Let go of every slot and buffer.  The arena stays until nobody refers to this object."""
        if self.closed:
            return
        self.check_idle("closing the VM")
        self.closed = True
        slots_lock(self.vm)
        vm_slots_free(self.vm)
        slots_unlock(self.vm)
        self.exports.clear()

    @property
    def is_closed(self):
        return self.closed

    # -- memslots

    def set_region(self, slot, flags, gpa, size, memory, int max_level, pfn_offset):
        """One KVM_SET_USER_MEMORY_REGION: (errno, reason, detail, change), errno 0 when done.

        ``memory`` None stands for the memory the slot has; ``size`` None for all of it.
        """
        cdef Region r
        cdef Export export = None
        cdef int err
        self.check_open()
        memset(&r, 0, sizeof(r))
        r.slot = <uint32_t>as_word(slot, "slot", 32)
        r.flags = <uint32_t>as_word(flags, "flags", 32)
        r.gpa = as_word(gpa, "gpa")
        r.max_level = max_level
        r.pfn_offset = <uint32_t>as_word(pfn_offset, "pfn_offset", 18)
        if memory is None:
            r.keep_memory = 1
            # Any size but 0 means "unchanged" here.
            r.size = 4096 if size is None else as_word(size, "size")
        else:
            export = Export(memory)
            if export.view.len == 0:
                raise ArgumentError("memory is empty: a slot has at least one page of 4096 bytes")
            r.size = export.view.len if size is None else as_word(size, "size")
            if r.size > <uint64_t>export.view.len:
                raise ArgumentError(f"size = {r.size} is more than the {export.view.len} bytes of memory")
            r.hva = <uint8_t *>export.view.buf
            r.host_writable = not export.view.readonly
            if export.view.readonly:
                r.flags |= MEM_READONLY
            r.token = self.next_token
        err = vm_set_region(self.vm, &r)
        if err == ERR_NONE and r.change == CHANGE_CREATE:
            self.exports[r.token] = export
            self.next_token += 1
        if r.released:
            del self.exports[r.released]
        return -err, REGION_REASONS[r.why], r.detail, r.change

    cdef object describe(self, const Slot *s):
        return (s.as_id << 16 | s.id, s.base_gfn << 12, s.npages << 12, s.flags,
                (<Export>self.exports[s.token]).obj)

    def slots(self, int as_id):
        """The slots of an address space in ascending order of gpa: (slot, gpa, size, flags, memory)."""
        cdef int i
        self.check_open()
        slots_lock(self.vm)
        try:
            return [self.describe(self.vm.slots[as_id].slot[i]) for i in range(self.vm.slots[as_id].map.n)]
        finally:
            slots_unlock(self.vm)

    def slot(self, slot):
        """The slot named by ``as_id << 16 | id``, or None."""
        cdef uint64_t number = as_word(slot, "slot")
        cdef Slot *s = NULL
        self.check_open()
        slots_lock(self.vm)
        try:
            if number >> 16 < ADDRESS_SPACES and number & 0xffff < MAX_SLOT_ID:
                s = self.vm.slot_by_id[number >> 16][number & 0xffff]
            return None if s == NULL else self.describe(s)
        finally:
            slots_unlock(self.vm)

    def slot_count(self, int as_id):
        self.check_open()
        return self.vm.slots[as_id].map.n

    def free_slot_id(self, int as_id):
        self.check_open()
        return slot_id_free(self.vm, as_id)

    def generation(self, int as_id):
        self.check_open()
        return slots_generation(self.vm.slots[as_id])

    def find_gfn(self, gfn, int as_id):
        """What a fault would learn of a gfn: (slot, pfn, largest page of the host, reasons against 2M, 1G) or None."""
        cdef uint64_t g = as_word(gfn, "gfn")
        cdef int hint = 0
        cdef Slot *s
        self.check_open()
        slots_lock(self.vm)
        try:
            s = slot_find(self.vm.slots[as_id], g, &hint)
            if s == NULL:
                return None
            return (s.as_id << 16 | s.id, slot_pfn(s, g), slot_host_level(s, g),
                    gfn_to_disallow(s, g, LEVEL_2M)[0], gfn_to_disallow(s, g, LEVEL_1G)[0])
        finally:
            slots_unlock(self.vm)

    def host_ranges(self):
        """Runs of host pages that slots bind: (host address, pages, first frame, users, level, writable)."""
        cdef int i
        self.check_open()
        slots_lock(self.vm)
        try:
            return [(<uint64_t>self.vm.ranges[i].host, self.vm.ranges[i].npages, self.vm.ranges[i].base_pfn,
                     self.vm.ranges[i].users, self.vm.ranges[i].max_level, bool(self.vm.ranges[i].writable))
                    for i in range(self.vm.n_ranges)]
        finally:
            slots_unlock(self.vm)

    def frame_areas(self):
        """The map of frames without the arena: (first frame, pages, host address, writable)."""
        cdef MemMap *m
        cdef int i
        self.check_open()
        slots_lock(self.vm)
        try:
            m = self.vm.hostmem
            return [(m.first[i], m.npages[i], <uint64_t>m.host[i], bool(m.writable[i])) for i in range(1, m.n)]
        finally:
            slots_unlock(self.vm)

    @property
    def total_pages(self):
        self.check_open()
        return self.vm.total_pages

    @property
    def max_mmu_pages(self):
        self.check_open()
        return self.vm.max_pages

    def take_zap_request(self):
        """True when a slot change asked for all shadow pages to go; the request is cleared."""
        wanted = bool(self.vm.want_zap_all)
        self.vm.want_zap_all = 0
        return wanted

    # -- counters

    def vm_stats(self):
        """Counters of the VM, in VM_STATS_ORDER."""
        cdef int i
        return [ld_u64(&self.vm.stats[i]) for i in range(VM_STATS)]

    def vcpu_stats(self, int vcpu_id):
        """Counters of a vCPU in VCPU_STATS_ORDER; of all of them together for id -1."""
        cdef int i
        cdef int v
        cdef uint64_t total
        cdef list out = []
        for i in range(VCPU_STATS):
            total = 0
            for v in range(self.vm.n_vcpus):
                if vcpu_id < 0 or v == vcpu_id:
                    total += ld_u64(&self.vm.vcpus[v].stats[i])
            out.append(total)
        return out

    # -- events

    def events_enable(self, mask, capacity):
        """Record the kinds of ``mask`` into a ring of ``capacity`` records, a power of two."""
        cdef uint64_t wanted = as_word(mask, "mask")
        cdef uint64_t room = as_word(capacity, "capacity")
        cdef EventRing *ring = &self.vm.events
        cdef Event *fresh
        self.check_open()
        if room != ring.capacity:
            self.check_idle("changing the size of the event ring")
            fresh = <Event *>calloc(<size_t>room, sizeof(Event))
            if fresh == NULL:
                raise MemoryError(f"no memory for {room} event records")
            st_release_u64(&ring.mask, 0)
            free(ring.ring)
            ring.ring = fresh
            ring.capacity = room
            ring.head = 0
            ring.tail = 0
        st_release_u64(&ring.mask, wanted)

    def events_disable(self):
        st_release_u64(&self.vm.events.mask, 0)

    def events_emit(self, kind, vcpu_id, tuple words):
        """Add a record made outside the engine; 7 words."""
        cdef uint64_t w[7]
        cdef int i
        for i in range(7):
            w[i] = as_word(words[i], f"word {i}")
        event_emit(self.vm, <uint32_t>as_word(vcpu_id, "vcpu", 32), <uint32_t>as_word(kind, "kind", 6),
                   w[0], w[1], w[2], w[3], w[4], w[5], w[6])

    def events_take(self, bint consume):
        """The finished records, oldest first, as an array of EVENT_DTYPE."""
        cdef EventRing *ring = &self.vm.events
        cdef uint64_t n
        cdef uint64_t waiting = ld_u64(&ring.head) - ring.tail
        out = np.empty(waiting, EVENT_DTYPE)
        if waiting == 0:
            return out
        cdef uint64_t address = out.ctypes.data
        n = events_copy(ring, <Event *>address, waiting, consume)
        return out[:n]

    @property
    def events_mask(self):
        return self.vm.events.mask

    @property
    def events_capacity(self):
        return self.vm.events.capacity

    @property
    def events_dropped(self):
        return ld_u64(&self.vm.events.dropped)


cdef class VcpuCore:
    """One vCPU of a VM; the struct lives as long as the VM."""

    cdef VmCore owner
    cdef Vcpu *vcpu

    def __cinit__(self, VmCore owner not None):
        cdef Vm *vm = owner.vm
        cdef Vcpu *vcpu
        cdef kvmmmu_line *line
        owner.check_open()
        self.owner = owner
        vcpu = <Vcpu *>calloc(1, sizeof(Vcpu))
        line = <kvmmmu_line *>aligned_alloc(64, 64)
        if vcpu == NULL or line == NULL:
            free(vcpu)
            free(line)
            raise MemoryError("no memory for a vCPU")
        memset(line, 0, 64)
        slots_lock(vm)
        if vm.n_vcpus == MAX_VCPUS:
            slots_unlock(vm)
            free(vcpu)
            free(line)
            raise ArgumentError(f"the VM has {MAX_VCPUS} vCPUs, the most there can be")
        vcpu.vm = vm
        vcpu.id = vm.n_vcpus
        vcpu.line = line
        vm.vcpus[vcpu.id] = vcpu
        vm.lines[vcpu.id] = line
        vm.n_vcpus += 1
        self.vcpu = vcpu
        slots_unlock(vm)

    @property
    def id(self):
        return self.vcpu.id

    @property
    def vm(self):
        return self.owner
