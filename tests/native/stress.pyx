# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Everything at once, round after round: vCPUs fault while slots, logs, host pages and quotas change under them.

stress [--seconds N] [--seed S] [--membarrier] [--snapshots] [--plant 1|2]: each round is a new machine under the next
MMU.  The threads look at what they get and stop at the first answer that no order of events allows.  With --snapshots
the state at each round's end goes to standard output (a word with its length, then the words) for whoever checks
invariants; text goes to standard error.  --membarrier: vCPUs mark their lines by plain stores.  --plant 1 is a data
race, 2 a use after free: a sanitizer that finds neither looks at nothing.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uint8_t
from libc.stdio cimport fflush, fprintf, fwrite, stderr, stdout
from libc.stdlib cimport atoi, calloc, free, malloc
from libc.string cimport memset, strcmp
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.atomics cimport (
    READERS_MEMBARRIER, fetch_add_u64, ld_u32, spin_lock, spin_unlock, st_u32,
)
from kvmmmu.engine.claim cimport CLAIM_OK, vcpu_claim, vcpu_claim_enter, vcpu_release
from kvmmmu.engine.dirty cimport dirty_clear, dirty_get
from kvmmmu.engine.drain cimport slots_lock, slots_unlock
from kvmmmu.engine.events cimport events_copy
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.many cimport access_many
from kvmmmu.engine.notifier cimport slot_dontneed, unmap_hva_range
from kvmmmu.engine.registers cimport load_cr3
from kvmmmu.engine.recovery cimport nx_recover
from kvmmmu.engine.roots cimport roots_sync, vcpu_invlpg, vcpu_set_smm
from kvmmmu.engine.snapshot cimport vm_snapshot
from kvmmmu.engine.state cimport (
    Access, ERR_NONE, Event, MMU_EPT, MMU_NPT, MMU_SHADOW, OUTCOME_MMIO, OUTCOME_OK, OUTCOME_PF, Slot, Vcpu, Vm,
)
from kvmmmu.engine.vcpu cimport vcpu_access
from kvmmmu.engine.zap cimport set_max_pages
from world cimport *

cdef extern from "time.h" nogil:
    ctypedef long time_t
    time_t time(time_t *t)

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t *thread, void *attr, void *(*start)(void *) noexcept nogil, void *arg)
    int pthread_join(pthread_t thread, void **result)

cdef extern from "unistd.h" nogil:
    unsigned alarm(unsigned seconds)

cdef enum:
    REGION = 0x200000      # one level-1 table of the guest
    DATA_GVA = 0x10000000  # stable: RAM
    EXTRA_GVA = 0x10200000  # stable, but the slot behind it comes and goes
    DEVICE_GVA = 0x10400000  # stable: never memory
    LOOSE_GVA = 0x10600000  # the guest keeps rewriting these entries
    WINDOW_GVA = 0x10800000  # where it does so
    LARGE_GVA = 0x10a00000  # one 2 MiB page
    OWN_PAGE = 400         # of DATA: page 400 + n belongs to vCPU n, which checks what it stored
    VCPUS = 3
    SMM = 1 << 16          # slots of the other address space
    SMM_RAM = SMM | 10     # there too RAM is RAM
    BATCH = 64
    EVENTS = 4096

cdef struct Stress:
    World *w
    uint32_t stop
    uint32_t wrong
    uint64_t other_cr3
    uint64_t loose_table
    uint64_t operations
    uint64_t planted
    int plant              # a fault for the sanitizer to find: 1 a race, 2 a use after free
    uint32_t extra_lock    # of the buffer behind the slots that come and go
    int max_level          # of what the host backs: 2 has huge pages

cdef struct Thread:
    Stress *s
    int n
    uint64_t seed
    pthread_t thread
    uint64_t stored


cdef inline uint64_t dice(Thread *t, uint64_t sides) noexcept nogil:
    t.seed ^= t.seed << 13
    t.seed ^= t.seed >> 7
    t.seed ^= t.seed << 17
    return (t.seed >> 11) % sides

cdef inline bint going(Thread *t) noexcept nogil:
    return not ld_u32(&t.s.stop)

cdef inline void complain(Thread *t, const char *what, uint64_t gva, const Access *a) noexcept nogil:
    fprintf(stderr, b"thread %d: %s: gva %#llx outcome %d gpa %#llx code %#llx exits %u\n", t.n, what,
            <unsigned long long>gva, <int>a.outcome, <unsigned long long>a.gpa, <unsigned long long>a.error_code,
            a.exits)
    st_u32(&t.s.wrong, 1)
    st_u32(&t.s.stop, 1)


