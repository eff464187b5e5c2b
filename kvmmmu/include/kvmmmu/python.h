/* SPDX-License-Identifier: Apache-2.0 */
/* What the door wants to know of the interpreter: a Python integer as a 64-bit word, the small ones without a call
 * (what one costs, a whole walk costs), and whether one thread at a time is in it. */
#ifndef KVMMMU_PYTHON_H
#define KVMMMU_PYTHON_H

#include <Python.h>
#include <stdint.h>

#ifdef Py_GIL_DISABLED
#define KVMMMU_GIL 0
#else
#define KVMMMU_GIL 1
#endif

/* By the interpreter, whose size_t takes the digits at once; its unsigned long long goes byte by byte. */
static inline int kvmmmu_pyword_large(PyObject *value, uint64_t *word)
{
    _Static_assert(sizeof(size_t) == sizeof(uint64_t), "a word is a size_t");
    *word = PyLong_AsSize_t(value);
    if (*word != UINT64_MAX)
        return 1;
    PyErr_Clear();
    return 0;
}

/* 0 where the value is to be looked at properly: no int itself, or none of 0 .. 2**64 - 2. */
static inline int kvmmmu_pyword(PyObject *value, uint64_t *word)
{
    if (!PyLong_CheckExact(value))
        return 0;
#if PY_VERSION_HEX >= 0x030C0000
    if (PyUnstable_Long_IsCompact((PyLongObject *)value)) {
        Py_ssize_t small = PyUnstable_Long_CompactValue((PyLongObject *)value);

        *word = (uint64_t)small;
        return small >= 0;
    }
    return kvmmmu_pyword_large(value, word);
#elif PYLONG_BITS_IN_DIGIT == 30
    const digit *part = ((PyLongObject *)value)->ob_digit;

    switch (Py_SIZE(value)) {
    case 0:
        *word = 0;
        return 1;
    case 1:
        *word = part[0];
        return 1;
    case 2:
        *word = part[0] | (uint64_t)part[1] << 30;
        return 1;
    default:
        return kvmmmu_pyword_large(value, word);
    }
#else
    return kvmmmu_pyword_large(value, word);
#endif
}

#endif
