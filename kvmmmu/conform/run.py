"""Check every file of truth under some paths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Literal

from kvmmmu.conform import replay
from kvmmmu.conform.recognise import find
from kvmmmu.conform.report import FileReport

__all__ = ["Dialect", "check_paths"]

Dialect = Literal["sdm", "kvm", "both"]


def check_paths(
    paths: Iterable[str | Path],
    *,
    dialect: Dialect = "sdm",
    show: int = 5,
    level: int | None = None,
    behaviour: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[FileReport]:
    """Yield one report per file (vectors in both dialects: two; golden runs: one per part of each level).

    Parameters
    ----------
    paths : iterable of paths
        Files, or directories that are searched.
    dialect : {"sdm", "kvm", "both"}
        The manuals' answer, or that of KVM's software walker; matters to vectors only.
    show : int
        How many disagreements of a file are kept as text.
    level : int, optional
        Golden runs: only this level of strictness, 1 to 5.
    behaviour : str, optional
        Golden runs: only those of the kernel that this profile stands for.
    progress : callable, optional
        Called with each file's name before it is checked.

    Raises
    ------
    FormatError
        A file is not what it should be.
    """
    # All are recognised first: a stranger among them is told before minutes of work, not after.
    for path, kind in list(find(paths)):
        if progress is not None:
            progress(str(path))
        if kind == "trace":
            yield replay.check(path, show=show)
        elif kind == "golden":
            yield from import_module("kvmmmu.conform.golden.runner").check(
                path, level=level, show=show, behaviour=behaviour
            )
        elif kind == "dump":
            yield import_module("kvmmmu.conform.dumps").check(path, show=show)
        else:
            vectors = import_module("kvmmmu.conform.vectors")
            for chosen in ("sdm", "kvm") if dialect == "both" else (dialect,):
                yield vectors.check(path, dialect=chosen, show=show)
