"""Vectors: files of single page walks with known answers, compared row by row.

Columns are described in the file's README.  A missing column is all zero, an unknown one an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu import _core
from kvmmmu.conform.report import FileReport
from kvmmmu.errors import ArgumentError, FormatError
from kvmmmu.records import ANSWER, CASE, column, read_npz

__all__ = ["check", "is_vectors"]

_INPUTS = {
    "stage": "u1",
    "cr0": "u8",
    "cr3": "u8",
    "cr4": "u8",
    "efer": "u8",
    "pkru": "u4",
    "gva": "u8",
    "access": "u1",
    "cpl": "u1",
    "implicit": "u1",
    "ac": "u1",
    "mode64": "u1",
    "maxphyaddr": "u1",
    "gbpages": "u1",
    "exec_only": "u1",
    "root2": "u8",
    "gpa_in": "u8",
    "is_table": "u1",
    "linear_valid": "u1",
    "amd": "u1",
}
_ANSWERS = {"kind": "u1", "pa": "u8", "page_bits": "u1", "err": "u8", "gpa": "u8"}
_WORDS = {"ent_pa": "u8", "ent_val": "u8", "ent_set": "u8", "kvm_set_xor": "u8"}
_OTHERS = {"kvm_diff": "u1", "agree": "u1"}
_RANGES = {"stage": 3, "access": 2, "cpl": 3, "maxphyaddr": 52}

_MOST_WORDS = 4096

_KIND_OK, _KIND_PF = 0, 1
_KIND_NESTED = 4  # and above: a fault of the second dimension
_STAGE_PLAIN, _STAGE_EPT_ONLY = 0, 3
_KIND_NAMES = ("ok", "#PF", "#GP", "#GP at CR3 load", "EPT violation", "EPT misconfiguration", "#NPF")

_Columns = dict[str, npt.NDArray[Any]]


def is_vectors(columns: _Columns) -> bool:
    """Whether columns look like a vectors file."""
    return "exp_kind" in columns and "ent_off" in columns


def _read(path: str | Path) -> tuple[_Columns, int]:
    """The file with every column there, and its number of rows."""
    raw = read_npz(path)
    if not is_vectors(raw):
        raise FormatError(f"{path}: not a vectors file; expected columns 'exp_kind' and 'ent_off'")
    known = {*_INPUTS, *_WORDS, *_OTHERS, "ent_off", *(f"{who}_{what}" for who in ("exp", "kvm") for what in _ANSWERS)}
    if unknown := sorted(raw.keys() - known):
        raise FormatError(f"{path}: unknown column {unknown[0]!r}")
    if raw["exp_kind"].ndim != 1:
        raise FormatError(f"{path}: column 'exp_kind' has shape {raw['exp_kind'].shape}; expected one dimension")
    rows = len(raw["exp_kind"])
    offsets = column(raw, path, "ent_off", "i8", (rows + 1,))
    words = len(column(raw, path, "ent_pa", "u8", (None,)))
    if offsets[0] != 0 or offsets[-1] != words or bool(np.any(np.diff(offsets) < 0)):
        raise FormatError(f"{path}: column 'ent_off' must rise from 0 to {words}, the length of 'ent_pa'")
    if rows and int(np.diff(offsets).max()) > _MOST_WORDS:
        raise FormatError(f"{path}: column 'ent_off' gives one row {np.diff(offsets).max()} words; allowed are 4096")
    dtypes = {**_INPUTS, **_OTHERS, **{f"{who}_{k}": t for who in ("exp", "kvm") for k, t in _ANSWERS.items()}}
    full: _Columns = {"ent_off": offsets}
    for name, dtype in dtypes.items():
        if name in raw:
            full[name] = column(raw, path, name, dtype, (rows,))
        else:
            full[name] = np.full(rows, 1 if name == "exec_only" else 0, dtype)
    for name, dtype in _WORDS.items():
        full[name] = column(raw, path, name, dtype, (words,)) if name in raw else np.zeros(words, dtype)
    for name, most in _RANGES.items():
        if rows and int(full[name].max()) > most:
            raise FormatError(f"{path}: column {name!r} has the value {full[name].max()}; allowed are 0 .. {most}")
    if rows and int(full["maxphyaddr"].min()) < 32:
        raise FormatError(f"{path}: column 'maxphyaddr' has the value {full['maxphyaddr'].min()}; allowed are 32 .. 52")
    if bool(np.any(full["ent_pa"] & 7)):
        raise FormatError(f"{path}: column 'ent_pa' has an address that is not a multiple of 8")
    return full, rows


def _walk(columns: _Columns, rows: int, dialect: str, kernel: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]:
    """The model's answers and the words after each walk."""
    cases = np.zeros(rows, CASE)
    for name in _INPUTS:
        cases[name] = columns[name]
    answers = np.zeros(rows, ANSWER)
    after = np.zeros(len(columns["ent_pa"]), np.uint64)
    kvm = 1 if dialect == "kvm" else 0
    words = columns["ent_pa"], columns["ent_val"]
    _core.walk_cases(cases, columns["ent_off"], *words, after, answers, kvm, kernel)
    return answers, after


