# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""A small machine for native mains: RAM from gpa 0, a 4-level guest in it, memory for a slot that comes and goes."""

from libc.stdint cimport uint32_t, uint64_t, uint8_t
from libc.stdio cimport printf
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport CpuRegs
from kvmmmu.engine.birth cimport BIRTH_OK, lines_new, vcpu_birth, vm_birth, vm_bury
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim_enter, vcpu_release
from kvmmmu.engine.region cimport vm_set_region
from kvmmmu.engine.registers cimport set_sregs
from kvmmmu.engine.roots cimport vm_teardown
from kvmmmu.engine.state cimport Access, ERR_NONE, MMIO_GENERATION, MMU_NPT, Region, Vcpu, Vm
from kvmmmu.engine.vcpu cimport vcpu_access

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    RAM_PAGES = 2048            # 8 MiB: slot 0
    TABLES = 0x100000           # the guest's tables are taken from here upwards
    DATA = 0x400000             # the upper half of RAM is free for data
    EXTRA_GPA = 0x1000000       # no slot here until slot_create makes one
    EXTRA_PAGES = 1024
    MMIO_GPA = 0x10000000       # never a slot
    GVA = 0x400000              # a convenient guest address
    WORLD_VCPUS = 4
    FLAGS = 0x67                # of a guest entry: P, W, U, A, D
    RW_TABLE = 0x27             # the same for tables: P, W, U, A

cdef struct Walker:
    # A bare lockless walk and what it saw.
    Vcpu *vcpu
    uint64_t address
    uint64_t sptes[6]
    int leaf

cdef struct Toucher:
    # One access and how it ended.
    Vcpu *vcpu
    uint64_t gva
    uint64_t access
    Access a

cdef struct World:
    Vm *vm
    Vcpu *vcpu[4]
    uint8_t *ram
    uint8_t *extra
    uint64_t cr3
    uint64_t next_table
    int failures
    # What threads work on, by thread: they may outlive the case that started them.
    Walker walker[4]
    Toucher toucher[4]

# ---- what a test says -------------------------------------------------------------

cdef inline void expect(World *w, bint truth, const char *what) noexcept nogil:
    """A rule that must hold; the case fails where it does not."""
    if not truth:
        printf("does not hold: %s\n", what)
        w.failures += 1

# ---- the guest's memory, behind KVM's back ------------------------------------------

cdef inline uint64_t *ram_word(World *w, uint64_t gpa) noexcept nogil:
    return <uint64_t *>(w.ram + gpa)

cdef inline uint64_t table_new(World *w) noexcept nogil:
    w.next_table += 4096
    return w.next_table - 4096

cdef inline uint64_t gpte_gpa(World *w, uint64_t gva, int level) noexcept nogil:
    """Where the guest's entry of a level stands; tables on the way are made."""
    cdef uint64_t table = w.cr3
    cdef uint64_t *entry
    cdef int at = 4
    while at > level:
        entry = ram_word(w, table) + ((gva >> (12 + 9 * (at - 1))) & 511)
        if not entry[0] & PT_PRESENT_MASK:
            entry[0] = table_new(w) | RW_TABLE
        table = entry[0] & PT_ADDR_MASK
        at -= 1
    return table + 8 * ((gva >> (12 + 9 * (level - 1))) & 511)

cdef inline void map_gva(World *w, uint64_t gva, uint64_t gpa) noexcept nogil:
    """A 4 KiB mapping with every right; the guest's own tables may be reached by identity."""
    ram_word(w, gpte_gpa(w, gva, 1))[0] = gpa | FLAGS

# ---- slots ---------------------------------------------------------------------------

cdef inline int slot_set(World *w, uint32_t id, uint64_t gpa, uint64_t pages, uint8_t *hva, uint32_t flags,
                         int max_level) noexcept nogil:
    """KVM_SET_USER_MEMORY_REGION; 0 pages deletes.  ERR_*."""
    cdef Region r
    memset(&r, 0, sizeof(r))
    r.slot = id
    r.flags = flags
    r.gpa = gpa
    r.size = pages << 12
    r.hva = hva
    r.host_writable = 1
    r.max_level = max_level
    return vm_set_region(w.vm, &r)

cdef inline int extra_create(World *w, uint32_t flags) noexcept nogil:
    """Slot 1: memory at EXTRA_GPA, of which the first pages are given."""
    return slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, flags, 2)