# ---- vCPUs ---------------------------------------------------------------------------

cdef inline void judge(Thread *t, uint64_t gva, const Access *a) noexcept nogil:
    """No order of events allows another answer."""
    cdef uint64_t page = gva & ~<uint64_t>4095
    if a.outcome == OUTCOME_OK or a.outcome == OUTCOME_MMIO:
        if page >= DATA_GVA and page < DATA_GVA + REGION:
            if a.outcome != OUTCOME_OK or a.gpa != DATA + (gva - DATA_GVA):
                complain(t, b"RAM must be RAM", gva, a)
        elif page >= DEVICE_GVA and page < DEVICE_GVA + REGION:
            if a.outcome != OUTCOME_MMIO or a.gpa != MMIO_GPA + (gva - DEVICE_GVA):
                complain(t, b"a device must be a device", gva, a)
        elif page >= EXTRA_GVA and page < EXTRA_GVA + REGION:
            if a.gpa != EXTRA_GPA + (gva - EXTRA_GVA):
                complain(t, b"the slot or a device, at its address", gva, a)
    elif a.outcome != OUTCOME_PF or page < LOOSE_GVA or page >= LOOSE_GVA + REGION:
        complain(t, b"only entries that the guest rewrites may fault", gva, a)

cdef inline uint64_t any_gva(Thread *t) noexcept nogil:
    cdef uint64_t where = dice(t, 10)
    cdef uint64_t page = dice(t, 48) << 12
    if where < 3:
        return DATA_GVA + page
    if where < 5:
        return EXTRA_GVA + page
    if where < 7:
        return DEVICE_GVA + (page & 0x7000)
    if where < 9:
        return LOOSE_GVA + page
    return LARGE_GVA + (dice(t, 512) << 12)

cdef inline uint8_t any_kind(Thread *t, uint64_t gva) noexcept nogil:
    """As ``access_many`` has them.  Only what is always memory can be fetched from."""
    return <uint8_t>dice(t, 3 if gva < DATA_GVA + REGION or gva >= LARGE_GVA else 2)

cdef inline void own_page(Thread *t, Vcpu *vcpu) noexcept nogil:
    """Store to a page of its own, or check what was stored last."""
    cdef Access a
    cdef uint64_t gva = DATA_GVA + (<uint64_t>(OWN_PAGE + t.n) << 12)
    cdef uint64_t value = t.stored + 1
    if dice(t, 2):
        vcpu_access(vcpu, gva, PFERR_WRITE, 8, <uint8_t *>&value, &a)
        t.stored = value
    else:
        vcpu_access(vcpu, gva, 0, 8, <uint8_t *>&value, &a)
        if a.outcome == OUTCOME_OK and value != t.stored:
            complain(t, b"what was stored must be there", gva, &a)
    judge(t, gva, &a)

cdef inline void rewrite_entry(Thread *t, Vcpu *vcpu) noexcept nogil:
    """The guest stores an entry of the loose table through its window."""
    cdef Access a
    cdef uint64_t entry = dice(t, 48)
    cdef uint64_t what = dice(t, 6), value = 0
    if what == 0:
        value = MMIO_GPA + (dice(t, 8) << 12) | FLAGS
    elif what == 1:
        value = EXTRA_GPA + (dice(t, 48) << 12) | FLAGS
    elif what < 5:
        value = DATA + (dice(t, 48) << 12) | (FLAGS if dice(t, 4) else 0x25)
    vcpu_access(vcpu, WINDOW_GVA + 8 * entry, PFERR_WRITE, 8, <uint8_t *>&value, &a)
    if a.outcome != OUTCOME_OK:
        complain(t, b"the window onto the table must stay open", WINDOW_GVA + 8 * entry, &a)
    if dice(t, 2):
        vcpu_invlpg_here(vcpu, LOOSE_GVA + (entry << 12))

cdef inline void vcpu_invlpg_here(Vcpu *vcpu, uint64_t gva) noexcept nogil:
    """As a call of its own: the vCPU leaves the guest by being released and claimed."""
    vcpu_release(vcpu)
    if vcpu_claim(vcpu) == CLAIM_OK:
        vcpu_invlpg(vcpu, gva)

