"""Dumps: the page tables of running kernels against what an emulator says they map.

Compared are four accounts of the same tables: each row of ``info tlb`` and of the reference
walk (translated one by one), each hole between the rows (not one present page in it), and the
ranges of ``info mem`` (effective rights).  The column ``in_ram`` is about the machine, not its
tables, and is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.conform.report import FileReport
from kvmmmu.dumps.npz import PageTableDump
from kvmmmu.paging import Paging
from kvmmmu.walks import Fault, PagingFormat, Rights

__all__ = ["check"]

_U64 = np.uint64
_NX_BIT, _LARGE_BIT = 63, 7
_FLAG_BITS = {1: 1, 2: 2, 4: 3, 8: 4, 16: 5, 32: 6, 64: _LARGE_BIT, 128: 8, 256: _NX_BIT}

_Array = npt.NDArray[Any]


class _Tally:
    """Counts answers and keeps the text of the first few that differ."""

    def __init__(self, show: int) -> None:
        self.agreed = 0
        self.total = 0
        self.show = show
        self.texts: list[str] = []

    def add(self, good: _Array, describe: Callable[[int], str]) -> None:
        self.agreed += int(good.sum())
        self.total += good.size
        for i in np.flatnonzero(~good)[: max(0, self.show - len(self.texts))]:
            self.texts.append(describe(int(i)))


def _leaf_flags(found: _Array) -> npt.NDArray[np.uint16]:
    """The emulator's flag word made of leaf entries; bit 7 of a lowest-level entry is PAT, not "large"."""
    flags = np.zeros(found.shape, np.uint16)
    for flag, bit in _FLAG_BITS.items():
        is_set = (found["entry"] >> _U64(bit)) & _U64(1) == 1
        if bit == _LARGE_BIT:
            is_set &= found["level"] > 1
        flags[is_set] |= np.uint16(flag)
    return flags


def _translate(paging: Paging, gvas: _Array) -> _Array:
    """A read that no feature but the tables refuses: supervisor, EFLAGS.AC set."""
    return paging.translate(gvas, "r", 0, ac=True)


def _describe(paging: Paging, what: str, gvas: _Array) -> Callable[[int], str]:
    return lambda i: f"{what} {i}: gva {int(gvas[i]):#x}\n{paging.explain(int(gvas[i]), ac=True)}"


def _check_tlb(paging: Paging, c: dict[str, _Array], tally: _Tally) -> None:
    found = _translate(paging, c["tlb_gva"])
    good = (found["fault"] == Fault.NONE) & (found["gpa"] == c["tlb_gpa"]) & (_leaf_flags(found) == c["tlb_flags"])
    tally.add(good, _describe(paging, "info tlb row", c["tlb_gva"]))


def _check_reference(paging: Paging, c: dict[str, _Array], tally: _Tally) -> None:
    found = _translate(paging, c["gva"])
    rights = found["access"]
    eff = np.where(rights & Rights.W, 1, 0) | np.where(rights & Rights.U, 2, 0) | np.where(rights & Rights.X, 0, 4)
    good = (
        (found["fault"] == Fault.NONE)
        & (found["gpa"] == c["gpa"])
        & (_U64(1) << found["page_shift"].astype(_U64) == c["size"])
        & (found["entry"] == c["pte"])
        & (_leaf_flags(found) == c["leaf_flags"])
        & (eff == c["eff"])
    )
    tally.add(good, _describe(paging, "reference row", c["gva"]))
    # The last byte of a page belongs to it, too.
    last = c["size"] - _U64(1)
    found = _translate(paging, c["gva"] + last)
    good = (found["fault"] == Fault.NONE) & (found["gpa"] == c["gpa"] + last)
    tally.add(good, _describe(paging, "last byte of reference row", c["gva"] + last))


def _holes(leaves: _Array, width: int) -> Iterator[tuple[int, int]]:
    """First and last address of each stretch between the pages that the emulator lists."""
    start = 0
    for gva, size in leaves:
        if int(gva) > start:
            yield start, int(gva) - 1
        start = int(gva) + int(size)
    if start < 1 << width:
        yield start, (1 << width) - 1


