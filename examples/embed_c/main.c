/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The glue: the one file that knows of Python.  It starts an interpreter, lets machine.py
 * make the VM, fetches the table and a handle, gives up the GIL and runs the simulator.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <kvmmmu/capi.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine.h"

/* The interpreter of the environment that kvmmmu is installed in. */
static int start_python(const char *program)
{
    PyConfig config;
    PyStatus status;

    PyConfig_InitPythonConfig(&config);
    status = PyConfig_SetBytesString(&config, &config.program_name, program);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        fprintf(stderr, "Python does not start: %s\n", status.err_msg);
    return !PyStatus_Exception(status);
}

static PyObject *make_vcpu(const char *folder, const char *mmu)
{
    PyObject *path = PySys_GetObject("path"); /* borrowed */
    PyObject *entry = PyUnicode_DecodeFSDefault(folder);
    PyObject *module = NULL, *vcpu = NULL;

    if (path != NULL && entry != NULL && PyList_Insert(path, 0, entry) == 0)
        module = PyImport_ImportModule("machine");
    if (module != NULL)
        vcpu = PyObject_CallMethod(module, "make", "s", mmu);
    Py_XDECREF(module);
    Py_XDECREF(entry);
    return vcpu;
}

int main(int argc, char **argv)
{
    const struct kvmmmu_capi *mmu;
    struct engine_totals totals;
    kvmmmu_vcpu *handle = NULL;
    PyObject *vcpu = NULL;
    PyThreadState *state;
    uint64_t walks = 0;
    int status;

    if (argc != 5) {
        fprintf(stderr, "usage: %s PYTHON FOLDER_OF_MACHINE_PY shadow|ept|npt ROUNDS\n", argv[0]);
        return 2;
    }
    if (!start_python(argv[1]))
        return 1;
    mmu = kvmmmu_import();
    if (mmu != NULL)
        vcpu = make_vcpu(argv[2], argv[3]);
    if (vcpu != NULL)
        handle = mmu->vcpu_from(vcpu);
    if (handle == NULL) {
        PyErr_Print();
        Py_XDECREF(vcpu);
        return 1;
    }

    state = PyEval_SaveThread();
    status = engine_run(mmu, handle, strtoull(argv[4], NULL, 10), &totals);
    PyEval_RestoreThread(state);

    if (status == KVMMMU_OK)
        status = mmu->vcpu_stat(handle, mmu->vcpu_stat_index("guest_walk"), &walks);
    if (status != KVMMMU_OK)
        fprintf(stderr, "kvmmmu: %s\n", mmu->status_text(status));
    else
        printf("uart: %s\naccesses %" PRIu64 ", exits %" PRIu64 ", guest walks by KVM %" PRIu64 "\n", totals.uart,
               totals.accesses, totals.exits, walks);
    Py_DECREF(vcpu); /* the handle ends here */
    return Py_FinalizeEx() < 0 || status != KVMMMU_OK;
}