def _answer_text(kind: int, pa: int, page_bits: int, err: int, gpa: int) -> str:
    name = _KIND_NAMES[kind] if kind < len(_KIND_NAMES) else str(kind)
    if kind == _KIND_OK:
        return f"{name} pa {pa:#x}, 2^{page_bits} bytes"
    return f"{name} code {err:#x}" + (f", gpa {gpa:#x}" if kind >= _KIND_NESTED else "")


def check(path: str | Path, *, dialect: str = "sdm", show: int = 5, kernel: int = 0) -> FileReport:
    """Walk every row of a vectors file and compare with its answers.

    Parameters
    ----------
    path : str or Path
        An ``.npz`` file of vectors.
    dialect : {"sdm", "kvm"}
        Whose rules: the manuals', or those of KVM's software walker; for the latter the ``kvm_*`` columns are
        the answer of each row with ``kvm_diff`` 1.
    show : int
        How many disagreements to describe.
    kernel : int
        0: each row alone; else as the first of a batch, whose other rows must agree with walking again
        (``Paging.kernel``).

    Returns
    -------
    FileReport
        A row agrees when kind, address, page size, code and guest-physical address are equal (those that the kind
        has), and the tables after the walk too: A and D bits exactly those listed on success, unchanged on a
        plain fault; a nested walk's tables are compared on success only, and its page size is not given.

    Raises
    ------
    FormatError
        The file is not readable as vectors.
    ArgumentError
        Unknown dialect.
    """
    if dialect not in ("sdm", "kvm"):
        raise ArgumentError(f"dialect is {dialect!r}; allowed are 'sdm' and 'kvm'")
    columns, rows = _read(path)
    answers, after = _walk(columns, rows, dialect, kernel)
    theirs = np.zeros(rows, bool) if dialect == "sdm" else columns["kvm_diff"] == 1
    want = {k: np.where(theirs, columns[f"kvm_{k}"], columns[f"exp_{k}"]) for k in _ANSWERS}
    stage = columns["stage"]
    plain = (stage == _STAGE_PLAIN) | (stage == _STAGE_EPT_ONLY)

    kind = answers["kind"]
    good = kind == want["kind"]
    success = good & (kind == _KIND_OK)
    good &= ~success | (answers["pa"] == want["pa"])
    good &= ~(success & plain) | (answers["page_bits"] == want["page_bits"])
    coded = (kind == _KIND_PF) | (kind >= _KIND_NESTED)
    good &= ~coded | (answers["error_code"] == want["err"])
    good &= (kind < _KIND_NESTED) | (answers["fault_gpa"] == want["gpa"])

    # Tables after the walk.
    row_of = np.repeat(np.arange(rows), np.diff(columns["ent_off"]))
    bits = columns["ent_set"] ^ np.where(theirs[row_of], columns["kvm_set_xor"], np.uint64(0))
    bits[~success[row_of]] = 0
    compared = success | (stage == _STAGE_PLAIN)
    wrong = (after != (columns["ent_val"] | bits)) & compared[row_of]
    tables_wrong = np.zeros(rows, bool)
    tables_wrong[row_of[wrong]] = True
    good &= ~tables_wrong

    disagreements = []
    for i in np.flatnonzero(~good)[:show]:
        text = [f"row {i}: " + " ".join(f"{n}={int(columns[n][i]):#x}" for n in _INPUTS if columns[n][i])]
        text.append("  expected " + _answer_text(*(int(want[k][i]) for k in _ANSWERS)))
        got = (int(answers[k][i]) for k in ("kind", "pa", "page_bits", "error_code", "fault_gpa"))
        text.append("  got      " + _answer_text(*got))
        for j in range(columns["ent_off"][i], columns["ent_off"][i + 1]):
            mark = ""
            if tables_wrong[i] and wrong[j]:
                mark = f" expected {int(columns['ent_val'][j] | bits[j]):#x} after, got {int(after[j]):#x}"
            text.append(f"  word {int(columns['ent_pa'][j]):#x} = {int(columns['ent_val'][j]):#x}{mark}")
        disagreements.append("\n".join(text))
    return FileReport(str(path), "vectors", int(good.sum()), rows, disagreements, part=f"{dialect} dialect")
