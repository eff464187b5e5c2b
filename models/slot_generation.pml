/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Slots change while vCPUs fault: what was learnt from an old table must not be taken for knowledge
 * of the new one, in an mmio spte or in a vCPU's record of its last MMIO page.
 *
 * Bounds: two vCPUs with two accesses each to one gfn, one thread that changes slots four times
 * (create, delete, or something unrelated), sptes with a generation of two bits, so that it wraps.
 * Memory is sequentially consistent here: the pair that is not (mark and drain) is the subject of
 * reader_handshake.pml.
 *
 * Claims: while memory stands at the gfn, from before an access to after it, the access is not emulated
 * as MMIO; while none does, it does not reach memory; a table of slots that a reader holds is not freed.
 *
 * Controls: NO_BUMP, BUMP_FIRST, NO_READER_MARK, NO_WRAP_ZAP, WRAP_AFTER_BUMP, NO_INVALID,
 * UNSTAMPED_RECORD, GENERATION_AFTER_WALK.  Not one: NO_UPDATE_BIT, which holds; what is cached during an update
 * carries the old number and misses after it.
 */
#ifndef ACCESSES
#define ACCESSES 2
#endif
#ifndef UPDATES
#define UPDATES 4
#endif

#define NONE 0
#define RAM 1
#define INVALID 2

/* The published table of slots: two places in turn, as malloc may give them. */
byte current;
byte content[2];
byte generation[2];
bool updating[2];
bool freed[2];

/* The entry that every vCPU's tables share, and which tree it is of. */
byte spte;            /* 0, 1: present, 4 + g: mmio of generation g */
#define PRESENT 1
#define MMIO(g) (4 + ((g) & 3))
#define RETRY 2       /* no spte, but how a fault ended */
byte tree;            /* moves when every translation is dropped */

bool marked[2];       /* the vCPU's line says SLOTS, since the VM entry before */
bool locked;          /* mmu_lock */

/* The claims' own knowledge: what held for good when a call returned. */
byte settled;         /* NONE, RAM, or INVALID while a call is on its way */
byte during[2];       /* the same for the whole of a vCPU's access, so far */

inline read_generation(s, g, u) {
    /* engine: vm_slots, slots_generation */
    s = current;
    atomic { assert(!freed[s]); g = generation[s]; u = updating[s] }
}

inline fill_record() {
    /* engine: mmio_cache_fill */
    read_generation(s, g, u);
    if
    :: !u -> atomic { recorded = true; record = g }
    :: else
    fi
}

inline mark() {
    /* engine: vcpu_claim, kvmmmu_line_claim, kvmmmu_guest_enter */
    marked[id] = true
}

inline unmark() {
    /* engine: vcpu_release, kvmmmu_line_release */
    marked[id] = false
}

