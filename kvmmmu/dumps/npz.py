"""Page tables of a stopped machine, with an emulator's own account of what they map, in one ``.npz`` file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.cpu import GuestCpu
from kvmmmu.errors import ArgumentError, FormatError
from kvmmmu.paging import Paging
from kvmmmu.records import column, read_npz

__all__ = ["PageTableDump", "is_dump"]

_COLUMNS: dict[str, str] = {
    "gva": "u8",
    "gpa": "u8",
    "size": "u8",
    "pte": "u8",
    "leaf_flags": "u2",
    "eff": "u1",
    "in_ram": "?",
    "tlb_gva": "u8",
    "tlb_gpa": "u8",
    "tlb_flags": "u2",
    "mem_start": "u8",
    "mem_end": "u8",
    "mem_prot": "u1",
    "map_start": "u8",
    "map_end": "u8",
}
_GROUPS = (
    ("gva", "gpa", "size", "pte", "leaf_flags", "eff", "in_ram"),
    ("tlb_gva", "tlb_gpa", "tlb_flags"),
    ("mem_start", "mem_end", "mem_prot"),
    ("map_start", "map_end", "map_kind", "map_name"),
)
_REGISTERS = ("cr0", "cr3", "cr4", "efer")
_CR4_PAE, _EFER_LMA = 1 << 5, 1 << 10
# QEMU sets A and D in PDPTEs of PAE paging, where the processor has reserved bits.
_PDPTE_QEMU_BITS = np.uint64(0x60)


def is_dump(columns: dict[str, npt.NDArray[Any]]) -> bool:
    """Whether columns look like a page-table dump."""
    return "page_data" in columns and "meta" in columns


@dataclass(frozen=True, eq=False)
class PageTableDump:
    """A dump in memory.

    Attributes
    ----------
    path : str
    meta : dict
        The file's own description: mode, registers, privilege level.
    page_gpa : ndarray of uint64, shape (n,)
    page_data : ndarray of uint64, shape (n, 512)
        The pages that hold tables.
    columns : dict
        The other columns, by name (see the dumps' README).
    """

    path: str
    meta: dict[str, Any]
    page_gpa: npt.NDArray[np.uint64]
    page_data: npt.NDArray[np.uint64]
    columns: dict[str, npt.NDArray[Any]]

    @classmethod
    def load(cls, path: str | Path) -> PageTableDump:
        """Read a file.

        Raises
        ------
        OSError
            The file cannot be opened.
        FormatError
            It is not a dump; the message names the column and what was expected.
        """
        raw = read_npz(path)
        if not is_dump(raw):
            raise FormatError(f"{path}: not a page-table dump; expected columns 'page_data' and 'meta'")
        known = {*_COLUMNS, "page_gpa", "page_data", "meta", "map_kind", "map_name"}
        if unknown := sorted(raw.keys() - known):
            raise FormatError(f"{path}: unknown column {unknown[0]!r}")
        page_gpa = column(raw, path, "page_gpa", "u8", (None,))
        page_data = column(raw, path, "page_data", "u8", (len(page_gpa), 512))
        columns: dict[str, npt.NDArray[Any]] = {}
        for group in _GROUPS:
            rows: int | None = None
            if group[0] not in raw and (others := [name for name in group if name in raw]):
                raise FormatError(f"{path}: column {group[0]!r} is missing; {others[0]!r} needs it")
            for name in group:
                if name not in raw:
                    columns[name] = np.zeros(rows or 0, _COLUMNS.get(name, "U1"))
                    continue
                if name in _COLUMNS:
                    columns[name] = column(raw, path, name, _COLUMNS[name], (rows,))
                else:
                    columns[name] = raw[name]
                    if raw[name].dtype.kind != "U" or raw[name].ndim != 1:
                        raise FormatError(f"{path}: column {name!r} has dtype {raw[name].dtype}; expected text")
                rows = len(columns[name])
        return cls(str(path), _meta(raw["meta"], path), page_gpa, page_data, columns)

    def paging(self, *, dialect: str = "sdm", cpu: GuestCpu | None = None) -> Paging:
        """Tables ready for translation.

        Parameters
        ----------
        dialect : {"sdm", "kvm"}
        cpu : GuestCpu, optional
            The file does not say what the processor was; by default one that reserves as little as possible
            (52 address bits, 1 GiB pages).

        Raises
        ------
        FormatError
            Pages that overlap or are not aligned, or PDPTEs that no processor loads.
        """
        cr3 = self.meta["cr3"]
        data = self.page_data
        if self.meta["cr4"] & _CR4_PAE and not self.meta["efer"] & _EFER_LMA:
            where = np.flatnonzero(self.page_gpa == np.uint64(cr3 & 0xFFFF_F000))
            if where.size:
                data = data.copy()
                first = (cr3 & 0xFE0) // 8
                data[where[0], first : first + 4] &= ~_PDPTE_QEMU_BITS
        try:
            return Paging(
                self.meta["cr0"],
                cr3,
                self.meta["cr4"],
                self.meta["efer"],
                GuestCpu(maxphyaddr=52) if cpu is None else cpu,
                memory=[(int(gpa), page) for gpa, page in zip(self.page_gpa, data, strict=True)],
                dialect=dialect,
            )
        except (ArgumentError, OverflowError) as e:
            raise FormatError(f"{self.path}: {e}") from None


def _meta(array: npt.NDArray[Any], path: str | Path) -> dict[str, Any]:
    try:
        meta = json.loads(str(array))
    except ValueError as e:
        raise FormatError(f"{path}: column 'meta' is not JSON ({e})") from None
    if not isinstance(meta, dict):
        raise FormatError(f"{path}: column 'meta' holds {type(meta).__name__}; expected an object")
    for name in _REGISTERS:
        value = meta.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise FormatError(f"{path}: meta.{name} is {value!r}; expected an integer in 0 .. 2**64 - 1")
    return meta
