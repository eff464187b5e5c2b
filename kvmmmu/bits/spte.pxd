# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""KVM's own entries: the masks a host chooses once, and what an spte's bits say.

Linux 6.1 encodings: an empty spte is 0, REMOVED is 0x5a0 (a TDX guest has bit 63 in both), bit 11 is
KVM's own present bit at every level (arch/x86/kvm/mmu/spte.h describes the layout).
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *

cdef struct SpteMasks:
    uint64_t present        # hardware present bits of a mapping (EPT with exec-only: 0)
    uint64_t user           # legacy U; EPT R
    uint64_t nx             # legacy bit 63; EPT 0
    uint64_t x              # legacy 0; EPT X
    uint64_t accessed
    uint64_t dirty
    uint64_t memtype        # bits set in every RAM leaf (EPT: WB, ignore PAT)
    uint64_t acc_track      # bits cleared to track accesses without hardware A/D
    uint64_t host_writable
    uint64_t mmu_writable
    uint64_t address        # bits of a frame's address in a leaf
    uint64_t me             # shadow_me_value: the C-bit, set in every mapping and link of a host whose kernel uses SME
    uint64_t mmio_value
    uint64_t mmio_mask
    uint64_t mmio_access    # ACC bits an mmio spte keeps
    uint64_t nonpresent_or_rsvd     # L1TF: always set in an mmio spte
    uint64_t nonpresent_low_gfn     # L1TF: address bits kept in place
    uint64_t empty          # an entry of the TDP MMU that maps nothing
    uint64_t removed        # one being torn down
    uint8_t ad_enabled      # the processor sets A/D in these tables
    uint8_t mmio_caching    # mmio sptes may be made


cdef inline void spte_masks_legacy(SpteMasks *m, int raw_maxphyaddr, int phys_bits, bint l1tf, int cache_bits,
                                   bint mmio_caching) noexcept nogil:
    """Shadow paging and NPT.  ``raw_maxphyaddr`` is CPUID's value, before key bits are taken away."""
    m.present = PT_PRESENT_MASK
    m.user = PT_USER_MASK
    m.nx = PT64_NX_MASK
    m.x = 0
    m.accessed = PT_ACCESSED_MASK
    m.dirty = PT_DIRTY_MASK
    m.memtype = 0
    m.acc_track = 0
    m.host_writable = SPTE_HOST_WRITABLE_LEGACY
    m.mmu_writable = SPTE_MMU_WRITABLE_LEGACY
    m.address = PT_ADDR_MASK
    m.me = 0
    m.empty = 0
    m.removed = REMOVED_SPTE
    m.ad_enabled = 1
    spte_masks_l1tf(m, phys_bits, l1tf, cache_bits)
    # Bit 51 is reserved below MAXPHYADDR 52: a present entry with it faults with RSVD.
    m.mmio_value = (BIT51 | PT_PRESENT_MASK) if raw_maxphyaddr < 52 and mmio_caching else 0
    m.mmio_mask = m.mmio_value
    m.mmio_access = ACC_W | ACC_U
    m.mmio_caching = m.mmio_value != 0


cdef inline void spte_masks_ept(SpteMasks *m, int phys_bits, bint l1tf, int cache_bits, bint ad, bint exec_only,
                                bint mmio_caching) noexcept nogil:
    m.present = 0 if exec_only else EPT_READ
    m.user = EPT_READ
    m.nx = 0
    m.x = EPT_EXEC
    # Without hardware A/D the same positions are software bits.
    m.accessed = EPT_ACCESSED if ad else 0
    m.dirty = EPT_DIRTY if ad else 0
    m.memtype = EPT_MT_WB | EPT_IPAT
    m.acc_track = EPT_RWX
    m.host_writable = SPTE_HOST_WRITABLE_EPT
    m.mmu_writable = SPTE_MMU_WRITABLE_EPT
    m.address = PT_ADDR_MASK
    m.me = 0
    m.empty = 0
    m.removed = REMOVED_SPTE
    m.ad_enabled = ad
    spte_masks_l1tf(m, phys_bits, l1tf, cache_bits)
    # Write and execute without read misconfigures, whatever the rest says.
    m.mmio_value = (EPT_WRITE | EPT_EXEC) if mmio_caching else 0
    m.mmio_mask = EPT_RWX | EPT_SUPPRESS_VE if mmio_caching else 0
    m.mmio_access = 0
    m.mmio_caching = mmio_caching


