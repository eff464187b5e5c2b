# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The door: owns memory, binds the engine to Python and C, checks every argument once."""

import os

# ---- sptes and constants
cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strcmp
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport (SpteMasks, spte_acc_tracked, spte_accessed_mask, spte_ad_kind_off,
                               spte_ad_need_write_protect, spte_dirty_mask, spte_executable, spte_is_last,
                               spte_is_mmio, spte_large, spte_masks_ept, spte_masks_legacy,
                               spte_masks_mmio, spte_masks_sme, spte_masks_ve, spte_mmu_writable,
                               spte_pfn, spte_present, spte_writable)
from kvmmmu.bits.mmio cimport mmio_spte_access, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make
from kvmmmu.bits.split cimport (SPLIT_READ_STEPS, SplitRead, split_being_zapped, split_clear_step, split_read_step,
                                split_set_step, spte_high, spte_low, spte_whole)
from kvmmmu.bits.split cimport SplitSpte as SplitEntry
from kvmmmu.engine.codec cimport (codec_is_mmio, codec_max_gfn, codec_mmio_make, codec_mmio_split, codec_present_bits,
                                  codec_reserved)
from kvmmmu.bits.paging cimport (
    CpuModel, DIALECT_SDM, Paging, paging_encrypted, paging_init_ept, paging_init_npt, rsvd_bits,
)


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
        "ONE": ONE, "ALL_ONES": ALL_ONES, "APIC_DEFAULT_GFN": APIC_DEFAULT_GFN,
        "ERA_MMIO_WIDE": ERA_MMIO_WIDE, "ERA_MMIO_CONSTANT": ERA_MMIO_CONSTANT,
        "ERA_MMIO_MISS_FAULTS": ERA_MMIO_MISS_FAULTS, "ERA_MMIO_BUG_OTHER": ERA_MMIO_BUG_OTHER,
        "ERA_MMIO_BUG_PRESENT": ERA_MMIO_BUG_PRESENT, "ERA_MMIO_SURVIVES": ERA_MMIO_SURVIVES,
        "ERA_CACHE_SIMPLE": ERA_CACHE_SIMPLE, "ERA_ENTRY_INSTALLS": ERA_ENTRY_INSTALLS,
        "ERA_INVLPG_REWRITES": ERA_INVLPG_REWRITES, "ERA_SYNC_EMPTY_ZAPS": ERA_SYNC_EMPTY_ZAPS,
        "ERA_ACCESSED_EARLY": ERA_ACCESSED_EARLY, "ERA_PATH_ACCESS": ERA_PATH_ACCESS,
        "ERA_PROTECT_LATE": ERA_PROTECT_LATE, "ERA_PROTECT_DROPS_LARGE": ERA_PROTECT_DROPS_LARGE,
        "ERA_PREFETCH_UNSYNC": ERA_PREFETCH_UNSYNC, "ERA_LOOKUP_SYNCS": ERA_LOOKUP_SYNCS,
        "ERA_FLOOD_BY_VCPU": ERA_FLOOD_BY_VCPU, "ERA_DIRTY_BY_CPU": ERA_DIRTY_BY_CPU,
        "ERA_LOG_WHOLE_SLOT": ERA_LOG_WHOLE_SLOT, "ERA_ZAP_AT_ONCE": ERA_ZAP_AT_ONCE,
        "ERA_NX_BY_GUEST": ERA_NX_BY_GUEST, "ERA_ONE_ROOT": ERA_ONE_ROOT, "ERA_CR3_NEEDS_SLOT": ERA_CR3_NEEDS_SLOT,
        "ERA_CR4_STRICT": ERA_CR4_STRICT, "ERA_NO_RETRY": ERA_NO_RETRY, "ERA_NO_SHORTCUT": ERA_NO_SHORTCUT,
        "ERA_MMIO_WHOLE": ERA_MMIO_WHOLE, "ERA_FAULT_KEEPS": ERA_FAULT_KEEPS,
        "ERA_RMW_FAULT_READS": ERA_RMW_FAULT_READS, "ERA_NO_FAST_FAULT": ERA_NO_FAST_FAULT,
        "ERA_ROLE_PLAIN": ERA_ROLE_PLAIN, "ERA_COUNT_OLD": ERA_COUNT_OLD, "ERA_PREFETCH_SKIPS": ERA_PREFETCH_SKIPS,
        "ERA_PREFETCH_NO_TAIL": ERA_PREFETCH_NO_TAIL, "ERA_FETCH_FAULT_FAILS": ERA_FETCH_FAULT_FAILS,
        "ERA_PDPTES_FRESH": ERA_PDPTES_FRESH, "ERA_WP0_UNLOGGED": ERA_WP0_UNLOGGED, "ERA_PDPTE_LAX": ERA_PDPTE_LAX,
        "ERA_CR0_LAX": ERA_CR0_LAX,
        "ACC_X": ACC_X, "ACC_W": ACC_W, "ACC_U": ACC_U, "ACC_ALL": ACC_ALL,
    }