cdef void *vcpu_main(void *arg) noexcept nogil:
    cdef Thread *t = <Thread *>arg
    cdef Vcpu *vcpu = t.s.w.vcpu[t.n]
    cdef Access all[64]
    cdef uint64_t gvas[64]
    cdef uint8_t kinds[64]
    cdef uint64_t what
    cdef int i
    while going(t):
        what = dice(t, 17)
        if (vcpu_claim_enter(vcpu) if what < 6 else vcpu_claim(vcpu)) != CLAIM_OK:
            memset(all, 0, sizeof(Access))
            complain(t, b"nobody else claims this vCPU", 0, all)
            break
        if what < 6:
            gvas[0] = any_gva(t)
            kinds[0] = any_kind(t, gvas[0])
            vcpu_access(vcpu, gvas[0], PFERR_WRITE if kinds[0] == 1 else PFERR_FETCH if kinds[0] else 0, 1, NULL, all)
            judge(t, gvas[0], all)
        elif what < 9:
            for i in range(BATCH):
                gvas[i] = any_gva(t)
                kinds[i] = any_kind(t, gvas[i])
            access_many(vcpu, gvas, kinds, BATCH, 1, all)
            for i in range(BATCH):
                judge(t, gvas[i], &all[i])
        elif what < 11:
            own_page(t, vcpu)
        elif what < 13:
            rewrite_entry(t, vcpu)
        elif what == 13:
            vcpu_invlpg(vcpu, any_gva(t))
        elif what == 14:
            load_cr3(vcpu, t.s.w.cr3 if dice(t, 2) else t.s.other_cr3)
        elif what == 15:
            roots_sync(vcpu)
        else:
            vcpu_set_smm(vcpu, <bint>dice(t, 2))
        vcpu_release(vcpu)
        fetch_add_u64(&t.s.operations, 1)
        if t.s.plant == 1:
            t.s.planted += 1
    return NULL


# ---- those who change things under them ----------------------------------------------

cdef inline uint32_t any_flags(Thread *t) noexcept nogil:
    return MEM_LOG_DIRTY_PAGES if dice(t, 2) else 0

cdef inline void change_extra(Thread *t) noexcept nogil:
    """The buffer goes back to the heap once no slot has it: nobody may touch it after."""
    cdef World *w = t.s.w
    cdef uint64_t what = dice(t, 8)
    spin_lock(&t.s.extra_lock)
    if w.extra == NULL:
        w.extra = <uint8_t *>aligned_alloc(2097152, EXTRA_PAGES << 12)
        memset(w.extra, 0, EXTRA_PAGES << 12)
        slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, any_flags(t), t.s.max_level)
        slot_set(w, SMM | 1, EXTRA_GPA, EXTRA_PAGES, w.extra, any_flags(t), t.s.max_level)
    elif what < 2:
        extra_delete(w)
        slot_set(w, SMM | 1, 0, 0, NULL, 0, 0)
        free(w.extra)
        if t.s.plant == 2:
            t.seed += w.extra[0]
        w.extra = NULL
    elif what < 4:
        # There and back: for a while the guest's address is a device.
        slot_set(w, 1, EXTRA_GPA + 0x2000000, EXTRA_PAGES, w.extra, 0, 0)
        slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, 0, 0)
    elif what == 4:
        # In one address space memory, in the other a device.
        slot_set(w, SMM | 1, 0, 0, NULL, 0, 0)
        slot_set(w, SMM | 1, EXTRA_GPA, EXTRA_PAGES, w.extra, any_flags(t), t.s.max_level)
    else:
        slot_set(w, 1, EXTRA_GPA, EXTRA_PAGES, w.extra, any_flags(t), 0)
        slot_set(w, SMM | 1, EXTRA_GPA, EXTRA_PAGES, w.extra, any_flags(t), 0)
    spin_unlock(&t.s.extra_lock)

cdef inline void change_slot(Thread *t) noexcept nogil:
    cdef World *w = t.s.w
    cdef uint64_t what = dice(t, 4)
    if what == 0:
        slot_set(w, 0, 0, RAM_PAGES, w.ram, any_flags(t), 0)
    elif what == 1:
        slot_set(w, SMM_RAM, 0, RAM_PAGES, w.ram, any_flags(t), 0)
    else:
        change_extra(t)
    # Slots that nobody uses: the tables grow and shrink.
    slot_set(w, 2 + <uint32_t>dice(t, 4), 0x8000000 + (dice(t, 4) << 13), 1, w.ram + (dice(t, 8) << 12), 0, 0)
    slot_set(w, SMM | 2 + <uint32_t>dice(t, 4), 0x8000000 + (dice(t, 4) << 13), 1, w.ram + (dice(t, 8) << 12), 0, 0)
    slot_set(w, 2 + <uint32_t>dice(t, 4), 0, 0, NULL, 0, 0)
    slot_set(w, SMM | 2 + <uint32_t>dice(t, 4), 0, 0, NULL, 0, 0)