cdef inline void spte_masks_era(SpteMasks *m, uint64_t era, int raw_maxphyaddr, bint ept) noexcept nogil:
    """The mmio masks of 2011: no generation in the entry, no care for L1TF.

    As merged: every bit from MAXPHYADDR to 62, and P unless that leaves no reserved bit; under EPT a fixed range with
    W and X.  As mailed: the fixed range and bit 0 on every host.
    """
    if not era & (ERA_MMIO_WIDE | ERA_MMIO_CONSTANT):
        return
    if era & ERA_MMIO_CONSTANT:
        m.mmio_mask = bits_between(56, 49) | PT_PRESENT_MASK
    elif ept:
        m.mmio_mask = bits_between(56, 49) | EPT_WRITE | EPT_EXEC
    else:
        # Without a reserved address bit the entry only looks absent: it never faults with RSVD.
        m.mmio_mask = bits_between(62, raw_maxphyaddr) | (PT_PRESENT_MASK if raw_maxphyaddr < 52 else 0)
    m.mmio_value = m.mmio_mask
    m.mmio_caching = 1
    m.mmio_access = ACC_W | ACC_U
    m.nonpresent_or_rsvd = 0
    m.nonpresent_low_gfn = bits_between(51, 12) & ~m.mmio_mask


cdef inline void spte_masks_sme(SpteMasks *m, int phys_bits, int c_bit, bint encrypts,
                                bint mmio_caching) noexcept nogil:
    """A host that can encrypt memory, and whose kernel does if it ``encrypts``: then mappings carry the C-bit.

    Of mmio sptes every bit it took from the address, but not the C-bit where it is the lowest.  KVM's svm.c
    (svm_adjust_mmio_mask): what lies above the reduced width is reserved, the C-bit alone is not.
    """
    cdef int lowest = phys_bits + (1 if c_bit == phys_bits else 0)
    cdef uint64_t value = bits_between(51, lowest) | PT_PRESENT_MASK if lowest < 52 else 0
    m.address &= ~(ONE << c_bit)
    m.me = ONE << c_bit if encrypts else 0
    spte_masks_mmio(m, value if mmio_caching else 0, value, ACC_W | ACC_U)


cdef inline void spte_masks_mmio(SpteMasks *m, uint64_t value, uint64_t mask, uint64_t access) noexcept nogil:
    """Set the mmio masks by hand; what KVM (kvm_mmu_set_mmio_spte_mask) finds wrong leaves value 0, no mmio sptes.

    Call it after the rest of the host is known: the rules ask for the L1TF split.
    """
    cdef uint64_t moved = m.nonpresent_or_rsvd << L1TF_MASK_LEN
    cdef bint wrong = access >> 32 != 0
    if mask & ~(EPT_SUPPRESS_VE | bits_between(51, 12) | bits_between(2, 0)) or value & ~mask:
        wrong = True
    # The address of an access must not show through, and an entry being torn down is not one to emulate.
    if value & (m.nonpresent_low_gfn | moved) or value != 0 and (REMOVED_SPTE & mask) == value:
        wrong = True
    m.mmio_value = 0 if wrong else value
    m.mmio_mask = mask
    m.mmio_access = access & (ALL_ONES >> 32)
    m.mmio_caching = m.mmio_value != 0


cdef inline void spte_masks_ve(SpteMasks *m) noexcept nogil:
    """A TDX guest: its mmio sptes are all clear where the mask looks, so that the processor tells the guest (#VE).

    Everything else has bit 63 (suppress #VE): an empty entry is that bit alone.
    """
    m.present |= EPT_SUPPRESS_VE
    m.empty = EPT_SUPPRESS_VE
    m.removed = REMOVED_SPTE | EPT_SUPPRESS_VE
    m.mmio_value = 0


