/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The TDP MMU's tables change by compare-exchange under the read side of mmu_lock.  What is being
 * taken down is REMOVED and belongs to whoever wrote that: nobody installs there, and a table freed
 * is not used again before everyone who may hold it has left.
 *
 * Bounds: two faults (of 4 KiB or 2 MiB, two or three attempts each), one pass over the slot (collapse,
 * split, or the zap of an entry inside a table that others may take down), one lockless walk, two levels,
 * three pages.  Every step here is one locked instruction, so memory is sequentially consistent.
 *
 * Claims: no entry of a free table is read or written; a table is freed with every entry REMOVED;
 * only the owner replaces REMOVED; at the end the counts of pages are those of the leaves.
 *
 * Controls: NO_GRACE, NO_FREEZE, PLAIN_STORE, OVERWRITE_REMOVED, WALKERS_ONLY (the freer waits for
 * lockless walks and not for faults), READ_AGAIN (a fault decides by a second read of its entry),
 * REMOVED_TAKEN (a table goes without waiting for the owner of a REMOVED entry in it), PASS_STORES
 * (the pass splits by a plain store).
 */
#ifndef TRIES
#define TRIES 2
#endif

#ifdef OVERWRITE_REMOVED
#define OVERWRITES true
#else
#define OVERWRITES false
#endif

#define REMOVED_IN(p) (leaf[p] == REMOVED)
#define HUGE 8
#define LEAF 5
#define REMOVED 9

byte entry;           /* of the upper table: 0, 1 and 2: a table, HUGE, REMOVED */
byte leaf[3];         /* the entry of a table: 0, LEAF, REMOVED */
byte owner;           /* who wrote REMOVED into the upper table, plus one */

bool alive[3];
bool doomed[3];
byte waits[3];
byte inside;          /* who may hold a table: bits 0, 1 the faults, 2 the pass, 3 the walk */
byte small, huge;     /* pages_4k, pages_2m */
byte over;

inline enter(who) {
    /* engine: mmu_read_lock, kvmmmu_read_lock */
    atomic { inside = inside | (1 << who) }
}

inline leave(who) {
    /* engine: mmu_read_unlock, kvmmmu_read_unlock */
    d_step {
        inside = inside & ~(1 << who);
        waits[1] = waits[1] & ~(1 << who);
        waits[2] = waits[2] & ~(1 << who)
    }
}

