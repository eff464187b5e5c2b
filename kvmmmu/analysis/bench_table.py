"""A benchmark report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

__all__ = ["parts"]


def parts(report: dict[str, Any]) -> Iterator[Table | str]:
    """Everything a reader wants to see of a report, in order."""
    machine = report["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load"])
    yield f"{machine['cpu']}, {machine['cpus']} CPUs, load {load}; {report['compiler']}"
    versions = (f"{name} {version or 'absent'}" for name, version in report["versions"].items())
    yield "; ".join(versions)
    yield _ratios(report["rows"])
    yield _goals(report["goals"])
    for key in ("skipped", "failed"):
        for entry in report[key]:
            yield f"{key}: {entry['name']}: {entry['why']}"
    if "changes" in report:
        yield from _changes(report["changes"])


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratios(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="their time over ours: more than 1 is in our favour")
    for name in ("benchmark", "ns each", "against", "lower quartile", "median", "upper quartile"):
        table.add_column(name, justify="left" if name in ("benchmark", "against") else "right", overflow="fold")
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            table.add_section()
            table.add_row(group, "", "", "", "", "", style="bold")
        nanoseconds = _number(row["seconds"]["median"] / row["items"] * 1e9)
        lines = [
            (peer, *(_number(1 / ratio[quartile]) for quartile in ("q3", "median", "q1")))
            for peer, ratio in row["over"].items()
        ]
        lines += [(peer, "absent", why, "") for peer, why in row["absent"].items()] or []
        for i, line in enumerate(lines or [("", "", "", "")]):
            table.add_row(row["name"] if i == 0 else "", nanoseconds if i == 0 else "", *line)
    return table


def _goals(goals: list[dict[str, Any]]) -> Table:
    table = Table(title="goals")
    for name in ("what", "goal", "measured", "met"):
        table.add_column(name, justify="right" if name in ("goal", "measured") else "left", overflow="fold")
    for goal in goals:
        sign = "≥" if goal["bound"] == "at least" else "≤"
        measured = "" if goal["ratio"] is None else _number(goal["ratio"])
        verdict = {True: "yes", False: "NO", None: goal["why"] or ""}[goal["met"]]
        table.add_row(goal["name"], f"{sign} {goal['goal']:g}", measured, verdict)
    return table


def _changes(changes: dict[str, Any]) -> Iterator[Table | str]:
    table = Table(title="changes of our time over theirs")
    for name in ("benchmark", "against", "before", "now", "change", ""):
        table.add_column(name, justify="left" if name in ("benchmark", "against", "") else "right", overflow="fold")
    for row in changes["rows"]:
        remark = ("slower" if row["change"] > 0 else "faster") if row["clear"] else "quartiles overlap"
        ratios = (_number(row["old"]), _number(row["new"]))
        table.add_row(row["name"], row["peer"], *ratios, f"{row['change']:+.1%}", remark)
    yield table
    for name, (old, new) in changes["circumstances"].items():
        yield f"not the same circumstances: {name} was {old}, now {new}"
    for name in changes["references"]:
        yield f"the yardstick {name} is not the one it was: ratios against it cannot be compared"
    for goal in changes["goals"]:
        yield f"goal {'now met' if goal['met'] else 'no longer met'}: {goal['name']}"
    for key in ("gone", "added"):
        if changes[key]:
            yield f"{key}: {', '.join(changes[key])}"
