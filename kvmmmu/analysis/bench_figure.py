"""A benchmark report as a figure: how much faster by shape of the trace, and what the number of slots costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvmmmu.analysis.figure import figure_file
from kvmmmu.errors import ArgumentError

__all__ = ["draw"]

_SHAPE = re.compile(r"bench_shape\[(.+?)-(.+)\]|bench_unusual\[(.+)\]")
_SLOTS = re.compile(r"bench_slot\[(\d+)-(\w+)\]")
_LOOPS = {"c": "plain C loop", "c_unrolled": "C unrolled by hand"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the figure; the suffix of ``path`` chooses the format.

    Parameters
    ----------
    report : dict
        As ``suite.run`` returns it.
    path : Path
        ``.svg``, ``.png``, ``.pdf``.

    Raises
    ------
    ArgumentError
        matplotlib is missing, or does not know the suffix, or the directory does not exist; or the report has neither
        kind of row.
    """
    shapes = _shapes(report["rows"])
    slots = _slots(report["rows"])
    if not shapes and not slots:
        raise ArgumentError("the report has no rows by trace shape and none by number of slots: nothing to draw")
    with figure_file(path, 10, 4) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_shapes(left, shapes)
        _draw_slots(right, slots)


def _shapes(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    found = []
    for row in rows:
        if match := _SHAPE.fullmatch(row["name"]):
            found.append((f"{match[2]}, {match[1]}" if match[1] else f"{match[3]}, L3", row["over"]))
    return found


def _slots(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float, float | None]]]:
    """For each kind of traffic: slots, ns of a lookup, ns of the binary search."""
    found: dict[str, list[tuple[int, float, float | None]]] = {}
    for row in rows:
        if match := _SLOTS.fullmatch(row["name"]):
            nanoseconds = row["seconds"]["median"] / row["items"] * 1e9
            binary = row["over"].get("binary")
            other = None if binary is None else nanoseconds / binary["median"]
            found.setdefault(match[2], []).append((int(match[1]), nanoseconds, other))
    return {traffic: sorted(points) for traffic, points in found.items()}


def _draw_shapes(axes: Any, shapes: list[tuple[str, dict[str, dict[str, float]]]]) -> None:
    axes.set_title("batch translation: times faster than …")
    if not shapes:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    for offset, (peer, label) in zip((-0.2, 0.2), _LOOPS.items(), strict=True):
        places = [i for i, (_, over) in enumerate(shapes) if peer in over]
        quartiles = [shapes[i][1][peer] for i in places]
        middle = [1 / q["median"] for q in quartiles]
        spread = [
            [m - 1 / q["q3"] for m, q in zip(middle, quartiles, strict=True)],
            [1 / q["q1"] - m for m, q in zip(middle, quartiles, strict=True)],
        ]
        axes.barh([i + offset for i in places], middle, 0.4, xerr=spread, label=label, error_kw={"linewidth": 0.6})
    axes.axvline(1, color="black", linewidth=0.6)
    axes.set_yticks(range(len(shapes)), [name for name, _ in shapes])
    axes.invert_yaxis()
    axes.set_xlabel("times (median, quartiles)")
    axes.legend()


def _draw_slots(axes: Any, slots: dict[str, list[tuple[int, float, float | None]]]) -> None:
    axes.set_title("slot of a gfn, by number of slots")
    if not slots:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        return
    for traffic, points in slots.items():
        numbers = [point[0] for point in points]
        (line,) = axes.plot(numbers, [point[1] for point in points], marker="o", markersize=3, label=traffic)
        others = [(point[0], point[2]) for point in points if point[2] is not None]
        if others:
            axes.plot(*zip(*others, strict=True), "--", color=line.get_color(), label=f"{traffic}, binary search in C")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots")
    axes.set_ylabel("ns a lookup")
    axes.legend()
