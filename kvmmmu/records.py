"""The structured dtypes of records that cross the door, and the readers of ``.npz`` columns."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu import _core
from kvmmmu.errors import FormatError

__all__ = ["ACCESS", "ANSWER", "CASE", "TRANSLATION", "column", "read_npz"]

# What NumPy and zipfile raise for bytes that are not what they expect.
_BROKEN = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,  # an encrypted member, or (NotImplementedError) an unknown compression
    TypeError,
    SyntaxError,  # from the parser of array headers
    tokenize.TokenError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_LAYOUTS = _core.record_layouts()


def _dtype(name: str) -> np.dtype[Any]:
    fields, itemsize = _LAYOUTS[name]
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": itemsize})


ACCESS = _dtype("access")
CASE = _dtype("case")
ANSWER = _dtype("answer")
TRANSLATION = _dtype("translation")


def read_npz(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """All columns of an ``.npz`` file.

    Raises
    ------
    OSError
        The file cannot be opened.
    FormatError
        The file cannot be read as one: it names the file, the column where there is one, and what was wrong.
    """
    columns: dict[str, npt.NDArray[Any]] = {}
    name = ""
    with open(path, "rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                if not isinstance(file, np.lib.npyio.NpzFile):
                    raise FormatError(f"{path}: one array; expected an .npz file of columns")
                for name in file.files:
                    columns[name] = file[name]
        except FormatError:
            raise
        except _BROKEN as e:
            where = f", column {name!r}" if name else ""
            raise FormatError(f"{path}{where}: not a readable .npz file ({e})") from None
        except AttributeError:  # NumPy's file object has no zip when its directory is unreadable
            raise FormatError(f"{path}: not a readable .npz file") from None
    for name, array in columns.items():
        if not isinstance(array, np.ndarray):
            raise FormatError(f"{path}: member {name!r} is not an array; expected .npy columns only")
    return columns


def column(
    columns: dict[str, npt.NDArray[Any]], path: str | Path, name: str, dtype: str, shape: tuple[int | None, ...]
) -> npt.NDArray[Any]:
    """One column, checked and converted.

    Parameters
    ----------
    columns : dict
        As ``read_npz`` gives them.
    path : str or Path
        The file, for the message.
    name : str
    dtype : str
        Wanted type; integers of another width are taken when every value fits.
    shape : tuple
        Wanted shape; None matches any length.

    Raises
    ------
    FormatError
        The column is missing, has another shape or kind, or a value that does not fit.
    """
    if name not in columns:
        raise FormatError(f"{path}: column {name!r} is missing")
    array = columns[name]
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        raise FormatError(f"{path}: column {name!r} has shape {array.shape}; expected {shape} (None: any)")
    want = np.dtype(dtype)
    if array.dtype.kind not in "iub":
        raise FormatError(f"{path}: column {name!r} has dtype {array.dtype}; expected {want}")
    if array.dtype != want and array.size:
        limits = np.iinfo(want)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise FormatError(f"{path}: column {name!r} has values outside {want}")
    return np.ascontiguousarray(array, dtype=want)
