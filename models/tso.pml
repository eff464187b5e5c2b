/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory as x86-TSO gives it: every processor has a store buffer, first in first out, that it sees
 * itself and that reaches memory some time later.  A locked instruction waits until the buffer is
 * empty.  With -DWEAK the buffer empties in any order, as a machine (or a compiler) without store
 * ordering may do; stores to one place keep theirs.
 *
 * Before inclusion: CPUS (at most 3), LOCATIONS, and DEPTH (1 or 2).
 */
#ifndef DEPTH
#define DEPTH 2
#endif

typedef Buffer {
    byte n;
    byte at[2];
    byte value[2]
}

byte mem[LOCATIONS];
Buffer buffer[CPUS];

inline store(cpu, where, what) {
    atomic {
        buffer[cpu].n < DEPTH ->
        buffer[cpu].at[buffer[cpu].n] = where;
        buffer[cpu].value[buffer[cpu].n] = what;
        buffer[cpu].n++
    }
}

/* A store that no earlier one may be seen after; on x86 that is every store. */
inline store_release(cpu, where, what) {
#ifdef WEAK
    atomic {
        buffer[cpu].n == 0 ->
        buffer[cpu].at[0] = where;
        buffer[cpu].value[0] = what;
        buffer[cpu].n = 1
    }
#else
    store(cpu, where, what)
#endif
}

#define SEEN(cpu, where) \
    ((buffer[cpu].n == 2 && buffer[cpu].at[1] == (where)) -> buffer[cpu].value[1] : \
     ((buffer[cpu].n > 0 && buffer[cpu].at[0] == (where)) -> buffer[cpu].value[0] : mem[where]))

inline load(cpu, where, into) {
    into = SEEN(cpu, where)
}

inline barrier(cpu) {
    buffer[cpu].n == 0
}

inline exchange(cpu, where, what) {
    atomic { buffer[cpu].n == 0 -> mem[where] = what }
}

inline commit_first(cpu) {
    mem[buffer[cpu].at[0]] = buffer[cpu].value[0];
    buffer[cpu].at[0] = buffer[cpu].at[1];
    buffer[cpu].value[0] = buffer[cpu].value[1];
    buffer[cpu].at[1] = 0;
    buffer[cpu].value[1] = 0;
    buffer[cpu].n--
}

inline commit_second(cpu) {
    mem[buffer[cpu].at[1]] = buffer[cpu].value[1];
    buffer[cpu].at[1] = 0;
    buffer[cpu].value[1] = 0;
    buffer[cpu].n--
}

active proctype Memory() {
end:
    do
    :: d_step { buffer[0].n > 0 -> commit_first(0) }
    :: d_step { buffer[1].n > 0 -> commit_first(1) }
#if CPUS > 2
    :: d_step { buffer[2].n > 0 -> commit_first(2) }
#endif
#ifdef WEAK
    :: d_step { buffer[0].n == 2 && buffer[0].at[0] != buffer[0].at[1] -> commit_second(0) }
    :: d_step { buffer[1].n == 2 && buffer[1].at[0] != buffer[1].at[1] -> commit_second(1) }
#endif
    od
}