# Not final: see ``split_columns``.
cdef class SpteCodec:
    """The masks one host uses in its sptes, and the batch loops over them; ``kvmmmu.sptes`` is its face."""
    cdef SpteMasks masks
    cdef Paging paging
    cdef bint ept

    def __cinit__(self, bint ept, int maxphyaddr, int phys_bits, bint l1tf, int cache_bits, bint ept_ad,
                  bint ept_exec_only, bint mmio_caching, bint gbpages, bint ept_2m, bint ept_1g, int c_bit,
                  bint sme, by_hand, bint ve):
        cdef CpuModel model
        memset(&model, 0, sizeof(model))
        model.maxphyaddr = phys_bits if c_bit and not ept else maxphyaddr
        model.gbpages = gbpages
        model.exec_only = ept_exec_only
        model.ept_2m = ept_2m
        model.ept_1g = ept_1g
        # Five levels: the rules of a level are the same in a shallower tree.
        if ept:
            paging_init_ept(&self.paging, 4 << 3 | (EPTP_AD if ept_ad else 0), &model, DIALECT_SDM)
        else:
            paging_init_npt(&self.paging, 0, MAX_LEVEL, &model, DIALECT_SDM)
        self.ept = ept
        if ept:
            spte_masks_ept(&self.masks, phys_bits, l1tf, cache_bits, ept_ad, ept_exec_only, mmio_caching)
        else:
            spte_masks_legacy(&self.masks, maxphyaddr, phys_bits, l1tf, cache_bits, mmio_caching)
            if c_bit:
                spte_masks_sme(&self.masks, phys_bits, c_bit, sme, mmio_caching)
                paging_encrypted(&self.paging, c_bit)
        if by_hand is not None:
            value, mask, access = by_hand
            spte_masks_mmio(&self.masks, value if mmio_caching else 0, mask, access)
        if ve:
            spte_masks_ve(&self.masks)

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
            "mmu_writable": m.mmu_writable, "address": m.address, "me": m.me, "mmio_value": m.mmio_value,
            "mmio_mask": m.mmio_mask, "mmio_access": m.mmio_access, "nonpresent_or_rsvd": m.nonpresent_or_rsvd,
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

    def being_zapped(self, uint64_t spte):
        """An entry of a 32-bit host, read in halves, that is empty or on its way there."""
        return bool(split_being_zapped(&self.masks, spte))

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
            n = self.split_columns(&spte[0], &gfn[0], &access[0], &gen[0], n)
        return n

    # Called through the class's table, so never inlined: beside its caller's buffers the loop runs out of registers.
    cdef size_t split_columns(self, const uint64_t *spte, uint64_t *gfn, uint32_t *access, uint64_t *gen,
                              size_t n) noexcept nogil:
        return codec_mmio_split(&self.masks, spte, gfn, access, gen, n)

    def is_mmio_many(self, const uint64_t[::1] spte, uint8_t[::1] out):
        cdef size_t n = spte.shape[0]
        if <size_t>out.shape[0] != n:
            raise ValueError("columns differ in length")
        if n:
            with nogil:
                codec_is_mmio(&self.masks, &spte[0], &out[0], n)

    def reserved_many(self, const uint64_t[::1] spte, int level, uint8_t[::1] out):
        cdef size_t n = spte.shape[0]
        if <size_t>out.shape[0] != n or not 1 <= level <= MAX_LEVEL:
            raise ValueError("columns differ in length, or no such level")
        if n:
            with nogil:
                codec_reserved(&self.paging, level, &spte[0], &out[0], n)

    def reserved(self, uint64_t spte, int level):
        """The reserved bits that are set; 0 in an entry that is not present."""
        if not 1 <= level <= MAX_LEVEL:
            raise ValueError("no such level")
        return rsvd_bits(&self.paging, level, spte) if spte & codec_present_bits(&self.paging) else 0

    def inspect(self, uint64_t spte, int level):
        """What the bits of a present spte say, by the kernels the engine itself uses."""
        cdef SpteMasks *m = &self.masks
        cdef uint64_t accessed = spte_accessed_mask(m, spte)
        cdef uint64_t dirty = spte_dirty_mask(m, spte)
        return {
            "present": bool(spte_present(spte)),
            "leaf": bool(spte_is_last(spte, level)),
            "large": bool(spte_large(spte)) and level > 1,
            "pfn": spte_pfn(m, spte),
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


@cython.final
cdef class SplitSpte:
    """An spte of a 32-bit host, stored and read in steps of one memory access each.

    ``set`` and ``clear`` make step ``n`` of a store and say whether it was the last; ``read`` makes step 0 to 3
    of the lockless read: None while it goes on, the value at its end, -1 if it must begin again.
    """
    cdef SplitEntry entry
    cdef SplitRead reading

    def __cinit__(self, uint64_t spte):
        self.entry.low = spte_low(spte)
        self.entry.high = spte_high(spte)

    def set(self, uint64_t spte, int step):
        return bool(split_set_step(&self.entry, spte, step))

    def clear(self, uint64_t spte, int step):
        return bool(split_clear_step(&self.entry, spte, step))

    def read(self, int step):
        if not split_read_step(&self.entry, &self.reading, step):
            return -1
        return spte_whole(self.reading.low, self.reading.high) if step == SPLIT_READ_STEPS - 1 else None
# ---- end of sptes and constants

# ---- walks: Paging over plain memory, and batches of cases with known answers

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cpython.long cimport PyLong_AsLongAndOverflow, PyLong_Check
from cpython.number cimport PyNumber_Index

from kvmmmu.bits.guest_walk cimport Walk, walk_present, walk_rights
from kvmmmu.bits.paging cimport (
    CpuModel, CpuRegs, FMT_NONE, FMT_PAE, Paging, eptp_valid, paging_init, paging_init_ept, paging_init_npt,
    paging_pdptr_bad, permission_fault, rsvd_bits,
)
from kvmmmu.engine.cases cimport WalkAnswer, WalkCase, cases_run
from kvmmmu.engine.embed cimport Tables
from kvmmmu.engine.memmap cimport memmap_index, memmap_insert, memmap_new
from kvmmmu.engine.state cimport Access, MemMap, Translation
from kvmmmu.engine.fault cimport walk_sptes
from kvmmmu.engine.paths cimport Paths, path_gpa, path_row, paths_init, single_gpa, single_row
from kvmmmu.engine.batch cimport BATCH_GATHER, BATCH_RING, translate_many
from kvmmmu.engine.choose cimport batch_kernel
from kvmmmu.engine.gather cimport gather_here
from kvmmmu.engine.translate cimport mappings_next, mappings_tables, walk_any
from kvmmmu.engine.walk cimport load_pdptrs, load_pdptrs_nested, walk_memory
from kvmmmu.errors import ArgumentError
from kvmmmu.outcome import Fault as _Fault, Rights as _Rights

FAULTS = tuple(_Fault)
RIGHTS = tuple(map(_Rights, range(8)))

cdef extern from "kvmmmu/python.h":
    bint HAVE_GIL "KVMMMU_GIL"
    bint pyword "kvmmmu_pyword"(object value, uint64_t *word) noexcept

cdef extern from *:
    """
    static PyObject *kvmmmu_method_of(PyObject *cls, PyObject *method) {
        return PyDescr_NewMethod((PyTypeObject *)cls, ((PyMethodDescrObject *)method)->d_method);
    }
    """
    object kvmmmu_method_of(object cls, object method)


def own_method(cls, str name):
    """Give a class an inherited C method as its own: CPython calls those of exactly the object's class at once."""
    if type(getattr(cls, name)) is not type(str.upper):
        raise TypeError(f"{name} of {cls!r} is no C method")
    setattr(cls, name, kvmmmu_method_of(cls, getattr(cls, name)))


cdef inline uint64_t word_arg(object value, str name) except? 0:
    """An integer in 0..2^64-1, or an error that names the argument."""
    cdef uint64_t word
    return word if pyword(value, &word) else word_checked(value, name, 64)


cdef uint64_t word_checked(object value, str name, int bits) except? 0:
    try:
        number = PyNumber_Index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if number < 0 or number >> bits:
        raise OverflowError(f"{name} is {number}; allowed are 0 .. 2**{bits} - 1")
    return number


cdef inline uint64_t as_word(object value, str name, int bits=64) except? 0:
    """``word_arg`` of fewer bits."""
    return word_arg(value, name) if bits == 64 else word_checked(value, name, bits)


cdef int in_range(object value, str name, int low, int high) except? -1:
    """An integer in low..high, or an error that names the argument."""
    cdef int overflow = 0
    cdef long n
    if value is 0 and low <= 0:
        return 0
    if not PyLong_Check(value):
        try:
            value = PyNumber_Index(value)
        except TypeError:
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    n = PyLong_AsLongAndOverflow(value, &overflow)
    if overflow or n < low or n > high:
        raise ArgumentError(f"{name} is {value}; allowed are {low} .. {high}")
    return <int>n


cdef inline uint64_t access_arg(object access, object cpl, bint implicit) except 1:
    """PFERR_* bits of "r", "w" or "x" at a privilege level."""
    cdef uint64_t bits
    cdef int ring = in_range(cpl, "cpl", 0, 3)
    # The same objects, nearly always: comparing strings is for the rest.
    if access is "r" or access is not "w" and access == "r":
        bits = 0
    elif access is "w" or access == "w":
        bits = PFERR_WRITE
    elif access == "x":
        bits = PFERR_FETCH
    else:
        raise ArgumentError(f"access is {access!r}; allowed are 'r', 'w' and 'x'")
    if implicit:
        return bits | PFERR_IMPLICIT
    return bits | PFERR_USER if ring == 3 else bits


cdef class WalkColumn:
    """A caller's buffer, held while the engine works on it."""

    cdef Py_buffer view
    cdef bint held

    @staticmethod
    cdef WalkColumn of(object buffer, str name, Py_ssize_t itemsize, Py_ssize_t n, bint writable):
        """``n`` items of ``itemsize`` bytes (n < 0: as many as there are)."""
        cdef WalkColumn self = WalkColumn.__new__(WalkColumn)
        try:
            PyObject_GetBuffer(buffer, &self.view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        except (TypeError, BufferError, ValueError) as e:
            kind = "writable, " if writable else ""
            raise ArgumentError(f"{name} must be a {kind}contiguous buffer: {e}") from None
        self.held = True
        if itemsize % 8 == 0 and <size_t>self.view.buf % 8:
            raise ArgumentError(f"{name} starts at an address that is not a multiple of 8")
        if self.view.len % itemsize or (n >= 0 and self.view.len != n * itemsize):
            wanted = f"{n} items" if n >= 0 else "whole items"
            raise ArgumentError(f"{name} has {self.view.len} bytes; wanted are {wanted} of {itemsize} bytes")
        return self

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


@cython.final
@cython.freelist(64)
cdef class TranslationRow:
    """One translation, as a row of ``Paging.translate``.

    Attributes
    ----------
    gva : int
    gpa : int or None
        The address in memory; None on a fault.
    fault : Fault
    error_code : int
        Of #PF; the exit qualification of an EPT violation; EXITINFO1 of a nested page fault.
    fault_gpa : int
        The guest-physical address that a second dimension refused.
    entry, level : int
        The last entry read, and the level it stands at.
    page_shift : int
        log2 of the page size, 0 on a fault.
    rights : Rights
        What the entries permit together; in KVM's dialect no write where D is clear, as KVM maps it.
    """

    cdef Translation t

    @property
    def gva(self):
        return self.t.gva

    @property
    def gpa(self):
        return None if self.t.fault else self.t.gpa

    @property
    def fault(self):
        return FAULTS[self.t.fault]

    @property
    def ok(self):
        return self.t.fault == 0

    @property
    def error_code(self):
        return self.t.error_code

    @property
    def fault_gpa(self):
        return self.t.fault_gpa

    @property
    def entry(self):
        return self.t.entry

    @property
    def level(self):
        return self.t.level

    @property
    def page_shift(self):
        return self.t.page_shift

    @property
    def rights(self):
        return RIGHTS[self.t.access]

    def __repr__(self):
        if self.t.fault:
            return (f"TranslationRow(gva={self.t.gva:#x}, {self.fault.name}, error_code={self.t.error_code:#x}, "
                    f"level={self.t.level})")
        return (f"TranslationRow(gva={self.t.gva:#x}, gpa={self.t.gpa:#x}, page_shift={self.t.page_shift}, "
                f"{self.rights!r})")


KERNELS = ("walk", "ring", "gather")
KERNELS_HERE = KERNELS if gather_here() else KERNELS[:2]
cdef int CHOSEN_KERNEL = batch_kernel()
if os.environ.get("KVMMMU_KERNEL") in KERNELS_HERE:
    CHOSEN_KERNEL = KERNELS.index(os.environ["KVMMMU_KERNEL"])


cdef class PagingCore(TablesHandle):
    """Tables in plain memory: owns the buffers' exports and the area map (see ``kvmmmu.paging``)."""

    cdef Paging paging
    cdef Paging host
    cdef MemMap map  # the header of ``areas``, whose columns it has
    cdef MemMap *areas
    cdef int hint[2]  # a dimension each
    cdef Tables tables
    cdef bint ready
    cdef Paths paths
    cdef list columns

    def __cinit__(self, *args, **names):
        paths_init(&self.paths, &self.paging, &self.host, &self.map, False)

    def __dealloc__(self):
        free(self.areas)

    def __init__(self, list areas, tuple registers, tuple model, int dialect, tuple second, object pdptes):
        """``areas``: (gpa, buffer); ``registers``: cr0 cr3 cr4 efer pkru compat; ``model``: the CpuModel's fields;
        ``second``: () or ("ept", eptp, model) or ("npt", ncr3, levels, model); ``pdptes``: four words or None.
        """
        cdef CpuRegs regs
        cdef CpuModel cpu, host_cpu
        cdef int bad
        cdef Walk hw
        if self.areas != NULL:
            raise ArgumentError("this object is in use already; make a new one")
        memset(&regs, 0, sizeof(regs))
        regs.cr0 = word_arg(registers[0], "cr0")
        regs.cr3 = word_arg(registers[1], "cr3")
        regs.cr4 = word_arg(registers[2], "cr4")
        regs.efer = word_arg(registers[3], "efer")
        pkru = word_arg(registers[4], "pkru")
        if pkru > 0xffffffff:
            raise OverflowError(f"pkru is {pkru}; allowed are 0 .. 2**32 - 1")
        regs.pkru = pkru
        regs.compat = bool(registers[5])
        model_arg(&cpu, model)
        self.bind_areas(areas)
        paging_init(&self.paging, &regs, &cpu, dialect)
        memset(&self.host, 0, sizeof(Paging))
        if second:
            model_arg(&host_cpu, second[len(second) - 1])
            root = word_arg(second[1], "eptp" if second[0] == "ept" else "ncr3")
            if second[0] == "ept":
                if not eptp_valid(root, &host_cpu):
                    raise ArgumentError(
                        f"eptp is {root:#x}; allowed are memory type 0 or 6 in bits 2:0, 3 or 4 in bits 5:3 (levels "
                        f"less one), A/D in bit 6, and a table address below bit {host_cpu.maxphyaddr}")
                paging_init_ept(&self.host, root, &host_cpu, dialect)
            else:
                paging_init_npt(&self.host, root, in_range(second[2], "levels", 4, 5), &host_cpu, dialect)
                self.paging.pdpte_in_memory = 1
        if self.paging.format == FMT_PAE and not self.paging.pdpte_in_memory:
            if pdptes is not None:
                for i in range(4):
                    regs.pdptr[i] = word_arg(pdptes[i], f"pdptes[{i}]")
                    if paging_pdptr_bad(regs.pdptr[i], &cpu):
                        raise_pdpte(i, regs.pdptr[i])
                    self.paging.pdptr[i] = regs.pdptr[i]
            elif second:
                if load_pdptrs_nested(&self.host, &self.map, self.hint, &hw, regs.cr3, &cpu, self.paging.pdptr,
                                      False):
                    raise ArgumentError(f"the PDPTEs at cr3 = {regs.cr3:#x} cannot be loaded through the EPT tables")
            else:
                bad = load_pdptrs(&self.map, self.hint, regs.cr3, &cpu, self.paging.pdptr)
                if bad >= 0:
                    raise_pdpte(bad, None)
        self.tables.guest = &self.paging
        self.tables.host = &self.host
        self.tables.map = &self.map
        self.tables.kernel = CHOSEN_KERNEL
        self.handle = <kvmmmu_tables *>&self.tables
        paths_init(&self.paths, &self.paging, &self.host, &self.map, HAVE_GIL)
        self.ready = True

    cdef int bind_areas(self, list areas) except -1:
        cdef Py_ssize_t i, n = len(areas)
        cdef WalkColumn column
        cdef uint64_t gpa, end = 0
        cdef list found = []
        for where, buffer in areas:
            gpa = word_arg(where, "gpa")
            if gpa & 0xfff:
                raise ArgumentError(f"gpa is {gpa:#x}; areas start at a multiple of 4096")
            try:
                column = WalkColumn.of(buffer, "memory", 4096, -1, True)
                writable = True
            except ArgumentError:
                column = WalkColumn.of(buffer, "memory", 4096, -1, False)
                writable = False
            if column.view.len == 0:
                continue
            if gpa >> 52 or (gpa + <uint64_t>column.view.len - 1) >> 52:
                raise ArgumentError(f"the area at gpa {gpa:#x} has {column.view.len} bytes; allowed is up to 2**52")
            found.append((gpa, column, writable))
        found.sort(key=area_start)
        n = len(found)
        self.areas = memmap_new(<int>n)
        if self.areas == NULL:
            raise MemoryError()
        for i in range(n):
            gpa, column, writable = found[i]
            if i and gpa < end:
                raise ArgumentError(f"the area at gpa {gpa:#x} overlaps the one before, which ends at {end:#x}")
            end = gpa + <uint64_t>column.view.len
            memmap_insert(self.areas, gpa >> 12, <uint64_t>column.view.len >> 12, <uint8_t *>column.view.buf, writable)
        memmap_index(self.areas)
        self.map = self.areas[0]
        self.columns = found
        return 0

    @cython.final
    cdef object gpa(self, uint64_t gva, uint64_t access, bint ac, bint set_ad):
        cdef uint64_t gpa
        if single_gpa(&self.paths, &self.paging, &self.host, &self.map, self.hint, gva, access, ac, set_ad, &gpa):
            return <int64_t>gpa
        return -1

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    @cython.embedsignature.format("clinic")
    def walk(self, gva, /):
        """Translate one address for a supervisor read; ``walk_for`` is for every other access.

        Parameters
        ----------
        gva : int
            Guest virtual address.

        Returns
        -------
        int
            The address in memory, or -1 where the access faults (``walk_result`` tells why).
        """
        cdef uint64_t gpa, word = word_arg(gva, "gva")
        if path_gpa(&self.paths, &self.paging, word, &gpa):
            return <int64_t>gpa
        return self.gpa(word, 0, False, False)

    @cython.binding(False)
    @cython.embedsignature.format("clinic")
    def walk_for(self, gva, access, cpl=0, bint ac=False, bint implicit=False, bint set_ad=False):
        """Translate one address for the access that is named.

        Parameters
        ----------
        gva : int
            Guest virtual address.
        access : {"r", "w", "x"}
        cpl : int
            Privilege level; 3 is a user access, 0 to 2 are supervisor accesses.
        ac : bool
            EFLAGS.AC.
        implicit : bool
            A supervisor access to a system structure, whatever ``cpl`` says.
        set_ad : bool
            Set accessed and dirty bits as the access would (entries in read-only memory stay as they are).

        Returns
        -------
        int
            As of ``walk``.
        """
        return self.gpa(word_arg(gva, "gva"), access_arg(access, cpl, implicit), ac, set_ad)

    @cython.binding(False)
    @cython.always_allow_keywords(False)
    @cython.embedsignature.format("clinic")
    def translate_one(self, gva, /):
        """Translate one address for a supervisor read, with the details.

        Parameters
        ----------
        gva : int
            Guest virtual address.

        Returns
        -------
        TranslationRow
            What a row of ``translate`` says.

        Notes
        -----
        The fastest call there is: one argument, and a result that is cheaper to make than a large ``int``.
        """
        cdef TranslationRow t = TranslationRow.__new__(TranslationRow)
        t.t.gva = word_arg(gva, "gva")
        if not path_row(&self.paths, &self.paging, &t.t):
            single_row(&self.paths, &self.paging, &self.host, &self.map, self.hint, &t.t)
        return t

    def translate_into(self, gvas, out, str access, cpl, bint ac, bint implicit, bint set_ad):
        """Translate a column of uint64 addresses into a column of records (``record_layouts``)."""
        cdef WalkColumn src = WalkColumn.of(gvas, "gvas", 8, -1, False)
        cdef int64_t n = src.view.len // 8
        cdef WalkColumn dst = WalkColumn.of(out, "out", sizeof(Translation), n, True)
        cdef uint64_t bits = access_arg(access, cpl, implicit)
        with nogil:
            translate_many(&self.paging, &self.host, &self.map, <const uint64_t *>src.view.buf, n, bits, ac, set_ad,
                           self.tables.kernel, <Translation *>dst.view.buf)

    @property
    def best_kernel(self):
        """The largest number that ``kernel`` may have on this processor."""
        return BATCH_GATHER if gather_here() else BATCH_RING

    @property
    def kernel(self):
        """How ``translate`` works: 0 walk by walk, 1 caches and prefetching, 2 the same with AVX-512."""
        return self.tables.kernel

    @kernel.setter
    def kernel(self, value):
        self.tables.kernel = in_range(value, "kernel", 0, self.best_kernel)

    def mappings_into(self, gva, out, int64_t walks):
        """List leaves from ``gva`` on; returns how many, and the address to go on from (None: that was all)."""
        cdef WalkColumn dst = WalkColumn.of(out, "out", sizeof(Translation), -1, True)
        cdef int64_t n = dst.view.len // <Py_ssize_t>sizeof(Translation)
        cdef uint64_t start = word_arg(gva, "gva") & self.paging.va_mask
        cdef bint done = self.paging.format == FMT_NONE
        cdef Paging tables
        if self.host.format != FMT_NONE:
            raise ArgumentError("mappings are listed in one dimension only; this object has nested tables")
        mappings_tables(&tables, &self.paging)
        with nogil:
            n = mappings_next(&tables, &self.map, &start, &done, walks, <Translation *>dst.view.buf, n)
        return n, (None if done else start)

    def walk_record(self, gva, access="r", cpl=0, bint ac=False, bint implicit=False, bint set_ad=False):
        """One walk with everything it saw: (guest walk, second dimension's last walk or None), as dictionaries."""
        cdef Walk w, hw
        cdef uint64_t bits = access_arg(access, cpl, implicit)
        memset(&hw, 0, sizeof(hw))
        walk_any(&self.paging, &self.host, &self.map, self.hint, &w, &hw, word_arg(gva, "gva"), bits, ac, set_ad)
        guest = walk_dict(&self.paging, &w)
        return guest, (walk_dict(&self.host, &hw) if hw.top else None)

    cdef const Paging *dimension(self, object value) except NULL:
        if in_range(value, "dimension", 1, 2) == 1:
            return &self.paging
        if self.host.format == FMT_NONE:
            raise ArgumentError("dimension is 2; this object has no nested tables")
        return &self.host

    def reserved_bits(self, level, entry, dimension=1):
        """Which reserved bits a present entry of a level has set, 0 for a legal one.

        Parameters
        ----------
        level : int
            1 to 5.
        entry : int
        dimension : {1, 2}
            The guest's tables, or the nested ones below (EPT: an illegal memory type or illegal rights give
            bits 5:0 of the entry).

        Returns
        -------
        int
        """
        return rsvd_bits(self.dimension(dimension), in_range(level, "level", 1, 5), word_arg(entry, "entry"))

    def permission_fault(self, rights, access="r", cpl=0, bint ac=False, bint implicit=False, pkey=0, dimension=1):
        """Whether rights (``walks.Rights``) refuse an access: 0, or the error-code bits of the cause (P, PK).

        Parameters
        ----------
        rights : int
            0 to 7.
        access, cpl, ac, implicit
            As in ``walk_for``; in EPT a user access is one that reads.
        pkey : int
            Protection key of the leaf, 0 to 15.
        dimension : {1, 2}

        Returns
        -------
        int
        """
        return permission_fault(self.dimension(dimension), access_arg(access, cpl, implicit),
                                in_range(rights, "rights", 0, 7), ac, in_range(pkey, "pkey", 0, 15))

    @property
    def format(self):
        """0 no paging, 1 32-bit, 2 PAE, 3 4- or 5-level."""
        return self.paging.format

    @property
    def levels(self):
        """Levels of the guest's tables (0 without paging)."""
        return self.paging.levels

    @property
    def root(self):
        """Address of the top table."""
        return self.paging.root

    @property
    def pdptes(self):
        """The four PDPTE registers (zeros outside PAE paging)."""
        return tuple([self.paging.pdptr[i] for i in range(4)])


def area_start(area):
    return area[0]


cdef raise_pdpte(int i, object value):
    what = f"PDPTE {i}" if value is None else f"PDPTE {i} = {value:#x}"
    raise ArgumentError(f"{what} is present and has reserved bits set; the processor refuses to load it with #GP(0)")


cdef int model_arg(CpuModel *model, tuple fields) except -1:
    memset(model, 0, sizeof(CpuModel))
    (model.maxphyaddr, model.gbpages, model.amd, model.exec_only, model.ept_2m, model.ept_1g, model.no_pse36) = fields
    in_range(fields[0], "maxphyaddr", 32, 52)
    return 0


cdef dict walk_dict(const Paging *p, const Walk *w):
    cdef int level
    cdef list entries = []
    cdef uint64_t reserved = 0
    if w.seen:
        if walk_present(p.format, w.entries[w.seen]):
            reserved = rsvd_bits(p, w.seen, w.entries[w.seen])
        level = 3 if p.format == FMT_PAE else w.top
        while level >= w.seen:
            entries.append((level, w.entry_gpas[level], w.entries[level], w.acc_above[level],
                            walk_rights(p.format, w.entries[level])))
            level -= 1
    return {
        "format": p.format, "va": w.va, "access": w.access, "ac": bool(w.ac), "entries": entries,
        "next_gpa": w.entry_gpa, "level": w.level, "seen": w.seen, "reserved": reserved, "acc": w.acc,
        "fault": w.fault, "error_code": w.error_code,
        "gpa": 0 if w.fault else w.gpa, "page_shift": 0 if w.fault else w.page_shift,
    }


def record_layouts():
    """(name, dtype string, offset) of the fields of each record that crosses this door, and its size."""
    cdef WalkCase c
    cdef WalkAnswer a
    cdef Translation t
    cdef Access x
    cdef ShadowPage sp
    cdef PteDesc d
    case = [(n, f"u{s}", o) for n, s, o in (
        ("cr0", 8, <size_t>&c.cr0 - <size_t>&c), ("cr3", 8, <size_t>&c.cr3 - <size_t>&c),
        ("cr4", 8, <size_t>&c.cr4 - <size_t>&c), ("efer", 8, <size_t>&c.efer - <size_t>&c),
        ("gva", 8, <size_t>&c.gva - <size_t>&c), ("root2", 8, <size_t>&c.root2 - <size_t>&c),
        ("gpa_in", 8, <size_t>&c.gpa_in - <size_t>&c), ("pkru", 4, <size_t>&c.pkru - <size_t>&c),
        ("stage", 1, <size_t>&c.stage - <size_t>&c), ("access", 1, <size_t>&c.access - <size_t>&c),
        ("cpl", 1, <size_t>&c.cpl - <size_t>&c), ("implicit", 1, <size_t>&c.implicit - <size_t>&c),
        ("ac", 1, <size_t>&c.ac - <size_t>&c), ("mode64", 1, <size_t>&c.mode64 - <size_t>&c),
        ("maxphyaddr", 1, <size_t>&c.maxphyaddr - <size_t>&c), ("gbpages", 1, <size_t>&c.gbpages - <size_t>&c),
        ("exec_only", 1, <size_t>&c.exec_only - <size_t>&c), ("is_table", 1, <size_t>&c.is_table - <size_t>&c),
        ("linear_valid", 1, <size_t>&c.linear_valid - <size_t>&c), ("amd", 1, <size_t>&c.amd - <size_t>&c),
    )]
    answer = [(n, f"u{s}", o) for n, s, o in (
        ("pa", 8, <size_t>&a.pa - <size_t>&a), ("error_code", 8, <size_t>&a.error_code - <size_t>&a),
        ("fault_gpa", 8, <size_t>&a.fault_gpa - <size_t>&a), ("kind", 1, <size_t>&a.kind - <size_t>&a),
        ("page_bits", 1, <size_t>&a.page_bits - <size_t>&a),
    )]
    translation = [(n, f"u{s}", o) for n, s, o in (
        ("gva", 8, <size_t>&t.gva - <size_t>&t), ("gpa", 8, <size_t>&t.gpa - <size_t>&t),
        ("error_code", 8, <size_t>&t.error_code - <size_t>&t), ("fault_gpa", 8, <size_t>&t.fault_gpa - <size_t>&t),
        ("entry", 8, <size_t>&t.entry - <size_t>&t), ("fault", 1, <size_t>&t.fault - <size_t>&t),
        ("page_shift", 1, <size_t>&t.page_shift - <size_t>&t), ("access", 1, <size_t>&t.access - <size_t>&t),
        ("level", 1, <size_t>&t.level - <size_t>&t),
    )]
    page = [(n, f, o) for n, f, o in (
        ("gfn", "u8", <size_t>&sp.gfn - <size_t>&sp), ("parents", "u8", <size_t>&sp.parents - <size_t>&sp),
        ("role", "u4", <size_t>&sp.role - <size_t>&sp), ("root_count", "i4", <size_t>&sp.root_count - <size_t>&sp),
        ("hash_next", "i4", <size_t>&sp.hash_next - <size_t>&sp),
        ("hash_prev", "i4", <size_t>&sp.hash_prev - <size_t>&sp),
        ("list_next", "i4", <size_t>&sp.list_next - <size_t>&sp),
        ("list_prev", "i4", <size_t>&sp.list_prev - <size_t>&sp),
        ("unsync_children", "u2", <size_t>&sp.unsync_children - <size_t>&sp),
        ("unsync", "u1", <size_t>&sp.unsync - <size_t>&sp), ("valid_gen", "u1", <size_t>&sp.valid_gen - <size_t>&sp),
        ("nx_next", "i4", <size_t>&sp.nx_next - <size_t>&sp), ("nx_prev", "i4", <size_t>&sp.nx_prev - <size_t>&sp),
        ("flooding", "u4", <size_t>&sp.flooding - <size_t>&sp), ("tdp", "u1", <size_t>&sp.tdp - <size_t>&sp),
        ("nx_disallowed", "u1", <size_t>&sp.nx_disallowed - <size_t>&sp),
        ("on_list", "u1", <size_t>&sp.on_list - <size_t>&sp), ("special", "u1", <size_t>&sp.special - <size_t>&sp),
    )]
    desc = [(n, f, o) for n, f, o in (
        ("sptes", "(14,)u8", <size_t>&d.sptes - <size_t>&d), ("more", "u4", <size_t>&d.more - <size_t>&d),
        ("count", "u4", <size_t>&d.count - <size_t>&d),
    )]
    access = [(n, f, o) for n, f, o in (
        ("gpa", "u8", <size_t>&x.gpa - <size_t>&x), ("error_code", "u8", <size_t>&x.error_code - <size_t>&x),
        ("fault_gva", "u8", <size_t>&x.fault_gva - <size_t>&x),
        ("mmio_gpa", "(2,)u8", <size_t>&x.mmio_gpa - <size_t>&x),
        ("mmio_size", "(2,)u1", <size_t>&x.mmio_size - <size_t>&x),
        ("mmio_offset", "(2,)u1", <size_t>&x.mmio_offset - <size_t>&x),
        ("n_mmio", "u1", <size_t>&x.n_mmio - <size_t>&x), ("outcome", "u1", <size_t>&x.outcome - <size_t>&x),
        ("path", "u1", <size_t>&x.path - <size_t>&x), ("size", "u1", <size_t>&x.size - <size_t>&x),
        ("exits", "u4", <size_t>&x.exits - <size_t>&x),
    )]
    return {
        "access": (access, sizeof(Access)),
        "case": (case, sizeof(WalkCase)), "answer": (answer, sizeof(WalkAnswer)),
        "translation": (translation, sizeof(Translation)),
        "page": (page, sizeof(ShadowPage)), "desc": (desc, sizeof(PteDesc)),
    }


def walk_cases(cases, offsets, words_pa, words, words_after, answers, int dialect, int kernel=0):
    """Walk each case over its own words; ``cases`` and ``answers`` are records as in ``record_layouts``.

    ``kernel``: 0 alone, else as the first row of a batch (``PagingCore.kernel``)."""
    cdef WalkColumn c = WalkColumn.of(cases, "cases", sizeof(WalkCase), -1, False)
    cdef int64_t n = c.view.len // <Py_ssize_t>sizeof(WalkCase)
    cdef WalkColumn o = WalkColumn.of(offsets, "offsets", 8, n + 1, False)
    cdef WalkColumn pa = WalkColumn.of(words_pa, "words_pa", 8, -1, False)
    cdef int64_t nwords = pa.view.len // 8
    cdef WalkColumn before = WalkColumn.of(words, "words", 8, nwords, False)
    cdef WalkColumn after = WalkColumn.of(words_after, "words_after", 8, nwords, True)
    cdef WalkColumn out = WalkColumn.of(answers, "answers", sizeof(WalkAnswer), n, True)
    cdef const int64_t *offset = <const int64_t *>o.view.buf
    cdef const uint64_t *address = <const uint64_t *>pa.view.buf
    cdef MemMap *scratch
    cdef int64_t i, most = 0
    cdef uint8_t *pages
    if offset[0] != 0 or offset[n] != nwords:
        raise ArgumentError(f"offsets run from {offset[0]} to {offset[n]}; wanted is 0 to {nwords}")
    for i in range(n):
        if offset[i + 1] < offset[i]:
            raise ArgumentError(f"offsets[{i + 1}] is {offset[i + 1]}, less than the one before, {offset[i]}")
        most = max(most, offset[i + 1] - offset[i])
    for i in range(nwords):
        if address[i] & 7:
            raise ArgumentError(f"words_pa[{i}] is {address[i]:#x}; allowed are multiples of 8")
    for i in range(n):
        in_range((<const WalkCase *>c.view.buf)[i].maxphyaddr, "maxphyaddr", 32, 52)
    if most > 4096:
        raise ArgumentError(f"one case lists {most} words; allowed are 4096")
    scratch = memmap_new(<int>most)
    pages = <uint8_t *>PyMem_RawMalloc((most or 1) * 4096)
    try:
        if scratch == NULL or pages == NULL:
            raise MemoryError()
        memset(pages, 0, most * 4096)
        for i in range(most):
            scratch.host[i] = pages + 4096 * i
            scratch.writable[i] = 1
        with nogil:
            cases_run(<const WalkCase *>c.view.buf, n, offset, address, <const uint64_t *>before.view.buf,
                      <uint64_t *>after.view.buf, dialect, kernel, scratch, <WalkAnswer *>out.view.buf)
    finally:
        free(scratch)
        PyMem_RawFree(pages)


# ---- memory, memslots, events, counters ------------------------------------------

from cpython.buffer cimport Py_buffer, PyBUF_RECORDS_RO, PyBuffer_IsContiguous, PyObject_CheckBuffer
from kvmmmu.engine.state cimport *
from kvmmmu.engine.atomics cimport fetch_add_u64, guest_store, ld_u64, st_release_u64, user_begin, user_end
from kvmmmu.engine.birth cimport BIRTH_NO_ADDRESSES, BIRTH_OK, BIRTH_TOO_MANY, lines_new, vcpu_birth, vm_birth, vm_bury
from kvmmmu.engine.claim cimport (CLAIM_BUSY, CLAIM_OK, vcpu_busy, vcpu_claim, vcpu_claim_enter, vcpu_release,
                                  vm_claims, vm_close_begin, vm_inside)
from kvmmmu.engine.counters cimport vm_stat
from kvmmmu.engine.dirty cimport dirty_clear, dirty_get
from kvmmmu.engine.drain cimport slots_lock, slots_unlock
from kvmmmu.engine.events cimport ev_inj_exception, event_emit, events_copy
from kvmmmu.engine.hostmem cimport vm_hostmem
from kvmmmu.engine.hostpages cimport host_write
from kvmmmu.engine.insn cimport insn_continue, insn_execute, insn_fetch
from kvmmmu.engine.many cimport access_many
from kvmmmu.engine.memslots cimport (gfn_to_disallow, slot_find, slot_host, slot_host_level, slot_pfn,
                                     slots_generation, vm_slots)
from kvmmmu.engine.locks cimport kvmmmu_reading_begin, kvmmmu_reading_end, mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.notifier cimport slot_dontneed, slot_never_touched
from kvmmmu.engine.zap cimport set_max_pages
from kvmmmu.engine.recovery cimport nx_recover
from kvmmmu.engine.region cimport nx_huge_pages_set, slot_id_free, vm_finish_delete, vm_set_region, vm_slots_free
from kvmmmu.engine.registers cimport REG_OK, set_sregs, vcpu_invpcid, write_efer
from kvmmmu.engine.replay cimport ReplayTotals, TraceColumns, first_bad_cpl, replay_run
from kvmmmu.engine.reserve cimport arena_discard
from kvmmmu.engine.moves cimport vcpu_move_to_cr
from kvmmmu.engine.roots cimport roots_sync, vcpu_init, vcpu_invlpg, vcpu_set_guest_mode, vcpu_set_smm, vm_teardown
from kvmmmu.engine.snapshot cimport vm_snapshot
from kvmmmu.engine.tlbcache cimport GEOMETRY_ARRAYS, tlb_new, tlb_retag
from kvmmmu.engine.tlbflush cimport tlb_invept, tlb_invvpid
from kvmmmu.engine.tlblist cimport TLB_RECORD_WORDS, tlb_records
from kvmmmu.engine.vcpu cimport vcpu_access

import numpy as np

from kvmmmu.errors import ArgumentError, VCpuBusyError, VmBusyError, VmClosedError
from kvmmmu.outcome import Outcome, Path

# By number: OUTCOME_* and PATH_*.
OUTCOMES = tuple(Outcome)
PATHS = tuple(Path)

VM_STATS_ORDER = (
    "mmu_shadow_zapped", "mmu_pte_write", "mmu_pde_zapped", "mmu_flooded", "mmu_recycled", "mmu_cache_miss",
    "mmu_unsync", "pages_4k", "pages_2m", "pages_1g", "nx_lpage_splits", "max_mmu_rmap_size",
    "max_mmu_page_hash_collisions", "remote_tlb_flush", "remote_tlb_flush_requests", "mmu_pte_updated",
)
VCPU_STATS_ORDER = (
    "pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", "pf_mmio_spte_created", "pf_guest", "tlb_flush",
    "invlpg", "mmio_exits", "insn_emulation", "insn_emulation_fail", "mmio_cache_hit", "mmio_spte_hit", "mmio_slow",
    "slot_search", "guest_walk", "mmio_refill", "tlb_hit", "tlb_miss", "tlb_nested_hit", "tlb_nested_miss",
    "walk_cache_hit",
    *[f"walk_refs_l{level}" for level in range(1, 6)], *[f"nested_walk_refs_l{level}" for level in range(1, 6)],
)
# By number: the tracepoint of EV_*.
EVENT_KINDS = (
    None, "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit",
    "kvm_mmu_walker_error", "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
    "kvm_mmu_prepare_zap_page", "mark_mmio_spte", "handle_mmio_page_fault", "check_mmio_spte", "fast_page_fault",
    "kvm_mmu_zap_all_fast", "kvm_mmu_set_spte", "kvm_mmu_spte_requested", "kvm_tdp_mmu_spte_changed",
    "kvm_mmu_split_huge_page", "kvm_page_fault", "vcpu_match_mmio", "kvm_mmio", "kvm_fast_mmio",
    "kvm_inj_exception", "kvm_emulate_insn", "kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva",
    "kvm_test_age_hva", "kvm_exit", "kvm_cr", "kvm_msr", "kvm_age_page",
)
EVENT_DTYPE = np.dtype([("kind", np.uint32), ("vcpu", np.uint32), ("w", np.uint64, (7,))])
# By number: why a region was refused (WHY_*).
REGION_REASONS = (
    None, "id", "flags", "size_align", "gpa_align", "hva_align", "as_id", "wrap", "too_many_pages", "no_slot",
    "total_pages", "hva_changed", "size_changed", "readonly_changed", "overlap", "max_gfn", "no_memory",
    "incongruent", "backing", "no_frames", "closed", "held", "live_sptes",
)
assert len(VM_STATS_ORDER) == VM_STATS and len(VCPU_STATS_ORDER) == VCPU_STATS and len(EVENT_KINDS) == EV_KINDS
assert len(REGION_REASONS) == WHY_LIVE_SPTES + 1 and EVENT_DTYPE.itemsize == sizeof(Event)


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


cdef class VmCore(VmHandle):
    """Owner of one ``Vm``: its arena, its tables, and the buffers its slots point into."""

    cdef Vm *vm
    cdef readonly int reader_protocol
    cdef bint closed
    cdef dict exports
    cdef object __weakref__
    cdef uint64_t next_token

    def __cinit__(self, int mmu, tuple host, int mmio_scheme, bint tdp_mmu, bint nx_huge_pages,
                  bint eager_split=True, uint64_t era=0, bint tdx=False, bint plain_marks=False):
        cdef Vm *vm = <Vm *>lines_new(sizeof(Vm))
        if vm == NULL:
            raise MemoryError("no memory for a VM")
        self.vm = vm
        self.handle = <kvmmmu_vm *>vm
        self.closed = False
        self.exports = {}
        self.next_token = 1
        vm.mmu = mmu
        (vm.host.maxphyaddr, vm.host.phys_bits, vm.host.gbpages, vm.host.l1tf, vm.host.cache_bits, vm.host.ept_ad,
         vm.host.ept_exec_only, vm.host.ept_1g, vm.host.ept_2m, vm.host.amd, vm.host.la57, vm.host.ad_first,
         vm.host.ept_checks_updates, vm.host.rsvd_alone, vm.host.c_bit, vm.host.sme, vm.host.mmio_by_hand,
         vm.host.mmio_value, vm.host.mmio_mask, vm.host.mmio_access) = host
        vm.switches.mmio_scheme = mmio_scheme
        vm.switches.tdp_mmu = tdp_mmu
        vm.switches.nx_huge_pages = nx_huge_pages
        vm.switches.eager_split, vm.tdx, vm.plain_marks = eager_split, tdx, plain_marks
        vm.switches.era = era
        born = vm_birth(vm)
        if born == BIRTH_NO_ADDRESSES:
            raise MemoryError("no address space for shadow pages (about 70 GiB are reserved, not used)")
        if born != BIRTH_OK:
            raise MemoryError("no memory for a VM")
        self.reader_protocol = vm.reader_protocol

    def __dealloc__(self):
        if self.vm != NULL:
            vm_bury(self.vm)

    cdef int check_open(self) except -1:
        if self.closed:
            raise VmClosedError("the VM was closed")
        return 0

    cdef int lock_slots(self) except -1:
        """Take slots_lock; its holder may need the interpreter, so nobody waits with it."""
        self.check_open()
        with nogil:
            slots_lock(self.vm)
        if self.closed:
            slots_unlock(self.vm)
            self.check_open()
        return 0

    cdef int check_idle(self, str what) except -1:
        cdef int i
        for i in range(self.vm.n_vcpus):
            if vcpu_busy(self.vm.vcpus[i]):
                raise VmBusyError(f"vCPU {i} is running: {what} needs every vCPU stopped")
        return 0

    cdef int check_still(self, uint64_t claims, str what) except -1:
        if vm_claims(self.vm) != claims:
            raise VmBusyError(f"a vCPU ran meanwhile: {what} needs every vCPU stopped")
        return 0

    def close(self):
        """Let go of every slot and buffer.  The arena stays until nobody refers to this object."""
        cdef int runs
        if self.closed:
            return
        with nogil:
            slots_lock(self.vm)
        if self.closed:
            # By another thread, meanwhile.
            slots_unlock(self.vm)
            return
        runs = vm_close_begin(self.vm)
        if runs >= 0:
            slots_unlock(self.vm)
            raise VmBusyError(f"vCPU {runs} is running: closing the VM needs every vCPU stopped")
        self.closed = True
        with nogil:
            vm_teardown(self.vm)
            vm_slots_free(self.vm)
            arena_discard(&self.vm.arena)
            slots_unlock(self.vm)
        self.exports.clear()

    @property
    def is_closed(self):
        return self.closed

    # -- memslots

    def set_region(self, slot, flags, gpa, size, memory, int max_level, pfn_offset, bint hold=False):
        """One KVM_SET_USER_MEMORY_REGION: (errno, reason, detail, change), errno 0 when done.

        ``memory`` None stands for the memory the slot has; ``size`` None for all of it; ``hold`` leaves a
        deletion open while the slot is INVALID, until ``finish_delete``.
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
        r.hold = hold
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
            # Whoever sees the new slot finds its buffer.
            r.token = fetch_add_u64(&self.next_token, 1)
            self.exports[r.token] = export
        with nogil:
            err = vm_set_region(self.vm, &r)
        if r.token and (err != ERR_NONE or r.change != CHANGE_CREATE):
            self.exports.pop(r.token, None)
        if r.released:
            self.exports.pop(r.released, None)
        return -err, REGION_REASONS[r.why], r.detail, r.change

    def finish_delete(self):
        """The second half of a deletion that was held open; False: none is."""
        cdef Region r
        cdef int err
        self.check_open()
        with nogil:
            err = vm_finish_delete(self.vm, &r)
        if err != ERR_NONE:
            return False
        self.exports.pop(r.released, None)
        return True

    cdef object describe(self, const Slot *s):
        return (s.as_id << 16 | s.id, s.base_gfn << 12, s.npages << 12, s.flags,
                (<Export>self.exports[s.token]).obj)

    def slots(self, int as_id):
        """The slots of an address space in ascending order of gpa: (slot, gpa, size, flags, memory)."""
        cdef int i
        self.lock_slots()
        try:
            return [self.describe(self.vm.slots[as_id].slot[i]) for i in range(self.vm.slots[as_id].map.n)]
        finally:
            slots_unlock(self.vm)

    def slot(self, slot):
        """The slot named by ``as_id << 16 | id``, or None."""
        cdef uint64_t number = as_word(slot, "slot")
        cdef Slot *s = NULL
        self.lock_slots()
        try:
            if number >> 16 < ADDRESS_SPACES and number & 0xffff < MAX_SLOT_ID:
                s = self.vm.slot_by_id[number >> 16][number & 0xffff]
            return None if s == NULL else self.describe(s)
        finally:
            slots_unlock(self.vm)

    def slot_count(self, int as_id):
        self.lock_slots()
        n = self.vm.slots[as_id].map.n
        slots_unlock(self.vm)
        return n

    def free_slot_id(self, int as_id):
        self.lock_slots()
        n = slot_id_free(self.vm, as_id)
        slots_unlock(self.vm)
        return n

    def generation(self, int as_id):
        self.lock_slots()
        n = slots_generation(self.vm.slots[as_id])
        slots_unlock(self.vm)
        return n

    def find_gfn(self, gfn, int as_id):
        """What a fault would learn of a gfn: (slot, pfn, largest page of the host, reasons against 2M, 1G) or None."""
        cdef uint64_t g = as_word(gfn, "gfn")
        cdef int hint = 0
        cdef Slot *s
        self.lock_slots()
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
        self.lock_slots()
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
        self.lock_slots()
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

    def set_nr_mmu_pages(self, pages):
        """KVM_SET_NR_MMU_PAGES; False below the minimum of 64."""
        cdef uint64_t goal = as_word(pages, "pages", 32)
        self.check_open()
        if goal < MIN_MMU_PAGES:
            return False
        self.lock_slots()
        with nogil:
            mmu_write_lock(self.vm)
            set_max_pages(self.vm, <int64_t>goal)
            self.vm.requested_pages = <int64_t>goal
            mmu_write_unlock(self.vm)
            slots_unlock(self.vm)
        return True

    def nx_recover(self, ratio):
        """One period of the recovery worker; the number of tables zapped."""
        cdef uint64_t share = as_word(ratio, "ratio", 32)
        self.check_open()
        with nogil:
            share = nx_recover(self.vm, share)
        return share

    def set_nx_huge_pages(self, bint on):
        """Switch the mitigation of a running VM."""
        self.check_open()
        with nogil:
            nx_huge_pages_set(self.vm, on)

    def set_manual_protect(self, int bits):
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 1 the log is cleared by hand, 3 and starts all dirty."""
        self.check_open()
        self.vm.switches.manual_protect = <uint8_t>bits

    def dirty_get(self, slot, out):
        """KVM_GET_DIRTY_LOG into a column of uint64; an errno."""
        cdef WalkColumn words = WalkColumn.of(out, "out", 8, -1, True)
        cdef uint32_t number = <uint32_t>as_word(slot, "slot", 32)
        cdef int err
        self.lock_slots()
        with nogil:
            err = dirty_get(self.vm, number, <uint64_t *>words.view.buf, <uint64_t>words.view.len // 8)
            slots_unlock(self.vm)
        return -err

    def dirty_clear(self, slot, first_page, npages, bits):
        """KVM_CLEAR_DIRTY_LOG; an errno."""
        cdef uint64_t first = as_word(first_page, "first_page")
        cdef uint64_t n = as_word(npages, "npages")
        cdef WalkColumn words = WalkColumn.of(bits, "bits", 8, -1, False)
        cdef uint32_t number = <uint32_t>as_word(slot, "slot", 32)
        cdef int err
        self.check_open()
        # The words of n pages, without n + 63, which may wrap.
        if <uint64_t>words.view.len // 8 < n // 64 + (n % 64 != 0):
            raise ArgumentError(f"bits has {words.view.len // 8} words; {n} pages need {n // 64 + (n % 64 != 0)}")
        self.lock_slots()
        with nogil:
            err = dirty_clear(self.vm, number, first, n, <const uint64_t *>words.view.buf)
            slots_unlock(self.vm)
        return -err

    def host_pages(self, slot, first_page, npages, bint untouched):
        """Declare pages of a slot's memory untouched, or give them back to the host (MADV_DONTNEED)."""
        cdef uint32_t number = <uint32_t>as_word(slot, "slot", 32)
        cdef uint64_t first = as_word(first_page, "first_page")
        cdef uint64_t n = as_word(npages, "npages")
        cdef Slot *s = NULL
        self.lock_slots()
        try:
            if number >> 16 < ADDRESS_SPACES and number & 0xffff < MAX_SLOT_ID:
                s = self.vm.slot_by_id[number >> 16][number & 0xffff]
            if s == NULL:
                raise ArgumentError(f"slot = {number} does not exist")
            if first > s.npages or n > s.npages - first:
                raise ArgumentError(f"pages {first} .. {first + n} are outside the slot's {s.npages} pages")
            if not untouched and (<Export>self.exports[s.token]).view.readonly:
                raise ArgumentError("the slot's memory is read-only")
            with nogil:
                if untouched:
                    slot_never_touched(self.vm, s, first, n)
                else:
                    slot_dontneed(self.vm, s, first, n)
        finally:
            slots_unlock(self.vm)

    def host_store(self, gpa, bytes data, int as_id):
        """The user process writes its own memory, behind KVM's back."""
        cdef uint64_t at = as_word(gpa, "gpa")
        cdef Py_ssize_t done = 0, now, n = len(data)
        cdef Slot *s
        cdef int hint = 0
        self.lock_slots()
        try:
            # All of it is looked at before the first byte is written.
            while done < n:
                s = slot_find(vm_slots(self.vm, as_id), (at + <uint64_t>done) >> 12, &hint)
                if s == NULL:
                    raise ArgumentError(f"gpa {at + <uint64_t>done:#x} is in no slot")
                if (<Export>self.exports[s.token]).view.readonly:
                    raise ArgumentError(f"gpa {at + <uint64_t>done:#x} stands in read-only memory")
                done += 4096 - <Py_ssize_t>((at + <uint64_t>done) & 4095)
            done = 0
            while done < n:
                now = min(n - done, <Py_ssize_t>(4096 - ((at + <uint64_t>done) & 4095)))
                s = slot_find(vm_slots(self.vm, as_id), (at + <uint64_t>done) >> 12, &hint)
                with nogil:
                    host_write(self.vm, s, (at + <uint64_t>done) >> 12)
                guest_store(slot_host(s, (at + <uint64_t>done) >> 12) + ((at + <uint64_t>done) & 4095),
                            <const char *>data + done, <unsigned>now)
                done += now
        finally:
            slots_unlock(self.vm)

    @property
    def mmu_valid_gen(self):
        """0 or 1; flips whenever all shadow pages are made obsolete at once."""
        return self.vm.valid_gen

    # -- everything at once

    def snapshot(self):
        """The whole state as a stream of words, a copy; ``kvmmmu.check.Snapshot`` reads it."""
        cdef uint64_t n, room = 0, address = 0, claims = vm_claims(self.vm)
        self.check_open()
        self.check_idle("a snapshot")
        while True:
            # Twice: nothing may be allocated while the locks are held.
            self.lock_slots()
            with nogil:
                n = vm_snapshot(self.vm, <uint64_t *>address, room)
                slots_unlock(self.vm)
            if n == room and room:
                self.check_still(claims, "a snapshot")
                return out
            out = np.empty(n, np.uint64)
            address = out.ctypes.data
            room = n

    def tlb_list(self, int vcpu_id):
        """What a vCPU's TLB holds now: rows of words as ``tlblist.pxd`` has them."""
        cdef uint64_t n, address, claims = vm_claims(self.vm)
        self.check_idle("a list of what is cached")
        if not 0 <= vcpu_id < self.vm.n_vcpus:
            raise ArgumentError(f"vcpu_id is {vcpu_id}; allowed are 0 .. {self.vm.n_vcpus - 1}")
        n = tlb_records(self.vm.vcpus[vcpu_id], NULL, 0)
        out = np.empty((n, TLB_RECORD_WORDS), np.uint64)
        address = out.ctypes.data
        with nogil:
            mmu_write_lock(self.vm)
            tlb_records(self.vm.vcpus[vcpu_id], <uint64_t *>address, n)
            mmu_write_unlock(self.vm)
        self.check_still(claims, "a list of what is cached")
        return out

    # -- counters

    def vm_stats(self):
        """Counters of the VM, in VM_STATS_ORDER."""
        return [vm_stat(self.vm, i) for i in range(VM_STATS)]

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


@cython.final
@cython.freelist(64)
cdef class AccessResult:
    """One access of a guest and what became of it.

    Attributes
    ----------
    outcome : Outcome
    path : Path
        Who carried it out: the processor alone, the processor after page faults, or KVM's emulator.
    gpa : int or None
        Guest-physical address of the first byte.
    error_code : int
        Of a #PF; an errno for ``Outcome.ERROR``.
    gva : int
        Address that faulted (CR2; of a #VE: the guest-linear address); 0 without a fault.
    mmio : tuple of (gpa, size)
        Pieces of the access, one per page, that no memory took: the caller completes them.
    exits : int
        VM exits it cost.
    """

    cdef Access a

    @property
    def outcome(self):
        return OUTCOMES[self.a.outcome]

    @property
    def path(self):
        return PATHS[self.a.path]

    @property
    def gpa(self):
        return None if self.a.gpa == ALL_ONES else self.a.gpa

    @property
    def error_code(self):
        return self.a.error_code

    @property
    def gva(self):
        return self.a.fault_gva

    @property
    def exits(self):
        return self.a.exits

    @property
    def ok(self):
        return self.a.outcome == OUTCOME_OK

    @property
    def mmio(self):
        return tuple([(self.a.mmio_gpa[i], self.a.mmio_size[i]) for i in range(self.a.n_mmio)])

    def __repr__(self):
        parts = [self.outcome.name, f"path={self.path.name}"]
        if self.a.gpa != ALL_ONES:
            parts.append(f"gpa={self.a.gpa:#x}")
        if self.a.outcome in (OUTCOME_PF, OUTCOME_GP, OUTCOME_VE):
            parts.append(f"error_code={self.a.error_code:#x}, gva={self.a.fault_gva:#x}")
        if self.a.outcome == OUTCOME_ERROR:
            parts.append(f"errno={self.a.error_code}")
        parts += [f"mmio={gpa:#x}+{size}" for gpa, size in self.mmio]
        return f"AccessResult({', '.join(parts)}, exits={self.a.exits})"


cdef inline uint64_t kind_arg(object kind) except 1:
    """PFERR_* bits of "r", "w", "x" or the codes 0, 1, 2."""
    if kind is "r" or kind is "w":
        return PFERR_WRITE if kind is "w" else 0
    return kind_compared(kind)


cdef uint64_t kind_compared(object kind) except 1:
    if kind == "r" or kind == 0:
        return 0
    if kind == "w" or kind == 1:
        return PFERR_WRITE
    if kind == "x" or kind == 2:
        return PFERR_FETCH
    raise ArgumentError(f"kind is {kind!r}; allowed are 'r', 'w', 'x' (or their codes 0, 1, 2)")


cdef class VcpuCore(VcpuHandle):
    """One vCPU of a VM; the struct lives as long as the VM.  ``kvmmmu.VCpu`` is its face."""

    cdef VmCore owner
    cdef Vcpu *vcpu
    cdef bint alone  # of the present claim

    def __cinit__(self, VmCore owner not None, tuple model not None, *args):
        cdef Vm *vm = owner.vm
        cdef Vcpu *vcpu
        cdef int born
        owner.check_open()
        self.owner = owner
        vcpu = <Vcpu *>lines_new(sizeof(Vcpu))
        if vcpu == NULL:
            raise MemoryError("no memory for a vCPU")
        model_arg(&vcpu.model, model)
        if args:
            vcpu.cr4_absent, vcpu.efer_absent = args[1].absent_bits()
        with nogil:
            born = vcpu_birth(vm, vcpu)
        if born != BIRTH_OK:
            free(vcpu)
        if born == BIRTH_TOO_MANY:
            raise ArgumentError(f"the VM has {MAX_VCPUS} vCPUs, the most there can be")
        if born != BIRTH_OK:
            raise MemoryError("no memory for a vCPU")
        self.vcpu = vcpu
        self.handle = <kvmmmu_vcpu *>vcpu

    @property
    def id(self):
        """Number of the vCPU, from 0 in order of creation."""
        return self.vcpu.id

    @property
    def core(self):
        return self.owner

    cdef int claim(self) except -1:
        """Take the vCPU.  ``self.alone``: nobody else is in the engine, so the call keeps the interpreter."""
        return self.take(False)

    @cython.final
    cdef inline int take(self, bint enter) except -1:
        cdef bint alone = not vm_inside(self.vcpu.vm)
        cdef int claim = vcpu_claim_enter(self.vcpu) if enter else vcpu_claim(self.vcpu)
        if claim != CLAIM_OK:
            return self.refuse(claim)
        self.alone = alone

    cdef int refuse(self, int claim) except -1:
        if claim == CLAIM_BUSY:
            raise VCpuBusyError(f"vCPU {self.vcpu.id} is in use by another thread")
        raise VmClosedError("the VM was closed")

    @cython.final
    cdef inline void release(self) noexcept nogil:
        vcpu_release(self.vcpu)

    # -- registers

    def registers(self):
        """cr0, cr3, cr4, efer, pkru, cpl, ac, compat, the four PDPTEs, smm."""
        cdef Vcpu *v = self.vcpu
        return (v.regs.cr0, v.regs.cr3, v.regs.cr4, v.regs.efer, v.regs.pkru, v.cpl, bool(v.ac), bool(v.regs.compat),
                tuple([v.regs.pdptr[i] for i in range(4)]), bool(v.smm))

    def set_mode(self, int cpl, bint ac):
        in_range(cpl, "cpl", 0, 3)
        self.claim()
        self.vcpu.cpl = cpl
        self.vcpu.ac = ac
        self.release()

    def set_smm(self, bint on):
        """Enter or leave system management mode."""
        self.claim()
        with nogil:
            vcpu_set_smm(self.vcpu, on)
        self.release()

    def load_sregs(self, cr0, cr3, cr4, efer, pkru, bint compat):
        """KVM_SET_SREGS; False: the values do not go together, nothing changed."""
        cdef CpuRegs regs
        cdef int result
        memset(&regs, 0, sizeof(regs))
        regs.cr0 = as_word(cr0, "cr0")
        regs.cr3 = as_word(cr3, "cr3")
        regs.cr4 = as_word(cr4, "cr4")
        regs.efer = as_word(efer, "efer")
        regs.pkru = <uint32_t>as_word(pkru, "pkru", 32)
        regs.compat = compat
        self.claim()
        with nogil:
            result = set_sregs(self.vcpu, &regs)
        self.release()
        return result == REG_OK

    def load_register(self, int n, value):
        """MOV to CR0, CR3, CR4 (``n`` 0, 3, 4) or WRMSR to EFER (8); False: #GP(0), nothing changed."""
        cdef uint64_t word = as_word(value, "value")
        cdef int result
        self.claim()
        if self.alone:
            result = write_efer(self.vcpu, word) if n == 8 else vcpu_move_to_cr(self.vcpu, n, word)
        else:
            with nogil:
                result = write_efer(self.vcpu, word) if n == 8 else vcpu_move_to_cr(self.vcpu, n, word)
        self.release()
        return result == REG_OK

    def invlpg(self, gva):
        """INVLPG of one page.

        Parameters
        ----------
        gva : int
            Any address in the page.

        Notes
        -----
        Shadow paging drops a leaf of an unsync shadow page and maps at once what the guest's table says now.
        Under EPT and NPT the instruction does not reach KVM.
        """
        cdef uint64_t word = as_word(gva, "gva")
        self.claim()
        if self.alone:
            vcpu_invlpg(self.vcpu, word)
        else:
            with nogil:
                vcpu_invlpg(self.vcpu, word)
        self.release()

    def init(self):
        """INIT the vCPU: paging off, every root dropped (what KVM on AMD does when the guest shut down)."""
        self.claim()
        with nogil:
            vcpu_init(self.vcpu)
        self.release()

    def set_guest_mode(self, bint on, ncr3):
        """Enter or leave the guest of a hypervisor in the guest; False: not possible here."""
        cdef uint64_t root = as_word(ncr3, "ncr3")
        cdef bint done
        self.claim()
        with nogil:
            done = vcpu_set_guest_mode(self.vcpu, on, root)
        self.release()
        return done

    @property
    def guest_mode(self):
        """The vCPU runs the guest of a hypervisor in the guest (``enter_guest_mode``)."""
        return bool(self.vcpu.guest_mode)

    def sync_roots(self):
        """Bring every unsync shadow page under the current root in line with the guest's tables.

        Nothing under EPT, NPT or without paging.
        """
        self.claim()
        with nogil:
            roots_sync(self.vcpu)
        self.release()

    # -- the processor's caches of translations

    def tlb_start(self, list geometry not None, bint spurious_faults):
        """Cache translations from now on, in arrays of (sets, ways); checked by ``kvmmmu.Tlb``."""
        cdef uint32_t numbers[2 * GEOMETRY_ARRAYS]
        cdef int i
        for i, (sets, ways) in enumerate(geometry):
            numbers[2 * i] = sets
            numbers[2 * i + 1] = ways
        self.claim()
        if self.vcpu.tlb == NULL:
            self.vcpu.tlb = tlb_new(numbers, spurious_faults)
        tlb_retag(self.vcpu)
        self.release()
        if self.vcpu.tlb == NULL:
            raise MemoryError("no memory for a TLB")

    def tlb_instruction(self, int which, int kind, uint64_t pcid, uint64_t gva):
        """INVEPT (0), INVVPID (1), INVPCID (2); False: #GP(0), nothing changed."""
        cdef int result = REG_OK
        self.claim()
        with nogil:
            if which == 2:
                result = vcpu_invpcid(self.vcpu, kind, pcid, gva)
            elif which:
                tlb_invvpid(self.vcpu, kind, gva)
            else:
                tlb_invept(self.vcpu)
        self.release()
        return result == REG_OK

    # -- accesses

    @cython.final
    cdef int make_access(self, int cpl, uint64_t gva, uint64_t bits, int n, uint8_t *data, Access *out) except -1:
        """``cpl`` -1: at the vCPU's own level."""
        cdef uint8_t own
        self.take(True)
        own = self.vcpu.cpl
        if cpl >= 0:
            self.vcpu.cpl = <uint8_t>cpl
        if self.alone:
            vcpu_access(self.vcpu, gva, bits, n, data, out)
            self.vcpu.cpl = own
            self.release()
        else:
            with nogil:
                vcpu_access(self.vcpu, gva, bits, n, data, out)
                self.vcpu.cpl = own
                # First this: in the guest, nobody may be kept waiting for the interpreter.
                self.release()
        return 0

    @cython.binding(False)
    @cython.embedsignature.format("clinic")
    def access(self, gva, kind="r", cpl=None, size=1, value=None, bint implicit=False):
        """Make one access as guest code would, with every fault and exit it causes.

        Parameters
        ----------
        gva : int
            Guest virtual address of the first byte.
        kind : {"r", "w", "x"} or {0, 1, 2}
            Read, write or fetch.
        cpl : int, optional
            Privilege level 0 to 3; the vCPU's own by default.
        size : int
            Bytes, 1 to 64; the access may cross a page.
        value : int, optional
            What a write stores, little endian.  Without it nothing is moved, but every check and exit happens.
        implicit : bool
            A supervisor access to a system structure, whatever the privilege level.

        Returns
        -------
        AccessResult

        Raises
        ------
        OverflowError
            ``gva`` or ``value`` negative or too wide.
        ArgumentError
            ``kind``, ``cpl`` or ``size`` out of range.
        VCpuBusyError
            Another thread uses this vCPU.
        """
        cdef AccessResult result = AccessResult.__new__(AccessResult)
        cdef uint64_t word = word_arg(gva, "gva")
        cdef uint64_t bits = kind_arg(kind)
        cdef uint8_t data[64]
        cdef uint8_t *moved = NULL
        cdef int level = -1
        cdef int n = 1 if size is 1 else in_range(size, "size", 1, 64)
        if value is not None:
            if bits != PFERR_WRITE:
                raise ArgumentError("value is given; it goes with writes only")
            store_value(data, value, n)
            moved = data
        if cpl is not None:
            level = 0 if cpl is 0 else in_range(cpl, "cpl", 0, 3)
        if implicit:
            bits |= PFERR_IMPLICIT
        self.make_access(level, word, bits, n, moved, &result.a)
        return result

    def move(self, gva, size, data, int cpl, bint write):
        """An access of up to 64 bytes with its data: (result, bytes of what memory gave)."""
        cdef AccessResult result = AccessResult.__new__(AccessResult)
        cdef uint64_t word = as_word(gva, "gva")
        cdef int n = in_range(size, "size", 1, 64)
        cdef uint8_t buffer[64]
        cdef bytes part
        cdef uint64_t bits = PFERR_WRITE if write else 0
        in_range(cpl, "cpl", 0, 3)
        memset(buffer, 0, 64)
        if write:
            part = data
            memcpy(buffer, <const char *>part, <size_t>in_range(len(part), "len(data)", n, n))
        self.make_access(cpl, word, bits, n, buffer, &result.a)
        return result, <bytes>buffer[:n]

    def run_insn(self, int op, gva, int size, value, expected, src, code_gva, int code_size, int cpl, bint split_rmw,
                 bint refetch, int vectoring, mmio_read):
        """One instruction to its end: (AccessResult, suberror, MMIO exits, result).

        ``mmio_read(gpa, size)`` returns the bytes a device gives; exits are (is write, gpa, size, data).
        """
        cdef AccessResult result = AccessResult.__new__(AccessResult)
        cdef Insn insn
        cdef uint8_t own
        cdef int i
        cdef bytes data
        memset(&insn, 0, sizeof(insn))
        in_range(cpl, "cpl", 0, 3)
        in_range(vectoring, "vectoring", 0, 31)
        insn.op = <uint8_t>in_range(op, "op", 0, 5)
        insn.gva = as_word(gva, "gva")
        insn.size = <uint8_t>in_range(size, "size", 1, 8)
        insn.value = as_word(value, "value")
        insn.expected = as_word(expected, "expected")
        insn.src = as_word(src, "src")
        insn.code_gva = as_word(code_gva, "code_gva")
        insn.code_size = <uint8_t>in_range(code_size, "code_size", 0, 15)
        insn.split_rmw = split_rmw
        insn.refetch = refetch
        self.claim()
        own = self.vcpu.cpl
        try:
            self.vcpu.cpl = <uint8_t>cpl
            self.vcpu.vectoring = <uint8_t>vectoring
            with nogil:
                insn_execute(self.vcpu, &insn, &result.a)
            while insn.wants_data and result.a.outcome == OUTCOME_MMIO:
                # In user space: the handler may change slots, and whoever does waits for no vCPU that is there.
                user_begin(self.vcpu.line)
                for i in range(result.a.n_mmio):
                    data = mmio_read(result.a.mmio_gpa[i], result.a.mmio_size[i])
                    memcpy(insn.read_data + result.a.mmio_offset[i], <const char *>data,
                           min(<size_t>len(data), <size_t>result.a.mmio_size[i]))
                user_end(self.vcpu.line)
                with nogil:
                    insn_continue(self.vcpu, &insn, &result.a)
        finally:
            self.vcpu.cpl = own
            self.vcpu.vectoring = 0
            self.release()
        exits = [(bool(insn.exits[i].write), insn.exits[i].gpa, insn.exits[i].size, insn.exits[i].data)
                 for i in range(insn.n_exits)]
        return result, result.a.suberror, exits, insn.result

    def mmio_offsets(self, AccessResult result not None):
        """Where in the access each piece of ``result.mmio`` stands."""
        return [result.a.mmio_offset[i] for i in range(result.a.n_mmio)]

    def fetch_software(self, code_gva, int code_size):
        """KVM's own fetch and decode of an instruction that it carries out or steps over: (AccessResult, suberror)."""
        cdef AccessResult result = AccessResult.__new__(AccessResult)
        cdef Insn insn
        memset(&insn, 0, sizeof(insn))
        insn.code_gva = as_word(code_gva, "code_gva")
        insn.code_size = <uint8_t>in_range(code_size, "code_size", 0, 15)
        self.claim()
        with nogil:
            insn_fetch(self.vcpu, &insn, &result.a)
        self.release()
        return result, result.a.suberror

    def trace_injection(self, int vector, bint has_error, error_code):
        """Trace that KVM injects an exception."""
        ev_inj_exception(self.owner.vm, self.vcpu.id, vector, has_error, as_word(error_code, "error_code"), False)

    def access_into(self, gvas, kinds, out, int cpl, int size):
        """A column of accesses, in order, into a column of records; ``kinds``: 0 read, 1 write, 2 fetch."""
        cdef WalkColumn src = WalkColumn.of(gvas, "gvas", 8, -1, False)
        cdef int64_t n = src.view.len // 8
        cdef WalkColumn codes = WalkColumn.of(kinds, "kinds", 1, n, False)
        cdef WalkColumn dst = WalkColumn.of(out, "out", sizeof(Access), n, True)
        cdef uint8_t own
        in_range(cpl, "cpl", 0, 3)
        in_range(size, "size", 1, 64)
        self.claim()
        own = self.vcpu.cpl
        self.vcpu.cpl = <uint8_t>cpl
        with nogil:
            access_many(self.vcpu, <const uint64_t *>src.view.buf, <const uint8_t *>codes.view.buf, n, size,
                        <Access *>dst.view.buf)
            self.vcpu.cpl = own
            self.release()

    def walk_records(self, gva, kind, int cpl):
        """The guest's tables and the processor's for one address, as they are: nothing is set or faulted.

        (guest walk, walk of the tables KVM built or None before there are any), as dictionaries.
        """
        cdef Vcpu *v = self.vcpu
        cdef uint64_t word = as_word(gva, "gva")
        cdef uint64_t bits = kind_arg(kind)
        cdef Walk w, hw
        cdef int hint = 0
        if cpl == 3:
            bits |= PFERR_USER
        self.claim()
        # Like KVM's lockless walk: nothing it meets is freed meanwhile.
        kvmmmu_reading_begin(v.line)
        walk_memory(&v.guest, &vm_slots(v.vm, v.smm).map, &hint, &w, word, bits, v.ac, False)
        built = None
        if v.root.page:
            hint = 0
            if v.vm.mmu == MMU_SHADOW:
                walk_memory(&v.hw, vm_hostmem(v.vm), &hint, &hw, word, bits, v.ac, False)
            else:
                walk_memory(&v.hw, vm_hostmem(v.vm), &hint, &hw, w.gpa if not w.fault else w.entry_gpa,
                            (bits & (PFERR_WRITE | PFERR_FETCH)) | PFERR_USER, False, False)
        kvmmmu_reading_end(v.line)
        guest = walk_dict(&v.guest, &w)
        if v.root.page:
            built = walk_dict(&v.hw, &hw)
        self.release()
        return guest, built

    def walk_sptes(self, uint64_t address):
        """``(level, spte, its reserved bits)`` of KVM's own lockless walk, the root's first; none without a table."""
        cdef uint64_t sptes[6]
        cdef int level, top = 0, leaf
        self.claim()
        leaf = walk_sptes(self.vcpu, address, sptes, &top) if self.vcpu.root.page else 0
        found = [(level, sptes[level],
                  rsvd_bits(&self.vcpu.hw, level, sptes[level]) if spte_present(sptes[level]) else 0)
                 for level in range(top, leaf - 1, -1)] if leaf else []
        self.release()
        return found

    # -- recorded runs

    def replay_into(self, a, b, c, kind, size, flags, cpl, bint values, stop_after):
        """Run records given as columns; the totals as a dictionary, ``what`` 0 if all agreed."""
        cdef ReplayTotals t
        cdef TraceColumns e
        cdef uint64_t i, n = len(a)
        cdef uint64_t stop = as_word(stop_after, "stop_after")
        cdef WalkColumn ca = WalkColumn.of(a, "a", 8, n, False)
        cdef WalkColumn cb = WalkColumn.of(b, "b", 8, n, False)
        cdef WalkColumn cc = WalkColumn.of(c, "c", 8, n, False)
        cdef WalkColumn ck = WalkColumn.of(kind, "kind", 1, n, False)
        cdef WalkColumn cs = WalkColumn.of(size, "size", 1, n, False)
        cdef WalkColumn cf = WalkColumn.of(flags, "flags", 1, n, False)
        cdef WalkColumn cp = WalkColumn.of(cpl, "cpl", 1, n, False)
        cdef AccessResult access = AccessResult.__new__(AccessResult)
        e.a = <const uint64_t *>ca.view.buf
        e.b = <const uint64_t *>cb.view.buf
        e.c = <const uint64_t *>cc.view.buf
        e.kind = <const uint8_t *>ck.view.buf
        e.size = <const uint8_t *>cs.view.buf
        e.flags = <const uint8_t *>cf.view.buf
        e.cpl = <const uint8_t *>cp.view.buf
        i = first_bad_cpl(&e, n)
        if i < n:
            raise ArgumentError(f"cpl[{i}] is {e.cpl[i]}; allowed are 0 .. 3")
        memset(&t, 0, sizeof(t))
        self.claim()
        with nogil:
            replay_run(self.vcpu, &e, n, values, stop, &t)
            self.release()
        access.a = t.access
        return {
            "events": t.events, "disagreements": t.disagreements, "mmio": t.mmio, "mmio_cache": t.mmio_cache,
            "mmio_spte": t.mmio_spte, "mmio_slow": t.mmio_slow, "page_faults": t.page_faults, "exits": t.exits,
            "by_kind": [t.by_kind[i] for i in range(16)], "what": t.what, "index": t.index, "gva": t.gva,
            "expected": t.expected, "got": t.got, "access": access,
        }


cdef int store_value(uint8_t *data, object value, int size) except -1:
    cdef bytes raw
    try:
        raw = PyNumber_Index(value).to_bytes(size, "little")
    except OverflowError:
        raise OverflowError(f"value = {value} is outside 0 ... 2^{8 * size}-1") from None
    memcpy(data, <const char *>raw, size)
    return 0


# ---- trees: a copy of the tables KVM built

from kvmmmu.engine.trees cimport TreePage, tree_copy, tree_list

TREE_PAGE_DTYPE = np.dtype(
    [("gfn", np.uint64), ("id", np.uint32), ("role", np.uint32), ("root_count", np.int32),
     ("unsync_children", np.uint32), ("write_flooding", np.uint32)]
    + [(name, np.uint8) for name in ("level", "unsync", "valid_gen", "nx_disallowed", "tdp", "special", "reached",
                                     "unused")]
    + [("unused2", np.uint32)])
assert TREE_PAGE_DTYPE.itemsize == sizeof(TreePage)


def tree_copy_of(VcpuCore core not None, bint everything, int previous):
    """Pages under the vCPU's root (``everything``: all): a TREE_PAGE_DTYPE column and sptes of shape (n, 512).

    The first page is the root (``previous`` 0 to 2: that previous root); there is none before the first entry.
    """
    cdef Vm *vm = core.owner.vm
    cdef int32_t *ids = NULL
    cdef uint8_t *seen = NULL
    cdef int n, room = 64
    cdef uint64_t page_address, spte_address
    core.owner.check_open()
    # Arrays are made before the lock is taken; more pages than expected: once more, with more room.
    while True:
        pages = np.empty(room, TREE_PAGE_DTYPE)
        sptes = np.empty((room, 512), np.uint64)
        page_address = pages.ctypes.data
        spte_address = sptes.ctypes.data
        with nogil:
            mmu_write_lock(vm)
            n = -1
            seen = <uint8_t *>calloc(vm.arena.top + 1, 1)
            ids = <int32_t *>calloc(vm.arena.top + 1, sizeof(int32_t))
            if seen != NULL and ids != NULL:
                n = tree_list(core.vcpu, everything, previous, seen, ids)
                if n <= room:
                    tree_copy(vm, ids, seen, n, <TreePage *>page_address, <uint64_t *>spte_address)
            mmu_write_unlock(vm)
        free(seen)
        free(ids)
        if n < 0:
            raise MemoryError("no memory for a copy of the tables")
        if n <= room:
            return pages[:n], sptes[:n]
        room = n + 64


# ---- C table

from cpython.pycapsule cimport PyCapsule_New
from kvmmmu.engine.embed cimport (
    Sregs, embed_access, embed_access_many, embed_copy, embed_get_sregs, embed_invlpg, embed_load_cr3,
    embed_set_sregs, embed_status_text, embed_sync_roots, embed_translate,
)

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8(object text) except NULL

cdef extern from "kvmmmu/capi.h" nogil:
    const uint32_t KVMMMU_CAPI_VERSION
    const char *KVMMMU_CAPI_NAME

    struct kvmmmu_capi:
        uint32_t version
        uint32_t size
        kvmmmu_vm *(*vm_from)(void *owner) except NULL
        kvmmmu_vcpu *(*vcpu_from)(void *owner) except NULL
        kvmmmu_tables *(*tables_from)(void *owner) except NULL
        int (*access)(kvmmmu_vcpu *, uint64_t, uint32_t, uint32_t, int, void *, kvmmmu_access *) noexcept nogil
        int (*access_many)(kvmmmu_vcpu *, const uint64_t *, const uint8_t *, size_t, uint32_t, int,
                           kvmmmu_access *) noexcept nogil
        int (*read)(kvmmmu_vcpu *, uint64_t, void *, size_t, int, size_t *, kvmmmu_access *) noexcept nogil
        int (*write)(kvmmmu_vcpu *, uint64_t, const void *, size_t, int, size_t *, kvmmmu_access *) noexcept nogil
        int (*invlpg)(kvmmmu_vcpu *, uint64_t) noexcept nogil
        int (*load_cr3)(kvmmmu_vcpu *, uint64_t) noexcept nogil
        int (*sync_roots)(kvmmmu_vcpu *) noexcept nogil
        int (*get_sregs)(kvmmmu_vcpu *, kvmmmu_sregs *) noexcept nogil
        int (*set_sregs)(kvmmmu_vcpu *, const kvmmmu_sregs *) noexcept nogil
        int (*vm_stat_index)(const char *) noexcept nogil
        int (*vcpu_stat_index)(const char *) noexcept nogil
        const char *(*vm_stat_name)(int) noexcept nogil
        const char *(*vcpu_stat_name)(int) noexcept nogil
        int (*vm_stat)(kvmmmu_vm *, int, uint64_t *) noexcept nogil
        int (*vcpu_stat)(kvmmmu_vcpu *, int, uint64_t *) noexcept nogil
        int (*translate)(const kvmmmu_tables *, const uint64_t *, size_t, uint32_t, int,
                         kvmmmu_translation *) noexcept nogil
        const char *(*status_text)(int) noexcept nogil


cdef class VmHandle:
    """A VM as other extensions see it: one pointer, see ``kvmmmu/capi.h``."""


cdef class VcpuHandle:
    """A vCPU as other extensions see it."""


cdef class TablesHandle:
    """Tables in plain memory as other extensions see them."""


cdef kvmmmu_vm *kvmmmu_vm_from(object owner) except NULL:
    """Of a ``VM``; the handle lives as long as that and its vCPUs do."""
    core = getattr(owner, "_core", owner)
    if not isinstance(core, VmHandle) or (<VmHandle>core).handle == NULL:
        raise TypeError(f"wanted is a kvmmmu.VM, not {type(owner).__name__}")
    return (<VmHandle>core).handle


cdef kvmmmu_vcpu *kvmmmu_vcpu_from(object owner) except NULL:
    if not isinstance(owner, VcpuHandle) or (<VcpuHandle>owner).handle == NULL:
        raise TypeError(f"wanted is a kvmmmu.VCpu, not {type(owner).__name__}")
    return (<VcpuHandle>owner).handle


cdef kvmmmu_tables *kvmmmu_tables_from(object owner) except NULL:
    if not isinstance(owner, TablesHandle) or (<TablesHandle>owner).handle == NULL:
        raise TypeError(f"wanted is a kvmmmu.Paging, not {type(owner).__name__}")
    return (<TablesHandle>owner).handle


# For C the same with NULL for "no object"; Cython's ``except NULL`` leaves the exception set.
cdef kvmmmu_vm *table_vm_from(void *owner) except NULL:
    return kvmmmu_vm_from(None if owner == NULL else <object>owner)

cdef kvmmmu_vcpu *table_vcpu_from(void *owner) except NULL:
    return kvmmmu_vcpu_from(None if owner == NULL else <object>owner)

cdef kvmmmu_tables *table_tables_from(void *owner) except NULL:
    return kvmmmu_tables_from(None if owner == NULL else <object>owner)


cdef int kvmmmu_make_access(kvmmmu_vcpu *vcpu, uint64_t gva, uint32_t how, uint32_t size, int cpl, void *data,
                            kvmmmu_access *result) noexcept nogil:
    return embed_access(<Vcpu *>vcpu, gva, how, size, cpl, <uint8_t *>data, <Access *>result)

cdef int kvmmmu_access_many(kvmmmu_vcpu *vcpu, const uint64_t *gvas, const uint8_t *how, size_t n, uint32_t size,
                            int cpl, kvmmmu_access *results) noexcept nogil:
    return embed_access_many(<Vcpu *>vcpu, gvas, how, n, size, cpl, <Access *>results)

cdef int kvmmmu_read(kvmmmu_vcpu *vcpu, uint64_t gva, void *data, size_t size, int cpl, size_t *done,
                     kvmmmu_access *last) noexcept nogil:
    return embed_copy(<Vcpu *>vcpu, gva, KVMMMU_READ, <uint8_t *>data, size, cpl, done, <Access *>last)

cdef int kvmmmu_write(kvmmmu_vcpu *vcpu, uint64_t gva, const void *data, size_t size, int cpl, size_t *done,
                      kvmmmu_access *last) noexcept nogil:
    return embed_copy(<Vcpu *>vcpu, gva, KVMMMU_WRITE, <uint8_t *>data, size, cpl, done, <Access *>last)

cdef int kvmmmu_invlpg(kvmmmu_vcpu *vcpu, uint64_t gva) noexcept nogil:
    return embed_invlpg(<Vcpu *>vcpu, gva)

cdef int kvmmmu_load_cr3(kvmmmu_vcpu *vcpu, uint64_t value) noexcept nogil:
    return embed_load_cr3(<Vcpu *>vcpu, value)

cdef int kvmmmu_sync_roots(kvmmmu_vcpu *vcpu) noexcept nogil:
    return embed_sync_roots(<Vcpu *>vcpu)

cdef int kvmmmu_get_sregs(kvmmmu_vcpu *vcpu, kvmmmu_sregs *sregs) noexcept nogil:
    return embed_get_sregs(<Vcpu *>vcpu, <Sregs *>sregs)

cdef int kvmmmu_set_sregs(kvmmmu_vcpu *vcpu, const kvmmmu_sregs *sregs) noexcept nogil:
    return embed_set_sregs(<Vcpu *>vcpu, <const Sregs *>sregs)

cdef int kvmmmu_translate(const kvmmmu_tables *tables, const uint64_t *gvas, size_t n, uint32_t how, int cpl,
                          kvmmmu_translation *results) noexcept nogil:
    return embed_translate(<const Tables *>tables, gvas, n, how, cpl, <Translation *>results)


# Counters by name: the C strings belong to the two tuples, which this module holds for good.
cdef tuple stat_names_held = (VM_STATS_ORDER, VCPU_STATS_ORDER)
cdef const char *vm_stat_names[VM_STATS]
cdef const char *vcpu_stat_names[VCPU_STATS]
for stat_number in range(VM_STATS):
    vm_stat_names[stat_number] = PyUnicode_AsUTF8(VM_STATS_ORDER[stat_number])
for stat_number in range(VCPU_STATS):
    vcpu_stat_names[stat_number] = PyUnicode_AsUTF8(VCPU_STATS_ORDER[stat_number])
del stat_number

cdef int name_index(const char **names, int n, const char *name) noexcept nogil:
    cdef int i
    if name != NULL:
        for i in range(n):
            if strcmp(names[i], name) == 0:
                return i
    return -1

cdef int kvmmmu_vm_stat_index(const char *name) noexcept nogil:
    return name_index(vm_stat_names, VM_STATS, name)

cdef int kvmmmu_vcpu_stat_index(const char *name) noexcept nogil:
    return name_index(vcpu_stat_names, VCPU_STATS, name)

cdef const char *kvmmmu_vm_stat_name(int index) noexcept nogil:
    return vm_stat_names[index] if 0 <= index < VM_STATS else NULL

cdef const char *kvmmmu_vcpu_stat_name(int index) noexcept nogil:
    return vcpu_stat_names[index] if 0 <= index < VCPU_STATS else NULL

cdef int kvmmmu_vm_stat(kvmmmu_vm *vm, int index, uint64_t *value) noexcept nogil:
    if vm == NULL or value == NULL or not 0 <= index < VM_STATS:
        return KVMMMU_E_ARGUMENT
    value[0] = vm_stat(<Vm *>vm, index)
    return KVMMMU_OK

cdef int kvmmmu_vcpu_stat(kvmmmu_vcpu *vcpu, int index, uint64_t *value) noexcept nogil:
    if vcpu == NULL or value == NULL or not 0 <= index < VCPU_STATS:
        return KVMMMU_E_ARGUMENT
    value[0] = ld_u64(&(<Vcpu *>vcpu).stats[index])
    return KVMMMU_OK


cdef const char *kvmmmu_status_text(int status) noexcept nogil:
    return embed_status_text(status)


cdef kvmmmu_capi capi_table
capi_table.version = KVMMMU_CAPI_VERSION
capi_table.size = <uint32_t>sizeof(kvmmmu_capi)
capi_table.vm_from = table_vm_from
capi_table.vcpu_from = table_vcpu_from
capi_table.tables_from = table_tables_from
capi_table.access = kvmmmu_make_access
capi_table.access_many = kvmmmu_access_many
capi_table.read = kvmmmu_read
capi_table.write = kvmmmu_write
capi_table.invlpg = kvmmmu_invlpg
capi_table.load_cr3 = kvmmmu_load_cr3
capi_table.sync_roots = kvmmmu_sync_roots
capi_table.get_sregs = kvmmmu_get_sregs
capi_table.set_sregs = kvmmmu_set_sregs
capi_table.vm_stat_index = kvmmmu_vm_stat_index
capi_table.vcpu_stat_index = kvmmmu_vcpu_stat_index
capi_table.vm_stat_name = kvmmmu_vm_stat_name
capi_table.vcpu_stat_name = kvmmmu_vcpu_stat_name
capi_table.vm_stat = kvmmmu_vm_stat
capi_table.vcpu_stat = kvmmmu_vcpu_stat
capi_table.translate = kvmmmu_translate
capi_table.status_text = kvmmmu_status_text
_C_API = PyCapsule_New(&capi_table, KVMMMU_CAPI_NAME, NULL)
# ---- end of C table
