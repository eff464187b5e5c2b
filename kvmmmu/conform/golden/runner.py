"""Run the scripts of an archive through the model and compare every operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from kvmmmu.conform.golden import linux31, operation, stubs
from kvmmmu.conform.golden.comparison import PARTS, counters_differ, outcomes_differ
from kvmmmu.conform.golden.configuration import ARTEFACTS, Configuration, configure
from kvmmmu.conform.golden.events import all_lines, events_differ, structural_lines
from kvmmmu.conform.golden.guest import Guest, Outcomes
from kvmmmu.conform.golden.host import Host
from kvmmmu.conform.golden.processor import Processor
from kvmmmu.conform.golden.recorder import Recorder
from kvmmmu.conform.golden.trees import model_tree, trees_differ
from kvmmmu.conform.report import FileReport
from kvmmmu.constants import TABLE
from kvmmmu.errors import FormatError
from kvmmmu.golden import Archive, OpEvents, Result, Script, parse_events, parse_result, parse_script, parse_setup
from kvmmmu.golden.results import TablePage
from kvmmmu.vm import VM

__all__ = ["Machine", "Tally", "check", "compare"]

_SCRIPTS = "scripts.tar.xz"
_NOISE = frozenset({"vm.remote_tlb_flush", "vm.max_mmu_rmap_size", "vm.max_mmu_page_hash_collisions"})
_OWN = frozenset({"mmio_cache_hit", "mmio_spte_hit", "mmio_slow", "slot_search", "guest_walk", "mmio_refill"})


class Machine:
    """A script's guest on the model.

    Parameters
    ----------
    configuration : Configuration
    script : Script
    events : bool
        Record tracepoints.
    """

    def __init__(self, configuration: Configuration, script: Script, *, events: bool) -> None:
        self.script = script
        self.configuration = configuration
        self.vm = VM(configuration.mmu, host=configuration.host, behaviour=configuration.behaviour)
        self.host = Host(self.vm, script)
        if script.dirty_manual:
            self.vm.set_manual_dirty_protect(initially_set=script.dirty_manual == 3)
        for gpa, size, value in script.memory:
            self.host.write(gpa, value.to_bytes(size, "little"))
        self.host.write(script.sysgpa, stubs.sys_page(script.long, script.sysgva))
        self.host.write(script.usrgpa, stubs.usr_page(script.long))
        self.vcpu = self.vm.create_vcpu(configuration.guest)
        self.recorder = Recorder(self.vm, self.host, enabled=events)
        processor = Processor(self.vcpu, configuration, self.recorder)
        processor.set_sregs(cr0=script.cr0, cr3=script.cr3, cr4=script.cr4, efer=script.efer)
        self.guest = Guest(processor, self.host, script)
        self.recorder.take()
        self._counters = self.counters()
        if configuration.era == "3.1":
            self._counters = linux31.counters(self._counters)

    def counters(self) -> dict[str, int]:
        """Every counter by the name recordings give it."""
        own = self.vcpu.stats
        return {
            f"vm.{name}" if name not in own else name: count
            for name, count in self.vm.stats.items()
            if name not in _OWN
        }

    def run(self, index: int) -> tuple[Outcomes, dict[str, int], list[str]]:
        """Run operation ``index``: outcomes, changes of counters, lines of tracepoints."""
        outcomes = operation.run(self.script.ops[index], self.script, self.guest, self.host)
        now = self.counters()
        if self.configuration.era == "3.1":
            now = linux31.counters(now)
        changes = {
            name: now[name] - self._counters[name]
            for name in now
            if now[name] != self._counters[name] and name not in _NOISE
        }
        self._counters = now
        return outcomes, changes, self.recorder.take()

    def tree(self) -> tuple[TablePage, ...]:
        """The tables under the vCPU's root; where it lost its root, those under the last one."""
        tree = model_tree(self.vm.page_tables(self.vcpu), self.host)
        return linux31.tree(tree) if self.configuration.era == "3.1" else tree

    def close(self) -> list[str]:
        """Destroy the VM; the tracepoints of that."""
        self.vm.close()
        return self.recorder.take()


@dataclass
class Tally:
    """One level's count over some operations."""

    agreed: int = 0
    total: int = 0
    scripts: int = 0
    scripts_agreed: int = 0
    differences: list[str] = field(default_factory=list)


def compare(
    configuration: Configuration,
    script: Script,
    result: Result,
    events: Sequence[OpEvents],
    parts: Sequence[str],
) -> dict[str, tuple[int, int, str | None]]:
    """Run a script and compare: per part (agreed, total, first difference)."""
    machine = Machine(configuration, script, events=bool({"4", "5"} & set(parts)))
    trees = any(part[0] == "3" for part in parts)
    counts = {part: [0, 0] for part in parts}
    first: dict[str, str | None] = dict.fromkeys(parts)
    for index, expected in enumerate(result.ops):
        outcomes, changes, lines = machine.run(index)
        tree = machine.tree() if expected.tree is not None and trees else ()
        if index == len(events) - 1:
            lines += machine.close()
        recorded: Sequence[str] = events[index].lines
        if configuration.era == "3.1":
            recorded, lines = linux31.lines(recorded), linux31.lines(lines)
        for part in parts:
            if part[0] == "3" and expected.tree is None:
                continue
            counts[part][1] += 1
            if part == "1":
                difference = outcomes_differ(expected.out, outcomes)
            elif part[0] == "2":
                difference = None
                if expected.stats is not None:
                    difference = counters_differ(expected.stats, changes, flushes=part == "2")
            elif part[0] == "3":
                assert expected.tree is not None
                difference = trees_differ(
                    expected.tree,
                    tree,
                    accessed_dirty=part == "3-ad",
                    ept=configuration.mmu == "ept",
                    roots_accessed="pdpte_accessed" in configuration.artefacts,
                    unnamed="frames_unnamed" in configuration.artefacts,
                )
            elif part == "4":
                difference = events_differ(
                    structural_lines(recorded), structural_lines(lines), livelock=events[index].livelock
                )
            else:
                difference = events_differ(all_lines(recorded), all_lines(lines), livelock=events[index].livelock)
            if difference is None:
                counts[part][0] += 1
            elif first[part] is None:
                first[part] = f"{script.name} op {index} ({script.ops[index]}): {difference}"
    return {part: (counts[part][0], counts[part][1], first[part]) for part in parts}


