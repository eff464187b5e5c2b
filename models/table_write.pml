/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's entry changes while a fault shadows it: by KVM's emulator, which stores and then asks
 * whether anything is shadowed, and by a processor that has not been told yet that the frame is
 * protected.  The fault counts, protects, and reads the entry again.
 *
 * Bounds: one fault, one emulated write, one write by a processor (emulated where it is refused);
 * store buffers two deep.  EXISTING: the table's page is there already and write-protected, so the
 * fault counts nothing and only installs.
 *
 * Claim: when all is over the spte is empty or made from the entry as it is.
 *
 * Controls: NO_WRITE_BARRIER, NO_COUNT_BARRIER, NO_SECOND_READ, NO_READER_MARK, NO_FLUSH.
 */
#define CPUS 3
#define EMULATOR 0
#define FAULT 1
#define PROCESSOR 2

#define GPTE 0        /* the guest's entry: its version */
#define COUNT 1       /* indirect pages */
#define SPTE 2        /* 0, or the version it was made from, plus one */
#define WRITABLE 3    /* the frame of the table, in the processor's tables */
#define LOCK 4
#define MODE 5        /* the processor's line */
#define LOCATIONS 6
#include "tso.pml"

inline lock(cpu) {
    /* engine: mmu_write_lock, kvmmmu_write_lock */
    atomic { buffer[cpu].n == 0 && mem[LOCK] == 0 -> mem[LOCK] = 1 }
}

inline unlock(cpu) {
    /* engine: mmu_write_unlock, kvmmmu_write_unlock */
    store_release(cpu, LOCK, 0)
}

inline emulated_write(cpu, version) {
    /* engine: piece_memory */
    store(cpu, GPTE, version);
    printf("cpu %d: emulator stores version %d (piece_memory)\n", cpu, version);
#ifndef NO_WRITE_BARRIER
    /* engine: full_barrier */
    barrier(cpu);
#endif
    /* engine: track_write */
    load(cpu, COUNT, counted);
    printf("cpu %d: %d tables are shadowed (track_write)\n", cpu, counted);
    if
    :: counted ->
        lock(cpu);
        /* engine: spte_zap */
        store(cpu, SPTE, 0);
        unlock(cpu)
    :: else
    fi;
    counted = 0
}

byte over;

proctype Emulator() {
    byte counted;
    emulated_write(EMULATOR, 1);
    over++
}

proctype Processor() {
    byte counted, writable;
#ifndef NO_READER_MARK
    /* engine: kvmmmu_guest_enter */
    exchange(PROCESSOR, MODE, 1);
#endif
    /* engine: hardware_access */
    load(PROCESSOR, WRITABLE, writable);
    if
    :: writable ->
        store(PROCESSOR, GPTE, 2);
        printf("cpu 2: the guest stores version 2\n")
    :: else
    fi;
#ifndef NO_READER_MARK
    /* engine: kvmmmu_guest_exit */
    store_release(PROCESSOR, MODE, 0);
#endif
    if
    :: writable
    :: else -> emulated_write(PROCESSOR, 2)
    fi;
    writable = 0;
    over++
}

proctype Fault() {
    byte seen, now, tries;
    do
    :: tries < 2 ->
        tries++;
        /* engine: guest_walk */
        load(FAULT, GPTE, seen);
        printf("cpu 1: walk reads version %d (guest_walk)\n", seen);
        lock(FAULT);
#ifndef EXISTING
        /* engine: page_get, account_shadowed */
        store(FAULT, COUNT, 1);
#ifndef NO_COUNT_BARRIER
        /* engine: full_barrier */
        barrier(FAULT);
#endif
        /* engine: write_protect_gfn */
        store(FAULT, WRITABLE, 0);
#ifndef NO_FLUSH
        /* engine: flush_remote_tlbs, readers_drain */
#ifndef NO_COUNT_BARRIER
        barrier(FAULT);
#endif
        mem[MODE] == 0;
#endif
#endif
        now = seen;
#ifndef NO_SECOND_READ
        /* engine: gpte_changed */
        load(FAULT, GPTE, now);
#endif
        if
        :: now == seen ->
            /* engine: shadow_map, leaf_install, spte_update */
            store(FAULT, SPTE, seen + 1);
            printf("cpu 1: spte of version %d (leaf_install)\n", seen);
            tries = 2
        :: else -> printf("cpu 1: the entry changed (gpte_changed)\n")
        fi;
        unlock(FAULT);
        atomic { seen = 0; now = 0 }
    :: else -> break
    od;
    over++
}

init {
    atomic {
#ifdef EXISTING
        mem[COUNT] = 1;
#else
        mem[WRITABLE] = 1;
#endif
        run Emulator();
        run Processor();
        run Fault()
    };
    over == 3 && buffer[0].n == 0 && buffer[1].n == 0 && buffer[2].n == 0;
    assert(mem[SPTE] == 0 || mem[SPTE] == mem[GPTE] + 1)
}
