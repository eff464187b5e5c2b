"""The ``kvmmmu`` command: reads arguments, calls the package, prints.  No logic of its own.

Exit status: 0 everything agreed, 1 a disagreement or nothing checked, 2 bad input (one line says what and where).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from kvmmmu._version import __version__
from kvmmmu.errors import KvmmmuError

MMUS = ("shadow", "ept", "npt")
SCHEMES = ("off", "zap_all", "generation", "unguarded")
AGREED, DISAGREED, BAD_INPUT = 0, 1, 2
# What a file or a pipe gets: no terminal says how wide it is, and cut columns help nobody.
PLAIN_WIDTH = 160


class _Address(click.ParamType[int]):
    """An unsigned 64-bit number, decimal or with a 0x prefix."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = value if isinstance(value, int) else int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is no number; expected decimal or 0x…", param, ctx)
        if not 0 <= number < 2**64:
            self.fail(f"{value} is outside 0…2^64-1", param, ctx)
        return number


class _Commands(click.Group):
    """Turns bad arguments and the package's named errors into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            command = "" if error.ctx is None or error.ctx is ctx else f" {error.ctx.info_name}"
            message = " ".join(error.format_message().split()).rstrip(".")
            click.echo(f"kvmmmu: {message}; see kvmmmu{command} --help", err=True)
            ctx.exit(BAD_INPUT)
        except (KvmmmuError, OverflowError, MemoryError) as error:
            click.echo(f"kvmmmu: {' '.join(str(error).split()) or 'out of memory'}", err=True)
            ctx.exit(BAD_INPUT)
        except BrokenPipeError:
            raise
        except OSError as error:
            click.echo(f"kvmmmu: {error.filename or 'file'}: {error.strerror or error}", err=True)
            ctx.exit(BAD_INPUT)


class _Bar:
    """A progress bar on standard error, shown once the work has taken a second."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("", total=None)
        self._began = time.monotonic()
        self._shown = False

    def describe(self, text: str) -> None:
        """Name what is being done."""
        self._progress.update(self._task, description=text)
        self._show()

    def advance(self, done: int, total: int | None) -> None:
        """Say how far it has come."""
        self._progress.update(self._task, completed=done, total=total)
        self._show()

    def _show(self) -> None:
        if not self._shown and time.monotonic() - self._began > 1 and sys.stderr.isatty():
            self._progress.start()
            self._shown = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shown:
            self._progress.stop()


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False, markup=False)


def _print_parts(parts: Iterable[Table | str]) -> None:
    console = _console()
    for part in parts:
        console.print(part)


def _print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvmmmu")
def main() -> None:
    """KVM's x86 MMU: replay recorded runs, check the model against known answers, look at page tables."""


def _with_trace(command: Callable[..., None]) -> Callable[..., None]:
    """What every command has that reads a recorded run."""
    file = click.Path(path_type=Path)
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table."),
        click.option("--memory-map", type=file, help="The machine's map (default: memory-map.json)."),
        click.option("--pages", type=file, help="The .npz with a raw trace's page tables."),
        click.argument("trace", required=False, type=file),
    ):
        command = decorate(command)
    return command


@main.command()
@click.option("--mmu", type=click.Choice([*MMUS, "all"]), default="all", show_default=True, help="The MMU or MMUs.")
@click.option(
    "--mmio-scheme",
    type=click.Choice(SCHEMES),
    help="How MMIO faults are cached; the behaviour profile's own scheme if not given.",
)
@click.option("--tlb", is_flag=True, help="Let the processor cache translations; count hits and table entries read.")
@_with_trace
@click.pass_context
def replay(
    ctx: click.Context,
    trace: Path | None,
    mmu: Any,
    mmio_scheme: Any,
    tlb: bool,
    pages: Path | None,
    memory_map: Path | None,
    as_json: bool,
) -> None:
    """Send a recorded run of a real kernel through the model and compare every answer.

    Without TRACE the sample that is installed with the package is replayed.
    """
    from kvmmmu.analysis import replay_table
    from kvmmmu.conform import replay as engine
    from kvmmmu.tlb import Tlb
    from kvmmmu.traces import bundled_trace, open_trace

    opened = open_trace(trace or bundled_trace(), pages=pages, memory_map=memory_map)
    reports = []
    with _Bar() as bar:
        modes: Iterable[Any] = MMUS if mmu == "all" else (mmu,)
        for mode in modes:
            bar.describe(mode)
            reports.append(
                engine.replay(
                    opened, mmu=mode, mmio_scheme=mmio_scheme, tlb=Tlb() if tlb else None, progress=bar.advance
                )
            )
    if as_json:
        _print_json({"trace": str(opened.path), "modes": [report.as_dict() for report in reports]})
    else:
        _print_parts(replay_table.parts(reports))
    ctx.exit(AGREED if all(report.ok for report in reports) else DISAGREED)