cdef inline void spte_masks_l1tf(SpteMasks *m, int phys_bits, bint l1tf, int cache_bits) noexcept nogil:
    """Keep the address of a non-present spte off the bits an L1TF-vulnerable cache looks at."""
    m.nonpresent_or_rsvd = 0
    cdef int low_bits = phys_bits
    if l1tf and cache_bits < 52 - L1TF_MASK_LEN:
        low_bits = cache_bits - L1TF_MASK_LEN
        m.nonpresent_or_rsvd = bits_between(cache_bits - 1, low_bits)
    m.nonpresent_low_gfn = bits_between(low_bits - 1, 12)


cdef inline uint64_t bits_between(int hi, int lo) noexcept nogil:
    return (ALL_ONES >> (63 - hi)) & (ALL_ONES << lo)


cdef inline bint spte_is_mmio(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return (spte & m.mmio_mask) == m.mmio_value and m.mmio_caching

cdef inline bint spte_present(uint64_t spte) noexcept nogil:
    return (spte & SPTE_MMU_PRESENT) != 0

cdef inline bint spte_large(uint64_t spte) noexcept nogil:
    return (spte & PT_PAGE_SIZE_MASK) != 0

cdef inline bint spte_is_last(uint64_t spte, int level) noexcept nogil:
    """A present spte at ``level`` maps memory rather than a table."""
    return level == LEVEL_4K or (spte & PT_PAGE_SIZE_MASK) != 0

cdef inline uint64_t spte_pfn(const SpteMasks *m, uint64_t spte) noexcept nogil:
    """The frame that a leaf maps."""
    return (spte & m.address) >> 12

cdef inline int32_t spte_child(uint64_t spte) noexcept nogil:
    """The table that an entry leads to, by number: tables are the lowest 2^20 frames, a C-bit stands above."""
    return <int32_t>(<uint32_t>spte >> 12)

cdef inline bint spte_writable(uint64_t spte) noexcept nogil:
    return (spte & PT_WRITABLE_MASK) != 0  # the same position in every format

cdef inline bint spte_mmu_writable(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return (spte & m.mmu_writable) != 0

cdef inline bint spte_ad_kind_off(uint64_t spte) noexcept nogil:
    return (spte & SPTE_TDP_AD_MASK) == SPTE_TDP_AD_DISABLED

cdef inline bint spte_ad_need_write_protect(uint64_t spte) noexcept nogil:
    return (spte & SPTE_TDP_AD_MASK) != 0

cdef inline bint spte_acc_tracked(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return spte_ad_kind_off(spte) and (spte & m.acc_track) == 0

cdef inline uint64_t spte_accessed_mask(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return 0 if spte_ad_kind_off(spte) else m.accessed

cdef inline uint64_t spte_dirty_mask(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return 0 if spte_ad_kind_off(spte) else m.dirty

cdef inline bint spte_executable(const SpteMasks *m, uint64_t spte) noexcept nogil:
    return (spte & (m.x | m.nx)) == m.x

cdef inline bint spte_permits(const SpteMasks *m, uint64_t spte, bint write, bint fetch) noexcept nogil:
    """The fast path's test: reads need bit 0, which is P and, in EPT, the R that an access-tracked leaf lacks."""
    if fetch:
        return spte_executable(m, spte)
    if write:
        return spte_writable(spte)
    return (spte & PT_PRESENT_MASK) != 0

cdef inline bint spte_has_volatile_bits(const SpteMasks *m, uint64_t spte) noexcept nogil:
    """Another agent may change this leaf without mmu_lock, so an update must exchange it.

    Linux 6.1: W=0 with MMU-writable; access-tracked; A/D kind with A=0, or W=1 and D=0.
    """
    if not spte_present(spte):
        return False
    if not spte_writable(spte) and spte_mmu_writable(m, spte):
        return True
    if spte_acc_tracked(m, spte):
        return True
    if m.accessed and not spte_ad_kind_off(spte):
        if (spte & m.accessed) == 0 or (spte_writable(spte) and (spte & m.dirty) == 0):
            return True
    return False

cdef inline uint64_t spte_make_nonleaf(const SpteMasks *m, uint64_t child_pfn, bint ad_disabled) noexcept nogil:
    """Structural sptes grant everything; rights live in leaves."""
    cdef uint64_t spte = SPTE_MMU_PRESENT | (child_pfn << 12) | m.present | PT_WRITABLE_MASK | m.user | m.x | m.me
    return spte | (SPTE_TDP_AD_DISABLED if ad_disabled else m.accessed)
