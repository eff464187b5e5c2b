# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A write that KVM makes into a shadowed guest table: the sptes behind it must go."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_present
from kvmmmu.engine.atomics cimport full_barrier, ld_u32, ld_u64, st_u32
from kvmmmu.engine.guest cimport guest_host_atomic
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.pages cimport gfn_first_page, gfn_next_page, page_at, role_level, role_quadrant
from kvmmmu.engine.sptes cimport spte_zap
from kvmmmu.engine.state cimport (
    PageList, STAT_MMU_FLOODED, STAT_MMU_PDE_ZAPPED, STAT_MMU_PTE_WRITE, ShadowPage, Vcpu, Vm,
)
from kvmmmu.engine.tlb cimport flush_remote_tlbs
from kvmmmu.engine.zap cimport list_init, zap_commit, zap_prepare

cdef enum:
    FLOODED = 3   # writes since a fault last used the table


cdef inline bint write_misaligned(const ShadowPage *sp, uint64_t gpa, int size) noexcept nogil:
    """Crosses an entry, or is too small to be one; a single byte at an entry's start is a flag being changed."""
    cdef uint64_t entry = 4 if sp.role & ROLE_4BYTE_GPTE else 8
    if size == 1 and not gpa & (entry - 1):
        return False
    if size < 4:
        return True
    return ((gpa ^ (gpa + <uint64_t>size - 1)) & ~(entry - 1)) != 0

cdef inline bint write_floods(ShadowPage *sp) noexcept nogil:
    """The guest keeps writing a table nobody walks: it is no table any more.  Leaf tables are exempt."""
    if role_level(sp.role) == LEVEL_4K:
        return False
    st_u32(&sp.flooding, ld_u32(&sp.flooding) + 1)
    return ld_u32(&sp.flooding) >= FLOODED

cdef inline int written_sptes(const ShadowPage *sp, uint64_t gpa, int *first) noexcept nogil:
    """How many sptes of the page stand behind the entry, and the first of them.

    A 32-bit guest's table fills several shadow pages (quadrants); its 4 MiB entries two sptes each.
    """
    cdef int offset = <int>(gpa & 4095)
    cdef int entry, n = 1
    if not sp.role & ROLE_4BYTE_GPTE:
        first[0] = offset >> 3
        return 1
    entry = offset >> 2
    if role_level(sp.role) == LEVEL_2M:
        entry <<= 1
        n = 2
    if entry >> 9 != role_quadrant(sp.role):
        return 0
    first[0] = entry & 511
    return n


cdef inline uint64_t written_entry(Vcpu *vcpu, uint64_t *gpa, int *size) noexcept nogil:
    """The whole entry as it is now; half of an 8-byte entry counts as the entry."""
    cdef uint8_t *host
    if size[0] == 4 and vcpu.regs.cr4 & CR4_PAE:
        gpa[0] &= ~<uint64_t>7
        size[0] = 8
    if size[0] != 4 and size[0] != 8 or gpa[0] & <uint64_t>(size[0] - 1):
        return 0
    host = guest_host_atomic(vcpu, gpa[0])
    if host == NULL:
        return 0
    return ld_u64(<const uint64_t *>host) if size[0] == 8 else ld_u32(<const uint32_t *>host)


cdef inline void track_write(Vcpu *vcpu, uint64_t gpa, int size) noexcept nogil:
    """After KVM stored ``size`` bytes at ``gpa`` for the guest (``kvm_mmu_pte_write``)."""
    cdef Vm *vm = vcpu.vm
    cdef PageList invalid
    cdef ShadowPage *sp
    cdef int32_t id
    cdef uint64_t entry
    cdef int first = 0, n
    cdef bint flush = False
    # The store comes before the look at the count; ``account_shadowed`` counts before it reads the entry.
    full_barrier()
    if not ld_u64(<const uint64_t *>&vm.indirect_pages):
        return
    list_init(&invalid)
    mmu_write_lock(vm)
    entry = written_entry(vcpu, &gpa, &size)
    vm.stats[<int>STAT_MMU_PTE_WRITE] += 1
    id = gfn_first_page(vm, gpa >> 12)
    while id:
        sp = page_at(vm, id)
        if write_misaligned(sp, gpa, size) or write_floods(sp):
            vm.stats[<int>STAT_MMU_FLOODED] += 1
            zap_prepare(vm, vcpu.id, id, &invalid)
        else:
            n = written_sptes(sp, gpa, &first)
            while n:
                if entry and role_level(sp.role) != LEVEL_4K:
                    vm.stats[<int>STAT_MMU_PDE_ZAPPED] += 1
                flush |= spte_zap(vm, (<uint64_t>id << 9) + <uint64_t>first)
                first += 1
                n -= 1
        id = gfn_next_page(vm, id, gpa >> 12)
    if invalid.head:
        zap_commit(vm, &invalid)
    elif flush:
        flush_remote_tlbs(vm)
    mmu_write_unlock(vm)
