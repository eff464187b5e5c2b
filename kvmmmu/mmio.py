"""Devices: callables that complete the MMIO accesses of a range."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

from kvmmmu._arguments import index_u64
from kvmmmu.errors import ArgumentError

__all__ = ["Mmio", "MmioRange"]

ReadHandler = Callable[[int, int], int]
WriteHandler = Callable[[int, int, int], None]

#: KVM leaves to user space in pieces of at most this many bytes.
EXIT_BYTES = 8


@dataclass(frozen=True)
class MmioRange:
    """A range of guest-physical addresses with its handlers.

    Attributes
    ----------
    gpa, size : int
        First byte and length in bytes.
    read : callable or None
        ``read(gpa, size)`` returns the value as an int, little endian.
    write : callable or None
        ``write(gpa, size, value)``.
    """

    gpa: int
    size: int
    read: ReadHandler | None
    write: WriteHandler | None

    @property
    def end(self) -> int:
        """The first address behind the range."""
        return self.gpa + self.size


class Mmio:
    """The devices of a VM, by range.

    They are asked after the engine has found an access to be MMIO, never before, and outside all its locks.
    """

    def __init__(self) -> None:
        self._ranges: list[MmioRange] = []

    def register(
        self,
        gpa: SupportsIndex,
        size: SupportsIndex,
        *,
        read: ReadHandler | None = None,
        write: WriteHandler | None = None,
    ) -> MmioRange:
        """Give a range to a device.

        Parameters
        ----------
        gpa, size : int
            First byte and length in bytes.
        read, write : callable, optional
            See ``MmioRange``; reads without a handler give all ones, writes without one are dropped.

        Raises
        ------
        ArgumentError
            The range is empty, wraps, or overlaps another.
        """
        start, length = index_u64("gpa", gpa), index_u64("size", size)
        if length == 0 or start + length > 1 << 64:
            raise ArgumentError(f"size is {length}; allowed are 1 .. {(1 << 64) - start}")
        for name, handler in (("read", read), ("write", write)):
            if handler is not None and not callable(handler):
                raise TypeError(f"{name} must be callable, not {type(handler).__name__}")
        new = MmioRange(start, length, read, write)
        at = self._place(start)
        for other in self._ranges[max(at - 1, 0) : at + 1]:
            if other.gpa < new.end and new.gpa < other.end:
                raise ArgumentError(
                    f"the range {new.gpa:#x}..{new.end:#x} overlaps the device at {other.gpa:#x}..{other.end:#x}"
                )
        self._ranges.insert(at, new)
        return new

    def unregister(self, device: MmioRange) -> None:
        """Take a range away again.

        Raises
        ------
        ArgumentError
            It is not registered.
        """
        if not isinstance(device, MmioRange):
            raise TypeError(f"device must be an MmioRange, not {type(device).__name__}")
        try:
            self._ranges.remove(device)
        except ValueError:
            raise ArgumentError(f"the range at gpa {device.gpa:#x} is not registered") from None

    def find(self, gpa: int) -> MmioRange | None:
        """The device of an address."""
        at = self._place(gpa)
        if at and gpa < self._ranges[at - 1].end:
            return self._ranges[at - 1]
        return None

    def __len__(self) -> int:
        return len(self._ranges)

    def _place(self, gpa: int) -> int:
        return bisect_right(self._ranges, gpa, key=lambda device: device.gpa)

    def read(self, gpa: int, size: int) -> bytes | None:
        """Read a piece of an access in exits of at most 8 bytes; None where some byte has no device."""
        parts = self._parts(gpa, size)
        if parts is None:
            return None
        data = b""
        for device, at, length in parts:
            value = (1 << 8 * length) - 1 if device.read is None else device.read(at, length)
            data += (value & ((1 << 8 * length) - 1)).to_bytes(length, "little")
        return data

    def write(self, gpa: int, data: bytes) -> bool:
        """Write a piece of an access; False, and nothing is written, where some byte has no device."""
        parts = self._parts(gpa, len(data))
        if parts is None:
            return False
        for device, at, length in parts:
            if device.write is not None:
                device.write(at, length, int.from_bytes(data[at - gpa : at - gpa + length], "little"))
        return True

    def _parts(self, gpa: int, size: int) -> list[tuple[MmioRange, int, int]] | None:
        parts = []
        end = gpa + size
        while gpa < end:
            device = self.find(gpa)
            if device is None:
                return None
            length = min(EXIT_BYTES, end - gpa, device.end - gpa)
            parts.append((device, gpa, length))
            gpa += length
        return parts
