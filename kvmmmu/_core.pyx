# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The door: owns memory, binds the engine to Python and C, checks every argument once."""

# ---- sptes and constants
cimport cython
from libc.string cimport memset
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport (SpteMasks, spte_acc_tracked, spte_accessed_mask, spte_ad_kind_off,
                               spte_ad_need_write_protect, spte_dirty_mask, spte_executable, spte_is_last,
                               spte_is_mmio, spte_large, spte_masks_ept, spte_masks_legacy, spte_mmu_writable,
                               spte_pfn, spte_present, spte_writable)
from kvmmmu.bits.mmio cimport mmio_spte_access, mmio_spte_gen, mmio_spte_gfn, mmio_spte_make
from kvmmmu.engine.codec cimport (codec_is_mmio, codec_max_gfn, codec_mmio_make, codec_mmio_split, codec_present_bits,
                                  codec_reserved)
from kvmmmu.bits.paging cimport CpuModel, DIALECT_SDM, Paging, paging_init_ept, paging_init_npt, rsvd_bits


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
    cdef Paging paging
    cdef bint ept

    def __cinit__(self, bint ept, int maxphyaddr, int phys_bits, bint l1tf, int cache_bits, bint ept_ad,
                  bint ept_exec_only, bint mmio_caching, bint gbpages, bint ept_2m, bint ept_1g):
        cdef CpuModel model
        memset(&model, 0, sizeof(model))
        model.maxphyaddr = maxphyaddr
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

# ---- walks: Paging over plain memory, and batches of cases with known answers

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memset
from cpython.long cimport PyLong_AsUnsignedLongLong
from cpython.number cimport PyNumber_Index

from kvmmmu.bits.constants cimport PFERR_FETCH, PFERR_IMPLICIT, PFERR_USER, PFERR_WRITE
from kvmmmu.bits.guest_walk cimport Walk, walk_present, walk_rights
from kvmmmu.bits.paging cimport (
    CpuModel, CpuRegs, FMT_NONE, FMT_PAE, Paging, eptp_valid, paging_init, paging_init_ept, paging_init_npt,
    paging_pdptr_bad, permission_fault, rsvd_bits,
)
from kvmmmu.engine.cases cimport WalkAnswer, WalkCase, cases_run
from kvmmmu.engine.state cimport MemMap
from kvmmmu.engine.translate cimport Translation, mappings_next, mappings_tables, translate_many, walk_any
from kvmmmu.engine.walk cimport load_pdptrs, load_pdptrs_nested
from kvmmmu.errors import ArgumentError


cdef uint64_t word_arg(object value, str name) except? 0:
    """An integer in 0..2^64-1, or an error that names the argument."""
    try:
        value = PyNumber_Index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise OverflowError(f"{name} is {value}; allowed are 0 .. 2**64 - 1") from None


cdef uint64_t access_arg(object access, int cpl, bint implicit) except? 0:
    """PFERR_* bits of "r", "w" or "x" at a privilege level."""
    cdef uint64_t bits
    if access == "r":
        bits = 0
    elif access == "w":
        bits = PFERR_WRITE
    elif access == "x":
        bits = PFERR_FETCH
    else:
        raise ArgumentError(f"access is {access!r}; allowed are 'r', 'w' and 'x'")
    if cpl < 0 or cpl > 3:
        raise ArgumentError(f"cpl is {cpl}; allowed are 0 .. 3")
    if implicit:
        return bits | PFERR_IMPLICIT
    return bits | PFERR_USER if cpl == 3 else bits


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
        if <size_t>self.view.buf % 8:
            raise ArgumentError(f"{name} starts at an address that is not a multiple of 8")
        if self.view.len % itemsize or (n >= 0 and self.view.len != n * itemsize):
            wanted = f"{n} items" if n >= 0 else "whole items"
            raise ArgumentError(f"{name} has {self.view.len} bytes; wanted are {wanted} of {itemsize} bytes")
        return self

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


