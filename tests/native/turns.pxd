# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The turn counter, by name; ``turns.h`` says what a schedule is."""

cdef extern from "turns.h" nogil:
    ctypedef void (*turns_fn)(void *) noexcept nogil
    void turns_reset()
    void turns_thread(int id, turns_fn fn, void *arg)
    int turns_step(int id, int point)
    int turns_finish()
    int turns_met(int id, int point)
    void turns_without(int point)
    void turns_plant(int mutant)
    const char *turns_mutant_name(int mutant)
    int turns_point_number(const char *name)
    int turns_mutant_number(const char *name)
    void turns_print_points()
