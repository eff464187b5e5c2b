"""Raw trace files: 32-byte records, mostly Zstandard-compressed, as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import FormatError
from kvmmmu.traces.columns import format_errors

__all__ = ["RECORD", "content_records", "raw_records"]

RECORD = np.dtype(
    [
        ("a", "<u8"),
        ("b", "<u8"),
        ("c", "<u8"),
        ("kind", "u1"),
        ("size", "u1"),
        ("flags", "u1"),
        ("cpl", "u1"),
        ("tb", "<u4"),
    ]
)
_READ = 1 << 18
# Small, because a hostile frame turns 4 bytes into 128 KiB and what one call gives back stands in memory.
_READ_PACKED = 1 << 12
# A frame may ask for a window of any size; no trace needs more than Zstandard's own recommended limit.
_MAX_WINDOW = 1 << 27


def content_records(path: Path) -> int | None:
    """Number of records, where the file says so without being read."""
    size: int
    if not path.name.endswith(".zst"):
        with format_errors(path, "file"):
            size = path.stat().st_size
    else:
        import zstandard

        with format_errors(path, "file"), path.open("rb") as stream:
            try:
                header = zstandard.get_frame_parameters(stream.read(18))
            except zstandard.ZstdError as error:
                raise FormatError(f"{path}: file: not Zstandard data ({error})") from None
            if header.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
                return None
            size = header.content_size
    if size % RECORD.itemsize:
        raise FormatError(f"{path}: file: {size} bytes, expected a multiple of {RECORD.itemsize}")
    return size // RECORD.itemsize


def raw_records(path: Path, size: int) -> Iterator[npt.NDArray[Any]]:
    """Stream the records, ``size`` at a time.

    Raises
    ------
    FormatError
        The file is truncated or corrupt, or its length is no multiple of a record.
    """
    want = size * RECORD.itemsize
    pending = bytearray()
    for block in _decompressed(path):
        pending += block
        while len(pending) >= want:
            yield np.frombuffer(bytes(pending[:want]), RECORD)
            del pending[:want]
    if len(pending) % RECORD.itemsize:
        raise FormatError(
            f"{path}: file: ends inside a record ({len(pending) % RECORD.itemsize} of {RECORD.itemsize} bytes)"
        )
    if pending:
        yield np.frombuffer(bytes(pending), RECORD)


def _decompressed(path: Path) -> Iterator[bytes]:
    with format_errors(path, "file"):
        stream = path.open("rb")
    with stream:
        if not path.name.endswith(".zst"):
            while block := stream.read(_READ):
                yield block
            return
        import zstandard

        context = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        frame = context.decompressobj()
        complete = False
        while block := stream.read(_READ_PACKED):
            while block:
                try:
                    data = frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise FormatError(f"{path}: file: corrupt Zstandard data ({error})") from None
                if data:
                    yield data
                complete = frame.eof
                block = b""
                if complete:
                    block = frame.unused_data
                    frame = context.decompressobj()
        if not complete:
            raise FormatError(f"{path}: file: truncated, the Zstandard frame has no end")
