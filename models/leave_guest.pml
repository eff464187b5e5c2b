/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Somebody waits for a vCPU whose batch of accesses never ends: it has to be asked to leave the guest.
 *
 * Bounds: one vCPU, whose batch stays in the guest for good unless a request or one of FAULTS faults makes it leave;
 * two who wait for it at the same time, one who makes a request first that the vCPU takes away (a flush), one who does
 * not (a slot update, who waits for faults too); store buffers two deep.
 *
 * MEMBARRIER: the vCPU's mark is a plain store, and who waits makes every processor pass a full barrier first.
 *
 * Claims: every wait ends (else Spin finds a state that nothing leaves), and none before the vCPU has left where it was.
 *
 * Controls: NO_KICK, KICK_FIRST, SECOND_LOOK, TAKEN_BACK, NO_MEMBARRIER.
 */
#ifndef FAULTS
#define FAULTS 2
#endif

#define CPUS 3
#define VCPU 2

#define LINE 0
#define REQUESTS 1
#define LOCATIONS 2
#include "tso.pml"

/* The line: bit 0, then the epoch. */
#define GUEST 1
#define EPOCH 2
#define SAME_EPOCH(a, b) ((a) / EPOCH == (b) / EPOCH)
/* The requests. */
#define FLUSH 1
#define KICK 2

byte stands;          /* what the vCPU has stored to its line, seen or not; no step decides by it */

/* Locked instructions on the word of requests. */
inline ask(who, what) {
    atomic { buffer[who].n == 0 -> mem[REQUESTS] = mem[REQUESTS] | (what) }
}

inline take(who, what) {
    atomic { buffer[who].n == 0 -> mem[REQUESTS] = mem[REQUESTS] & ~(what) }
}

inline leave() {
    atomic {
        mode = mode & ~GUEST;
        store_release(VCPU, LINE, mode);
        stands = mode
    }
}

active proctype Vcpu() {
    byte mode, faults;
    do
    :: true ->
        /* engine: vcpu_enter_slow, requests_serve, request_take */
        take(VCPU, FLUSH | KICK);
        /* engine: kvmmmu_guest_enter, kvmmmu_mark */
        atomic {
            mode = (mode + EPOCH) | GUEST;
#ifdef MEMBARRIER
            store(VCPU, LINE, mode);
#else
            exchange(VCPU, LINE, mode);
#endif
            stands = mode;
            printf("vcpu: in the guest, epoch %d (guest_enter)\n", mode / EPOCH)
        };
end:
        if
        :: faults < FAULTS ->
            faults++;
            /* engine: guest_leave, kvmmmu_guest_exit */
            leave();
            printf("vcpu: out of it for a fault (guest_leave)\n")
        :: SEEN(VCPU, REQUESTS) ->
            /* engine: access_many, run_stops, vcpu_enter */
            leave();
            printf("vcpu: out of it at a request (vcpu_enter)\n")
        fi
    od
}

/* ``until``: what the line says once nothing has to be waited for. */
inline wait(who, until) {
    /* engine: vcpus_wait, kvmmmu_readers_barrier */
    atomic {
        buffer[who].n == 0;
#if defined(MEMBARRIER) && !defined(NO_MEMBARRIER)
        buffer[VCPU].n == 0;
#endif
        was = stands
    };
#ifdef KICK_FIRST
    ask(who, KICK);
#endif
    /* engine: vcpu_wait */
    atomic {
        load(who, LINE, seen);
        printf("%d: sees epoch %d, in the guest: %d (vcpu_wait)\n", who, seen / EPOCH, seen & GUEST)
    };
#if !defined(NO_KICK) && !defined(KICK_FIRST)
    if
    :: seen & GUEST ->
        /* engine: request */
        ask(who, KICK);
        printf("%d: asks the vcpu to leave (request)\n", who)
    :: else
    fi;
#endif
#ifdef SECOND_LOOK
    load(who, LINE, seen);
#endif
    /* engine: kvmmmu_wait_line */
    until;
#ifdef TAKEN_BACK
    take(who, KICK);
#endif
    printf("%d: has waited (vcpu_wait)\n", who)
}

active proctype Flush() {
    byte seen, was;
    /* engine: flush_remote_tlbs, request_all */
    ask(0, FLUSH);
    printf("0: asks for a flush (request_all)\n");
    /* engine: readers_drain */
    wait(0, !(mem[LINE] & GUEST) || !SAME_EPOCH(mem[LINE], seen));
    assert(!(was & GUEST) || stands != was)
}

active proctype Update() {
    byte seen, was;
    /* engine: vm_drain */
    wait(1, !SAME_EPOCH(mem[LINE], seen));
    assert(!SAME_EPOCH(stands, was))
}