cdef inline int extra_move(World *w, uint64_t gpa) noexcept nogil:
    return slot_set(w, 1, gpa, EXTRA_PAGES, w.extra, 0, 0)

cdef inline int extra_flags(World *w, uint32_t flags) noexcept nogil:
    return slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, flags, 0)

cdef inline int extra_delete(World *w) noexcept nogil:
    return slot_set(w, 1, 0, 0, NULL, 0, 0)

# ---- the machine -----------------------------------------------------------------------

cdef inline void host_default(Vm *vm) noexcept nogil:
    """The host of ``km.HostCpu()``, but for the width of its addresses."""
    vm.host.maxphyaddr = 46
    vm.host.phys_bits = 46
    vm.host.gbpages = 1
    vm.host.cache_bits = 46
    vm.host.ept_ad = 1
    vm.host.ept_exec_only = 1
    vm.host.ept_1g = 1
    vm.host.ept_2m = 1
    vm.host.amd = vm.mmu == MMU_NPT
    vm.switches.mmio_scheme = MMIO_GENERATION
    vm.switches.tdp_mmu = 1
    vm.switches.eager_split = 1

cdef inline bint vcpu_start(World *w, Vcpu *vcpu) noexcept nogil:
    """Long mode, 4 levels, the world's tables."""
    cdef CpuRegs regs
    memset(&regs, 0, sizeof(regs))
    regs.cr0 = CR0_PE | CR0_PG | CR0_WP
    regs.cr3 = w.cr3
    regs.cr4 = CR4_PAE
    regs.efer = EFER_LME | EFER_LMA | EFER_NX
    return set_sregs(vcpu, &regs) == 0

cdef inline World *world_new(int mmu, int vcpus, bint tdp_mmu) noexcept nogil:
    """Slot 0 is RAM; every vCPU has paging on.  NULL: the machine has no memory."""
    return world_new_marked(mmu, vcpus, tdp_mmu, False)

cdef inline World *world_new_marked(int mmu, int vcpus, bint tdp_mmu, bint plain_marks) noexcept nogil:
    """The same where vCPUs mark their lines by plain stores, if the system lets them."""
    cdef World *w = <World *>calloc(1, sizeof(World))
    cdef Vcpu *vcpu
    cdef int i
    w.vm = <Vm *>lines_new(sizeof(Vm))
    w.ram = <uint8_t *>aligned_alloc(2097152, RAM_PAGES << 12)
    w.extra = <uint8_t *>aligned_alloc(2097152, EXTRA_PAGES << 12)
    memset(w.ram, 0, RAM_PAGES << 12)
    memset(w.extra, 0, EXTRA_PAGES << 12)
    w.vm.mmu = mmu
    host_default(w.vm)
    w.vm.switches.tdp_mmu = tdp_mmu
    w.vm.plain_marks = plain_marks
    if vm_birth(w.vm) != BIRTH_OK:
        return NULL
    w.next_table = TABLES
    w.cr3 = table_new(w)
    if slot_set(w, 0, 0, RAM_PAGES, w.ram, 0, 1) != ERR_NONE:
        return NULL
    for i in range(vcpus):
        vcpu = <Vcpu *>lines_new(sizeof(Vcpu))
        vcpu.model.maxphyaddr = 40
        vcpu.model.gbpages = 1
        if vcpu_birth(w.vm, vcpu) != BIRTH_OK or not vcpu_start(w, vcpu):
            return NULL
        w.vcpu[i] = vcpu
    return w

cdef inline int world_end(World *w) noexcept nogil:
    """Take it down; how many rules did not hold."""
    cdef int failures = w.failures
    vm_teardown(w.vm)
    vm_bury(w.vm)
    free(w.ram)
    free(w.extra)
    free(w)
    return failures

cdef inline Access world_access(Vcpu *vcpu, uint64_t gva, uint64_t access) noexcept nogil:
    """One access of one byte, the vCPU claimed as by the doors that make one."""
    cdef Access a
    memset(&a, 0, sizeof(a))
    if vcpu_claim_enter(vcpu) == CLAIM_OK:
        vcpu_access(vcpu, gva, access, 1, NULL, &a)
        vcpu_release(vcpu)
    return a
