# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The door: owns memory, binds the engine to Python and C, checks every argument once."""

from kvmmmu.bits.mmio cimport mmio_spte_make
from kvmmmu.bits.spte cimport SpteMasks, spte_masks_legacy
from kvmmmu.engine.state cimport Vm, Vcpu

def probe():
    cdef SpteMasks m
    spte_masks_legacy(&m, 46, 46, False, 46, True)
    cdef Vm vm
    return mmio_spte_make(&m, 0xfee00, 7, 2), sizeof(Vm), sizeof(Vcpu)
