# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A write that KVM makes into a shadowed guest table: the sptes behind it must go."""

from libc.stdint cimport int32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_present
from kvmmmu.engine.atomics cimport full_barrier, ld_u32, ld_u64, st_u32
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.pages cimport gfn_first_page, gfn_next_page, page_at, role_level, spte_at
from kvmmmu.engine.rewrite cimport entry_rewrite, written_entry
from kvmmmu.engine.sptes cimport spte_read, spte_write
from kvmmmu.engine.state cimport (
    PageList, STAT_MMU_FLOODED, STAT_MMU_PTE_WRITE, ShadowPage, Vcpu, Vm,
)
from kvmmmu.engine.tlb cimport flush_own_tlb, flush_remote_tlbs
from kvmmmu.engine.zap cimport list_init, zap_commit, zap_prepare

cdef enum:
    FLOODED = 3   # writes since a fault last used the table


cdef inline bint write_misaligned(const Vm *vm, const ShadowPage *sp, uint64_t gpa, int size) noexcept nogil:
    """Crosses an entry, or is too small to be one; a single byte at an entry's start is a flag being changed."""
    cdef uint64_t entry = 4 if sp.role & ROLE_4BYTE_GPTE else 8
    if size == 1 and not gpa & (entry - 1) and not vm.switches.era & ERA_FLOOD_BY_VCPU:
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

cdef inline bint write_floods_vcpu(Vcpu *vcpu, uint64_t gfn) noexcept nogil:
    """Linux 3.1: the third store in a row to one table, unless what was mapped ahead by the last one got used."""
    cdef Vm *vm = vcpu.vm
    cdef uint64_t spte = spte_read(spte_at(vm, vcpu.ahead_spte)) if vcpu.ahead_spte else 0
    if vcpu.ahead_spte and vcpu.ahead_gfn == gfn and spte_present(spte) and not spte & vm.masks.accessed:
        # The page written was itself mapped ahead: this store is the proof of its use.
        spte |= vm.masks.accessed
        spte_write(spte_at(vm, vcpu.ahead_spte), spte)
    if gfn == vcpu.written_gfn and not spte & vm.masks.accessed:
        vcpu.written_times += 1
        return vcpu.written_times >= FLOODED
    vcpu.written_gfn = gfn
    vcpu.written_times = 1
    vcpu.ahead_spte = 0
    return False


cdef inline void track_write(Vcpu *vcpu, uint64_t gpa, int size) noexcept nogil:
    """After KVM stored ``size`` bytes at ``gpa`` for the guest (``kvm_mmu_pte_write``)."""
    cdef Vm *vm = vcpu.vm
    cdef PageList invalid
    cdef ShadowPage *sp
    cdef int32_t id
    cdef uint64_t entry
    cdef bint flush = False, floods = False, any = False
    cdef bint by_vcpu = (vm.switches.era & ERA_FLOOD_BY_VCPU) != 0
    # The store comes before the look at the count; ``account_shadowed`` counts before it reads the entry.
    full_barrier()
    if not ld_u64(<const uint64_t *>&vm.indirect_pages):
        return
    list_init(&invalid)
    mmu_write_lock(vm)
    entry = written_entry(vcpu, &gpa, &size)
    vm.stats[<int>STAT_MMU_PTE_WRITE] += 1
    if by_vcpu:
        floods = write_floods_vcpu(vcpu, gpa >> 12)
    id = gfn_first_page(vm, gpa >> 12)
    while id:
        sp = page_at(vm, id)
        if write_misaligned(vm, sp, gpa, size) or floods or not by_vcpu and write_floods(sp):
            vm.stats[<int>STAT_MMU_FLOODED] += 1
            zap_prepare(vm, vcpu.id, id, &invalid)
        else:
            any = True
            flush |= entry_rewrite(vcpu, id, gpa, entry)
        id = gfn_next_page(vm, id, gpa >> 12)
    if invalid.head:
        zap_commit(vm, &invalid)
    elif flush:
        flush_remote_tlbs(vm)
    elif any and vm.switches.era & ERA_COUNT_OLD:
        flush_own_tlb(vcpu)
    mmu_write_unlock(vm)
