"""A comparison of designs as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from kvmmmu.analysis.compare import COLUMNS, Row

__all__ = ["parts"]


def parts(rows: Sequence[Row]) -> Iterator[Table | str]:
    """Everything a reader wants to see of a comparison, a row for each design, in order."""
    first = rows[0].report
    yield f"{first.trace}: {first.events:,} events under each design"
    shown = rows[0].counts()
    for part in dict.fromkeys(column.part for column in COLUMNS if column.key in shown):
        yield _table(rows, part)
    wrong = [row for row in rows if not row.report.ok]
    for row in wrong:
        different = row.report.disagreements + row.report.tables_different
        yield f"{row.design}: {different:,} disagreements with the recording; first: {row.report.first}"
    if not wrong:
        yield "every answer of every design is the recorded one"


def _table(rows: Sequence[Row], part: str) -> Table:
    columns = [column for column in COLUMNS if column.part == part]
    with_cpu = part == "KVM's work"
    table = Table(title=part)
    table.add_column("design", overflow="fold")
    for heading in [*(column.heading for column in columns), *(["CPU time, × first design"] if with_cpu else [])]:
        table.add_column(heading, justify="right", overflow="fold")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        cells = [_cell(row.counts()[column.key]) for column in columns]
        table.add_row(
            str(row.design),
            *cells,
            *([f"{row.cpu.median:.2f}"] if with_cpu else []),
            end_section=after is not None and after.design.mmu != row.design.mmu,
        )
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
