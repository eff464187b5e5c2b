/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Turns: threads that run one at a time, each up to a point of kvmmmu/hooks.h.
 *
 * A schedule is a list of steps (thread, point): let that thread run until it stands at the
 * point, or until it has ended; every other thread stands still meanwhile.  A thread that does
 * not get there in time, or ends before, fails the schedule.  Nothing sleeps.
 */
#ifndef KVMMMU_TESTS_TURNS_H
#define KVMMMU_TESTS_TURNS_H

enum { TURNS_THREADS = 4 };

struct turns_step {
    int thread;
    int point; /* KVMMMU_POINT_*; END: until its function returns */
};

typedef void (*turns_fn)(void *);

/* A new schedule; forgets the threads of the one before. */
void turns_reset(void);
/* Thread ``id`` will run fn(arg). */
void turns_thread(int id, turns_fn fn, void *arg);
/* Let ``id`` run until it stands at ``point``.  0, or -1 after a message. */
int turns_step(int id, int point);
/* All of a schedule; stops at the first step that fails. */
int turns_run(const struct turns_step *steps, int n);
/* Let every thread run to its end without stopping.  0, or -1 if one hangs. */
int turns_finish(void);
/* How often a thread has met a point so far. */
int turns_met(int id, int point);

/* Negative controls: a point that is not there any more, a fault that is planted. */
void turns_without(int point);
void turns_plant(int mutant);

/* Names, for the command line. */
const char *turns_point_name(int point);
const char *turns_mutant_name(int mutant);
int turns_point_number(const char *name);
int turns_mutant_number(const char *name);
/* Prints the points at which any step so far stopped a thread, one a line. */
void turns_print_points(void);

#endif
