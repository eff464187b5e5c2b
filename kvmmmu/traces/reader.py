"""Recorded runs: the ``.npz`` and ``.raw.zst`` forms, read as a stream of column chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import FormatError
from kvmmmu.traces.columns import ColumnFile
from kvmmmu.traces.memory_map import MemoryArea, longest_prefix, memory_areas, read_memory_map
from kvmmmu.traces.raw import content_records, raw_records

__all__ = ["CHUNK", "Chunk", "Kind", "Trace", "bundled_trace", "open_trace"]

CHUNK = 1 << 16
PAGE = 4096
BUNDLED = "linux-x86_64-4level-mmio"
BUNDLED_RAW = f"{BUNDLED}-first200k.raw.zst"
RAW_SUFFIXES = (".raw.zst", ".raw")


class Kind(IntEnum):
    """What a record is."""

    MEM = 0  # a data access that succeeded: a=gva, b=gpa, c=value
    FETCH = 1  # instructions from a new page: a=rip, b=gpa
    STATE = 2  # a=cr3, b=cr0|cr4<<32, c=efer|eflags<<32
    PF = 3  # the guest's handler was entered: a=cr2, b=error code, c=rip
    INVLPG = 4  # about to run: a=gva, b=1 if known
    MOVCR = 5  # about to run: a=value, b=register number
    MEMHI = 8  # high half of the 16-byte access before it
    PTSTORE = 10  # a store into a frame that is a page table at some time: c=value


MEM_STORE = 1
MEM_MMIO = 2
MEM_CROSSES = 4

_COLUMNS: Mapping[str, np.dtype[Any]] = {
    "kind": np.dtype(np.uint8),
    "a": np.dtype("<u8"),
    "b": np.dtype("<u8"),
    "c": np.dtype("<u8"),
    "size": np.dtype(np.uint8),
    "flags": np.dtype(np.uint8),
    "cpl": np.dtype(np.uint8),
}
_PAGE_COLUMNS = ("page_gpa", "page_t0", "page_t1", "meta")
_OPTIONAL = ("page_t1", "tb_delta", "full_replay")
_KNOWN_KIND = np.zeros(256, np.bool_)
_KNOWN_KIND[[int(kind) for kind in Kind]] = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records as contiguous columns: uint64 a, b, c; uint8 kind, size, flags, cpl.

    ``start`` is the number of the first record in the whole trace, from 0.
    """

    start: int
    kind: npt.NDArray[np.uint8]
    a: npt.NDArray[np.uint64]
    b: npt.NDArray[np.uint64]
    c: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    cpl: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.kind)

    def part(self, first: int, last: int) -> Chunk:
        """Records ``first…last-1`` of this chunk, as views."""
        return Chunk(
            self.start + first,
            self.kind[first:last],
            self.a[first:last],
            self.b[first:last],
            self.c[first:last],
            self.size[first:last],
            self.flags[first:last],
            self.cpl[first:last],
        )


@dataclass(frozen=True)
class Trace:
    """A recorded run; ``chunks()`` streams its records, everything else is in memory.

    Attributes
    ----------
    path : pathlib.Path
    meta : mapping
        What the recorder noted.
    memory_map : tuple of MemoryArea
        The machine's guest-physical map, ascending.
    page_gpa : ndarray of uint64, shape (n,)
        Where the page-table pages stand.
    page_t0 : ndarray of uint64, shape (n, 512)
        Their contents before the first record.
    page_t1 : ndarray of uint64, shape (n, 512), or None
        Their contents after the last; None where the trace is only a piece of the run.
    n_records : int or None
        None where a raw file does not say.
    """

    path: Path
    meta: Mapping[str, Any]
    memory_map: tuple[MemoryArea, ...]
    page_gpa: npt.NDArray[np.uint64]
    page_t0: npt.NDArray[np.uint64]
    page_t1: npt.NDArray[np.uint64] | None
    n_records: int | None

    @property
    def is_raw(self) -> bool:
        """Whether the file holds every record (``.raw.zst``) rather than the compact form."""
        return self.path.name.endswith(RAW_SUFFIXES)

    def chunks(self, size: int = CHUNK) -> Iterator[Chunk]:
        """Stream the records, ``size`` at a time.

        In a raw file a store into one of ``page_gpa`` is given as PTSTORE, so that both forms say the same.

        Raises
        ------
        FormatError
            The file is truncated or corrupt, or a record is of no known kind; names file, column and record.
        """
        if size < 1:
            raise ValueError(f"size: {size} is below 1")
        yield from self._raw_chunks(size) if self.is_raw else self._npz_chunks(size)

    def _npz_chunks(self, size: int) -> Iterator[Chunk]:
        with ColumnFile(self.path) as file:
            columns = {name: file.column(name) for name in _COLUMNS}
            count = int(columns["kind"].shape[0])
            for start in range(0, count, size):
                take = min(size, count - start)
                chunk = Chunk(start, **{name: column.read(take) for name, column in columns.items()})
                _check_records(self.path, chunk)
                yield chunk
            for column in columns.values():
                column.finish()

    def _raw_chunks(self, size: int) -> Iterator[Chunk]:
        start = 0
        frames = np.sort(self.page_gpa >> np.uint64(12))
        for records in raw_records(self.path, size):
            chunk = Chunk(start, **{name: np.ascontiguousarray(records[name]) for name in _COLUMNS})
            _check_records(self.path, chunk)
            _name_table_stores(chunk, frames)
            yield chunk
            start += len(chunk)


