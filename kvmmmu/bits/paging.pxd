# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Paging formats: what the registers and the CPU model say about entries."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.access cimport (
    PERM_EPT, PERM_NX, PERM_SMAP, PERM_SMEP, PERM_WP, permission_index, permission_table, pkey_fault, pkru_table,
)
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.rsvd cimport (
    RSVD_LEVELS, ept_bad_mt_xwr, rsvd_clear, rsvd_init_32, rsvd_init_64, rsvd_init_ept, rsvd_init_pae, rsvd_pdpte,
)
from kvmmmu.bits.spte cimport bits_between

cdef enum:
    FMT_NONE = 0  # paging off: gva == gpa
    FMT_32 = 1    # 4-byte entries, 2 levels
    FMT_PAE = 2   # 8-byte entries, PDPTE registers + 2 levels
    FMT_64 = 3    # 8-byte entries, 4 or 5 levels (NPT too)
    FMT_EPT = 4   # EPT entries, 4 or 5 levels

cdef enum:
    DIALECT_SDM = 0  # what the manuals say the processor does
    DIALECT_KVM = 1  # what KVM's software walker does

cdef enum:
    FAULT_NONE = 0
    FAULT_PF = 1              # #PF(error_code)
    FAULT_GP = 2              # #GP(0): address not canonical
    FAULT_PDPTE = 3           # #GP(0) at the CR3 load: a present PDPTE has reserved bits
    FAULT_EPT_VIOLATION = 4   # error_code holds qualification bits
    FAULT_EPT_MISCONFIG = 5
    FAULT_NPF = 6             # error_code holds EXITINFO1

cdef struct CpuRegs:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t pdptr[4]  # PDPTE registers; read only in PAE paging
    uint32_t pkru
    uint8_t compat     # CS.L = 0: in long mode linear addresses are 32 bits wide

cdef struct CpuModel:
    uint8_t maxphyaddr  # bits
    uint8_t gbpages     # 1 GiB leaves allowed
    uint8_t amd         # bit 8 of PML4E/PML5E reserved in KVM's walker
    uint8_t exec_only   # EPT: 100b entries allowed
    uint8_t ept_2m      # EPT: 2 MiB leaves allowed
    uint8_t ept_1g      # EPT: 1 GiB leaves allowed
    uint8_t no_pse36    # 4 MiB pages lie below 4 GiB (KVM's walker never believes it)

cdef struct Paging:
    int format           # FMT_*
    int levels           # 0, 2, 3, 4, 5
    int dialect          # DIALECT_*
    int fault_kind       # FAULT_* of a refused access (EPT: of a violation)
    uint64_t root        # table address in CR3 / EPTP / nCR3 (PAE: PDPT address)
    uint64_t pdptr[4]    # PAE
    uint64_t va_mask     # bits of an address that the walk looks at
    uint64_t va_limit    # second dimension: bits that no table translates
    uint64_t addr_mask   # address bits of an entry, before the cut to its level
    uint64_t accessed    # the format's A bit, 0 without
    uint64_t dirty       # the format's D bit, 0 without
    uint64_t rsvd[2][6]  # reserved bits by [bit 7][level]
    uint64_t bad_mt_xwr  # EPT: bit n set when entry bits 5:0 == n misconfigure
    uint8_t permissions[16]  # bit n of [pfec >> 1]: ACC value n faults
    uint32_t pkru_mask   # 2 bits per pfec index
    uint32_t pkru
    uint32_t fetch_bit   # PFERR_FETCH where fetch faults report I/D, else 0
    uint8_t pse          # 32-bit: bit 7 of a PDE makes a leaf
    uint8_t pse36_bits   # PDE bits 13 .. 13+n-1 are address bits 32 ..
    uint8_t va_shift     # 64 - canonical width; 0: every address is canonical
    uint8_t pdpte_in_memory  # PAE without PDPTE registers (SVM nested paging)
    uint8_t pke
    uint8_t wp
    uint8_t ad_first     # of a nested walk: guest A/D bits are set before the address itself is translated
    # as the second dimension of a nested walk:
    uint64_t table_access  # how a guest table entry is read
    uint64_t update_access  # how its A/D bits are written where table_access does not say so, else 0
    uint64_t final_access  # added to the guest's own access at the end
    uint64_t table_note  # bits of the exit that say: a guest table was being read
    uint64_t final_note  # bits of the exit that say: the final address was being translated
    uint8_t by_page      # a guest table's page is translated, not its entry's address


cdef inline bint va_canonical(uint64_t va, int va_shift) noexcept nogil:
    """Bits 63 .. (63 - va_shift) of the address are all equal."""
    return <uint64_t>(<int64_t>(va << va_shift) >> va_shift) == va


cdef inline bint paging_pdptr_bad(uint64_t pdpte, const CpuModel *model) noexcept nogil:
    """A PDPTE that no register takes: MOV to CR3 answers #GP(0) (SDM vol. 3A section 4.4.1)."""
    return (pdpte & PT_PRESENT_MASK) != 0 and (pdpte & rsvd_pdpte(model.maxphyaddr)) != 0