cdef class PagingCore:
    """Tables in plain memory: owns the buffers' exports and the area map (see ``kvmmmu.paging``)."""

    cdef Paging paging
    cdef Paging host
    cdef MemMap map
    cdef int hint
    cdef bint ready
    cdef list columns

    def __dealloc__(self):
        PyMem_RawFree(self.map.first)
        PyMem_RawFree(self.map.npages)
        PyMem_RawFree(self.map.host)
        PyMem_RawFree(self.map.writable)

    def __init__(self, list areas, tuple registers, tuple model, int dialect, tuple second, object pdptes):
        """``areas``: (gpa, buffer); ``registers``: cr0 cr3 cr4 efer pkru compat; ``model``: the CpuModel's fields;
        ``second``: () or ("ept", eptp, model) or ("npt", ncr3, levels, model); ``pdptes``: four words or None.
        """
        cdef CpuRegs regs
        cdef CpuModel cpu, host_cpu
        cdef int bad
        cdef Walk hw
        if self.ready:
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
                paging_init_npt(&self.host, root, second[2], &host_cpu, dialect)
                self.paging.pdpte_in_memory = 1
        if self.paging.format == FMT_PAE and not self.paging.pdpte_in_memory:
            if pdptes is not None:
                for i in range(4):
                    regs.pdptr[i] = word_arg(pdptes[i], f"pdptes[{i}]")
                    if paging_pdptr_bad(regs.pdptr[i], &cpu):
                        raise_pdpte(i, regs.pdptr[i])
                    self.paging.pdptr[i] = regs.pdptr[i]
            elif second:
                if load_pdptrs_nested(&self.host, &self.map, &self.hint, &hw, regs.cr3, &cpu, self.paging.pdptr,
                                      False):
                    raise ArgumentError(f"the PDPTEs at cr3 = {regs.cr3:#x} cannot be loaded through the EPT tables")
            else:
                bad = load_pdptrs(&self.map, &self.hint, regs.cr3, &cpu, self.paging.pdptr)
                if bad >= 0:
                    raise_pdpte(bad, None)
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
        self.map.first = <uint64_t *>PyMem_RawMalloc((n or 1) * sizeof(uint64_t))
        self.map.npages = <uint64_t *>PyMem_RawMalloc((n or 1) * sizeof(uint64_t))
        self.map.host = <uint8_t **>PyMem_RawMalloc((n or 1) * sizeof(uint8_t *))
        self.map.writable = <uint8_t *>PyMem_RawMalloc((n or 1) * sizeof(uint8_t))
        if not self.map.first or not self.map.npages or not self.map.host or not self.map.writable:
            raise MemoryError()
        for i in range(n):
            gpa, column, writable = found[i]
            if i and gpa < end:
                raise ArgumentError(f"the area at gpa {gpa:#x} overlaps the one before, which ends at {end:#x}")
            end = gpa + <uint64_t>column.view.len
            self.map.first[i] = gpa >> 12
            self.map.npages[i] = <uint64_t>column.view.len >> 12
            self.map.host[i] = <uint8_t *>column.view.buf
            self.map.writable[i] = writable
        self.map.n = <int>n
        self.map.capacity = <int>n
        self.columns = found
        return 0

    def walk(self, gva, access="r", int cpl=0, bint ac=False, bint implicit=False, bint set_ad=False):
        """Translate one address.

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
            The address in memory, or -1 where the access faults (``walk_result`` tells why).
        """
        cdef Walk w, hw
        cdef uint64_t bits = access_arg(access, cpl, implicit)
        if walk_any(&self.paging, &self.host, &self.map, &self.hint, &w, &hw, word_arg(gva, "gva"), bits, ac, set_ad):
            return -1
        return w.gpa if self.host.format == FMT_NONE else hw.gpa

    def translate_into(self, gvas, out, str access, int cpl, bint ac, bint implicit, bint set_ad):
        """Translate a column of uint64 addresses into a column of records (``record_layouts``)."""
        cdef WalkColumn src = WalkColumn.of(gvas, "gvas", 8, -1, False)
        cdef int64_t n = src.view.len // 8
        cdef WalkColumn dst = WalkColumn.of(out, "out", sizeof(Translation), n, True)
        cdef uint64_t bits = access_arg(access, cpl, implicit)
        with nogil:
            translate_many(&self.paging, &self.host, &self.map, <const uint64_t *>src.view.buf, n, bits, ac, set_ad,
                           <Translation *>dst.view.buf)

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

    def walk_record(self, gva, access="r", int cpl=0, bint ac=False, bint implicit=False, bint set_ad=False):
        """One walk with everything it saw: (guest walk, second dimension's last walk or None), as dictionaries."""
        cdef Walk w, hw
        cdef uint64_t bits = access_arg(access, cpl, implicit)
        memset(&hw, 0, sizeof(hw))
        walk_any(&self.paging, &self.host, &self.map, &self.hint, &w, &hw, word_arg(gva, "gva"), bits, ac, set_ad)
        guest = walk_dict(&self.paging, &w)
        return guest, (walk_dict(&self.host, &hw) if hw.top else None)

    cdef const Paging *dimension(self, int n) except NULL:
        if n == 2 and self.host.format == FMT_NONE:
            raise ArgumentError("dimension is 2; this object has no nested tables")
        if n != 1 and n != 2:
            raise ArgumentError(f"dimension is {n}; allowed are 1 (the guest's tables) and 2 (those below)")
        return &self.paging if n == 1 else &self.host

    def reserved_bits(self, int level, entry, int dimension=1):
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
        if level < 1 or level > 5:
            raise ArgumentError(f"level is {level}; allowed are 1 .. 5")
        return rsvd_bits(self.dimension(dimension), level, word_arg(entry, "entry"))

    def permission_fault(self, int rights, access="r", int cpl=0, bint ac=False, bint implicit=False, int pkey=0,
                         int dimension=1):
        """Whether rights (``walks.Rights``) refuse an access: 0, or the error-code bits of the cause (P, PK).

        Parameters
        ----------
        rights : int
            0 to 7.
        access, cpl, ac, implicit
            As in ``walk``; in EPT a user access is one that reads.
        pkey : int
            Protection key of the leaf, 0 to 15.
        dimension : {1, 2}

        Returns
        -------
        int
        """
        if rights < 0 or rights > 7:
            raise ArgumentError(f"rights is {rights}; allowed are 0 .. 7")
        if pkey < 0 or pkey > 15:
            raise ArgumentError(f"pkey is {pkey}; allowed are 0 .. 15")
        return permission_fault(self.dimension(dimension), access_arg(access, cpl, implicit), rights, ac, pkey)

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
    return {
        "case": (case, sizeof(WalkCase)), "answer": (answer, sizeof(WalkAnswer)),
        "translation": (translation, sizeof(Translation)),
    }