@main.command()
@click.option("--mmu", "mmus", multiple=True, type=click.Choice(MMUS), help="Default: all three.")
@click.option("--mmio-scheme", "schemes", multiple=True, type=click.Choice(SCHEMES), help="Default: all but unguarded.")
@click.option(
    "--behaviour", "profiles", multiple=True, help="A profile: 6.1 (default), 3.1, seed; with its own MMIO scheme."
)
@click.option("--switch", "switches", multiple=True, metavar="NAME=on|off", help="Of the behaviour, e.g. tdp_mmu.")
@click.option("--tlb/--no-tlb", help="Let the processors cache translations; count hits and table entries read.")
@click.option("--slot-changes", type=click.IntRange(1), metavar="EVERY", help="Change an unused slot so often.")
@click.option("--seed", type=_Address(), default=1, show_default=True, help="Of the slot changes.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True, help="Replays, for CPU time.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it here (.svg, .png).")
@_with_trace
@click.pass_context
def compare(
    ctx: click.Context,
    trace: Path | None,
    mmus: Any,
    schemes: Any,
    profiles: tuple[str, ...],
    switches: tuple[str, ...],
    tlb: bool,
    slot_changes: int | None,
    seed: int,
    rounds: int,
    figure: Path | None,
    pages: Path | None,
    memory_map: Path | None,
    as_json: bool,
) -> None:
    """Hold designs of an MMU against each other on one recorded run: exits, walks, searches, pages, CPU time.

    Designs are all combinations of what --mmu, --mmio-scheme, --behaviour and --switch name; each may be given more
    than once.  Without TRACE the sample that is installed with the package is replayed.
    """
    from kvmmmu.analysis import compare as engine
    from kvmmmu.analysis import compare_figure, compare_table
    from kvmmmu.analysis import figure as files
    from kvmmmu.conform.slot_changes import SlotChanges
    from kvmmmu.tlb import Tlb
    from kvmmmu.traces import bundled_trace, open_trace

    designs = engine.designs(mmus, schemes, profiles, map(engine.switch_of, switches))
    if figure is not None:
        files.check(figure)
    opened = open_trace(trace or bundled_trace(), pages=pages, memory_map=memory_map)
    with _Bar() as bar:

        def show(design: str, done: int, total: int | None) -> None:
            bar.describe(design)
            bar.advance(done, total)

        rows = engine.compare(
            opened,
            designs,
            tlb=Tlb() if tlb else None,
            slot_changes=SlotChanges(slot_changes, seed) if slot_changes else None,
            rounds=rounds,
            progress=show,
        )
    if figure is not None:
        compare_figure.draw(rows, figure)
    if as_json:
        _print_json({"trace": str(opened.path), "rounds": rounds, "designs": [row.as_dict() for row in rows]})
    else:
        _print_parts(compare_table.parts(rows))
    ctx.exit(AGREED if all(row.report.ok for row in rows) else DISAGREED)


@main.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR_OR_FILE...")
@click.option("--show", type=click.IntRange(0), default=5, show_default=True, help="Disagreements shown per file.")
@click.option(
    "--dialect",
    type=click.Choice(["sdm", "kvm", "both"]),
    default="sdm",
    show_default=True,
    help="The manuals' answer or KVM's own software walker's; matters to vectors.",
)
@click.option("--level", type=click.IntRange(1, 5), help="Golden runs: only this level of strictness.")
@click.option(
    "--behaviour",
    type=click.Choice(["3.1", "6.1"]),
    help="Golden runs: only those of this kernel, against its profile (default: each against its own).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.pass_context
def conform(
    ctx: click.Context,
    paths: tuple[Path, ...],
    show: int,
    dialect: Any,
    level: int | None,
    behaviour: str | None,
    as_json: bool,
) -> None:
    """Check the model against vectors, dumps, traces and golden runs of real KVM; directories are searched."""
    from kvmmmu.conform.run import check_paths

    with _Bar() as bar:
        reports = list(
            check_paths(paths, dialect=dialect, show=show, level=level, behaviour=behaviour, progress=bar.describe)
        )
    if as_json:
        _print_json(
            {
                "files": [
                    {
                        "file": report.file,
                        "kind": report.kind,
                        "agreed": report.agreed,
                        "total": report.total,
                        "disagreements": report.disagreements,
                    }
                    | _golden_fields(report)
                    for report in reports
                ]
            }
        )
    else:
        _conform_table(_console(), reports)
    ctx.exit(AGREED if reports and all(report.ok for report in reports) else DISAGREED)


def _golden_fields(report: Any) -> dict[str, Any]:
    """What a report of golden runs says besides."""
    if report.level is None:
        return {"part": report.part} if report.part else {}
    return {
        "config": report.config,
        "level": report.level,
        "part": report.part,
        "scripts_agreed": report.scripts_agreed,
        "scripts": report.scripts,
        "switches": list(report.switches),
        "behaviour": report.behaviour,
        "exempt": report.exempt,
    }


def _conform_table(console: Console, reports: list[Any]) -> None:
    if not reports:
        console.print("nothing was checked: no vectors, dumps, traces or golden runs there")
        return
    table = Table()
    table.add_column("file", overflow="fold")
    table.add_column("kind")
    table.add_column("agreed", justify="right")
    table.add_column("total", justify="right")
    switches: dict[str, tuple[str, ...]] = {}
    exempt: dict[str, int] = {}
    for report in reports:
        kind = ", ".join(filter(None, (report.kind, report.part)))
        if report.level is not None:
            kind = f"level {report.level}: {report.part}"
        table.add_row(report.file, kind, f"{report.agreed:,}", f"{report.total:,}")
        switches[report.file] = report.switches
        exempt[report.file] = report.exempt
    console.print(table)
    for file, names in switches.items():
        for name in names:
            console.print(f"{file}: imitated: {name}")
    for file, n in exempt.items():
        if n:
            console.print(f"{file}: {n} operations behind a livelock under CR4.SMEP are exempt (docs/deviations.md)")
    for report in reports:
        for text in report.disagreements:
            console.print(f"{report.file}: {text}")


@main.command()
@click.option("--markdown", is_flag=True, help="Print the table of docs/review.md.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def review(markdown: bool, as_json: bool) -> None:
    """Say what a guest gets at each point of the review of 2011: as mailed, as merged (Linux 3.1), and in Linux 6.1."""
    from kvmmmu.analysis import review as points

    if markdown:
        click.echo(points.markdown())
        return
    rows = list(points.answers())
    if as_json:
        _print_json(
            {
                "points": [
                    {"remark": point.remark, "steps": point.steps, "answers": row, "golden": point.golden}
                    for point, row in rows
                ]
            }
        )
        return
    table = Table()
    for name in ("remark", "steps", *points.PROFILES, "golden script"):
        table.add_column(name, overflow="fold")
    for point, row in rows:
        table.add_row(str(point.remark), point.steps, *(row[name] for name in points.PROFILES), point.golden)
    _console().print(table)


@main.command()
@click.argument("dump", type=click.Path(path_type=Path))
@click.argument("gva", type=_Address())
@click.option("--access", type=click.Choice(["r", "w", "x"]), default="r", show_default=True, help="Kind of access.")
@click.option("--cpl", type=click.IntRange(0, 3), default=0, show_default=True, help="Privilege level.")
@click.option("--dialect", type=click.Choice(["sdm", "kvm"]), default="sdm", show_default=True, help="Whose rules.")
def walk(dump: Path, gva: int, access: str, cpl: int, dialect: str) -> None:
    """Walk the page tables of a DUMP for one address, entry by entry, in words."""
    from kvmmmu.dumps import PageTableDump

    click.echo(PageTableDump.load(dump).paging(dialect=dialect).explain(gva, access, cpl))


@main.command()
@click.argument("spte", type=_Address())
@click.option("--mmu", type=click.Choice(MMUS), default="shadow", show_default=True, help="Whose tables it stands in.")
@click.option("--level", type=click.IntRange(1, 5), default=1, show_default=True, help="1 = 4 KiB … 5 = 256 TiB.")
@click.option("--maxphyaddr", type=int, default=46, show_default=True, help="The host's MAXPHYADDR.")
@click.option("--phys-bits", type=int, help="Address bits after encryption keys (default: MAXPHYADDR).")
@click.option("--l1tf", is_flag=True, help="The host has the L1TF flaw.")
@click.option("--cache-bits", type=int, help="Address bits its L1 cache compares (default: --phys-bits).")
@click.option("--c-bit", type=int, help="The address bit that marks encrypted memory (default: there is none).")
@click.option("--tdx", is_flag=True, help="It is a TDX guest's (with --mmu ept).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of words.")
def decode(
    spte: int,
    mmu: Any,
    level: int,
    maxphyaddr: int,
    phys_bits: int | None,
    l1tf: bool,
    cache_bits: int | None,
    c_bit: int | None,
    tdx: bool,
    as_json: bool,
) -> None:
    """Say in words what an spte (KVM's own page-table entry) is."""
    from kvmmmu.sptes import SpteFormat

    made_by = SpteFormat(
        mmu, maxphyaddr=maxphyaddr, phys_bits=phys_bits, l1tf=l1tf, cache_bits=cache_bits, c_bit=c_bit, ve=tdx
    )
    words = made_by.decode(spte, level=level)
    if as_json:
        _print_json({"spte": words.spte, "level": words.level, "kind": words.kind, "facts": words.facts})
    else:
        click.echo(str(words))


@main.command()
@click.option("--quick", is_flag=True, help="A tenth of the time a row, no large tables: for CI, not for figures.")
@click.option("--only", metavar="EXPRESSION", help="Only benchmarks whose name fits (pytest's -k).")
@click.option(
    "--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write the report here, as JSON."
)
@click.option("--figure", type=click.Path(path_type=Path), help="Draw it here (.svg, .png).")
@click.option("--compare", type=click.Path(path_type=Path), metavar="OLD.json", help="Say what changed since.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.pass_context
def bench(
    ctx: click.Context,
    quick: bool,
    only: str | None,
    output: Path | None,
    figure: Path | None,
    compare: Path | None,
    as_json: bool,
) -> None:
    """Measure against plain C loops, NumPy, and other emulators where installed; ratios within one process.

    Exit status 0 when everything ran, whether or not it met its goals; 1 when a benchmark failed.
    """
    from kvmmmu.analysis import bench_table, suite

    old = None if compare is None else suite.load(compare)
    if output is not None and not output.absolute().parent.is_dir():
        raise click.BadParameter(f"{output.parent} is no directory", param_hint="--output")
    if figure is not None:
        from kvmmmu.analysis import figure as files

        files.check(figure)
    with _Bar() as bar:

        def show(name: str, percent: int) -> None:
            bar.describe(name)
            bar.advance(percent, 100)

        report = suite.run(quick=quick, only=only, progress=show)
    if old is not None:
        report["changes"] = suite.changes(old, report)
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n")
    if as_json:
        _print_json(report)
    else:
        _print_parts(bench_table.parts(report))
    if figure is not None:
        from kvmmmu.analysis.bench_figure import draw

        draw(report, figure)
    ctx.exit(DISAGREED if report["failed"] else AGREED)


if __name__ == "__main__":
    main()
