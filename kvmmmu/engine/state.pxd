# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Every struct of the machine.  All state hangs from ``Vm`` and ``Vcpu``; no globals.

Numbers that name things are ids into columns: page 0 is never a shadow page,
spte index = page * 512 + entry, so 0 never names an spte either.
"""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from kvmmmu.bits.paging cimport CpuModel, CpuRegs, Paging
from kvmmmu.bits.guest_walk cimport Walk
from kvmmmu.bits.spte cimport SpteMasks
from kvmmmu.engine.answers cimport (
    Access, OUTCOME_ERROR, OUTCOME_GP, OUTCOME_HANG, OUTCOME_INTERNAL_ERROR, OUTCOME_MMIO, OUTCOME_OK, OUTCOME_PF,
    OUTCOME_SHUTDOWN, OUTCOME_VE, PATH_EMULATED, PATH_FAULT, PATH_HARDWARE, Translation,
)

cdef extern from "kvmmmu/lock.h" nogil:
    cdef struct kvmmmu_line:
        uint64_t mode
    cdef struct kvmmmu_rwlock:
        uint32_t writer

cdef enum:
    ERR_NONE = 0
    ERR_NOMEM = -12       # ENOMEM
    ERR_EXIST = -17       # EEXIST
    ERR_INVAL = -22       # EINVAL
    ERR_NOSPC = -28       # ENOSPC: the shadow-page arena or quota is exhausted
    ERR_NOENT = -2        # ENOENT
    ERR_BUSY = -16        # EBUSY: a vCPU runs
    ERR_FAULT = -14       # EFAULT

cdef enum:
    ADDRESS_SPACES = 2
    MAX_VCPUS = 64
    PAGE_CACHE = 8        # free pages a vCPU keeps for faults that hold mmu_lock for read
    MAX_SLOT_ID = 32764   # user slots are 0 .. MAX_SLOT_ID-1
    MAX_SLOT_PAGES = 2147483647
    MIN_MMU_PAGES = 64
    SLOT_PAGES_PER_MMU_PAGE = 50
    PREV_ROOTS = 3
    PTE_LIST_EXT = 14
    HASH_BITS = 12
    ARENA_PAGES = 1048576    # 4 GiB of sptes, reserved, not committed; arena pfns are 0 .. ARENA_PAGES-1
    ARENA_DESCS = 536870912  # pte list blocks reserved: one for every spte of the arena
    HOST_STATES = 1073741824  # frames that have a host page state (4 TiB); those beyond count as present
    RANGE_PFN_ALIGN = 262144  # each host range starts at a 1 GiB boundary

cdef enum:
    MMU_SHADOW = 0
    MMU_EPT = 1
    MMU_NPT = 2

cdef enum:
    MMIO_OFF = 0
    MMIO_ZAP_ALL = 1
    MMIO_GENERATION = 2
    MMIO_UNGUARDED = 3    # the mail of 2011: cached, and nothing undoes it when slots change

# ---- guest memory -----------------------------------------------------------

cdef enum:
    MEMMAP_LINE = 8       # words of a cache line: what a search of ``first`` ends in
    MEMMAP_NODE = 16      # keys of a node of the index, two lines
    MEMMAP_LEVELS = 7     # 8 * 16^7 areas

cdef struct MemMap:
    # Areas of frames in ascending order, as columns: what every walk reads memory through.
    int n
    int levels            # of the index; 0: ``first`` is one line
    uint64_t serial       # of the maps a VM has published: an address it gave holds as long
    uint64_t *first       # first frame of each area; ALL_ONES behind the last one of a line that is not full
    uint64_t *npages
    uint8_t **host        # host address of its first byte; NULL: no memory there
    uint8_t *writable
    uint64_t *level[7]    # level[0]: the first frame of each line; above it the first key of each node, up to one node

cdef struct HostRange:
    # A run of host pages that the same number of slots bind; disjoint from every other run.
    uint8_t *host
    uint64_t npages
    uint64_t base_pfn
    uint32_t users        # slots that bind these bytes
    uint8_t max_level     # largest mapping the host backs them with: 1, 2 or 3
    uint8_t writable

cdef struct Segment:
    # Pages of a slot whose frames follow each other.
    uint64_t first        # page number within the slot
    uint64_t npages
    uint64_t pfn
    uint8_t max_level     # of the host's backing

cdef struct Slot:
    uint64_t base_gfn
    uint64_t npages
    uint8_t *hva          # host address of the first byte
    uint64_t base_pfn     # frame of the first page; frames follow it when n_segments is 1
    int n_segments
    Segment *segments     # owned; by page number
    uint32_t flags        # MEM_LOG_DIRTY_PAGES | MEM_READONLY | MEMSLOT_INVALID
    uint32_t id
    uint32_t as_id
    uint64_t token        # names the Python buffer export that keeps hva alive
    void *arrays          # owned: the one block in which the next three stand
    uint64_t *rmap[3]     # [level-1]: one head word per frame of that size
    uint32_t *disallow[2]  # [level-2]: reasons against a large page there
    uint16_t *write_track  # shadow pages of level > 1 (and other trackers) per gfn
    uint64_t *dirty       # owned: dirty bitmap, one bit per page, or NULL

cdef struct SlotSet:
    # One published, immutable table of an address space's slots.
    MemMap map            # by gfn; an INVALID slot keeps its place, its host is NULL
    Slot **slot           # parallel to map
    uint64_t generation   # bit 63: an update is in flight

cdef enum:
    CHANGE_NONE = 0
    CHANGE_CREATE = 1
    CHANGE_DELETE = 2
    CHANGE_MOVE = 3
    CHANGE_FLAGS = 4

# Why a region was refused; what a message needs beyond the errno.
cdef enum:
    WHY_NONE = 0
    WHY_ID
    WHY_FLAGS
    WHY_SIZE_ALIGN
    WHY_GPA_ALIGN
    WHY_HVA_ALIGN
    WHY_AS_ID
    WHY_WRAP
    WHY_TOO_MANY_PAGES
    WHY_NO_SLOT
    WHY_TOTAL_PAGES
    WHY_HVA_CHANGED
    WHY_SIZE_CHANGED
    WHY_READONLY_CHANGED
    WHY_OVERLAP
    WHY_MAX_GFN
    WHY_NO_MEMORY
    WHY_INCONGRUENT
    WHY_BACKING
    WHY_NO_FRAMES
    WHY_CLOSED
    WHY_HELD
    WHY_LIVE_SPTES

cdef struct Region:
    # The arguments of KVM_SET_USER_MEMORY_REGION and what came of them.
    uint32_t slot         # as_id << 16 | id
    uint32_t flags
    uint64_t gpa
    uint64_t size         # bytes; 0 deletes
    uint8_t *hva
    uint8_t keep_memory   # hva and size are those the slot has
    uint8_t host_writable  # the buffer may be written
    uint8_t hold          # of a deletion: stop while the slot is INVALID
    uint8_t max_level     # backing wanted for bytes not bound yet: 1, 2, 3; 0: 1, and no opinion on bound ones
    uint32_t pfn_offset   # of a new host range within its 1 GiB, in pages
    uint64_t token        # of the buffer export behind hva
    int change            # out: CHANGE_*
    int why               # out: WHY_*
    uint64_t detail       # out: the number the message needs
    uint64_t released     # out: token whose export nobody uses any more, 0 = none

# ---- shadow pages -----------------------------------------------------------

cdef struct ShadowPage:
    # 64 bytes: what a fault touches of a page besides its entries.
    uint64_t gfn
    uint64_t parents      # pte list of the sptes that point here
    uint32_t role
    int32_t root_count
    int32_t hash_next
    int32_t hash_prev
    int32_t list_next     # active, invalid or free list
    int32_t list_prev
    int32_t nx_next       # NX huge page recovery list
    int32_t nx_prev
    uint16_t unsync_children
    uint8_t unsync
    uint8_t valid_gen
    uint32_t flooding     # emulated writes since the last use by a fault
    uint8_t tdp           # owned by the TDP MMU
    uint8_t nx_disallowed
    uint8_t on_list       # LIST_*
    uint8_t special       # a PAE root table: entries, but no gfn, role or list
    uint32_t slot_bits    # slots (id mod 32) that a leaf here was ever made for

cdef enum:
    LIST_NONE = 0
    LIST_FREE = 1
    LIST_ACTIVE = 2
    LIST_INVALID = 3
    LIST_CACHED = 4       # a vCPU's own free page

cdef struct PteDesc:
    # 14 spte indices; the block is found by id through the head word or ``more``.
    uint64_t sptes[14]
    uint32_t more
    uint32_t count

cdef struct PageList:
    int32_t head
    int32_t tail
    int64_t n

cdef struct Arena:
    uint64_t *sptes       # ARENA_PAGES * 512, reserved once: addresses never move
    uint64_t *shadowed    # per spte of an indirect page: gfn << 12 | access
    ShadowPage *page      # by id
    uint64_t *unsync_bits  # 8 words per page: children that are unsync or have such
    PteDesc *desc         # descriptor blocks by id; 0 is never a block
    uint32_t desc_top
    uint32_t desc_free    # chain through ``more``
    int32_t free          # chain through ``list_next``
    uint32_t lock         # of free and top
    uint32_t doomed       # torn down under mmu_lock held for read: freed by its next holder for write
    int32_t top           # pages [1, top) have been used at least once
    int32_t limit         # pages this VM may ever hold

# ---- observation ------------------------------------------------------------

cdef struct Event:
    uint32_t kind         # EV_*, stored last: 0 while the record is being written
    uint32_t vcpu         # id, or ~0 for the VM
    uint64_t w[7]         # fields, by kind

cdef struct EventRing:
    uint64_t mask         # bit EV_*: recorded
    Event *ring
    uint64_t capacity     # a power of two, or 0
    uint64_t head         # records ever written
    uint64_t tail         # records ever read
    uint64_t dropped

# By tracepoint; the fields w[0..6] of each stand in events.pxd.  Append only, below 64.
cdef enum:
    EV_NONE = 0
    EV_KVM_MMU_PAGETABLE_WALK
    EV_KVM_MMU_PAGING_ELEMENT
    EV_KVM_MMU_SET_ACCESSED_BIT
    EV_KVM_MMU_SET_DIRTY_BIT
    EV_KVM_MMU_WALKER_ERROR
    EV_KVM_MMU_GET_PAGE
    EV_KVM_MMU_SYNC_PAGE
    EV_KVM_MMU_UNSYNC_PAGE
    EV_KVM_MMU_PREPARE_ZAP_PAGE
    EV_MARK_MMIO_SPTE
    EV_HANDLE_MMIO_PAGE_FAULT
    EV_CHECK_MMIO_SPTE
    EV_FAST_PAGE_FAULT
    EV_KVM_MMU_ZAP_ALL_FAST
    EV_KVM_MMU_SET_SPTE
    EV_KVM_MMU_SPTE_REQUESTED
    EV_KVM_TDP_MMU_SPTE_CHANGED
    EV_KVM_MMU_SPLIT_HUGE_PAGE
    EV_KVM_PAGE_FAULT
    EV_VCPU_MATCH_MMIO
    EV_KVM_MMIO
    EV_KVM_FAST_MMIO
    EV_KVM_INJ_EXCEPTION
    EV_KVM_EMULATE_INSN
    EV_KVM_UNMAP_HVA_RANGE
    EV_KVM_SET_SPTE_HVA
    EV_KVM_AGE_HVA
    EV_KVM_TEST_AGE_HVA
    EV_KVM_EXIT
    EV_KVM_CR
    EV_KVM_MSR
    EV_KVM_AGE_PAGE
    EV_KINDS

# The order is the order of the names in _core; append only.
cdef enum:
    STAT_MMU_SHADOW_ZAPPED = 0
    STAT_MMU_PTE_WRITE
    STAT_MMU_PDE_ZAPPED
    STAT_MMU_FLOODED
    STAT_MMU_RECYCLED
    STAT_MMU_CACHE_MISS
    STAT_MMU_UNSYNC
    STAT_PAGES_4K
    STAT_PAGES_2M
    STAT_PAGES_1G
    STAT_NX_LPAGE_SPLITS
    STAT_MAX_MMU_RMAP_SIZE
    STAT_MAX_MMU_PAGE_HASH_COLLISIONS
    STAT_REMOTE_TLB_FLUSH
    STAT_REMOTE_TLB_FLUSH_REQUESTS
    STAT_MMU_PTE_UPDATED
    VM_STATS

cdef enum:
    VSTAT_PF_TAKEN = 0
    VSTAT_PF_FIXED
    VSTAT_PF_EMULATE
    VSTAT_PF_SPURIOUS
    VSTAT_PF_FAST
    VSTAT_PF_MMIO_SPTE_CREATED
    VSTAT_PF_GUEST
    VSTAT_TLB_FLUSH
    VSTAT_INVLPG
    VSTAT_MMIO_EXITS
    VSTAT_INSN_EMULATION
    VSTAT_INSN_EMULATION_FAIL
    # Not KVM's: how MMIO accesses were served, and what the slow way costs.
    VSTAT_MMIO_CACHE_HIT
    VSTAT_MMIO_SPTE_HIT
    VSTAT_MMIO_SLOW
    VSTAT_SLOT_SEARCH
    VSTAT_GUEST_WALK
    VSTAT_MMIO_REFILL     # of the hits on an mmio spte: a flush had emptied the record of the last page
    # Not KVM's either: the processor's caches of translations, counted while the vCPU has some.
    VSTAT_TLB_HIT
    VSTAT_TLB_MISS
    VSTAT_TLB_NESTED_HIT    # of guest-physical mappings, by walks in two dimensions
    VSTAT_TLB_NESTED_MISS
    VSTAT_WALK_CACHE_HIT    # walks that began below the top table
    VSTAT_WALK_REF_L1       # entries read by the level they stand at; the next four follow
    VSTAT_WALK_REF_L5 = VSTAT_WALK_REF_L1 + 4
    VSTAT_NESTED_REF_L1     # the same in the second dimension
    VSTAT_NESTED_REF_L5 = VSTAT_NESTED_REF_L1 + 4
    VCPU_STATS

# ---- vCPUs ------------------------------------------------------------------

cdef enum:
    REQ_FREE_OBSOLETE_ROOTS = 1
    REQ_MMU_SYNC = 2
    REQ_LOAD_PGD = 4
    REQ_TLB_FLUSH = 8
    REQ_TLB_FLUSH_CURRENT = 16
    REQ_TLB_FLUSH_GUEST = 32
    REQ_TRIPLE_FAULT = 64
    REQ_KICK = 128        # leave the guest, nothing else: somebody waits for that

cdef enum:
    TLB_SIZES = 3         # 4 KiB, 2 MiB, 1 GiB
    TLB_PCIDS = 4096
    TLB_MET = 64          # a power of two
    PSC_LEVELS = 6        # by level; an entry of level 1 is never a table's
    # Kinds of access that an entry may refuse.
    TLB_READ = 1
    TLB_WRITE = 2
    TLB_FETCH = 4

cdef struct TlbEntry:
    uint64_t key          # page number << 6 | bits of the offset in the page
    uint64_t context      # whose it is (tlbcache.pxd); 0: nobody's
    uint64_t hpa          # of the page's first byte
    uint64_t gpa          # the same, guest-physical
    uint64_t used         # when last, by the TLB's own clock
    int32_t root          # KVM's page that the walk began at
    uint8_t acc           # ACC rights of the tables that map the address
    uint8_t pkey
    uint8_t refuse        # TLB_*: kinds that must be walked whatever ``acc`` says (D is clear, the second dimension)
    uint8_t linear_shift  # of the mapping that this entry may be a part of

cdef struct TlbArray:
    TlbEntry *entries     # sets * ways
    uint64_t mask         # sets - 1
    uint32_t ways         # 0: there is none

cdef struct TlbMet:
    # What the arrays gave for a 4 KiB page when they were last searched for it.
    uint64_t page
    TlbEntry *entry

cdef struct PscEntry:
    # A paging-structure cache's entry: what an entry that points to a table said (SDM vol. 3A section 4.10.3).
    uint64_t key          # address above the bits that the table translates
    uint64_t context
    uint64_t hpa          # of the table
    uint64_t gpa          # the same, guest-physical
    uint64_t used
    int32_t root
    uint32_t acc          # ACC rights down to and with the entry

cdef struct PscArray:
    PscEntry *entries
    uint64_t mask
    uint32_t ways

cdef struct Tlb:
    # One vCPU's; touched by its thread alone.
    uint64_t context      # of what is cached now for the current PCID
    uint64_t global_context
    uint64_t psc_context
    uint64_t host_context  # of guest-physical mappings
    uint64_t clock
    uint64_t all_epoch    # each flush moves an epoch, and every entry of the one before is gone
    uint64_t global_epoch
    uint64_t host_epoch
    uint64_t tables_epoch  # of the paging-structure caches of all PCIDs
    uint64_t moves        # of any epoch: none of them, nor a sum of them, is larger
    uint64_t *pcid_epoch  # TLB_PCIDS of them
    uint64_t *psc_epoch   # the same
    TlbEntry *last[2]     # last hit: data, fetch
    TlbMet met[TLB_MET]   # by page number
    uint64_t missed       # the page for which they gave nothing, and none was entered since; all ones: none
    TlbEntry nothing      # what these point to before the first hit
    TlbArray first[3]     # by size
    TlbArray second       # 4 KiB and 2 MiB
    TlbArray nested       # guest-physical mappings of all sizes
    PscArray psc[6]       # by level, of tables that translate linear addresses
    PscArray host_psc[6]  # the same for guest-physical addresses
    uint8_t sizes         # bit n: a page of size n may be cached
    uint8_t nested_sizes
    uint8_t split         # some entry is a part of a larger mapping
    uint8_t spurious_faults  # a refused access faults at once, unwalked

cdef struct Root:
    uint64_t pgd          # CR3 / PDPT address it was built for
    int32_t page          # arena id; 0 = no root
    uint32_t role

cdef struct MmioCache:
    uint64_t gva          # page address, 0 = none
    uint64_t gfn          # 0 = none: gfn 0 can never hit
    uint32_t access
    uint64_t generation

cdef struct Fault:
    # One page fault on its way through the handler.
    uint64_t addr         # gva (shadow) or gpa (direct)
    uint64_t error_code   # PFERR_*
    uint8_t write
    uint8_t fetch
    uint8_t user
    uint8_t present
    uint8_t rsvd
    uint8_t prefetch
    uint8_t map_writable
    uint32_t seq          # notifier_seq when the fault began
    uint8_t self_change   # the write goes to a table page of its own walk
    uint8_t huge_page_disallowed
    int max_level
    int req_level
    int goal_level
    uint64_t gfn
    Slot *slot
    uint64_t pfn
    uint32_t access       # ACC rights of the guest's translation

cdef enum:
    NESTED_PATHS = 64     # of each kind
    NESTED_ENTRIES = 30   # two dimensions of five levels need 29 at most

cdef struct NestedPath:
    # Entries above a leaf that led there once (nestedpaths.pxd).
    uint64_t key          # address >> 21; none has all ones
    uint64_t formats      # NestedPaths.formats, the map of host memory and the root it was taken down under
    uint64_t serial
    uint64_t root
    const uint8_t *table  # the lowest table in host memory
    uint64_t place        # its address, or where the large page's entry stands
    uint64_t entry        # or the large page's entry
    uint64_t accessed     # A, if every entry of the tables has it
    uint32_t acc          # ACC rights of all
    int level             # of the leaf
    int n
    const uint64_t *at[NESTED_ENTRIES]
    uint64_t word[NESTED_ENTRIES]

cdef struct NestedPaths:
    uint64_t formats      # moves when the formats of the tables do, or where the guest's begin
    uint64_t guest_met[NESTED_PATHS]  # keys met once: a path is kept for who comes again
    uint64_t final_met[NESTED_PATHS]
    NestedPath guest[NESTED_PATHS]
    NestedPath final[NESTED_PATHS]

cdef struct Vcpu:
    Vm *vm
    int id
    kvmmmu_line *line     # this vCPU's own cache line: who runs it, what it is doing (lock.h)
    CpuRegs regs
    CpuModel model        # what the guest's CPUID says
    uint64_t cr4_absent   # control bits of features that it says are not there
    uint64_t efer_absent
    uint8_t cpl
    uint8_t ac            # EFLAGS.AC
    uint8_t long_cs       # CS.L: 64-bit code
    uint8_t smm           # address space 1
    uint8_t guest_mode    # runs the guest of a hypervisor in the guest: addresses are L2 gpas, ncr3 translates them
    uint64_t ncr3         # nested CR3 in guest mode: root of L1's tables
    uint32_t requests     # REQ_*, set by any thread
    uint64_t rip          # of the instruction at work, for tracepoints
    uint64_t retry_rip    # the instruction last resumed instead of emulated, and its fault address
    uint64_t retry_address
    uint8_t vectoring     # the exception being delivered by the access, 0 = none
    uint8_t mmio_hit      # the last fault was served by the record of the last MMIO page, or by an mmio spte
    int slot_hint         # last slot found, checked before use
    int mem_hint          # last host area of guest memory the processor read
    int table_hint        # the same for the tables KVM built
    Paging guest          # the guest's tables as KVM's walker sees them
    Paging guest_hw       # the same as the processor does (TDP)
    Paging hw             # the tables the processor walks: shadow, EPT or NPT
    uint64_t cpu_role     # base | extended << 32
    uint32_t root_role
    Root root
    Root prev_roots[3]
    int32_t last_root     # the root last loaded: what there is to look at while none is
    int32_t pae_root      # special page with 4 entries, made on first need
    MmioCache mmio
    uint64_t role_nx      # EFER.NX as the last WRMSR set it: what a role says where SREGS is not asked
    uint64_t written_gfn  # the table the guest wrote last by emulation, and how often in a row
    uint32_t written_times
    uint64_t ahead_spte   # the spte last made ahead of its use, and its gfn: was it used, the table is alive
    uint64_t ahead_gfn
    uint64_t stats[64]    # written by the owner of the vCPU alone
    uint64_t leaves[3]    # by level: what its faults under mmu_lock for read added to the VM's STAT_PAGES_*
    Tlb *tlb              # NULL: the processor caches nothing
    NestedPaths *paths
    int32_t free_pages[8]  # taken from the arena before mmu_lock
    int n_free_pages
    uint32_t lonely_exits  # of the present access, in a row, with nobody else at work in the VM
    Walk walk             # the last guest walk (KVM's or the processor's)
    Walk nested           # the last walk of the second dimension, or of shadow tables

# ---- the machine ------------------------------------------------------------

cdef struct HostCpu:
    uint8_t maxphyaddr    # raw CPUID value
    uint8_t phys_bits     # after memory-encryption key bits
    uint8_t gbpages
    uint8_t l1tf
    uint8_t cache_bits
    uint8_t ept_ad
    uint8_t ept_exec_only
    uint8_t ept_1g
    uint8_t ept_2m
    uint8_t amd           # vendor
    uint8_t la57          # five-level host tables
    uint8_t ept_checks_updates  # guest A/D updates need W in EPT when EPT A/D is off
    uint8_t ad_first      # guest A/D bits are set before the address itself is translated
    uint8_t rsvd_alone    # a reserved-bit fault is reported without P
    uint8_t c_bit         # position of the bit that marks encrypted memory; 0: none
    uint8_t sme           # the host's kernel sets it, also in KVM's tables
    uint8_t mmio_by_hand  # the next three replace what the host would choose
    uint64_t mmio_value
    uint64_t mmio_mask
    uint64_t mmio_access

cdef struct Switches:
    # A behaviour profile: named differences between eras, each settable alone.
    uint8_t mmio_scheme
    uint8_t tdp_mmu
    uint8_t nx_huge_pages
    uint8_t eager_split   # split huge mappings when dirty logging starts
    uint64_t era          # ERA_*: each a decision that older kernels take otherwise
    uint8_t manual_protect  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: bit 0 manual, bit 1 initially set

cdef struct Vm:
    int mmu               # MMU_*
    uint8_t tdx           # the shared half of a TDX guest's memory
    HostCpu host
    Switches switches
    SpteMasks masks
    Paging spte_format    # KVM's tables in the format the processor walks; root and roles filled per vCPU
    kvmmmu_rwlock *mmu_lock
    uint8_t plain_marks   # asked for: vCPUs mark their lines by plain stores (lock.h)
    uint8_t reader_protocol  # what came of it, KVMMMU_READERS_*
    kvmmmu_line *lines[65]  # 0: the VM's own, for who holds slots_lock; then those of the vCPUs
    int n_lines           # published last
    Vcpu *vcpus[64]
    int n_vcpus
    # memory
    uint32_t slots_lock   # serialises slot changes
    MemMap *hostmem       # by pfn: area 0 is the arena, then the host ranges; published with release
    HostRange *ranges
    int n_ranges
    int ranges_capacity
    SlotSet *slots[2]     # published with release, by address space
    Slot **slot_by_id[2]  # MAX_SLOT_ID entries each; under slots_lock
    void *held            # a deletion held open between its two swaps (region.pxd, Held), or NULL
    uint64_t *last_base[2]  # by id: base gfn named in its last change (3.1's rule for zapping all)
    uint8_t *host_states  # by pfn: HOSTPAGE_*; reserved, untouched while every page is present
    uint8_t host_states_used
    uint32_t notifier_seq  # moves when the host takes a page away: a fault that raced is dropped
    uint32_t notifier_active  # invalidations of host pages at work: nothing is mapped meanwhile
    uint32_t host_lock    # serialises changes of host page states; taken before mmu_lock
    void (*notify_replaced)(Vm *vm, uint8_t *hva) noexcept nogil  # upward: the host copied a page
    int slot_hint[2]      # last slot found under mmu_lock for write, by address space
    uint64_t total_pages  # in slots of address space 0 and 1
    # shadow pages
    Arena arena
    int32_t *hash         # 2^HASH_BITS heads
    PageList active       # head = newest
    int64_t used_pages    # shadow-MMU pages counted against the limit
    int64_t max_pages
    int64_t requested_pages  # by SET_NR_MMU_PAGES; 0 = follow the slots
    int64_t indirect_pages
    uint8_t valid_gen
    uint8_t rmaps         # slots carry rmaps (shadow MMU in use)
    int32_t tdp_roots     # chain through list_next
    uint32_t nx_lock      # guards the next two and the pages' links between them
    int32_t nx_head       # tables in the place of a huge page, oldest first; 0 = none
    int32_t nx_tail
    uint32_t closed       # 1 once closed: no vCPU may be claimed any more
    uint64_t stats[32]
    EventRing events

# ---- one access: what becomes of it stands in answers.pxd -----------------------------

cdef enum:
    SUBERROR_EMULATION = 1
    SUBERROR_DELIVERY_EV = 3   # an exit that cannot be handled while an exception is delivered

# ---- one instruction ----------------------------------------------------------------

cdef enum:
    INSN_LOAD = 0
    INSN_STORE = 1
    INSN_FETCH = 2      # a jump: the fetch of its target
    INSN_ADD = 3        # read, modify, write
    INSN_CMPXCHG = 4    # locked
    INSN_MOVS = 5       # memory to memory

cdef struct MmioExit:
    uint64_t gpa
    uint64_t data
    uint8_t size
    uint8_t write

cdef struct Insn:
    uint64_t gva          # the operand, or where MOVS writes
    uint64_t src          # where MOVS reads
    uint64_t value        # stored or added
    uint64_t expected     # CMPXCHG: what must be there
    uint64_t code_gva     # where the instruction stands
    uint8_t code_size     # its bytes
    uint8_t op            # INSN_*
    uint8_t size          # of the operand: 1, 2, 4 or 8
    uint8_t split_rmw     # the processor reports a faulting ADD or CMPXCHG as a read first
    uint8_t refetch       # the instruction is fetched again after every exit
    uint8_t known         # the emulator has the operand's gpa from the exit
    uint64_t known_gpa
    # out
    uint64_t result       # loaded, or what CMPXCHG saw
    uint8_t wants_data    # an MMIO read of exits[n_exits-1 ...] waits for read_data
    uint8_t read_done     # read_data is there
    uint8_t read_data[8]
    uint64_t read_gpa     # of the first piece
    uint8_t n_exits
    MmioExit exits[8]
