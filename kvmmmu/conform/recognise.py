"""Which kind of truth a file holds; what looks like truth and is not recognised is an error, never skipped."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from kvmmmu.errors import FormatError

__all__ = ["TruthKind", "find", "recognise"]

TruthKind = Literal["vectors", "dump", "trace", "golden"]

# A column that only this kind has, and that every file of it must have.
_TELLTALE: dict[str, TruthKind] = {"ent_off": "vectors", "page_data": "dump", "page_t0": "trace"}
_DATA_SUFFIXES = (".npz", ".npy", ".zst", ".raw", ".xz")


def recognise(path: Path) -> TruthKind:
    """Return the kind of one file.

    Raises
    ------
    FormatError
        The file is none of vectors, dump, trace and golden runs, or cannot be read.
    """
    if path.name.endswith((".raw.zst", ".raw")):
        return "trace"
    if path.name.endswith(".tar.xz"):
        return "golden"
    if path.suffix != ".npz":
        raise FormatError(
            f"{path}: file: not vectors, a dump, a trace or golden runs; expected a name ending in .npz, .raw.zst or "
            ".tar.xz"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise FormatError(f"{path}: file: not an .npz archive, truncated or corrupt ({error})") from None
    kinds = [kind for column, kind in _TELLTALE.items() if column in names]
    if len(kinds) != 1:
        expected = ", ".join(f"{column} ({kind})" for column, kind in _TELLTALE.items())
        raise FormatError(f"{path}: columns {sorted(names)}: expected exactly one of {expected}")
    return kinds[0]


def find(paths: Iterable[str | Path]) -> Iterator[tuple[Path, TruthKind]]:
    """Yield every file of truth under ``paths``, directories in sorted order.

    In a directory only names that end like data are looked at (a README beside it is not data); a file that is named
    itself must be truth.
    """
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise FormatError(f"{path}: file: no such file or directory")
            yield path, recognise(path)
            continue
        for folder, folders, names in os.walk(path, onerror=_unreadable):
            folders.sort()
            for name in sorted(names):
                if name.endswith(_DATA_SUFFIXES):
                    yield Path(folder, name), recognise(Path(folder, name))


def _unreadable(error: OSError) -> None:
    raise FormatError(f"{error.filename}: file: {error.strerror}")
