/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kvmmmu for C: one versioned table of functions.
 *
 * A simulator's own files include this header and nothing of Python's: VMs and vCPUs are
 * made in Python, where their options are checked and documented; C gets handles and makes
 * accesses through them.  One file of the host includes Python.h before this header and
 * fetches the table:
 *
 *     const struct kvmmmu_capi *mmu = kvmmmu_import();       needs the GIL
 *     kvmmmu_vcpu *vcpu = mmu->vcpu_from(object);            needs the GIL
 *     mmu->access(vcpu, gva, KVMMMU_WRITE, 8, KVMMMU_OWN_CPL, &value, &result);   does not
 *
 * Rules.  A handle lives as long as the Python object it came from: keep a reference to that.
 * A vCPU is one thread's at a time (KVMMMU_E_BUSY for a second one); different vCPUs of a VM
 * may run in different threads.  Every argument is checked; a call that returns an error has
 * changed nothing.  Under one version the table grows at its end only and no struct changes.
 */
#ifndef KVMMMU_CAPI_H
#define KVMMMU_CAPI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVMMMU_CAPI_VERSION 1
#define KVMMMU_CAPI_NAME "kvmmmu._core._C_API"

typedef struct kvmmmu_vm kvmmmu_vm;         /* of a kvmmmu.VM */
typedef struct kvmmmu_vcpu kvmmmu_vcpu;     /* of a kvmmmu.VCpu */
typedef struct kvmmmu_tables kvmmmu_tables; /* of a kvmmmu.Paging: tables in plain memory */

/* What a call returns. */
enum {
    KVMMMU_OK = 0,
    KVMMMU_STOPPED = 1,     /* read, write: not all bytes; the access says why */
    KVMMMU_E_ARGUMENT = -1, /* a null pointer, or a value outside its range */
    KVMMMU_E_BUSY = -2,     /* another thread uses this vCPU */
    KVMMMU_E_CLOSED = -3,   /* the VM was closed */
    KVMMMU_E_GP = -4        /* the processor refuses the register value with #GP(0) */
};

/* How an access is made: one of the first three, with the others added. */
enum {
    KVMMMU_READ = 0,
    KVMMMU_WRITE = 1,
    KVMMMU_FETCH = 2,
    KVMMMU_IMPLICIT = 0x10, /* a supervisor access to a system structure, whatever the CPL */
    KVMMMU_AC = 0x20,       /* translate: EFLAGS.AC is 1 (a vCPU has its own) */
    KVMMMU_SET_AD = 0x40    /* translate: set accessed and dirty bits (a vCPU always does) */
};

#define KVMMMU_OWN_CPL (-1)   /* the vCPU's current privilege level */
#define KVMMMU_MAX_ACCESS 64  /* bytes of one access */

/* How an access ended. */
enum {
    KVMMMU_OUTCOME_OK = 0,
    KVMMMU_OUTCOME_MMIO = 1,           /* no memory takes it: the caller completes the pieces */
    KVMMMU_OUTCOME_PF = 2,             /* the guest gets #PF(error_code) at fault_gva */
    KVMMMU_OUTCOME_GP = 3,             /* the guest gets #GP(0) */
    KVMMMU_OUTCOME_INTERNAL_ERROR = 4, /* KVM gives up: no instruction to emulate */
    KVMMMU_OUTCOME_SHUTDOWN = 5,       /* triple fault */
    KVMMMU_OUTCOME_HANG = 6,           /* exits without progress */
    KVMMMU_OUTCOME_ERROR = 7,          /* KVM_RUN would fail; error_code is the errno */
    KVMMMU_OUTCOME_VE = 8              /* a TDX guest gets #VE for gpa; error_code is the exit qualification */
};

/* Who carried it out. */
enum {
    KVMMMU_PATH_HARDWARE = 0, /* the processor alone */
    KVMMMU_PATH_FAULT = 1,    /* page faults, then the processor */
    KVMMMU_PATH_EMULATED = 2  /* KVM made the access */
};

/* One access of a guest and what became of it. */
struct kvmmmu_access {
    uint64_t gpa;           /* of the first byte; all ones where none is known */
    uint64_t error_code;
    uint64_t fault_gva;
    uint64_t mmio_gpa[2];   /* pieces that no memory took, one per page */
    uint8_t mmio_size[2];   /* bytes of each */
    uint8_t mmio_offset[2]; /* where in the access it begins */
    uint8_t n_mmio;         /* pieces: 0, 1 or 2 */
    uint8_t outcome;        /* KVMMMU_OUTCOME_* */
    uint8_t path;           /* KVMMMU_PATH_* */
    uint8_t size;           /* bytes of the access this is about */
    uint32_t exits;         /* VM exits it cost */
    uint8_t suberror;       /* of OUTCOME_INTERNAL_ERROR: KVM's number of it, 0 where there is none */
    uint8_t unused[3];
};

/* One address through tables in plain memory. */
struct kvmmmu_translation {
    uint64_t gva;
    uint64_t gpa;        /* of the byte; under a second dimension the address in host memory */
    uint64_t error_code; /* of the fault */
    uint64_t fault_gpa;  /* guest-physical address that the second dimension refused */
    uint64_t entry;      /* last entry read of the guest's tables: the leaf, or where the walk ended */
    uint8_t fault;       /* 0 none, 1 #PF, 2 #GP, 4 EPT violation, 5 EPT misconfiguration, 6 NPF */
    uint8_t page_shift;  /* log2 of the guest's page size */
    uint8_t access;      /* rights of the translation: 1 execute, 2 write, 4 user */
    uint8_t level;       /* of that last entry; 0: none was read */
    uint32_t unused;
};

