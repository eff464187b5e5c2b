"""Break one spte of a live VM behind its back, which no call of the library can do.

The VM's own memory is searched for the tables through ``/proc/self/mem``, where a bad address is an error and no crash.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import kvmmmu as km
from kvmmmu.walks import walk_result


def _words(memory: int, address: int, count: int) -> list[int]:
    try:
        data = os.pread(memory, 8 * count, address)
    except (OSError, OverflowError):
        return []
    return list(struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8]))


@contextmanager
def planted(vcpu: km.VCpu, gva: int, level: int, bits: int) -> Iterator[int]:
    """Flip bits in the spte of one level behind an address; yields what it then is."""
    _, built = vcpu.walk_records(gva, "r", 0)
    assert built is not None
    entries = walk_result(built).entries
    memory = os.open("/proc/self/mem", os.O_RDWR)
    try:
        # An entry's host address is its offset in the arena; the arena's address stands in the VM's struct.
        candidates = (
            pointer
            for vm in _words(memory, id(vcpu.vm._core), 32)
            for pointer in _words(memory, vm, 4096)
            if pointer >= 1 << 32
        )
        for base in candidates:
            if all(_words(memory, base + entry.gpa, 1) == [entry.value] for entry in entries):
                break
        else:
            raise AssertionError("the tables were not found")
        entry = next(entry for entry in entries if entry.level == level)
        broken = entry.value ^ bits
        os.pwrite(memory, struct.pack("<Q", broken), base + entry.gpa)
        try:
            yield broken
        finally:
            os.pwrite(memory, struct.pack("<Q", entry.value), base + entry.gpa)
    finally:
        os.close(memory)
