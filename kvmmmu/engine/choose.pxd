# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Which kernel batches use on this processor: AVX-512 where there is one and it is faster: a trial of 50 us.

Gathers are slow on processors whose microcode serialises them (Gather Data Sampling, 2023).
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport DIALECT_SDM, CpuModel, CpuRegs, Paging, paging_init
from kvmmmu.engine.batch cimport BATCH_GATHER, BATCH_RING, translate_many
from kvmmmu.engine.gather cimport gather_here
from kvmmmu.engine.memmap cimport memmap_index, memmap_insert, memmap_new
from kvmmmu.engine.state cimport MemMap, Translation

cdef extern from "kvmmmu/gather.h" nogil:
    uint64_t kvmmmu_ticks()

cdef enum:
    TRIAL_ROWS = 512
    TRIAL_ROUNDS = 3

cdef struct Trial:
    uint64_t tables[4][512]
    uint64_t gvas[512]
    Translation rows[512]


cdef inline bint trial_gather_wins(Trial *t) noexcept nogil:
    cdef CpuRegs regs
    cdef CpuModel model
    cdef Paging p, none
    cdef MemMap *m = memmap_new(1)
    cdef uint64_t ticks
    cdef uint64_t[3] best
    cdef int i, _, kernel
    if m == NULL:
        return False
    memset(&regs, 0, sizeof(regs))
    memset(&model, 0, sizeof(model))
    memset(&none, 0, sizeof(none))
    regs.cr0 = CR0_PE | CR0_WP | CR0_PG
    regs.cr4 = CR4_PAE
    regs.efer = EFER_LME | EFER_LMA | EFER_NX
    model.maxphyaddr = 40
    paging_init(&p, &regs, &model, DIALECT_SDM)
    for i in range(3):
        t.tables[i][0] = (<uint64_t>(i + 1) << 12) | PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK
    for i in range(TRIAL_ROWS):
        t.tables[3][i] = (<uint64_t>i << 12) | PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK
        t.gvas[i] = <uint64_t>((i * 181) & (TRIAL_ROWS - 1)) << 12  # every page once
    memmap_insert(m, 0, 4, <uint8_t *>t.tables, False)
    memmap_index(m)
    best[<int>BATCH_RING] = ALL_ONES
    best[<int>BATCH_GATHER] = ALL_ONES
    for _ in range(TRIAL_ROUNDS):
        for kernel in range(BATCH_RING, BATCH_GATHER + 1):
            ticks = kvmmmu_ticks()
            translate_many(&p, &none, m, t.gvas, TRIAL_ROWS, PFERR_USER, False, False, kernel, t.rows)
            ticks = kvmmmu_ticks() - ticks
            if ticks < best[kernel]:
                best[kernel] = ticks
    free(m)
    return best[<int>BATCH_GATHER] < best[<int>BATCH_RING]


cdef inline int batch_kernel() noexcept nogil:
    """BATCH_GATHER or BATCH_RING."""
    cdef Trial trial
    if not gather_here():
        return BATCH_RING
    memset(&trial, 0, sizeof(Trial))
    return BATCH_GATHER if trial_gather_wins(&trial) else BATCH_RING
