"""Files with figures: matplotlib asked for only here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvmmmu.errors import ArgumentError

__all__ = ["check", "figure_file"]


def check(path: Path) -> None:
    """Refuse now what ``figure_file`` would refuse after hours of work.

    Raises
    ------
    ArgumentError
        matplotlib is missing, or does not know the suffix, or the directory does not exist.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ArgumentError("the figure needs matplotlib: pip install 'kvmmmu[bench]'") from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ArgumentError(f"{path}: suffix {path.suffix!r}: allowed are {', '.join(f'.{name}' for name in known)}")
    if not path.parent.is_dir():
        raise ArgumentError(f"{path}: no such directory: {path.parent}")


@contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches to draw on, then written; the suffix of ``path`` chooses the format.

    Raises
    ------
    ArgumentError
        As ``check``.
    """
    check(path)
    import matplotlib
    from matplotlib.figure import Figure

    # The same data gives the same bytes; text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "kvmmmu", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