def _check_records(path: Path, chunk: Chunk) -> None:
    for name, good, expected in (
        ("kind", _KNOWN_KIND[chunk.kind], f"one of {', '.join(str(int(kind)) for kind in Kind)}"),
        ("size", chunk.size <= 4, "0…4 (bytes are 1 << size)"),
        ("flags", chunk.flags <= 7, "0…7"),
        ("cpl", chunk.cpl <= 3, "0…3"),
    ):
        if not good.all():
            at = int(np.argmin(good))
            value = int(getattr(chunk, name)[at])
            raise FormatError(f"{path}: {name}: record {chunk.start + at} has {value}, expected {expected}")


def _name_table_stores(chunk: Chunk, frames: npt.NDArray[np.uint64]) -> None:
    """Turn a raw chunk's stores into table frames into PTSTORE records of at most 8 bytes each."""
    if not len(frames):
        return
    frame = chunk.b >> np.uint64(12)
    at = np.minimum(np.searchsorted(frames, frame), len(frames) - 1)
    stores = (
        ((chunk.kind == Kind.MEM) | (chunk.kind == Kind.MEMHI))
        & ((chunk.flags & (MEM_STORE | MEM_MMIO)) == MEM_STORE)
        & (frames[at] == frame)
    )
    chunk.kind[stores] = Kind.PTSTORE
    # The high half of a 16-byte store follows as a record of its own.
    chunk.size[stores] = np.minimum(chunk.size[stores], 3)


def bundled_trace(*, raw: bool = False) -> Path:
    """Path of the sample that is installed with the package: a booted 64-bit Linux doing MMIO.

    Parameters
    ----------
    raw : bool
        The first 200,000 records of the same run with nothing left out, for measuring: most accesses of the
        sample itself are the first ones to their page.
    """
    return Path(str(files("kvmmmu.traces") / "data" / (BUNDLED_RAW if raw else f"{BUNDLED}.npz")))


def open_trace(
    path: str | Path,
    *,
    pages: str | Path | None = None,
    memory_map: str | Path | Sequence[MemoryArea | Mapping[str, Any]] | None = None,
) -> Trace:
    """Open a recorded run.

    Parameters
    ----------
    path : path
        An ``.npz``, or a raw file (``.raw.zst``, ``.raw``).
    pages : path, optional
        The ``.npz`` that has a raw file's page tables; without it the one beside the file whose stem is the longest
        that the file's name begins with.
    memory_map : path or list of areas, optional
        The machine's map; without it ``memory-map.json`` beside the file, under the longest key that the file's name
        begins with.

    Raises
    ------
    FormatError
        The file, its pages or its map are missing, truncated or not what they should be; names file and field.
    """
    path = Path(path)
    stem = _stem(path)
    if not path.is_file():
        raise FormatError(f"{path}: file: no such file")
    if memory_map is None or isinstance(memory_map, str | Path):
        where = path.parent / "memory-map.json" if memory_map is None else Path(memory_map)
        areas = read_memory_map(where, stem)
    else:
        areas = memory_areas(list(memory_map), "memory_map")
    if path.name.endswith(RAW_SUFFIXES):
        pages_path = _sibling(path, stem) if pages is None else Path(pages)
    elif pages is not None:
        raise FormatError(f"{path}: pages: {pages}: an .npz trace has its own page tables")
    else:
        pages_path = path
    with ColumnFile(pages_path) as file:
        n_records: int | None = _check_columns(file)
        meta = _meta(file)
        page_gpa, page_t0, page_t1 = _page_tables(file, areas)
    if pages_path is not path:
        n_records = content_records(path)
        # Only a raw file that holds the whole run ends in its final tables.
        if n_records is None or n_records != meta.get("nrec"):
            page_t1 = None
    return Trace(path, meta, tuple(areas), page_gpa, page_t0, page_t1, n_records)


