/* SPDX-License-Identifier: Apache-2.0 */
/* The turn counter behind turns.h, and what kvmmmu/hooks.h calls in a build with -DKVMMMU_TEST. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "kvmmmu/hooks.h"
#include "turns.h"
#include "names.h" /* written by build.py from hooks.h */

struct turner {
    turns_fn fn;
    void *arg;
    pthread_t thread;
    int started, ended;
    int stop_at;  /* the point of its step; -1: it has no step */
    int standing; /* it stands there */
    int go;       /* it may go on */
    int met[KVMMMU_POINTS];
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct turner turners[TURNS_THREADS];
static int absent[KVMMMU_POINTS], planted[KVMMMU_MUTANTS], stopped[KVMMMU_POINTS];
static int patience = 20; /* seconds; the machine may be loaded */
static __thread struct turner *self;

void kvmmmu_test_yield(const void *vcpu, int point)
{
    struct turner *t = self;

    (void)vcpu;
    if (t == NULL || absent[point])
        return;
    pthread_mutex_lock(&mutex);
    t->met[point]++;
    if (t->stop_at == point) {
        t->standing = 1;
        t->go = 0;
        pthread_cond_broadcast(&changed);
        while (!t->go)
            pthread_cond_wait(&changed, &mutex);
        t->standing = 0;
    }
    pthread_mutex_unlock(&mutex);
}

int kvmmmu_test_mutant(const void *vm, int id)
{
    (void)vm;
    return planted[id];
}

static void *turner_main(void *arg)
{
    struct turner *t = arg;

    self = t;
    t->fn(t->arg);
    pthread_mutex_lock(&mutex);
    t->ended = 1;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return NULL;
}

void turns_reset(void)
{
    memset(turners, 0, sizeof(turners));
}

void turns_thread(int id, turns_fn fn, void *arg)
{
    turners[id].fn = fn;
    turners[id].arg = arg;
    turners[id].stop_at = -1;
}

/* With the mutex: start it, or let it go on, and wait until it stands or has ended. */
static int turner_run(struct turner *t, int point)
{
    struct timespec until;

    t->stop_at = point;
    if (!t->started) {
        t->started = 1;
        pthread_create(&t->thread, NULL, turner_main, t);
    } else if (t->standing) {
        t->go = 1;
        t->standing = 0;
        pthread_cond_broadcast(&changed);
    }
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += patience;
    while (!t->standing && !t->ended)
        if (pthread_cond_timedwait(&changed, &mutex, &until) == ETIMEDOUT)
            return -1;
    return 0;
}

int turns_step(int id, int point)
{
    struct turner *t = &turners[id];
    int late, reached;

    stopped[point] = 1;
    pthread_mutex_lock(&mutex);
    if (t->ended) {
        late = 0;
        reached = 0;
    } else {
        late = turner_run(t, point);
        reached = point == KVMMMU_POINT_END ? t->ended : t->standing;
    }
    pthread_mutex_unlock(&mutex);
    if (late)
        printf("thread %d did not come to %s in %d seconds\n", id, turns_point_name(point), patience);
    else if (!reached)
        printf("thread %d ended before it came to %s\n", id, turns_point_name(point));
    return late || !reached ? -1 : 0;
}

int turns_run(const struct turns_step *steps, int n)
{
    int i;

    for (i = 0; i < n; i++)
        if (turns_step(steps[i].thread, steps[i].point)) {
            printf("at step %d of the schedule\n", i + 1);
            return -1;
        }
    return 0;
}

int turns_finish(void)
{
    struct timespec until;
    int i, hung = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += patience;
    pthread_mutex_lock(&mutex);
    for (i = 0; i < TURNS_THREADS; i++) {
        turners[i].stop_at = -1;
        turners[i].go = 1;
    }
    pthread_cond_broadcast(&changed);
    for (i = 0; i < TURNS_THREADS && !hung; i++)
        while (turners[i].started && !turners[i].ended && !hung)
            hung = pthread_cond_timedwait(&changed, &mutex, &until) == ETIMEDOUT;
    pthread_mutex_unlock(&mutex);
    if (hung) {
        /* It still uses what the caller is about to free. */
        printf("a thread hangs\n");
        fflush(stdout);
        _Exit(1);
    }
    for (i = 0; i < TURNS_THREADS; i++)
        if (turners[i].started)
            pthread_join(turners[i].thread, NULL);
    return 0;
}

int turns_met(int id, int point)
{
    int n;

    pthread_mutex_lock(&mutex);
    n = turners[id].met[point];
    pthread_mutex_unlock(&mutex);
    return n;
}

void turns_without(int point)
{
    absent[point] = 1;
    patience = 1;
}

void turns_plant(int mutant)
{
    planted[mutant] = 1;
    patience = 1;
}

const char *turns_point_name(int point)
{
    return point_names[point];
}

const char *turns_mutant_name(int mutant)
{
    return mutant_names[mutant];
}

static int number(const char *const *names, int n, const char *name)
{
    int i;

    for (i = 0; i < n; i++)
        if (names[i] && !strcmp(names[i], name))
            return i;
    return -1;
}

int turns_point_number(const char *name)
{
    return number(point_names, KVMMMU_POINTS, name);
}

int turns_mutant_number(const char *name)
{
    return number(mutant_names, KVMMMU_MUTANTS, name);
}

void turns_print_points(void)
{
    int i;

    for (i = 1; i < KVMMMU_POINTS; i++)
        if (stopped[i])
            printf("%s\n", point_names[i]);
}
