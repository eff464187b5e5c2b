/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest table may be written freely only while its shadow page is marked unsync, and whoever then
 * synchronises must find the mark before it can meet an entry written meanwhile.
 *
 * Bounds: a vCPU that faults on the table's frame, one that writes its entry through the writable
 * spte, one that is told so and loads CR3; two rounds each; store buffers two deep.
 *
 * Claim: after the load of CR3 an access of that vCPU is translated by an entry at least as new as
 * the one the guest told it of.
 *
 * Controls: SWAPPED (writable first), WEAK with NO_BARRIER (a machine that may reorder the two stores),
 * NO_READER_MARK (the flush does not wait for a processor that has translated and not yet stored),
 * NO_FLUSH, NO_WRITE_PROTECT.
 */
#ifndef ROUNDS
#define ROUNDS 2
#endif

#define CPUS 3
#define FAULTER 0
#define GUEST 1
#define LOADER 2

#define GPTE 0        /* the guest's entry: its version */
#define TOLD 1        /* the guest's own message: the version it has written */
#define UNSYNC 2      /* of the table's shadow page */
#define CHILDREN 3    /* unsync children of the root */
#define WRITABLE 4    /* the spte that maps the table's frame */
#define SPTE 5        /* the shadow of GPTE: the version it was made from */
#define LOCK 6
#define MODE 7        /* the line of the vCPU that writes */
#define LOCATIONS 8
#include "tso.pml"

inline lock(cpu) {
    /* engine: mmu_write_lock, kvmmmu_write_lock */
    atomic { buffer[cpu].n == 0 && mem[LOCK] == 0 -> mem[LOCK] = 1 }
}

inline unlock(cpu) {
    /* engine: mmu_write_unlock, kvmmmu_write_unlock */
    store_release(cpu, LOCK, 0)
}

byte over;

proctype Faulter() {
    byte round, unsync;
    do
    :: round < ROUNDS ->
        round++;
        lock(FAULTER);
#ifdef SWAPPED
        store(FAULTER, WRITABLE, 1);
#endif
        /* engine: try_to_unsync */
        load(FAULTER, UNSYNC, unsync);
        if
        :: unsync == 0 ->
            store(FAULTER, UNSYNC, 1);
            /* engine: mark_parents_unsync, unsync_bit_set */
            store(FAULTER, CHILDREN, 1);
            printf("faulter: marked unsync (try_to_unsync)\n")
        :: else
        fi;
#ifndef NO_BARRIER
        /* engine: full_barrier */
        barrier(FAULTER);
#endif
#ifndef SWAPPED
        /* engine: leaf_install, spte_update */
        store(FAULTER, WRITABLE, 1);
        printf("faulter: the frame is writable (leaf_install)\n");
#endif
        unlock(FAULTER);
        unsync = 0
    :: else -> break
    od;
    over++
}

proctype Guest() {
    byte version, writable, tries;
    do
    :: tries < 3 && version < ROUNDS ->
        tries++;
#ifndef NO_READER_MARK
        /* engine: kvmmmu_guest_enter */
        exchange(GUEST, MODE, 1);
#endif
        /* engine: hardware_access */
        load(GUEST, WRITABLE, writable);
        if
        :: writable ->
            version++;
            store(GUEST, GPTE, version);
            printf("guest: entry is version %d\n", version)
        :: else -> skip
        fi;
#ifndef NO_READER_MARK
        /* engine: kvmmmu_guest_exit */
        store_release(GUEST, MODE, 0);
#endif
        if
        :: writable -> store_release(GUEST, TOLD, version)
        :: else
        fi;
        writable = 0
    :: else -> break
    od;
    over++
}

proctype Loader() {
    byte round, told, children, version;
    do
    :: round < ROUNDS ->
        round++;
        load(LOADER, TOLD, told);
        /* engine: roots_sync */
        load(LOADER, CHILDREN, children);
        if
        :: children ->
            lock(LOADER);
            /* engine: sync_children, write_protect_gfn */
#ifndef NO_WRITE_PROTECT
            store(LOADER, WRITABLE, 0);
#endif
#ifndef NO_FLUSH
            /* engine: flush_remote_tlbs, readers_drain */
            barrier(LOADER);
            mem[MODE] == 0;
#endif
            printf("loader: the frame is protected again (sync_children)\n");
            /* engine: page_unmark_unsync */
            store(LOADER, UNSYNC, 0);
            /* engine: sync_page, sync_spte, gpte_load */
            load(LOADER, GPTE, version);
            store(LOADER, SPTE, version);
            /* engine: batch_clear_parents, unsync_bit_clear */
            store(LOADER, CHILDREN, 0);
            unlock(LOADER);
            printf("loader: synchronised with version %d (sync_page)\n", version)
        :: else -> printf("loader: nothing is unsync (roots_sync)\n")
        fi;
        /* engine: hardware_access */
        load(LOADER, SPTE, version);
        printf("loader: told of version %d, translated by %d\n", told, version);
        assert(version >= told);
        atomic { told = 0; children = 0; version = 0 }
    :: else -> break
    od;
    over++
}

init {
    atomic { run Faulter(); run Guest(); run Loader() }
}