def _stem(path: Path) -> str:
    for suffix in (*RAW_SUFFIXES, ".npz"):
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    raise FormatError(f"{path}: file: expected a name ending in .npz, .raw.zst or .raw")


def _sibling(path: Path, stem: str) -> Path:
    names = [other.name.removesuffix(".npz") for other in path.parent.glob("*.npz")]
    name = longest_prefix(stem, names)
    if name is None:
        raise FormatError(
            f"{path}: page tables: a raw file has none, and no .npz beside it has a name that {stem!r} begins with"
        )
    return path.parent / f"{name}.npz"


def _check_columns(file: ColumnFile) -> int:
    """Check the names, dtypes and lengths of a trace's columns; returns the number of records."""
    known = {*_COLUMNS, *_PAGE_COLUMNS, *_OPTIONAL}
    for name in file.names:
        if name not in known:
            raise FormatError(f"{file.path}: {name}: unknown column; a trace has {', '.join(sorted(known))}")
    for name in (*_COLUMNS, *_PAGE_COLUMNS):
        if name not in file.names and name not in _OPTIONAL:
            raise FormatError(f"{file.path}: {name}: missing column")
    count: int | None = None
    expected: dict[str, np.dtype[Any]] = dict(_COLUMNS)
    if "tb_delta" in file.names:
        expected["tb_delta"] = np.dtype("<u4")
    for name, dtype in expected.items():
        column = file.column(name)
        column.close()
        if column.dtype != dtype or len(column.shape) != 1:
            raise FormatError(
                f"{file.path}: {name}: {column.dtype} of shape {column.shape}, expected {dtype} of shape (n,)"
            )
        if count is None:
            count = int(column.shape[0])
        elif column.shape[0] != count:
            raise FormatError(f"{file.path}: {name}: {column.shape[0]} records, expected {count} as in 'kind'")
    assert count is not None
    return count


def _meta(file: ColumnFile) -> Mapping[str, Any]:
    column = file.column("meta")
    column.close()
    if column.dtype.kind != "U" or column.shape != ():
        raise FormatError(f"{file.path}: meta: {column.dtype} of shape {column.shape}, expected JSON text of shape ()")
    try:
        meta = json.loads(str(file.whole("meta")[()]))
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file.path}: meta: not JSON ({error})") from None
    if not isinstance(meta, dict):
        raise FormatError(f"{file.path}: meta: {type(meta).__name__}, expected a JSON object")
    if not isinstance(meta.get("mode"), str):
        raise FormatError(f"{file.path}: meta.mode: {meta.get('mode')!r}, expected the name of a paging mode")
    nrec = meta.get("nrec", 0)
    if not isinstance(nrec, int) or isinstance(nrec, bool) or nrec < 0:
        raise FormatError(f"{file.path}: meta.nrec: {nrec!r}, expected a count of records")
    return MappingProxyType(meta)


def _page_tables(
    file: ColumnFile, areas: Sequence[MemoryArea]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64] | None]:
    """Read and check the page-table pages."""
    limit = sum(area.nbytes for area in areas if area.is_memory) // PAGE
    shapes = {"page_gpa": "(n,)", "page_t0": "(n, 512)", "page_t1": "(n, 512)"}
    count: int | None = None
    for name, shape in shapes.items():
        if name not in file.names:
            continue
        column = file.column(name)
        column.close()
        if column.dtype != np.dtype("<u8") or column.shape[1:] != (() if name == "page_gpa" else (512,)):
            raise FormatError(
                f"{file.path}: {name}: {column.dtype} of shape {column.shape}, expected uint64 of shape {shape}"
            )
        if count is None:
            count = int(column.shape[0])
            if not 0 < count <= limit:
                raise FormatError(f"{file.path}: {name}: {count} pages, expected 1…{limit}, the machine's memory")
        elif column.shape[0] != count:
            raise FormatError(f"{file.path}: {name}: {column.shape[0]} pages, expected {count} as in 'page_gpa'")
    page_gpa = file.whole("page_gpa")
    for i, gpa in enumerate(page_gpa.tolist()):
        if gpa % PAGE or not any(area.is_memory and area.start_gpa <= gpa <= area.end_gpa for area in areas):
            raise FormatError(f"{file.path}: page_gpa: [{i}] is {gpa:#x}, expected a page of the machine's memory")
    if len(np.unique(page_gpa)) != len(page_gpa):
        raise FormatError(f"{file.path}: page_gpa: a page stands in it twice")
    return page_gpa, file.whole("page_t0"), file.whole("page_t1") if "page_t1" in file.names else None