def walk_cases(cases, offsets, words_pa, words, words_after, answers, int dialect):
    """Walk each case over its own words; ``cases`` and ``answers`` are records as in ``record_layouts``."""
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
    cdef MemMap scratch
    cdef int64_t i, most = 0, bad
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
    if most > 4096:
        raise ArgumentError(f"one case lists {most} words; allowed are 4096")
    scratch.n = 0
    scratch.capacity = <int>most
    scratch.first = <uint64_t *>PyMem_RawMalloc((most or 1) * sizeof(uint64_t))
    scratch.npages = <uint64_t *>PyMem_RawMalloc((most or 1) * sizeof(uint64_t))
    scratch.host = <uint8_t **>PyMem_RawMalloc((most or 1) * sizeof(uint8_t *))
    scratch.writable = <uint8_t *>PyMem_RawMalloc((most or 1) * sizeof(uint8_t))
    pages = <uint8_t *>PyMem_RawMalloc((most or 1) * 4096)
    try:
        if not scratch.first or not scratch.npages or not scratch.host or not scratch.writable or not pages:
            raise MemoryError()
        memset(pages, 0, most * 4096)
        for i in range(most):
            scratch.npages[i] = 1
            scratch.host[i] = pages + 4096 * i
            scratch.writable[i] = 1
        with nogil:
            bad = cases_run(<const WalkCase *>c.view.buf, n, offset, address, <const uint64_t *>before.view.buf,
                            <uint64_t *>after.view.buf, dialect, &scratch, <WalkAnswer *>out.view.buf)
        assert bad < 0
    finally:
        PyMem_RawFree(scratch.first)
        PyMem_RawFree(scratch.npages)
        PyMem_RawFree(scratch.host)
        PyMem_RawFree(scratch.writable)
        PyMem_RawFree(pages)
