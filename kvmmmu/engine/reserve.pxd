# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Address space for shadow pages, reserved once: columns never move and untouched pages cost nothing."""

from libc.stdint cimport int32_t, uint64_t
from libc.stdlib cimport calloc, free
from kvmmmu.engine.state cimport (
    ARENA_DESCS, ARENA_PAGES, Arena, HASH_BITS, HOST_STATES, MemMap, PteDesc, ShadowPage, Vm,
)
from kvmmmu.engine.memmap cimport memmap_index, memmap_insert, memmap_new

cdef extern from "sys/mman.h" nogil:
    int PROT_READ
    int PROT_WRITE
    int MAP_PRIVATE
    int MAP_ANONYMOUS
    int MAP_NORESERVE
    void *MAP_FAILED
    void *mmap(void *where, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *where, size_t length)
    int madvise(void *where, size_t length, int advice)
    int MADV_DONTNEED


cdef inline void *column_reserve(size_t size) noexcept nogil:
    cdef void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    return NULL if p == MAP_FAILED else p


cdef inline void column_release(void *p, size_t size) noexcept nogil:
    if p != NULL:
        munmap(p, size)


cdef inline bint arena_reserve(Arena *a) noexcept nogil:
    """Page 0 and block 0 are never given out, so 0 can mean none."""
    a.sptes = <uint64_t *>column_reserve(<size_t>ARENA_PAGES * 4096)
    a.shadowed = <uint64_t *>column_reserve(<size_t>ARENA_PAGES * 4096)
    a.page = <ShadowPage *>column_reserve(<size_t>ARENA_PAGES * sizeof(ShadowPage))
    a.unsync_bits = <uint64_t *>column_reserve(<size_t>ARENA_PAGES * 64)
    a.desc = <PteDesc *>column_reserve(<size_t>ARENA_DESCS * sizeof(PteDesc))
    a.desc_top = 1
    a.desc_free = 0
    a.free = 0
    a.top = 1
    a.limit = ARENA_PAGES
    return (a.sptes != NULL and a.shadowed != NULL and a.page != NULL and a.unsync_bits != NULL
            and a.desc != NULL)


cdef inline void arena_release(Arena *a) noexcept nogil:
    column_release(a.sptes, <size_t>ARENA_PAGES * 4096)
    column_release(a.shadowed, <size_t>ARENA_PAGES * 4096)
    column_release(a.page, <size_t>ARENA_PAGES * sizeof(ShadowPage))
    column_release(a.unsync_bits, <size_t>ARENA_PAGES * 64)
    column_release(a.desc, <size_t>ARENA_DESCS * sizeof(PteDesc))


cdef inline void arena_discard(Arena *a) noexcept nogil:
    """The VM is closed: its pages go back to the host, the address space stays while someone may hold the VM."""
    madvise(a.sptes, <size_t>a.top * 4096, MADV_DONTNEED)
    madvise(a.shadowed, <size_t>a.top * 4096, MADV_DONTNEED)
    madvise(a.page, <size_t>ARENA_PAGES * sizeof(ShadowPage), MADV_DONTNEED)
    madvise(a.unsync_bits, <size_t>ARENA_PAGES * 64, MADV_DONTNEED)
    madvise(a.desc, <size_t>ARENA_DESCS * sizeof(PteDesc), MADV_DONTNEED)


cdef inline bint vm_memory_init(Vm *vm) noexcept nogil:
    """The arena, its hash, and a map of frames in which the arena is area 0: a page id is its frame."""
    cdef MemMap *m
    if not arena_reserve(&vm.arena):
        return False
    vm.hash = <int32_t *>calloc(<size_t>1 << HASH_BITS, sizeof(int32_t))
    vm.host_states = <unsigned char *>column_reserve(HOST_STATES)
    m = memmap_new(1)
    vm.hostmem = m
    if vm.hash == NULL or m == NULL or vm.host_states == NULL:
        return False
    memmap_insert(m, 0, ARENA_PAGES, <unsigned char *>vm.arena.sptes, True)
    memmap_index(m)
    return True


cdef inline void vm_memory_free(Vm *vm) noexcept nogil:
    arena_release(&vm.arena)
    column_release(vm.host_states, HOST_STATES)
    free(vm.hash)
    free(vm.hostmem)
    free(vm.ranges)