cdef void *slots_main(void *arg) noexcept nogil:
    cdef Thread *t = <Thread *>arg
    while going(t):
        change_slot(t)
        fetch_add_u64(&t.s.operations, 1)
    return NULL


cdef inline void collect_log(Thread *t, uint32_t slot, uint64_t pages) noexcept nogil:
    cdef uint64_t words[64]
    slots_lock(t.s.w.vm)
    if dirty_get(t.s.w.vm, slot, words, (pages + 63) >> 6) == 0 and dice(t, 2):
        dirty_clear(t.s.w.vm, slot, 0, pages, words)
    slots_unlock(t.s.w.vm)

cdef inline void host_changes(Thread *t) noexcept nogil:
    """The host takes pages away, below both slots; where there is memory to lose it loses it."""
    cdef World *w = t.s.w
    cdef uint8_t *at
    cdef Slot *slot
    slots_lock(w.vm)
    if dice(t, 2):
        at = w.ram + (dice(t, RAM_PAGES) << 12)
        unmap_hva_range(w.vm, at, at + 4096 * (1 + dice(t, 4)))
    slot = w.vm.slot_by_id[0][0]
    if slot != NULL and dice(t, 4) == 0:
        # Pages that the guest reads and writes, but does not expect to find again.
        slot_dontneed(w.vm, slot, (DATA >> 12) + dice(t, 40), 1 + dice(t, 4))
    slots_unlock(w.vm)

cdef inline void change_quota(Thread *t) noexcept nogil:
    slots_lock(t.s.w.vm)
    mmu_write_lock(t.s.w.vm)
    set_max_pages(t.s.w.vm, 100 + <int64_t>dice(t, 400))
    mmu_write_unlock(t.s.w.vm)
    slots_unlock(t.s.w.vm)

cdef void *host_main(void *arg) noexcept nogil:
    cdef Thread *t = <Thread *>arg
    cdef Event some[32]
    cdef uint64_t what
    while going(t):
        what = dice(t, 10)
        if what < 3:
            collect_log(t, 0 if dice(t, 2) else SMM_RAM, RAM_PAGES)
        elif what == 3:
            collect_log(t, 1 if dice(t, 2) else SMM | 1, EXTRA_PAGES)
        elif what < 6:
            host_changes(t)
        elif what == 6:
            change_quota(t)
        elif what == 7:
            nx_recover(t.s.w.vm, 1 + dice(t, 3))
        else:
            events_copy(&t.s.w.vm.events, some, 32, True)
        fetch_add_u64(&t.s.operations, 1)
    return NULL


cdef extern from "time.h" nogil:
    struct timespec:
        time_t tv_sec
        long tv_nsec
    int nanosleep(const timespec *request, timespec *remain)

cdef void nap() noexcept nogil:
    """The one who only watches the clock leaves the processors to the others."""
    cdef timespec t
    t.tv_sec = 0
    t.tv_nsec = 20000000
    nanosleep(&t, NULL)


# ---- a round -------------------------------------------------------------------------

cdef bint stress_slots(Stress *s) noexcept nogil:
    """RAM in both of the VM's address spaces, as large as this round's host has it."""
    return (slot_set(s.w, 0, 0, 0, NULL, 0, 0) == ERR_NONE
            and slot_set(s.w, 0, 0, RAM_PAGES, s.w.ram, 0, s.max_level) == ERR_NONE
            and slot_set(s.w, SMM_RAM, 0, RAM_PAGES, s.w.ram, 0, s.max_level) == ERR_NONE)

cdef bint stress_guest(Stress *s) noexcept nogil:
    """Two address spaces of the guest that share everything but their top tables."""
    cdef World *w = s.w
    cdef uint64_t i
    for i in range(512):
        map_gva(w, DATA_GVA + (i << 12), DATA + (i << 12))
        map_gva(w, EXTRA_GVA + (i << 12), EXTRA_GPA + (i << 12))
        map_gva(w, DEVICE_GVA + (i << 12), MMIO_GPA + (i << 12))
        map_gva(w, LOOSE_GVA + (i << 12), DATA + (i << 12))
    s.loose_table = gpte_gpa(w, LOOSE_GVA, 1) & ~<uint64_t>4095
    map_gva(w, WINDOW_GVA, s.loose_table)
    ram_word(w, gpte_gpa(w, LARGE_GVA, 2))[0] = 0x600000 | FLAGS | PT_PAGE_SIZE_MASK
    s.other_cr3 = table_new(w)
    for i in range(512):
        ram_word(w, s.other_cr3)[i] = ram_word(w, w.cr3)[i]
    w.vm.events.ring = <Event *>calloc(EVENTS, sizeof(Event))
    w.vm.events.capacity = EVENTS
    w.vm.events.mask = ALL_ONES
    return w.vm.events.ring != NULL

