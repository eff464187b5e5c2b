# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Paging formats: what the registers and the CPU model say about entries."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    FMT_NONE = 0  # paging off: gva == gpa
    FMT_32 = 1    # 4-byte entries, 2 levels
    FMT_PAE = 2   # 8-byte entries, PDPTE registers + 2 levels
    FMT_64 = 3    # 8-byte entries, 4 or 5 levels (NPT too)
    FMT_EPT = 4   # EPT entries, 4 or 5 levels

cdef enum:
    DIALECT_SDM = 0  # what the manuals say the processor does
    DIALECT_KVM = 1  # what KVM's software walker does

cdef struct CpuRegs:
    uint64_t cr0
    uint64_t cr3
    uint64_t cr4
    uint64_t efer
    uint64_t pdptr[4]  # PDPTE registers; read only in PAE paging
    uint32_t pkru

cdef struct CpuModel:
    uint8_t maxphyaddr  # bits
    uint8_t gbpages     # 1 GiB leaves allowed
    uint8_t amd         # bit 8 of PML4E/PML5E reserved in KVM's walker
    uint8_t exec_only   # EPT: 100b entries allowed
    uint8_t ept_2m      # EPT: 2 MiB leaves allowed
    uint8_t ept_1g      # EPT: 1 GiB leaves allowed

cdef struct Paging:
    int format           # FMT_*
    int levels           # 0, 2, 3, 4, 5
    int dialect          # DIALECT_*
    uint64_t root        # table address in CR3 / EPTP / nCR3 (PAE: PDPT address)
    uint64_t pdptr[4]    # PAE
    uint64_t addr_mask   # address bits of an entry, before the cut to its level
    uint64_t rsvd[2][6]  # reserved bits by [bit 7][level]
    uint64_t bad_mt_xwr  # EPT: bit n set when entry bits 5:0 == n misconfigure
    uint8_t permissions[16]  # bit n of [pfec >> 1]: ACC value n faults
    uint32_t pkru_mask   # 2 bits per pfec index
    uint32_t pkru
    uint32_t fetch_bit   # PFERR_FETCH where fetch faults report I/D, else 0
    uint8_t pse          # 32-bit: bit 7 of a PDE makes a leaf
    uint8_t pse36_high   # PDE bits 13 .. 13+n-1 are address bits 32 ..
    uint8_t ad           # entries have A/D bits
    uint8_t va_bits      # canonical width; 0: truncate to 32 bits
    uint8_t leaf_max     # highest level where bit 7 makes a leaf without fault (unused by EPT)
    uint8_t pke
    uint8_t wp