cdef inline bint rsvd_fault(const Paging *p, int level, uint64_t entry) noexcept nogil:
    """A present entry of ``level`` has a reserved bit set (EPT: is misconfigured)."""
    return ((entry & p.rsvd[(entry >> 7) & 1][level]) | ((p.bad_mt_xwr >> (entry & 63)) & 1)) != 0


cdef inline uint64_t rsvd_bits(const Paging *p, int level, uint64_t entry) noexcept nogil:
    """Which bits of it (EPT: bits 5:0 when the memory type and rights are what is wrong)."""
    cdef uint64_t bits = entry & p.rsvd[(entry >> 7) & 1][level]
    if (p.bad_mt_xwr >> (entry & 63)) & 1:
        bits |= entry & bits_between(5, 0)
    return bits


cdef inline uint64_t permission_fault(const Paging *p, uint64_t access, uint32_t acc, bint ac,
                                      uint32_t pkey) noexcept nogil:
    """0 when rights ``acc`` allow the access, else the error-code bits of the cause (PRESENT, PK)."""
    cdef bint fault = (p.permissions[permission_index(access, ac)] >> acc) & 1
    if p.pke and pkey_fault(p.pkru_mask, p.pkru, access, acc, pkey):
        return PFERR_PRESENT | PFERR_PK
    return PFERR_PRESENT if fault else 0


cdef inline void paging_clear(Paging *p, int format, int levels, int dialect) noexcept nogil:
    """What every format starts from: no reserved bits, no PDPTEs, nothing refused, no second dimension."""
    cdef int i
    p.format = format
    p.levels = levels
    p.dialect = dialect
    p.fault_kind = FAULT_PF
    p.root = 0
    for i in range(4):
        p.pdptr[i] = 0
    for i in range(16):
        p.permissions[i] = 0
    p.va_mask = ALL_ONES
    p.va_limit = 0
    p.addr_mask = PT_ADDR_MASK
    p.accessed = PT_ACCESSED_MASK
    p.dirty = PT_DIRTY_MASK
    rsvd_clear(&p.rsvd[0][0])
    p.bad_mt_xwr = 0
    p.pkru_mask = 0
    p.pkru = 0
    p.fetch_bit = 0
    p.pse = 0
    p.pse36_bits = 0
    p.va_shift = 0
    p.pdpte_in_memory = 0
    p.pke = 0
    p.wp = 0
    p.ad_first = 0
    p.table_access = 0
    p.update_access = 0
    p.final_access = 0
    p.table_note = 0
    p.final_note = 0
    p.by_page = 0


cdef inline int pse36_address_bits(const CpuModel *model, int dialect) noexcept nogil:
    """How many address bits above 31 a 4 MiB page has (SDM vol. 3A section 4.3: M = min(40, MAXPHYADDR))."""
    if dialect == DIALECT_KVM:
        return 4
    if model.no_pse36 or model.maxphyaddr <= 32:
        return 0
    return (40 if model.maxphyaddr > 40 else model.maxphyaddr) - 32


cdef inline void paging_init(Paging *p, const CpuRegs *regs, const CpuModel *model, int dialect) noexcept nogil:
    """The guest's own paging mode as CR0, CR4 and EFER choose it (SDM vol. 3A section 4.1.1)."""
    cdef bint nx = (regs.efer & EFER_NX) != 0
    cdef bint smep = (regs.cr4 & CR4_SMEP) != 0
    cdef bint pae = (regs.cr4 & CR4_PAE) != 0
    cdef uint32_t mode = 0
    cdef int i
    if not regs.cr0 & CR0_PG:
        paging_clear(p, FMT_NONE, 0, dialect)
        p.va_mask = bits_between(31, 0)
        p.accessed = 0
        p.dirty = 0
        return
    if regs.efer & EFER_LMA:
        paging_clear(p, FMT_64, 5 if regs.cr4 & CR4_LA57 else 4, dialect)
        p.root = regs.cr3 & PT_ADDR_MASK
        if regs.compat:
            p.va_mask = bits_between(31, 0)
        else:
            p.va_shift = 64 - 57 if p.levels == 5 else 64 - 48
        rsvd_init_64(&p.rsvd[0][0], model.maxphyaddr, nx, model.gbpages, dialect == DIALECT_KVM and model.amd)
        p.pke = (regs.cr4 & CR4_PKE) != 0
        p.pkru = regs.pkru
    elif pae:
        paging_clear(p, FMT_PAE, 3, dialect)
        p.root = regs.cr3 & bits_between(31, 5)
        p.va_mask = bits_between(31, 0)
        for i in range(4):
            p.pdptr[i] = regs.pdptr[i]
        rsvd_init_pae(&p.rsvd[0][0], model.maxphyaddr, nx)
    else:
        paging_clear(p, FMT_32, 2, dialect)
        p.root = regs.cr3 & bits_between(31, 12)
        p.va_mask = bits_between(31, 0)
        p.addr_mask = bits_between(31, 12)
        p.pse = (regs.cr4 & CR4_PSE) != 0
        p.pse36_bits = <uint8_t>pse36_address_bits(model, dialect)
        rsvd_init_32(&p.rsvd[0][0], p.pse, p.pse36_bits)
    p.wp = (regs.cr0 & CR0_WP) != 0
    # KVM's walker asks for NX alone; the processor wants PAE entries too, or SMEP.
    if smep or (nx and (pae or dialect == DIALECT_KVM)):
        p.fetch_bit = <uint32_t>PFERR_FETCH
    mode = (PERM_WP if p.wp else 0) | (PERM_NX if nx else 0) | (PERM_SMEP if smep else 0)
    if regs.cr4 & CR4_SMAP:
        mode |= PERM_SMAP
    permission_table(p.permissions, mode)
    if p.pke:
        p.pkru_mask = pkru_table(p.wp)