/* The registers that the MMU depends on. */
struct kvmmmu_sregs {
    uint64_t cr0;
    uint64_t cr3;
    uint64_t cr4;
    uint64_t efer;
    uint32_t pkru;
    uint8_t compat; /* CS.L = 0: in long mode linear addresses are 32 bits wide */
    uint8_t cpl;    /* 0 .. 3 */
    uint8_t ac;     /* EFLAGS.AC */
    uint8_t unused; /* 0 */
};

struct kvmmmu_capi {
    uint32_t version; /* KVMMMU_CAPI_VERSION; another one means another table */
    uint32_t size;    /* bytes of this table where it was compiled */

    /* -- with the GIL: handles of Python objects; NULL with an exception set ------------- */

    kvmmmu_vm *(*vm_from)(void *object);
    kvmmmu_vcpu *(*vcpu_from)(void *object);
    kvmmmu_tables *(*tables_from)(void *object);

    /* -- without: accesses ------------------------------------------------------------- */

    /*
     * One load, store or fetch of `size` bytes (1 .. KVMMMU_MAX_ACCESS, page crossings
     * included) with every fault and exit it causes.  `how`: READ, WRITE or FETCH, IMPLICIT.
     * `data` may be null: then nothing moves, but every check and exit happens.  Returns
     * KVMMMU_OK when the access was made, whatever its outcome.
     */
    int (*access)(kvmmmu_vcpu *vcpu, uint64_t gva, uint32_t how, uint32_t size, int cpl, void *data,
                  struct kvmmmu_access *result);

    /* `n` accesses in order, without data; `how` has one byte each, KVMMMU_READ .. FETCH. */
    int (*access_many)(kvmmmu_vcpu *vcpu, const uint64_t *gvas, const uint8_t *how, size_t n, uint32_t size,
                       int cpl, struct kvmmmu_access *results);

    /*
     * Copy guest memory through the MMU, in accesses of up to KVMMMU_MAX_ACCESS bytes.
     * KVMMMU_STOPPED: `done` bytes are copied and the access after them, of `last->size`
     * bytes, did not end in memory.  With outcome MMIO its other bytes were moved: complete
     * the pieces and go on after it.  `last` is the last access made.
     */
    int (*read)(kvmmmu_vcpu *vcpu, uint64_t gva, void *data, size_t size, int cpl, size_t *done,
                struct kvmmmu_access *last);
    int (*write)(kvmmmu_vcpu *vcpu, uint64_t gva, const void *data, size_t size, int cpl, size_t *done,
                 struct kvmmmu_access *last);

    /* -- without: what a guest or its monitor does ----------------------------------------- */

    int (*invlpg)(kvmmmu_vcpu *vcpu, uint64_t gva);
    int (*load_cr3)(kvmmmu_vcpu *vcpu, uint64_t value);
    int (*sync_roots)(kvmmmu_vcpu *vcpu);
    int (*get_sregs)(kvmmmu_vcpu *vcpu, struct kvmmmu_sregs *sregs);
    /* All at once, as KVM_SET_SREGS; E_ARGUMENT also for a feature the guest CPU lacks. */
    int (*set_sregs)(kvmmmu_vcpu *vcpu, const struct kvmmmu_sregs *sregs);

    /* -- without: counters, under the names that vm.stats and vcpu.stats have --------------- */

    int (*vm_stat_index)(const char *name);   /* -1: no such counter */
    int (*vcpu_stat_index)(const char *name);
    const char *(*vm_stat_name)(int index);   /* null after the last */
    const char *(*vcpu_stat_name)(int index);
    int (*vm_stat)(kvmmmu_vm *vm, int index, uint64_t *value);
    int (*vcpu_stat)(kvmmmu_vcpu *vcpu, int index, uint64_t *value);

    /* -- without: tables in plain memory ----------------------------------------------------- */

    /* Walk `n` addresses; `how`: READ, WRITE or FETCH, IMPLICIT, AC, SET_AD; cpl 0 .. 3. */
    int (*translate)(const kvmmmu_tables *tables, const uint64_t *gvas, size_t n, uint32_t how, int cpl,
                     struct kvmmmu_translation *results);

    /* What a KVMMMU_* return value means, in words. */
    const char *(*status_text)(int status);
};

#ifdef Py_PYTHON_H
/* The table of the kvmmmu that Python imports; NULL with an exception set.  Needs the GIL. */
static inline const struct kvmmmu_capi *kvmmmu_import(void)
{
    const struct kvmmmu_capi *capi = (const struct kvmmmu_capi *)PyCapsule_Import(KVMMMU_CAPI_NAME, 0);

    if (capi == NULL)
        return NULL;
    if (capi->version != KVMMMU_CAPI_VERSION || capi->size < sizeof(struct kvmmmu_capi)) {
        PyErr_Format(PyExc_ImportError,
                     "kvmmmu's C table is version %u of %u bytes; compiled for version %u of at least %u bytes: "
                     "rebuild against the installed kvmmmu, or install a newer one",
                     (unsigned)capi->version, (unsigned)capi->size, (unsigned)KVMMMU_CAPI_VERSION,
                     (unsigned)sizeof(struct kvmmmu_capi));
        return NULL;
    }
    return capi;
}
#endif

#ifdef __cplusplus
}
#endif

#endif
