/* SPDX-License-Identifier: Apache-2.0 */
/*
 * membarrier(2): a full barrier on every processor that runs a thread of this process, paid for by the caller (about a
 * microsecond), so that those threads need none of their own.  Not there: other systems, Linux before 4.14, a sandbox that
 * refuses it; and ThreadSanitizer, which does not know what it orders.
 */
#ifndef KVMMMU_MEMBARRIER_H
#define KVMMMU_MEMBARRIER_H

#include <stdlib.h>

#if defined(__linux__) && !defined(__SANITIZE_THREAD__) && defined(__has_include)
#if __has_include(<linux/membarrier.h>)
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#define KVMMMU_HAS_MEMBARRIER 1
#endif
#endif

/* Once before the first use; 0: there is none. */
static inline int kvmmmu_membarrier_register(void)
{
#ifdef KVMMMU_HAS_MEMBARRIER
    return syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0) == 0;
#else
    return 0;
#endif
}

static inline void kvmmmu_membarrier(void)
{
#ifdef KVMMMU_HAS_MEMBARRIER
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0) == 0)
        return;
    /* A child of fork may have to register again. */
    if (kvmmmu_membarrier_register() && syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0) == 0)
        return;
#endif
    /* Refused by now: going on would free what somebody reads. */
    abort();
}

#endif
