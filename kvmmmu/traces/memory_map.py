"""The machine's guest-physical memory map that stands beside a trace."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmmmu.errors import FormatError

__all__ = ["MemoryArea", "longest_prefix", "memory_areas", "read_memory_map"]

PAGE = 4096
GPA_LIMIT = 1 << 52


@dataclass(frozen=True, slots=True)
class MemoryArea:
    """One range of guest-physical addresses; ``end_gpa`` is the last byte of it.

    ``kind`` is ``"ram"`` or ``"rom"`` (memory, the latter read-only); anything else is answered by a device or by
    nothing.
    """

    start_gpa: int
    end_gpa: int
    kind: str
    name: str

    @property
    def is_memory(self) -> bool:
        """Whether the area is backed by memory."""
        return self.kind in ("ram", "rom")

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end_gpa - self.start_gpa + 1


def longest_prefix(stem: str, names: Iterable[str]) -> str | None:
    """Return the longest of ``names`` that ``stem`` begins with, or None."""
    return max((name for name in names if stem.startswith(name)), key=len, default=None)


def read_memory_map(path: Path, stem: str) -> list[MemoryArea]:
    """Read the areas of the trace ``stem`` from a ``memory-map.json``.

    Its keys are trace stems; a trace that is a piece of another is found by the longest key its name begins with.

    Raises
    ------
    FormatError
        The file is missing or no such JSON object, or an area is malformed; names the file and the field.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: memory map: {error.strerror}; expected a JSON file beside the trace") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: memory map: not JSON ({error})") from None
    if not isinstance(document, dict):
        raise FormatError(f"{path}: memory map: expected an object keyed by trace name")
    key = longest_prefix(stem, document)
    if key is None:
        raise FormatError(f"{path}: memory map: no key begins the trace name {stem!r}; it has {sorted(document)}")
    return memory_areas(document[key], f"{path}: {key}")


def memory_areas(entries: object, where: str) -> list[MemoryArea]:
    """Check and convert the areas of one machine; ``where`` begins each message."""
    if not isinstance(entries, list):
        raise FormatError(f"{where}: expected a list of areas")
    areas = sorted((_area(entry, f"{where}[{i}]") for i, entry in enumerate(entries)), key=lambda area: area.start_gpa)
    for before, after in itertools.pairwise(areas):
        if after.start_gpa <= before.end_gpa:
            raise FormatError(f"{where}: areas {before.name!r} and {after.name!r} overlap at {after.start_gpa:#x}")
    if not any(area.kind == "ram" for area in areas):
        raise FormatError(f"{where}: expected at least one area of kind 'ram'")
    return areas


def _area(entry: object, where: str) -> MemoryArea:
    if isinstance(entry, MemoryArea):
        entry = {"start": entry.start_gpa, "end": entry.end_gpa, "kind": entry.kind, "name": entry.name}
    if not isinstance(entry, Mapping):
        raise FormatError(f"{where}: expected an object with start, end, kind, name")
    unknown = set(entry) - {"start", "end", "kind", "name"}
    if unknown:
        raise FormatError(f"{where}.{min(map(str, unknown))}: unknown field")
    start, end = _gpa(entry, "start", where), _gpa(entry, "end", where)
    kind, name = entry.get("kind"), entry.get("name", "")
    if not isinstance(kind, str) or not kind:
        raise FormatError(f"{where}.kind: {kind!r}, expected a name such as 'ram'")
    if not isinstance(name, str):
        raise FormatError(f"{where}.name: {name!r}, expected a string")
    if end < start:
        raise FormatError(f"{where}.end: {end:#x} is below start {start:#x} (the end is inclusive)")
    area = MemoryArea(start, end, kind, name)
    if area.is_memory and (start % PAGE or (end + 1) % PAGE):
        raise FormatError(f"{where}: {kind} {start:#x}…{end:#x} is not whole 4 KiB pages")
    return area


def _gpa(entry: Mapping[str, Any], field: str, where: str) -> int:
    value = entry.get(field)
    try:
        number = int(value, 16) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < GPA_LIMIT:
        raise FormatError(f"{where}.{field}: {value!r}, expected an address below 2^52, hexadecimal text or integer")
    return number
