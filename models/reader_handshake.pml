/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The lockless walk beside everything that mmu_lock's holder may do meanwhile: set, clear, mark as
 * MMIO, synchronise, unlink, free and use again, change a slot.
 *
 * Bounds: two readers, one writer, two levels, three pages (a root, two tables), two addresses,
 * a generation of two bits, store buffers two deep.
 *
 * FORM says how a freed page is kept from readers:
 *   1  Linux 3.1: a counter of readers; none inside: free at once, else by an RCU callback
 *   2  today's shadow MMU, and this engine: every reader marks its own line, the freer waits
 *   3  the TDP MMU: freed after an RCU grace period
 *
 * MEMBARRIER, beside form 2: the reader's mark is a plain store; the freer makes every processor pass a full barrier
 * (membarrier) after it unlinked and before it looks at the lines.
 *
 * Claims: a table that a walk holds is neither free nor another address's; what is read for an
 * address was written for it; an address that had memory when its walk began is not emulated.
 *
 * Controls: NO_READER_BARRIER, NO_WRITER_BARRIER, NO_HANDSHAKE, NO_GRACE, READ_TWICE, NO_BUMP, NO_MEMBARRIER.
 */
#ifndef FORM
#define FORM 2
#endif
#ifndef VISITS
#define VISITS 2
#endif
#ifndef STEPS
#define STEPS 5
#endif

#define CPUS 3
#define WRITER 2

#define MODE(r) (r)
#define ROOT(a) (2 + (a))
#define LEAF(p) (3 + (p))
#define GENERATION 6
#define COUNTER 7
#define LOCATIONS 8
#include "tso.pml"

#define OUTSIDE 0
#define READING 1

/* A root entry is 0 or the number of a table.  A leaf: */
#define PRESENT(a) (8 + (a))
#define MMIO(a, g) (16 + ((a) << 2) + (g))
#define IS_MMIO(s) ((s) >= 16)
#define ADDRESS_OF(s) ((s) >= 16 -> (((s) >> 2) & 1) : ((s) & 1))
#define GEN_OF(s) ((s) & 3)
#define UPDATING 4

/* What the claims are about; no step decides by these. */
byte stands[3];       /* the address a table serves, plus one; 0: free */
byte holds[2];        /* the table a walk has in hand */
byte ram;             /* address 0: 0 no slot, 1 being created, 2 the call returned */
byte inside;          /* readers in an RCU section, one bit each */
byte waits[3];        /* readers a doomed table waits for (the kernel's RCU, taken as right) */
bool doomed[3];

inline enter(r) {
    atomic { inside = inside | (1 << r) }
}

inline leave(r) {
    d_step {
        inside = inside & ~(1 << r);
        waits[1] = waits[1] & ~(1 << r);
        waits[2] = waits[2] & ~(1 << r);
        holds[r] = 0
    }
}

proctype Reader(byte r) {
    byte address, table, spte, generation, visit;
    bool had_ram;
    do
    :: visit < VISITS ->
        visit++;
        if
        :: address = 0
        :: address = 1
        fi;
        had_ram = (ram == 2 && address == 0);
#if FORM == 1
        enter(r);
        atomic { buffer[r].n == 0 -> mem[COUNTER]++ };           /* Linux 3.1 */
#elif FORM == 2
        /* engine: kvmmmu_reading_begin, kvmmmu_mark */
#if defined(NO_READER_BARRIER) || defined(MEMBARRIER)
        store(r, MODE(r), READING);
#else
        exchange(r, MODE(r), READING);
#endif
        printf("reader %d: marked READING (kvmmmu_reading_begin)\n", r);
#else
        enter(r);                                                /* RCU read section */
#endif
        /* engine: walk_sptes, root_table */
        atomic {
            load(r, ROOT(address), table);
            holds[r] = table;
            printf("reader %d: address %d, root entry leads to table %d (shadow_walk)\n", r, address, table);
            assert(table == 0 || stands[table] == address + 1)
        };
        /* engine: shadow_walk */
        if
        :: table == 0 -> spte = 0
        :: else ->
            atomic {
                assert(stands[table] == address + 1);
                load(r, LEAF(table), spte);
                printf("reader %d: leaf reads %d (shadow_walk)\n", r, spte)
            }
        fi;
        /* engine: handle_mmio_fault, spte_is_mmio */
        if
        :: IS_MMIO(spte) ->
#ifdef READ_TWICE
            /* Decides by one read and decodes another. */
            load(r, LEAF(table), spte);
            assert(IS_MMIO(spte));
#endif
            skip
        :: else
        fi;
#if FORM == 1
        holds[r] = 0;
        atomic { buffer[r].n == 0 -> mem[COUNTER]-- };           /* Linux 3.1 */
        leave(r);
#elif FORM == 2
        /* engine: kvmmmu_reading_end */
        holds[r] = 0;
        store_release(r, MODE(r), OUTSIDE);
#else
        leave(r);
#endif
        assert(spte == 0 || ADDRESS_OF(spte) == address);
        if
        :: IS_MMIO(spte) ->
            /* engine: vcpu_generation, mmio_gen_valid */
            load(r, GENERATION, generation);
            if
            :: generation >= UPDATING            /* INVALID: the real path */
            :: generation < UPDATING && generation != GEN_OF(spte)
            :: generation < UPDATING && generation == GEN_OF(spte) ->
                printf("reader %d: emulates address %d\n", r, address);
                assert(!had_ram)
            fi
        :: else                                  /* RETRY */
        fi;
        d_step { address = 0; table = 0; spte = 0; generation = 0; had_ram = false }
    :: else -> break
    od
}