proctype Vcpu(byte id) {
    byte n, s, g, seen, slot, record, root;
    bool u, recorded, emulate, done;
    do
    :: n < ACCESSES ->
        n++;
        during[id] = settled;
        done = false;
        do
        :: !done ->
            emulate = false;
            mark();
            /* engine: vcpu_enter, hardware_access */
            atomic { seen = spte; root = tree };
            if
            :: seen == PRESENT ->
                printf("vcpu %d: the processor reaches memory\n", id);
                assert(during[id] != NONE);
                done = true
            :: seen >= 4 ->
                printf("vcpu %d: reserved-bit fault, spte of generation %d (handle_mmio_fault)\n", id, seen & 3);
                read_generation(s, g, u);
                if
#ifdef UNSTAMPED_RECORD
                :: recorded ->
#else
                /* engine: mmio_match_gpa, mmio_cache_fresh */
                :: recorded && record == g && !u ->
#endif
                    printf("vcpu %d: its record matches\n", id);
                    emulate = true
                :: else ->
#ifdef GENERATION_AFTER_WALK
                    /* engine: walk_sptes */
                    seen = spte;
                    read_generation(s, g, u);
#else
                    /* engine: vcpu_generation */
                    read_generation(s, g, u);
                    /* engine: walk_sptes */
                    seen = spte;
#endif
                    if
                    :: seen < 4 -> seen = RETRY
                    /* engine: mmio_gen_valid */
                    :: seen >= 4 && !u && (g & 3) == (seen & 3) ->
                        fill_record();
                        emulate = true
                    :: seen >= 4 && (u || (g & 3) != (seen & 3)) -> seen = 0   /* INVALID: the real path */
                    fi
                fi
            :: else
            fi;
            if
            :: seen == 0 ->
#ifdef NO_READER_MARK
                unmark();
#endif
                /* engine: vcpu_slot, slot_find */
                s = current;
                atomic {
                    assert(!freed[s]);
                    slot = content[s];
                    printf("vcpu %d: looks the slot up: %d (vcpu_slot)\n", id, slot)
                };
                if
                :: slot == NONE ->
                    /* engine: fault_pfn */
                    fill_record();
                    /* engine: mmu_write_lock */
                    atomic { !locked -> locked = true };
                    if
                    /* engine: fault_stale */
                    :: root == tree ->
                        /* engine: leaf_mark_mmio, vcpu_generation, mmio_spte_make */
                        read_generation(s, g, u);
                        spte = MMIO(g);
                        printf("vcpu %d: mmio spte of generation %d (leaf_mark_mmio)\n", id, g & 3);
                        emulate = true
                    :: else
                    fi;
                    /* engine: mmu_write_unlock */
                    locked = false
                :: slot == RAM ->
                    atomic { !locked -> locked = true };
                    if
                    :: root == tree ->
                        /* engine: leaf_install */
                        spte = PRESENT;
                        printf("vcpu %d: maps memory (leaf_install)\n", id)
                    :: else
                    fi;
                    locked = false
                :: slot == INVALID               /* engine: slot_visible */
                fi
            :: else
            fi;
            if
            :: emulate ->
                read_generation(s, g, u);
                if
                /* engine: piece_gpa, mmio_match_gpa */
#ifdef UNSTAMPED_RECORD
                :: recorded -> slot = NONE
#else
                :: recorded && record == g && !u -> slot = NONE
#endif
                :: else ->
                    /* engine: piece_memory */
                    s = current;
                    atomic { assert(!freed[s]); slot = content[s] }
                fi;
                if
                :: slot == RAM -> assert(during[id] != NONE)
                :: else ->
                    printf("vcpu %d: MMIO exit\n", id);
                    assert(during[id] != RAM)
                fi;
                done = true
            :: else
            fi;
            unmark();
            atomic { s = 0; g = 0; u = false; seen = 0; slot = 0; root = 0 }
        :: else -> break
        od;
        during[id] = 0
    :: else -> break
    od;
    atomic { recorded = false; record = 0; n = 0; done = false; emulate = false }
}

inline drop_all() {
    /* engine: region_flush_shadow, zap_all_fast */
    atomic { !locked -> locked = true };
    d_step { spte = 0; tree = tree ^ 1; printf("slots: every translation is dropped (region_flush_shadow)\n") };
    locked = false
}

/* Publish a table, wait for the readers of the old one, count. */
inline swap(what) {
    /* engine: slots_publish, slotset_replace */
    d_step {
        next = 1 - current;
        content[next] = what;
        generation[next] = generation[current];
        updating[next] = true;
        freed[next] = false;
#ifdef BUMP_FIRST
        generation[next] = generation[next] + 1;
        updating[next] = false;
#endif
#ifdef NO_UPDATE_BIT
        updating[next] = false;
#endif
        current = next;
        printf("slots: table with %d is published (slots_publish)\n", what)
    };
    /* engine: vm_drain, vcpus_wait */
    !marked[0];
    !marked[1];
    freed[1 - next] = true;
#if !defined(BUMP_FIRST) && !defined(NO_BUMP)
#if !defined(WRAP_AFTER_BUMP) && !defined(NO_WRAP_ZAP)
    /* engine: region_swap */
    if
    :: ((generation[next] + 1) & 3) == 0 -> drop_all()
    :: else
    fi;
#endif
    /* engine: slots_settle */
    d_step {
        generation[next] = generation[next] + 1;
        updating[next] = false;
        printf("slots: generation %d (slots_settle)\n", generation[next])
    };
#ifdef WRAP_AFTER_BUMP
    if
    :: (generation[next] & 3) == 0 -> drop_all()
    :: else
    fi;
#endif
#else
    updating[next] = false;
#endif
    skip
}

inline begin_call() {
    d_step { settled = INVALID; during[0] = INVALID; during[1] = INVALID }
}

proctype Slots() {
    byte n, next, now;
    do
    :: n < UPDATES ->
        n++;
        if
        :: content[current] == NONE ->
            /* engine: region_create */
            begin_call();
            swap(RAM);
            settled = RAM;
            printf("slots: create returned\n")
        :: content[current] == RAM ->
            /* engine: region_delete, work_invalidate */
            begin_call();
#ifndef NO_INVALID
            swap(INVALID);
#endif
            drop_all();
            swap(NONE);
            settled = NONE;
            printf("slots: delete returned\n")
        :: true ->
            /* engine: region_apply */
            now = content[current];
            swap(now)
        fi
    :: else -> break
    od
}

init {
    atomic {
        freed[1] = true;
        run Vcpu(0);
#ifndef ONE_VCPU
        run Vcpu(1);
#endif
        run Slots()
    }
}
