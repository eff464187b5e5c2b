# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The door: owns memory, binds the engine to Python and C, checks every argument once."""

# ---- sptes and constants
cimport cython
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport (SpteMasks, spte_acc_tracked, spte_accessed_mask, spte_ad_kind_off,
                               spte_ad_need_write_protect, spte_dirty_mask, spte_executable, spte_is_last,
                               spte_is_mmio, spte_large, spte_masks_ept, spte_masks_legacy, spte_mmu_writable,
                               spte_pfn, spte_present, spte_writable)
from kvmmmu.bits.mmio cimport mmio_spte_access, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make
from kvmmmu.engine.codec cimport codec_is_mmio, codec_max_gfn, codec_mmio_make, codec_mmio_split


def constants():
    """Every name of ``kvmmmu/bits.h`` with its value, as a new dict."""
    return {
        "CR0_PE": CR0_PE, "CR0_WP": CR0_WP, "CR0_NW": CR0_NW, "CR0_CD": CR0_CD, "CR0_PG": CR0_PG,
        "CR3_PCID_MASK": CR3_PCID_MASK, "CR3_NOFLUSH": CR3_NOFLUSH, "CR4_PSE": CR4_PSE, "CR4_PAE": CR4_PAE,
        "CR4_PGE": CR4_PGE, "CR4_LA57": CR4_LA57, "CR4_PCIDE": CR4_PCIDE, "CR4_SMEP": CR4_SMEP, "CR4_SMAP": CR4_SMAP,
        "CR4_PKE": CR4_PKE, "EFER_SCE": EFER_SCE, "EFER_LME": EFER_LME, "EFER_LMA": EFER_LMA, "EFER_NX": EFER_NX,
        "EPTP_AD": EPTP_AD, "PT_PRESENT_MASK": PT_PRESENT_MASK, "PT_WRITABLE_MASK": PT_WRITABLE_MASK,
        "PT_USER_MASK": PT_USER_MASK, "PT_PWT_MASK": PT_PWT_MASK, "PT_PCD_MASK": PT_PCD_MASK,
        "PT_ACCESSED_MASK": PT_ACCESSED_MASK, "PT_DIRTY_MASK": PT_DIRTY_MASK, "PT_PAGE_SIZE_MASK": PT_PAGE_SIZE_MASK,
        "PT_GLOBAL_MASK": PT_GLOBAL_MASK, "PT64_NX_MASK": PT64_NX_MASK, "PT_ADDR_MASK": PT_ADDR_MASK,
        "PT_PKEY_SHIFT": PT_PKEY_SHIFT, "EPT_READ": EPT_READ, "EPT_WRITE": EPT_WRITE, "EPT_EXEC": EPT_EXEC,
        "EPT_RWX": EPT_RWX, "EPT_MT_MASK": EPT_MT_MASK, "EPT_MT_SHIFT": EPT_MT_SHIFT, "EPT_MT_WB": EPT_MT_WB,
        "EPT_IPAT": EPT_IPAT, "EPT_PAGE_SIZE": EPT_PAGE_SIZE, "EPT_ACCESSED": EPT_ACCESSED, "EPT_DIRTY": EPT_DIRTY,
        "EPT_SUPPRESS_VE": EPT_SUPPRESS_VE, "EPT_VIOLATION_ACC_READ": EPT_VIOLATION_ACC_READ,
        "EPT_VIOLATION_ACC_WRITE": EPT_VIOLATION_ACC_WRITE, "EPT_VIOLATION_ACC_INSTR": EPT_VIOLATION_ACC_INSTR,
        "EPT_VIOLATION_PROT_SHIFT": EPT_VIOLATION_PROT_SHIFT, "EPT_VIOLATION_PROT_MASK": EPT_VIOLATION_PROT_MASK,
        "EPT_VIOLATION_GVA_VALID": EPT_VIOLATION_GVA_VALID,
        "EPT_VIOLATION_GVA_TRANSLATED": EPT_VIOLATION_GVA_TRANSLATED, "PFERR_PRESENT": PFERR_PRESENT,
        "PFERR_WRITE": PFERR_WRITE, "PFERR_USER": PFERR_USER, "PFERR_RSVD": PFERR_RSVD, "PFERR_FETCH": PFERR_FETCH,
        "PFERR_PK": PFERR_PK, "PFERR_GUEST_FINAL": PFERR_GUEST_FINAL, "PFERR_GUEST_PAGE": PFERR_GUEST_PAGE,
        "PFERR_IMPLICIT": PFERR_IMPLICIT, "SPTE_MMU_PRESENT": SPTE_MMU_PRESENT,
        "SPTE_HOST_WRITABLE_LEGACY": SPTE_HOST_WRITABLE_LEGACY, "SPTE_MMU_WRITABLE_LEGACY": SPTE_MMU_WRITABLE_LEGACY,
        "SPTE_HOST_WRITABLE_EPT": SPTE_HOST_WRITABLE_EPT, "SPTE_MMU_WRITABLE_EPT": SPTE_MMU_WRITABLE_EPT,
        "SPTE_TDP_AD_MASK": SPTE_TDP_AD_MASK, "SPTE_TDP_AD_DISABLED": SPTE_TDP_AD_DISABLED,
        "SPTE_TDP_AD_WRPROT_ONLY": SPTE_TDP_AD_WRPROT_ONLY, "SPTE_SAVED_BITS_SHIFT": SPTE_SAVED_BITS_SHIFT,
        "SPTE_SAVED_BITS_MASK": SPTE_SAVED_BITS_MASK, "REMOVED_SPTE": REMOVED_SPTE,
        "MMIO_GEN_LOW_SHIFT": MMIO_GEN_LOW_SHIFT, "MMIO_GEN_LOW_BITS": MMIO_GEN_LOW_BITS,
        "MMIO_GEN_HIGH_SHIFT": MMIO_GEN_HIGH_SHIFT, "MMIO_GEN_LOW_MASK": MMIO_GEN_LOW_MASK,
        "MMIO_GEN_HIGH_MASK": MMIO_GEN_HIGH_MASK, "MMIO_GEN_MASK": MMIO_GEN_MASK,
        "GEN_UPDATE_IN_PROGRESS": GEN_UPDATE_IN_PROGRESS, "L1TF_MASK_LEN": L1TF_MASK_LEN,
        "PFN_ERR_MASK": PFN_ERR_MASK, "PFN_NOSLOT": PFN_NOSLOT, "PFN_ERR_FAULT": PFN_ERR_FAULT,
        "PFN_ERR_RO_FAULT": PFN_ERR_RO_FAULT, "ROLE_LEVEL_MASK": ROLE_LEVEL_MASK, "ROLE_4BYTE_GPTE": ROLE_4BYTE_GPTE,
        "ROLE_QUADRANT_SHIFT": ROLE_QUADRANT_SHIFT, "ROLE_QUADRANT_MASK": ROLE_QUADRANT_MASK,
        "ROLE_DIRECT": ROLE_DIRECT, "ROLE_ACCESS_SHIFT": ROLE_ACCESS_SHIFT, "ROLE_ACCESS_MASK": ROLE_ACCESS_MASK,
        "ROLE_INVALID": ROLE_INVALID, "ROLE_EFER_NX": ROLE_EFER_NX, "ROLE_CR0_WP": ROLE_CR0_WP,
        "ROLE_SMEP_ANDNOT_WP": ROLE_SMEP_ANDNOT_WP, "ROLE_SMAP_ANDNOT_WP": ROLE_SMAP_ANDNOT_WP,
        "ROLE_AD_DISABLED": ROLE_AD_DISABLED, "ROLE_GUEST_MODE": ROLE_GUEST_MODE,
        "ROLE_PASSTHROUGH": ROLE_PASSTHROUGH, "ROLE_SMM_SHIFT": ROLE_SMM_SHIFT, "ROLE_EXT_VALID": ROLE_EXT_VALID,
        "ROLE_EXT_EXECONLY": ROLE_EXT_EXECONLY, "ROLE_EXT_PSE": ROLE_EXT_PSE, "ROLE_EXT_PKE": ROLE_EXT_PKE,
        "ROLE_EXT_SMAP": ROLE_EXT_SMAP, "ROLE_EXT_SMEP": ROLE_EXT_SMEP, "ROLE_EXT_LA57": ROLE_EXT_LA57,
        "ROLE_EXT_LMA": ROLE_EXT_LMA, "MEM_LOG_DIRTY_PAGES": MEM_LOG_DIRTY_PAGES, "MEM_READONLY": MEM_READONLY,
        "MEMSLOT_INVALID": MEMSLOT_INVALID, "BIT51": BIT51, "GFN_HASH_MULTIPLIER": GFN_HASH_MULTIPLIER,
        "ALL_ONES": ALL_ONES,
        "ACC_X": ACC_X, "ACC_W": ACC_W, "ACC_U": ACC_U, "ACC_ALL": ACC_ALL,
    }