cdef inline void paging_encrypted(Paging *p, int c_bit) noexcept nogil:
    """Of entries that may have a C-bit: it says how memory is read, and is neither address nor reserved.

    APM vol. 2 section 7.10.
    """
    cdef uint64_t others = ~(ONE << c_bit)
    cdef int level
    p.addr_mask &= others
    for level in range(RSVD_LEVELS):
        p.rsvd[0][level] &= others
        p.rsvd[1][level] &= others


cdef inline bint eptp_valid(uint64_t eptp, const CpuModel *model) noexcept nogil:
    """An EPTP that VM entry takes: UC or WB, 4 or 5 levels, no reserved bit (SDM vol. 3C section 25.6.11)."""
    cdef uint64_t memtype = eptp & 7
    cdef uint64_t walk = (eptp >> 3) & 7
    if memtype != 0 and memtype != 6:
        return False
    if walk != 3 and walk != 4:
        return False
    return (eptp & (bits_between(11, 7) | bits_between(63, model.maxphyaddr))) == 0


cdef inline void paging_init_ept(Paging *p, uint64_t eptp, const CpuModel *model, int dialect) noexcept nogil:
    """Tables under an EPTP (bit 6: A/D bits; bits 5:3: levels less one).

    In the access of such a walk PFERR_USER means "reads".
    """
    cdef bint ad = (eptp & EPTP_AD) != 0
    paging_clear(p, FMT_EPT, 5 if ((eptp >> 3) & 7) == 4 else 4, dialect)
    p.fault_kind = FAULT_EPT_VIOLATION
    p.root = eptp & PT_ADDR_MASK
    p.va_limit = bits_between(63, 57 if p.levels == 5 else 48)
    p.accessed = EPT_ACCESSED if ad else 0
    p.dirty = EPT_DIRTY if ad else 0
    p.fetch_bit = <uint32_t>PFERR_FETCH
    rsvd_init_ept(&p.rsvd[0][0], model.maxphyaddr, model.ept_2m, model.ept_1g)
    p.bad_mt_xwr = ept_bad_mt_xwr(model.exec_only)
    permission_table(p.permissions, PERM_EPT)
    p.table_note = EPT_VIOLATION_GVA_VALID
    p.final_note = EPT_VIOLATION_GVA_VALID | EPT_VIOLATION_GVA_TRANSLATED
    if dialect == DIALECT_KVM:
        p.table_access = PFERR_USER | PFERR_WRITE
        p.final_access = PFERR_USER
        p.by_page = 1
    elif ad:
        p.table_access = PFERR_USER | PFERR_WRITE
    else:
        p.table_access = PFERR_USER
        p.update_access = PFERR_USER | PFERR_WRITE


cdef inline void paging_init_npt(Paging *p, uint64_t ncr3, int levels, const CpuModel *model,
                                 int dialect) noexcept nogil:
    """Nested tables under nCR3: long-mode tables of a host with NXE = 1, walked as user accesses.

    APM vol. 2 section 15.25; the host's CR0.WP, SMEP, SMAP and keys do not apply.
    """
    paging_clear(p, FMT_64, levels, dialect)
    p.fault_kind = FAULT_NPF
    p.root = ncr3 & PT_ADDR_MASK
    p.va_limit = bits_between(63, 57 if levels == 5 else 48)
    p.fetch_bit = <uint32_t>PFERR_FETCH
    p.wp = 1
    rsvd_init_64(&p.rsvd[0][0], model.maxphyaddr, True, model.gbpages, dialect == DIALECT_KVM and model.amd)
    permission_table(p.permissions, PERM_WP | PERM_NX)
    p.table_access = PFERR_USER | PFERR_WRITE
    p.final_access = PFERR_USER
    p.table_note = PFERR_GUEST_PAGE
    p.final_note = PFERR_GUEST_FINAL
    p.by_page = dialect == DIALECT_KVM
