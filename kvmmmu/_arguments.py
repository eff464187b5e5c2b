"""Argument checks that several faces share: integers and columns from Python, named when they are wrong."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import ArgumentError

__all__ = ["Words", "bytes_of", "column_u64", "index_in", "index_of", "index_u64"]

# An integer, or anything NumPy makes an array of integers from.
Words = SupportsIndex | npt.ArrayLike

U64_MAX = 2**64 - 1


def index_of(name: str, value: object) -> int:
    """Return ``value`` as an int of any size, or raise TypeError: a float is no integer, whatever its value."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def index_u64(name: str, value: SupportsIndex) -> int:
    """Return ``value`` as an int in 0…2^64−1, or raise OverflowError (TypeError if it is no integer)."""
    number = index_of(name, value)
    if not 0 <= number <= U64_MAX:
        raise OverflowError(f"{name} = {number} is outside 0 ... 2^64-1")
    return number


def index_in(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """Return ``value`` as an int in ``low…high``, both included, or raise ArgumentError."""
    number = index_u64(name, value)
    if not low <= number <= high:
        raise ArgumentError(f"{name}: {number} is outside {low}…{high}")
    return number


def bytes_of(name: str, value: bytes | bytearray | memoryview) -> bytes:
    """Return a copy of the bytes of a buffer; ``bytes`` itself would make an integer so many zeros."""
    try:
        return bytes(memoryview(value))
    except TypeError:
        raise TypeError(f"{name} must be bytes, not {type(value).__name__}") from None


def column_u64(name: str, values: Words) -> npt.NDArray[np.uint64]:
    """Return ``values`` as uint64, aligned and in C order, its shape kept; nothing is rounded or wrapped on the way.

    Raises TypeError for what is no integer, OverflowError outside 0…2^64−1, ArgumentError where it is no array.
    """
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError as why:
        raise ArgumentError(f"{name}: no array of integers ({why})") from None
    if array.dtype.kind == "i":
        if array.size and int(array.min()) < 0:
            raise OverflowError(f"{name} = {int(array.min())} is outside 0 ... 2^64-1")
    elif array.dtype.kind == "b":
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    elif array.dtype.kind != "u":
        # NumPy makes floats of a list with integers on both sides of 2^63: look at what was given.
        flat = [index_u64(name, value) for value in np.asarray(values, object).flat]
        array = np.array(flat, np.uint64).reshape(array.shape)
    array = np.asarray(array, np.uint64, order="C")
    return array if array.flags.aligned else array.copy()
