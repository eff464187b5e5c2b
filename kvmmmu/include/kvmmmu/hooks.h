/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Points where test builds stop a thread, and faults they plant; nothing in a release.
 * Append only: tests name points and mutants by what follows the prefix.
 */
#ifndef KVMMMU_HOOKS_H
#define KVMMMU_HOOKS_H

enum {
    KVMMMU_POINT_END = 0, /* the thread has ended */
    /* waiting: met each time round the loop */
    KVMMMU_POINT_LOCK_WAIT,  /* for mmu_lock */
    KVMMMU_POINT_DRAIN_WAIT, /* a freer, for walkers that began before */
    KVMMMU_POINT_SYNC_WAIT,  /* a slot update, for readers of the table it replaced */
    /* the vCPU */
    KVMMMU_POINT_HARDWARE,     /* the processor is about to walk */
    KVMMMU_POINT_EXIT,         /* the processor reported a fault, KVM has not looked yet */
    KVMMMU_POINT_WALK_MARKED,  /* READING is announced, no spte was read */
    KVMMMU_POINT_WALK_READ,    /* every spte was read, the mark stands */
    KVMMMU_POINT_WALK_LEFT,    /* the mark is lifted, nothing was decided */
    KVMMMU_POINT_MMIO_FRESH,   /* the mmio spte was found current, nothing is cached yet */
    KVMMMU_POINT_EMULATE,      /* the fault ended in EMULATE, the access was not carried out */
    KVMMMU_POINT_SLOT_FOUND,   /* a fault has its slot */
    KVMMMU_POINT_FAULT_PFN,    /* a fault has its frame and no lock */
    KVMMMU_POINT_FAULT_LOCKED, /* a fault holds mmu_lock */
    KVMMMU_POINT_FAST_READ,    /* the lockless repair has read its spte, not exchanged it */
    /* writers of sptes */
    KVMMMU_POINT_SPTE_WRITE,   /* a leaf is about to be written by a fault */
    KVMMMU_POINT_LINK,         /* a child is complete, not linked */
    KVMMMU_POINT_LINKED,
    KVMMMU_POINT_UNLINKED,     /* unlinked and not flushed */
    KVMMMU_POINT_FLUSHED,      /* flushed, nothing was freed */
    KVMMMU_POINT_FREED,
    KVMMMU_POINT_TDP_SET,      /* an exchange in the TDP MMU is about to be tried */
    KVMMMU_POINT_TDP_REMOVED,  /* an entry is REMOVED, not flushed */
    KVMMMU_POINT_UNSYNC,       /* a page is marked unsync, nothing was made writable */
    KVMMMU_POINT_ACCOUNTED,    /* a table counts as shadowed, its entry was not reread */
    KVMMMU_POINT_STORED,       /* the emulator has stored, not looked whether a table was hit */
    /* slots and notifiers */
    KVMMMU_POINT_SLOT_PUBLISHED, /* the new table stands, bit 63 of its generation too */
    KVMMMU_POINT_SLOT_DRAINED,   /* nobody reads the old table, the bit still stands */
    KVMMMU_POINT_SLOT_SETTLED,   /* the new generation stands without the bit */
    KVMMMU_POINT_SLOT_INVALID,   /* the slot is INVALID for all, nothing was zapped */
    KVMMMU_POINT_SLOT_ZAPPED,    /* everything was zapped, the slot is still INVALID */
    KVMMMU_POINT_NOTIFIER,       /* leaves of a host range are gone, the lock is held */
    KVMMMU_POINT_ROOTS_REQUESTED, /* vCPUs are asked to drop obsolete roots, the lock is held */
    KVMMMU_POINT_BITS_SET,       /* a walk is about to set A or D in an entry it read */
    KVMMMU_POINT_TDP_INSTALL,    /* a TDP fault has read the entry it wants, decided nothing */
    KVMMMU_POINT_REMOVED_WAIT,   /* waiting, as above: a table that goes, for the owner of a REMOVED entry in it */
    KVMMMU_POINT_LINE_SEEN,      /* who waits has looked at a vCPU's line and asked it to leave, not waited */
    KVMMMU_POINTS
};

enum {
    KVMMMU_MUTANT_NO_ANNOUNCE = 1, /* the lockless walk does not say that it reads */
    KVMMMU_MUTANT_NO_DRAIN,        /* a freer does not wait for walkers */
    KVMMMU_MUTANT_NO_SYNC,         /* a slot update does not wait for readers */
    KVMMMU_MUTANT_SECOND_READ,     /* the walk reads its last spte again */
    KVMMMU_MUTANT_NO_GENERATION,   /* a slot update does not move the generation */
    KVMMMU_MUTANT_NO_IN_PROGRESS,  /* nor mark that it is in flight */
    KVMMMU_MUTANT_LINK_EARLY,      /* a child is linked before its entries are empty */
    KVMMMU_MUTANT_NO_SEQ,          /* the notifier does not count */
    KVMMMU_MUTANT_PLAIN_STORE,     /* the lockless repair stores instead of exchanging */
    KVMMMU_MUTANT_NO_REREAD,       /* a fault does not read its table again under the lock */
    KVMMMU_MUTANT_LATE_GENERATION, /* the generation is read after the walk */
    KVMMMU_MUTANT_REMOVED_TAKEN,   /* a table that goes does not wait for owners of REMOVED entries in it */
    KVMMMU_MUTANT_PASS_ONCE,       /* a pass over a slot goes on where its exchange failed */
    KVMMMU_MUTANT_STALE_PATH,      /* nor starts from the root after it let a writer in */
    KVMMMU_MUTANT_NO_GRACE,        /* a table that went is freed while faults may be in it */
    KVMMMU_MUTANT_DEAF_BATCH,      /* a batch goes on with what it remembers, whatever is requested */
    KVMMMU_MUTANT_NO_KICK,         /* who waits does not ask a batch to leave the guest */
    KVMMMU_MUTANT_SECOND_LOOK,     /* who waits looks at the line again, after it decided whom to ask */
    KVMMMU_MUTANTS
};

#ifdef KVMMMU_TEST
#ifdef __cplusplus
extern "C" {
#endif
void kvmmmu_test_yield(const void *vcpu, int point);
int kvmmmu_test_mutant(const void *vm, int id);
#ifdef __cplusplus
}
#endif
#define KVMMMU_YIELD(vcpu, point) kvmmmu_test_yield((vcpu), (point))
#define KVMMMU_MUTANT(vm, id) kvmmmu_test_mutant((vm), (id))
#else
#define KVMMMU_YIELD(vcpu, point) ((void)0)
#define KVMMMU_MUTANT(vm, id) 0
#endif

#endif
