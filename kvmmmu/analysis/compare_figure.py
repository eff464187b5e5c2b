"""A comparison of designs as a figure: what each one's exits, MMIO, searches and pages come to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmmmu.analysis.compare import COLUMNS, Row
from kvmmmu.analysis.figure import figure_file

__all__ = ["draw"]

# Stacked where the parts add up to something: all exits of accesses, all MMIO accesses.
_PANELS = (
    ("exits", ("pf_taken", "mmio_faults", "invlpg"), True),
    ("MMIO accesses", ("mmio_cache_hit", "mmio_spte_hit", "mmio_slow"), True),
    ("walks and searches by KVM", ("guest_walk", "slot_search"), False),
    ("shadow pages", ("mmu_cache_miss", "mmu_shadow_zapped"), False),
    ("table entries read an access", ("walk_refs_per_access",), False),
)
_HEADINGS = {column.key: column.heading for column in COLUMNS}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the figure; the suffix of ``path`` chooses the format.

    Parameters
    ----------
    rows : sequence of Row
        As ``compare`` returns them.
    path : Path
        ``.svg``, ``.png``, ``.pdf``.

    Raises
    ------
    ArgumentError
        matplotlib is missing, or does not know the suffix, or the directory does not exist.
    """
    counts = [row.counts() for row in rows]
    panels = [panel for panel in _PANELS if panel[1][0] in counts[0]]
    with figure_file(path, 3 * (len(panels) + 1), 1.6 + 0.3 * len(rows)) as figure:
        axes = figure.subplots(1, len(panels) + 1, sharey=True)
        for at, (title, keys, stacked) in zip(axes, panels, strict=False):
            at.set_title(title)
            _bars(at, [[count[key] for count in counts] for key in keys], keys, stacked)
        _draw_cpu(axes[-1], rows)
        axes[0].set_yticks(range(len(rows)), [str(row.design) for row in rows])
        axes[0].invert_yaxis()


def _bars(at: Any, columns: list[list[float | None]], keys: Sequence[str], stacked: bool) -> None:
    height = 0.8 if stacked else 0.8 / len(columns)
    left = [0.0] * len(columns[0])
    for number, (key, counted) in enumerate(zip(keys, columns, strict=True)):
        values = [value or 0.0 for value in counted]
        shift = 0.0 if stacked else (number - (len(columns) - 1) / 2) * height
        at.barh([i + shift for i in range(len(values))], values, height, left=left, label=_HEADINGS[key])
        if stacked:
            left = [a + b for a, b in zip(left, values, strict=True)]
    for i, value in enumerate(columns[0]):
        if value is None:
            at.text(0, i, " KVM does not count", va="center", color="tab:gray")
    at.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _draw_cpu(at: Any, rows: Sequence[Row]) -> None:
    at.set_title("CPU time, times that of the first")
    middle = [row.cpu.median for row in rows]
    spread = [[row.cpu.median - row.cpu.q1 for row in rows], [row.cpu.q3 - row.cpu.median for row in rows]]
    at.barh(range(len(rows)), middle, 0.8, xerr=spread, color="tab:gray", error_kw={"linewidth": 0.6})
    at.axvline(1, color="black", linewidth=0.6)