def _check_holes(paging: Paging, c: dict[str, _Array], tally: _Tally) -> None:
    """Nothing is mapped in a hole: neither at its edges, nor anywhere that the tables reach."""
    shift = 22 if paging.format == PagingFormat.PAGING_32 else 21
    width = 64 if paging.format == PagingFormat.LONG else 32
    listed = np.zeros(len(c["tlb_gva"]), [("gva", "u8"), ("size", "u8")])
    listed["gva"] = c["tlb_gva"]
    listed["size"] = _tlb_sizes(c, shift)
    listed.sort(order="gva")
    holes = list(_holes(listed, width))
    edges = np.array(holes, _U64).reshape(-1, 2)
    ends = _translate(paging, edges)
    good = (ends["fault"] != Fault.NONE).all(axis=1)
    mapped = paging.mappings(limit=len(listed) + len(holes) + 1)["gva"]
    inside = np.searchsorted(edges[:, 0], mapped, side="right") - 1
    hit = (inside >= 0) & (mapped <= edges[np.maximum(inside, 0), 1]) if len(edges) else np.zeros(0, bool)
    good[np.unique(inside[hit])] = False
    tally.add(good, lambda i: f"hole {edges[i, 0]:#x} .. {edges[i, 1]:#x} is not empty")
    same = np.array_equal(mapped, listed["gva"])
    tally.add(
        np.array([same]), lambda _: f"the tables map {len(mapped)} pages, info tlb lists {len(listed)}, not the same"
    )


def _tlb_sizes(c: dict[str, _Array], shift: int) -> _Array:
    """Page sizes of the rows: the reference walk's where it has the row; else by the "large" flag."""
    sizes = np.where(c["tlb_flags"] & 64, _U64(1 << shift), _U64(4096))
    if not len(c["gva"]):
        return sizes
    order = np.argsort(c["gva"], kind="stable")
    at = np.minimum(np.searchsorted(c["gva"][order], c["tlb_gva"]), len(order) - 1)
    return np.where(c["gva"][order][at] == c["tlb_gva"], c["size"][order][at], sizes)


def _check_rights(paging: Paging, c: dict[str, _Array], tally: _Tally) -> None:
    """Neighbouring pages with the same rights make one range."""
    if not len(c["mem_start"]):
        return
    leaves = paging.mappings(limit=max(1 << 20, 2 * len(c["tlb_gva"])))
    prot = np.where(leaves["access"] & Rights.W, 1, 0) | np.where(leaves["access"] & Rights.U, 2, 0)
    start = leaves["gva"]
    end = start + (_U64(1) << leaves["page_shift"].astype(_U64))
    new = np.ones(len(leaves), bool)
    new[1:] = (start[1:] != end[:-1]) | (prot[1:] != prot[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(leaves))[: len(first)] - 1
    ours = {(int(a), int(b), int(p)) for a, b, p in zip(start[first], end[last], prot[first], strict=True)}
    theirs = list(zip(c["mem_start"].tolist(), c["mem_end"].tolist(), c["mem_prot"].tolist(), strict=True))
    good = np.array([row in ours for row in theirs])
    tally.add(good, lambda i: f"info mem range {theirs[i][0]:#x} .. {theirs[i][1]:#x} prot {theirs[i][2]} is not ours")
    extra = sorted(ours - set(theirs))
    tally.add(np.array([not extra]), lambda _: f"info mem lacks {len(extra)} of our ranges, the first {extra[0]}")


def check(path: str | Path, *, show: int = 5) -> FileReport:
    """Compare every answer that a dump holds with the model.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` dump.
    show : int
        How many disagreements to describe.

    Returns
    -------
    FileReport
        Its total counts the rows of ``info tlb`` and of the reference walk (its first and last bytes), the holes,
        the ranges of ``info mem``, and one for each of the two sets being complete.

    Raises
    ------
    OSError
        The file cannot be opened.
    FormatError
        It is not a dump.
    """
    dump = PageTableDump.load(path)
    paging = dump.paging()
    tally = _Tally(show)
    _check_tlb(paging, dump.columns, tally)
    _check_reference(paging, dump.columns, tally)
    _check_holes(paging, dump.columns, tally)
    _check_rights(paging, dump.columns, tally)
    return FileReport(str(path), "dump", tally.agreed, tally.total, tally.texts)