def knowable(configuration: Configuration, script: Script, result: Result) -> int:
    """How many operations of a run can be foretold.

    Under CR4.SMEP the walker of Linux 3.1 tests a variable that it never set: a guest may go round for ever, and what
    it did to its registers and tables until it was stopped is in no recording.  It also lets 64-bit code switch paging
    off, after which the processor is in no mode that the manuals know.
    """
    if configuration.era != "3.1":
        return len(result.ops)
    cr4 = script.cr4
    for op, done in zip(script.ops, result.ops, strict=False):
        if op.name == "cr4" and done.out[-1][0] == "ok":
            cr4 = op["value"]
        if done.out[-1:] == (("hang", {}),) and cr4 & TABLE["CR4_SMEP"]:
            return op.index
        if op.name == "cr0" and script.long and not op["value"] & TABLE["CR0_PG"] and done.out[-1][0] == "ok":
            return op.index
    return len(result.ops)


@lru_cache(maxsize=4)
def _scripts(folder: Path) -> Archive:
    path = folder / _SCRIPTS
    if not path.is_file():
        raise FormatError(f"{path}: file: the scripts of golden runs are missing")
    return Archive(path)


def check(
    path: Path,
    *,
    level: int | None = None,
    show: int = 5,
    only: Callable[[str], bool] | None = None,
    behaviour: str | None = None,
) -> Iterator[FileReport]:
    """Yield one report per part of each level for an archive of runs; none for an archive of scripts.

    Parameters
    ----------
    path : Path
    level : int, optional
        Only this level, 1 to 5.
    show : int
        How many scripts' first differences are kept.
    only : callable, optional
        Which scripts, by name; all by default.
    behaviour : str, optional
        Nothing is yielded for runs of another kernel than the one this profile stands for.

    Raises
    ------
    FormatError
        The archive, or the scripts beside it, are not what they should be.
    """
    archive = Archive(path)
    if not archive.is_run:
        return
    configuration = configure(parse_setup(archive.setup(), f"{path}: setup.txt"), f"{path}: setup.txt")
    if behaviour is not None and configuration.era != behaviour:
        return
    scripts = _scripts(path.parent)
    parts = [part for part in PARTS if level is None or part[0] == str(level)]
    tallies = {part: Tally() for part in parts}
    exempt = 0
    for name in archive.scripts:
        if only is not None and not only(name):
            continue
        script = parse_script(scripts.script(name), f"{scripts.path}: {name}")
        result = parse_result(archive.result(name), f"{path}: {name}")
        events = parse_events(archive.events(name), f"{path}: {name}")
        _match(script, result, events, f"{path}: {name}")
        cut = knowable(configuration, script, result)
        exempt += len(result.ops) - cut
        result = replace(result, ops=result.ops[:cut])
        for part, (agreed, total, difference) in compare(configuration, script, result, events, parts).items():
            tally = tallies[part]
            tally.agreed += agreed
            tally.total += total
            tally.scripts += total > 0
            tally.scripts_agreed += 0 < total == agreed
            if difference is not None and len(tally.differences) < show:
                tally.differences.append(difference)
    switches = tuple(f"{name}: {ARTEFACTS[name]}" for name in sorted(configuration.artefacts))
    for part, tally in tallies.items():
        yield FileReport(
            str(path),
            "golden",
            tally.agreed,
            tally.total,
            tally.differences,
            config=archive.name,
            level=int(part[0]),
            part=PARTS[part],
            scripts_agreed=tally.scripts_agreed,
            scripts=tally.scripts,
            switches=switches,
            behaviour=configuration.era,
            exempt=exempt,
        )


def _match(script: Script, result: Result, events: Sequence[OpEvents], where: str) -> None:
    """The three texts are about the same operations; a livelock may end a run early."""
    if len(result.ops) != len(events):
        raise FormatError(f"{where}: results of {len(result.ops)} operations, events of {len(events)}")
    cut = bool(result.ops) and result.ops[-1].out[-1:] == (("hang", {}),)
    if len(result.ops) != len(script.ops) and not (cut and len(result.ops) < len(script.ops)):
        raise FormatError(f"{where}: results of {len(result.ops)} operations; the script has {len(script.ops)}")
    for op, got, recorded in zip(script.ops, result.ops, events, strict=False):
        if got.op != op.raw or recorded.op != str(op):
            raise FormatError(f"{where}: op {op.index}: {recorded.op!r} was run; the script says {str(op)!r}")
