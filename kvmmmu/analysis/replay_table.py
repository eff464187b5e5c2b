"""Replays of a recorded run as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from kvmmmu.conform.replay import ReplayReport

__all__ = ["parts"]


def parts(reports: Sequence[ReplayReport]) -> Iterator[Table | str]:
    """Everything a reader wants to see of replays, a column each, in order."""
    table = Table(title=f"{reports[0].trace}: replay")
    table.add_column("")
    for report in reports:
        table.add_column(report.mmu, justify="right")

    def row(name: str, values: list[str], **how: Any) -> None:
        table.add_row(name, *values, **how)

    def group(title: str, field: str) -> None:
        names = dict.fromkeys(name for report in reports for name in getattr(report, field))
        for i, name in enumerate(names):
            values = [f"{getattr(report, field).get(name, 0):,}" for report in reports]
            row(f"{title}{name}", values, end_section=i == len(names) - 1)

    row("events replayed", [f"{report.events:,}" for report in reports])
    row("disagreements", [f"{report.disagreements:,}" for report in reports])
    row(
        "final page-table entries different",
        [
            f"{report.tables_different:,} of {report.tables_compared:,}" if report.tables_compared else "not recorded"
            for report in reports
        ],
    )
    row("events/s", [f"{report.events_per_second:,.0f}" for report in reports], end_section=True)
    group("MMIO served by ", "mmio")
    group("", "faults")
    group("", "counters")
    group("", "tlb")
    yield table
    for report in reports:
        if report.first is not None:
            yield f"{report.mmu}: first disagreement: {report.first}"