cdef bint put_snapshot(Vm *vm) noexcept nogil:
    cdef uint64_t room = vm_snapshot(vm, NULL, 0)
    cdef uint64_t *words = <uint64_t *>malloc(<size_t>room * 8)
    vm_snapshot(vm, words, room)
    fwrite(&room, 8, 1, stdout)
    fwrite(words, 8, <size_t>room, stdout)
    fflush(stdout)
    free(words)
    return True

cdef int round_run(int number, uint64_t seed, bint snapshots, int plant, bint *membarrier,
                   uint64_t *operations) noexcept nogil:
    """0: nothing was wrong.  ``membarrier``: asked for, and had."""
    cdef Stress s
    cdef Thread threads[8]
    cdef int i, wrong
    cdef time_t end = time(NULL) + 2
    cdef int mmu = MMU_SHADOW
    if number & 3 == 1:
        mmu = MMU_EPT
    elif number & 3 >= 2:
        mmu = MMU_NPT
    memset(&s, 0, sizeof(s))
    s.plant = plant
    s.w = world_new_marked(mmu, VCPUS, number & 3 != 3, membarrier[0])
    # Four rounds of huge pages, four under the NX mitigation, four of small ones.
    s.max_level = 1 if (number >> 2) % 3 == 2 else 2
    if s.w == NULL or not stress_slots(&s) or not stress_guest(&s):
        fprintf(stderr, b"no memory for a machine\n")
        return 2
    membarrier[0] = s.w.vm.reader_protocol == READERS_MEMBARRIER
    s.w.vm.switches.nx_huge_pages = (number >> 2) % 3 == 1
    # 3 vCPUs, two who change slots, one host.
    for i in range(VCPUS + 3):
        threads[i].s = &s
        threads[i].n = i
        threads[i].stored = 0
        threads[i].seed = (seed + <uint64_t>(number * 16 + i + 1)) * GFN_HASH_MULTIPLIER | 1
        pthread_create(&threads[i].thread, NULL,
                       vcpu_main if i < VCPUS else slots_main if i < VCPUS + 2 else host_main, &threads[i])
    alarm(120)
    while time(NULL) < end and not ld_u32(&s.stop):
        nap()
    st_u32(&s.stop, 1)
    for i in range(VCPUS + 3):
        pthread_join(threads[i].thread, NULL)
    alarm(0)
    operations[0] += s.operations
    wrong = <int>s.wrong
    if snapshots:
        put_snapshot(s.w.vm)
    world_end(s.w)
    return wrong

cdef public int native_main(int argc, char **argv) noexcept nogil:
    cdef int i = 1, seconds = 30, number = 0, wrong = 0, plant = 0
    cdef uint64_t seed = 1, operations = 0
    cdef bint snapshots = False, membarrier = False
    cdef time_t end
    while i < argc:
        if strcmp(argv[i], b"--snapshots") == 0:
            snapshots = True
        elif strcmp(argv[i], b"--membarrier") == 0:
            membarrier = True
        elif i + 1 < argc and strcmp(argv[i], b"--seconds") == 0:
            i += 1
            seconds = atoi(argv[i])
        elif i + 1 < argc and strcmp(argv[i], b"--plant") == 0:
            i += 1
            plant = atoi(argv[i])
        elif i + 1 < argc and strcmp(argv[i], b"--seed") == 0:
            i += 1
            seed = <uint64_t>atoi(argv[i])
        else:
            fprintf(stderr, b"usage: stress [--seconds N] [--seed S] [--membarrier] [--snapshots] [--plant 1|2]\n")
            return 2
        i += 1
    end = time(NULL) + seconds
    while not wrong and time(NULL) < end:
        wrong = round_run(number, seed, snapshots, plant, &membarrier, &operations)
        number += 1
    fprintf(stderr, b"stress: %d rounds, %llu operations, readers by %s, %s\n", number, <unsigned long long>operations,
            b"membarrier" if membarrier else b"exchange", b"clean" if not wrong else b"FAILED")
    return wrong