/* engine: kvmmmu_readers_barrier */
inline readers_barrier() {
    /* engine: kvmmmu_full_barrier */
    barrier(WRITER);
#if defined(MEMBARRIER) && !defined(NO_MEMBARRIER)
    /* engine: kvmmmu_membarrier */
    /* One processor after the other, each when it likes; nothing of theirs is waited for but their buffers. */
    barrier(0);
    barrier(1);
    printf("writer: every processor has passed a barrier (kvmmmu_membarrier)\n");
#endif
}

/* One flush for what was unlinked; afterwards the memory may be used again. */
inline commit(p) {
    /* engine: zap_commit, flush_remote_tlbs */
#ifndef NO_WRITER_BARRIER
    readers_barrier();
#endif
#if FORM == 1
    if
    :: SEEN(WRITER, COUNTER) == 0 -> release(p)
    :: else ->
#ifdef NO_GRACE
        release(p)
#else
        d_step { doomed[p] = true; waits[p] = inside }           /* call_rcu */
#endif
    fi
#elif FORM == 2
#ifndef NO_HANDSHAKE
    /* engine: readers_drain */
    SEEN(WRITER, MODE(0)) != READING;
    SEEN(WRITER, MODE(1)) != READING;
    printf("writer: no line is READING (readers_drain)\n");
#endif
    release(p)
#else
#ifdef NO_GRACE
    release(p)
#else
    barrier(WRITER);
    d_step { doomed[p] = true; waits[p] = inside }
#endif
#endif
}

inline release(p) {
    /* engine: page_free */
    atomic {
        assert(holds[0] != p && holds[1] != p);
        stands[p] = 0;
        doomed[p] = false;
        printf("writer: table %d is free (page_free)\n", p)
    };
    store(WRITER, LEAF(p), 0)
}

inline unlink(p, a) {
    /* engine: zap_prepare, spte_zap */
    store(WRITER, LEAF(p), 0);
    /* engine: parent_remove */
    store(WRITER, ROOT(a), 0);
    printf("writer: table %d unlinked from address %d (zap_prepare)\n", p, a)
}

proctype Writer() {
    byte p, a, spte, step, generation;
    do
    :: step < STEPS ->
        step++;
        if
        :: a = 0
        :: a = 1
        fi;
        p = SEEN(WRITER, ROOT(a));
        if
        :: p == 0 ->
            if
            :: atomic { stands[1] == 0 -> p = 1 }
            :: atomic { stands[2] == 0 -> p = 2 }
            :: stands[1] != 0 && stands[2] != 0
            fi;
            if
            :: p != 0 ->
                /* engine: page_alloc, page_get */
                stands[p] = a + 1;
                if
                :: store(WRITER, LEAF(p), 0)
                /* engine: page_link */
                :: a == 1 || ram == 0 -> store(WRITER, LEAF(p), MMIO(a, generation))
                fi;
                store(WRITER, ROOT(a), p);
                printf("writer: table %d linked at address %d (page_link)\n", p, a)
            :: else
            fi
        :: else ->
            spte = SEEN(WRITER, LEAF(p));
            if
            :: a == 0 && ram == 2 ->
                /* engine: leaf_install, spte_update */
                store(WRITER, LEAF(p), PRESENT(a))
            :: a == 1 || ram == 0 ->
                /* engine: leaf_mark_mmio, spte_write */
                store(WRITER, LEAF(p), MMIO(a, generation))
            :: spte != 0 ->
                /* engine: spte_drop, spte_zap, sync_gva */
                store(WRITER, LEAF(p), 0)
            :: IS_MMIO(spte) && (a == 1 || ram == 0) ->
                /* engine: sync_spte */
                store(WRITER, LEAF(p), MMIO(a, generation))
            :: true ->
                unlink(p, a);
                commit(p)
            fi
        fi;
        d_step { p = 0; a = 0; spte = 0 }
    :: step < STEPS && ram == 0 ->
        step++;
        /* engine: slots_publish, slots_settle */
        ram = 1;
        store(WRITER, GENERATION, generation + UPDATING);
        /* engine: vm_drain */
        readers_barrier();
#if FORM == 2
        SEEN(WRITER, MODE(0)) != READING;
        SEEN(WRITER, MODE(1)) != READING;
#endif
#ifndef NO_BUMP
        generation = (generation + 1) & 3;
#endif
        store(WRITER, GENERATION, generation);
        barrier(WRITER);
        ram = 2;
        printf("writer: address 0 has a slot (slots_settle)\n")
#if FORM != 2
    :: atomic { doomed[1] && waits[1] == 0 -> doomed[1] = false }; release(1)
    :: atomic { doomed[2] && waits[2] == 0 -> doomed[2] = false }; release(2)
#endif
    :: step == STEPS -> break
    od
}

init {
    atomic {
        stands[1] = 1;
        mem[ROOT(0)] = 1;
        mem[LEAF(1)] = MMIO(0, 0);
        run Reader(0);
#ifndef ONE_READER
        run Reader(1);
#endif
        run Writer()
    }
}
