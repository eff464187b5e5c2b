"""Columns of an ``.npz`` as streams: a trace is read a chunk at a time, never a whole column."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.lib.format as npy
import numpy.typing as npt

from kvmmmu.errors import FormatError

__all__ = ["ColumnFile", "format_errors"]

_READ = 1 << 18

# What zipfile, zlib and NumPy's header reader raise on bytes that are not what they should be.
_CORRUPT = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    struct.error,
    OverflowError,
    OSError,
    MemoryError,
)


@contextmanager
def format_errors(path: Path, field: str) -> Iterator[None]:
    """Turn what a reader raises on corrupt bytes into a FormatError that names the file and the field."""
    try:
        yield
    except FormatError:
        raise
    except FileNotFoundError as error:
        raise FormatError(f"{path}: {field}: {error.strerror}") from None
    except _CORRUPT as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise FormatError(f"{path}: {field}: cannot be read, truncated or corrupt ({text[:120]})") from error


class _Column:
    """One array of the file, at its first unread element."""

    def __init__(self, file: ColumnFile, name: str) -> None:
        self.path, self.name = file.path, name
        with format_errors(self.path, name):
            info = file.archive.getinfo(f"{name}.npy")
            self._stream = file.archive.open(info)
            version = npy.read_magic(self._stream)
            if version == (1, 0):
                self.shape, fortran, self.dtype = npy.read_array_header_1_0(self._stream)
            elif version == (2, 0):
                self.shape, fortran, self.dtype = npy.read_array_header_2_0(self._stream)
            else:
                raise FormatError(f"{self.path}: {name}: .npy version {version}, expected 1.0 or 2.0")
            if self.dtype.hasobject:
                raise FormatError(f"{self.path}: {name}: dtype {self.dtype}, expected plain numbers or text")
            if fortran and len(self.shape) > 1:
                raise FormatError(f"{self.path}: {name}: Fortran order, expected C order")
            nbytes = self.dtype.itemsize
            for extent in self.shape:
                nbytes *= int(extent)
            # Checked before anything is allocated: the header may claim any size.
            if info.file_size - self._stream.tell() != nbytes:
                raise FormatError(
                    f"{self.path}: {name}: {info.file_size - self._stream.tell()} bytes of data, "
                    f"expected {nbytes} for {self.dtype} {self.shape}"
                )

    def read(self, count: int) -> npt.NDArray[Any]:
        """The next ``count`` items along the first axis; an array of its own."""
        shape = (count, *self.shape[1:])
        with format_errors(self.path, self.name):
            out = np.empty(shape, self.dtype)
            view = out.reshape(-1).view(np.uint8)
            filled = 0
            while filled < len(view):
                block = self._stream.read(min(len(view) - filled, _READ))
                if not block:
                    raise FormatError(f"{self.path}: {self.name}: ends {len(view) - filled} bytes early")
                view[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
                filled += len(block)
            return out

    def finish(self) -> None:
        """Read to the end, where the archive's checksum is compared."""
        with format_errors(self.path, self.name):
            if self._stream.read(1):
                raise FormatError(f"{self.path}: {self.name}: more data than its header says")

    def close(self) -> None:
        self._stream.close()


class ColumnFile:
    """An ``.npz`` whose columns are read as streams or, the small ones, at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with format_errors(path, "file"):
            self.archive = zipfile.ZipFile(path)
        self.names: list[str] = []
        for member in self.archive.namelist():
            name = member.removesuffix(".npy")
            if name == member or name in self.names:
                self.close()
                raise FormatError(f"{path}: {member}: expected distinct .npy members only")
            self.names.append(name)

    def column(self, name: str) -> _Column:
        """Open a column at its start."""
        return _Column(self, name)

    def whole(self, name: str) -> npt.NDArray[Any]:
        """Read a whole array."""
        column = self.column(name)
        try:
            flat = _flattened(column)
            column.finish()
        finally:
            column.close()
        return flat.reshape(column.shape)

    def close(self) -> None:
        """Close the file."""
        self.archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _flattened(column: _Column) -> npt.NDArray[Any]:
    if not column.shape:
        column.shape, scalar = (1,), True
    else:
        scalar = False
    out = column.read(int(column.shape[0]))
    if scalar:
        column.shape = ()
    return out