inline teardown(p) {
    /* engine: tdp_teardown, tdp_changed, xchg_u64 */
    /* engine: tdp_claim */
#ifdef REMOVED_TAKEN
    d_step {
#else
    d_step {
        !REMOVED_IN(p) ->
#endif
        assert(alive[p]);
        if
        :: leaf[p] == LEAF -> small--
        :: else
        fi;
#ifdef NO_FREEZE
        leaf[p] = 0;
#else
        leaf[p] = REMOVED;
#endif
        printf("table %d is taken down (tdp_teardown)\n", p)
    };
    /* engine: tdp_defer, tdp_free */
    d_step {
        doomed[p] = true;
#if defined(NO_GRACE)
        waits[p] = 0;
#elif defined(WALKERS_ONLY)
        waits[p] = inside & 8;
#else
        waits[p] = inside;
#endif
        skip
    }
}

active proctype Grace() {
end:
    do
    /* engine: tdp_reap, readers_drain, page_free */
    :: d_step {
        doomed[1] && waits[1] == 0 ->
        printf("table 1 is free (page_free)\n");
#ifndef NO_FREEZE
        assert(leaf[1] == REMOVED);
#endif
        doomed[1] = false; alive[1] = false; leaf[1] = 0
    }
    :: d_step {
        doomed[2] && waits[2] == 0 ->
        printf("table 2 is free (page_free)\n");
#ifndef NO_FREEZE
        assert(leaf[2] == REMOVED);
#endif
        doomed[2] = false; alive[2] = false; leaf[2] = 0
    }
    od
}

/* REMOVED, flush, then empty for the next owner; ok: it was ours to do. */
inline zap_entry(who, old) {
    /* engine: tdp_zap_entry, tdp_set, cmpxchg_u64 */
    atomic {
        if
        :: entry == old ->
            entry = REMOVED;
            owner = who + 1;
            ok = true;
            if
            :: old == HUGE -> huge--
            :: else
            fi;
            printf("%d: entry %d becomes REMOVED (tdp_zap_entry)\n", who, old)
        :: else -> ok = false
        fi
    };
    if
    :: ok && old != HUGE -> teardown(old)
    :: else
    fi;
    /* engine: flush_remote_tlbs, spte_write */
    if
    :: ok -> d_step { assert(entry == REMOVED && owner == who + 1); entry = 0; owner = 0;
                      printf("%d: the entry is empty (tdp_zap_entry)\n", who) }
    :: else
    fi
}

proctype Fault(byte who) {
    byte tries, seen, p, old;
    bool want_huge, ok;
    do
    :: tries < TRIES ->
        tries++;
        if
        :: want_huge = false
        :: want_huge = true
        fi;
        enter(who);
        /* engine: tdp_map, spte_read */
        seen = entry;
        p = 0;
        if
#ifndef OVERWRITE_REMOVED
        :: seen == REMOVED -> printf("%d: REMOVED, retry (tdp_map)\n", who)
#endif
        :: want_huge && (seen != REMOVED || OVERWRITES) ->
            /* engine: tdp_install, tdp_set */
#ifdef READ_AGAIN
            seen = entry;
#endif
            if
            :: seen == HUGE
            :: else ->
                atomic {
                    if
                    :: entry == seen ->
                        entry = HUGE;
                        huge++;
                        ok = true;
                        printf("%d: huge leaf over %d (tdp_install)\n", who, seen)
                    :: else -> ok = false
                    fi
                };
                if
                :: ok && (seen == 1 || seen == 2) -> teardown(seen)
                :: else
                fi;
                tries = (ok -> TRIES : tries)
            fi
        :: !want_huge && (seen != REMOVED || OVERWRITES) ->
            if
            :: seen == HUGE -> zap_entry(who, HUGE); seen = (ok -> 0 : REMOVED)
            :: else
            fi;
            if
            :: seen == 0 || (seen == REMOVED && OVERWRITES) ->
                /* engine: tdp_page_new, page_alloc */
                d_step {
                    if
                    :: !alive[1] -> p = 1; alive[1] = true; leaf[1] = 0
                    :: alive[1] && !alive[2] -> p = 2; alive[2] = true; leaf[2] = 0
                    :: else -> p = 0
                    fi
                };
                if
                :: p ->
                    /* engine: tdp_set, spte_make_nonleaf */
                    atomic {
                        if
#ifdef PLAIN_STORE
                        :: true -> entry = p
#else
                        :: entry == seen -> entry = p
                        :: else -> alive[p] = false; p = 0        /* engine: page_free */
#endif
                        fi;
                        printf("%d: links table %d (tdp_map)\n", who, p)
                    }
                :: else
                fi
            :: seen == 1 || seen == 2 -> p = seen
            :: else
            fi;
            if
            :: p ->
                d_step { assert(alive[p]); old = leaf[p] };
                if
                :: old == REMOVED || old == LEAF
                :: old == 0 ->
                    /* engine: tdp_install, tdp_set */
                    d_step {
                        assert(alive[p]);
                        if
                        :: leaf[p] == old ->
                            leaf[p] = LEAF;
                            small++;
                            tries = TRIES;
                            printf("%d: leaf in table %d (tdp_install)\n", who, p)
                        :: else
                        fi
                    }
                fi
            :: else
            fi
        fi;
        leave(who);
        atomic { seen = 0; p = 0; old = 0; ok = false; want_huge = false }
    :: else -> break
    od;
    over++
}

/* Until the entry is none of the pass' business: a failed exchange is looked at again. */
proctype Pass() {
    byte seen, p;
    bool ok;
    enter(2);
    if
    :: do
       /* engine: tdp_collapse_range, may_collapse */
       :: seen = entry;
          if
          :: seen == 1 || seen == 2 -> zap_entry(2, seen)
          :: else -> break
          fi;
          if
          :: ok -> break
          :: else
          fi
       od
    :: do
       /* engine: tdp_split_range, tdp_split_entry */
       :: seen = entry;
          if
          :: seen == HUGE ->
              d_step {
                  if
                  :: !alive[1] -> p = 1; alive[1] = true; leaf[1] = LEAF
                  :: alive[1] && !alive[2] -> p = 2; alive[2] = true; leaf[2] = LEAF
                  :: else -> p = 0
                  fi
              };
              if
              :: p == 0 -> break
              :: else
              fi;
              atomic {
                  if
#ifdef PASS_STORES
                  :: true ->
#else
                  :: entry == HUGE ->
#endif
                      entry = p; huge--; small++; ok = true;
                      printf("2: table %d translates as the huge leaf did (tdp_split_entry)\n", p)
#ifndef PASS_STORES
                  :: else -> alive[p] = false; leaf[p] = 0        /* engine: page_free */
#endif
                  fi
              }
          :: else -> break
          fi;
          if
          :: ok -> break
          :: else
          fi
       od
    :: seen = entry;
       if
       :: seen == 1 || seen == 2 ->
           /* The table stands for one between, its entry for a link or a huge leaf. */
           /* engine: tdp_zap_entry */
           d_step {
               assert(alive[seen]);
               if
               :: leaf[seen] == LEAF -> leaf[seen] = REMOVED; small--; ok = true;
                  printf("2: the entry in table %d becomes REMOVED (tdp_zap_entry)\n", seen)
               :: else
               fi
           };
           if
           :: ok -> d_step { assert(alive[seen] && leaf[seen] == REMOVED); leaf[seen] = 0;
                             printf("2: the entry in table %d is empty (tdp_zap_entry)\n", seen) }
           :: else
           fi
       :: else
       fi
    fi;
    leave(2);
    atomic { seen = 0; p = 0; ok = false };
    over++
}

proctype Walk() {
    byte seen, spte;
    /* engine: kvmmmu_reading_begin */
    atomic { inside = inside | 8 };
    /* engine: shadow_walk */
    seen = entry;
    if
    :: seen == 1 || seen == 2 -> d_step { assert(alive[seen]); spte = leaf[seen] }
    :: else
    fi;
    /* engine: kvmmmu_reading_end */
    leave(3);
    atomic { seen = 0; spte = 0 };
    over++
}

init {
    atomic {
        if
        :: entry = 0
        :: entry = HUGE; huge = 1
        :: entry = 1; alive[1] = true; leaf[1] = LEAF; small = 1
        fi;
        run Fault(0);
        run Fault(1);
        run Pass();
        run Walk()
    };
    over == 4 && !doomed[1] && !doomed[2];
    assert(entry != REMOVED);
    assert(huge == (entry == HUGE -> 1 : 0));
    assert(small == ((entry == 1 || entry == 2) && leaf[entry] == LEAF -> 1 : 0));
    assert(!alive[1] || entry == 1);
    assert(!alive[2] || entry == 2)
}