@cython.final
cdef class SpteCodec:
    """The masks one host uses in its sptes, and the batch loops over them; ``kvmmmu.sptes`` is its face."""
    cdef SpteMasks masks
    cdef bint ept

    def __cinit__(self, bint ept, int maxphyaddr, int phys_bits, bint l1tf, int cache_bits, bint ept_ad,
                  bint ept_exec_only, bint mmio_caching):
        self.ept = ept
        if ept:
            spte_masks_ept(&self.masks, phys_bits, l1tf, cache_bits, ept_ad, ept_exec_only, mmio_caching)
        else:
            spte_masks_legacy(&self.masks, maxphyaddr, phys_bits, l1tf, cache_bits, mmio_caching)

    @property
    def mmio_caching(self):
        return self.masks.mmio_caching != 0

    @property
    def max_gfn(self):
        return codec_max_gfn(&self.masks)

    def fields(self):
        """The masks by name."""
        cdef SpteMasks m = self.masks
        return {
            "present": m.present, "user": m.user, "nx": m.nx, "x": m.x, "accessed": m.accessed, "dirty": m.dirty,
            "memtype": m.memtype, "acc_track": m.acc_track, "host_writable": m.host_writable,
            "mmu_writable": m.mmu_writable, "me": m.me, "mmio_value": m.mmio_value, "mmio_mask": m.mmio_mask,
            "mmio_access": m.mmio_access, "nonpresent_or_rsvd": m.nonpresent_or_rsvd,
            "nonpresent_low_gfn": m.nonpresent_low_gfn,
        }

    def make(self, uint64_t gfn, uint32_t access, uint64_t gen):
        return mmio_spte_make(&self.masks, gfn, access, gen)

    def split(self, uint64_t spte):
        """``(gfn, access, gen)``, or None if the entry is not an mmio spte."""
        if not spte_is_mmio(&self.masks, spte):
            return None
        return mmio_spte_gfn(&self.masks, spte), mmio_spte_access(&self.masks, spte), mmio_spte_gen(spte)

    def is_mmio(self, uint64_t spte):
        return bool(spte_is_mmio(&self.masks, spte))

    def make_many(self, const uint64_t[::1] gfn, const uint32_t[::1] access, const uint64_t[::1] gen,
                  uint64_t[::1] spte):
        """Index of the first gfn this host cannot store, or the length."""
        cdef size_t n = spte.shape[0]
        if <size_t>gfn.shape[0] != n or <size_t>access.shape[0] != n or <size_t>gen.shape[0] != n:
            raise ValueError("columns differ in length")
        if n == 0:
            return 0
        with nogil:
            n = codec_mmio_make(&self.masks, &gfn[0], &access[0], &gen[0], &spte[0], n)
        return n

    def split_many(self, const uint64_t[::1] spte, uint64_t[::1] gfn, uint32_t[::1] access, uint64_t[::1] gen):
        """Index of the first entry that is not an mmio spte, or the length."""
        cdef size_t n = spte.shape[0]
        if <size_t>gfn.shape[0] != n or <size_t>access.shape[0] != n or <size_t>gen.shape[0] != n:
            raise ValueError("columns differ in length")
        if n == 0:
            return 0
        with nogil:
            n = codec_mmio_split(&self.masks, &spte[0], &gfn[0], &access[0], &gen[0], n)
        return n

    def is_mmio_many(self, const uint64_t[::1] spte, uint8_t[::1] out):
        cdef size_t n = spte.shape[0]
        if <size_t>out.shape[0] != n:
            raise ValueError("columns differ in length")
        if n:
            with nogil:
                codec_is_mmio(&self.masks, &spte[0], &out[0], n)

    def inspect(self, uint64_t spte, int level):
        """What the bits of a present spte say, by the kernels the engine itself uses."""
        cdef SpteMasks *m = &self.masks
        cdef uint64_t accessed = spte_accessed_mask(m, spte)
        cdef uint64_t dirty = spte_dirty_mask(m, spte)
        return {
            "present": bool(spte_present(spte)),
            "leaf": bool(spte_is_last(spte, level)),
            "large": bool(spte_large(spte)) and level > 1,
            "pfn": spte_pfn(spte),
            "writable": bool(spte_writable(spte)),
            "executable": bool(spte_executable(m, spte)),
            "user": (spte & m.user) != 0,
            "accessed": (spte & accessed) != 0 if accessed else None,
            "dirty": (spte & dirty) != 0 if dirty else None,
            "host_writable": (spte & m.host_writable) != 0,
            "mmu_writable": bool(spte_mmu_writable(m, spte)),
            "ad_disabled": bool(spte_ad_kind_off(spte)),
            "write_protect_only": bool(spte_ad_need_write_protect(spte)) and not spte_ad_kind_off(spte),
            "access_tracked": bool(self.ept and spte_acc_tracked(m, spte)),
            "saved_bits": (spte & SPTE_SAVED_BITS_MASK) >> SPTE_SAVED_BITS_SHIFT,
            "memory_type": (spte & EPT_MT_MASK) >> EPT_MT_SHIFT if self.ept else None,
            "ignore_pat": (spte & EPT_IPAT) != 0 if self.ept else None,
        }
# ---- end of sptes and constants

from kvmmmu.bits.mmio cimport mmio_spte_make
from kvmmmu.bits.spte cimport SpteMasks, spte_masks_legacy
from kvmmmu.engine.state cimport Vm, Vcpu

def probe():
    cdef SpteMasks m
    spte_masks_legacy(&m, 46, 46, False, 46, True)
    cdef Vm vm
    return mmio_spte_make(&m, 0xfee00, 7, 2), sizeof(Vm), sizeof(Vcpu)
