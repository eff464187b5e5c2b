"""Designs of an MMU held against each other on one recorded run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from kvmmmu._arguments import index_in
from kvmmmu.analysis.measure import Quartiles, ratios
from kvmmmu.behaviour import Behaviour, MmioScheme
from kvmmmu.conform.replay import MMUS, ReplayReport, replay
from kvmmmu.conform.slot_changes import SlotChanges
from kvmmmu.errors import ArgumentError, FormatError
from kvmmmu.tlb import Tlb
from kvmmmu.traces import Trace
from kvmmmu.vm import Mmu

__all__ = ["COLUMNS", "Column", "Design", "Row", "compare", "designs", "switch_of"]

SCHEMES: Final[tuple[MmioScheme, ...]] = ("off", "zap_all", "generation")
_SETTINGS: Final = {"on": True, "off": False}

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Design:
    """One way to build the MMU.

    Parameters
    ----------
    mmu : {"shadow", "ept", "npt"}
    mmio_scheme : {"off", "zap_all", "generation", "unguarded"}, optional
        The behaviour profile's own if not given.
    profile : {"6.1", "3.1", "seed"}
    switches : mapping of str to bool
        Switches of the behaviour (``kvmmmu.behaviour.SWITCHES``, ``tdp_mmu``, ``nx_huge_pages``).

    Attributes
    ----------
    behaviour : Behaviour
        All of it but the MMU.

    Raises
    ------
    ArgumentError
        Something is unknown.
    """

    mmu: Mmu
    mmio_scheme: MmioScheme | None = None
    profile: str = "6.1"
    switches: Mapping[str, bool] = field(default_factory=dict)
    behaviour: Behaviour = field(init=False)

    def __post_init__(self) -> None:
        if self.mmu not in MMUS:
            raise ArgumentError(f"mmu = {self.mmu!r}: allowed are {', '.join(map(repr, MMUS))}")
        given: dict[str, Any] = dict(self.switches)
        object.__setattr__(self, "behaviour", Behaviour(self.profile, mmio_scheme=self.mmio_scheme, **given))

    def __str__(self) -> str:
        profile = [] if self.profile == "6.1" else [self.profile]
        switches = (f"{name}={'on' if value else 'off'}" for name, value in self.switches.items())
        return ", ".join([self.mmu, self.behaviour.mmio_scheme, *profile, *switches])


@dataclass(frozen=True)
class Row:
    """What a recorded run asked of one design.

    Attributes
    ----------
    design : Design
    report : ReplayReport
        Every counter, and whether the answers were the recorded ones.
    cpu : Quartiles
        CPU time of the vCPU, as a ratio to that of the first design in the same round.
    """

    design: Design
    report: ReplayReport
    cpu: Quartiles

    def counts(self) -> dict[str, float | None]:
        """The numbers by the keys of ``COLUMNS``; those of the TLB only if there was one, None if KVM has no count."""
        return {column.key: column.of(self) for column in COLUMNS if self.report.tlb or column.part != "TLB"}

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain data for JSON."""
        return {
            "design": str(self.design),
            "mmu": self.design.mmu,
            "mmio_scheme": self.design.behaviour.mmio_scheme,
            "behaviour": self.design.profile,
            "switches": dict(self.design.switches),
            "events": self.report.events,
            "disagreements": self.report.disagreements + self.report.tables_different,
            "first_disagreement": self.report.first,
            **self.counts(),
            "cpu_over_first": self.cpu.as_dict(),
        }


@dataclass(frozen=True)
class Column:
    """One number of a row: the table it stands in, its key in JSON, its heading, and where it comes from."""

    part: Literal["exits and MMIO", "KVM's work", "TLB"]
    key: str
    heading: str
    of: Callable[[Row], float | None]


def _counter(key: str) -> Callable[[Row], float | None]:
    def of(row: Row) -> float:
        return (row.report.counters | row.report.faults | row.report.tlb)[key]

    return of


def _shadow_pages(key: str) -> Callable[[Row], float | None]:
    count = _counter(key)

    def of(row: Row) -> float | None:
        # KVM counts the pages of the shadow MMU only.
        return None if row.design.mmu != "shadow" and row.design.behaviour.tdp_mmu else count(row)

    return of


def _mmio_faults(row: Row) -> float:
    return row.report.exits - row.report.faults["pf_taken"]


def _references(row: Row) -> float:
    tlb = row.report.tlb
    read = sum(count for name, count in tlb.items() if "walk_refs_l" in name)
    return round(read / ((tlb["tlb_hit"] + tlb["tlb_miss"]) or 1), 3)


#: KVM's counters under their names, and two numbers made of them: exits for MMIO alone, entries read an access.
COLUMNS: Final = (
    Column("exits and MMIO", "pf_taken", "page-fault exits", _counter("pf_taken")),
    Column("exits and MMIO", "mmio_faults", "MMIO-fault exits", _mmio_faults),
    Column("exits and MMIO", "invlpg", "INVLPG exits", _counter("invlpg")),
    Column("exits and MMIO", "mmio_exits", "exits to user space", _counter("mmio_exits")),
    Column("exits and MMIO", "mmio_cache_hit", "MMIO by vCPU record", _counter("mmio_cache_hit")),
    Column("exits and MMIO", "mmio_spte_hit", "MMIO by mmio spte", _counter("mmio_spte_hit")),
    Column("exits and MMIO", "mmio_slow", "MMIO by slow path", _counter("mmio_slow")),
    Column("KVM's work", "guest_walk", "guest walks", _counter("guest_walk")),
    Column("KVM's work", "slot_search", "memslot searches", _counter("slot_search")),
    Column("KVM's work", "mmu_cache_miss", "shadow pages made", _shadow_pages("mmu_cache_miss")),
    Column("KVM's work", "mmu_shadow_zapped", "shadow pages zapped", _shadow_pages("mmu_shadow_zapped")),
    Column("KVM's work", "remote_tlb_flush_requests", "TLB flush requests", _counter("remote_tlb_flush_requests")),
    Column("TLB", "tlb_hit", "TLB hits", _counter("tlb_hit")),
    Column("TLB", "tlb_miss", "TLB misses", _counter("tlb_miss")),
    Column("TLB", "walk_refs_per_access", "entries read an access", _references),
)


def switch_of(text: str) -> tuple[str, bool]:
    """Read ``"name=on"`` or ``"name=off"``.

    Raises
    ------
    ArgumentError
        It is neither; whether there is such a switch is asked by ``Design``.
    """
    name, _, value = text.partition("=")
    if value not in _SETTINGS:
        raise ArgumentError(f"switch {text!r}: expected {name or 'name'}=on or {name or 'name'}=off")
    return name, _SETTINGS[value]


def designs(
    mmus: Iterable[Mmu] = (),
    mmio_schemes: Iterable[MmioScheme] = (),
    profiles: Iterable[str] = (),
    switches: Iterable[tuple[str, bool]] = (),
) -> list[Design]:
    """Every combination of what is given; what is given twice counts once, a switch given both ways makes two.

    Parameters
    ----------
    mmus : iterable of str
        If empty: all three.
    mmio_schemes : iterable of str
        If empty: off, zap_all and generation; with ``profiles`` the scheme of each profile.
    profiles : iterable of str
        If empty: 6.1.
    switches : iterable of (str, bool)

    Returns
    -------
    list of Design
        The last named varies fastest.

    Raises
    ------
    ArgumentError
        Something is unknown.
    """
    profiles = list(dict.fromkeys(profiles))
    schemes: list[MmioScheme | None] = list(dict.fromkeys(mmio_schemes))
    settings: dict[str, dict[bool, None]] = {}
    for name, value in switches:
        settings.setdefault(name, {})[value] = None
    return [
        Design(mmu, scheme, profile, dict(zip(settings, values, strict=True)))
        for mmu in dict.fromkeys(mmus) or MMUS
        for profile in profiles or ["6.1"]
        for scheme in schemes or ([None] if profiles else SCHEMES)
        for values in itertools.product(*settings.values())
    ]


def compare(
    trace: Trace,
    designs: Sequence[Design],
    *,
    tlb: Tlb | None = None,
    slot_changes: SlotChanges | None = None,
    rounds: int = 3,
    progress: Progress | None = None,
) -> list[Row]:
    """Replay a recorded run under each design, every answer compared with the recorded one.

    Parameters
    ----------
    trace : Trace
    designs : sequence of Design
    tlb : Tlb, optional
        The processor of every design caches translations.
    slot_changes : SlotChanges, optional
        Slots that the run does not use come and go meanwhile, the same for every design.
    rounds : int
        How often each is replayed, taking turns in an order that rotates.  Counters are the same each time, CPU time
        is not.
    progress : callable, optional
        Called with (design and round in words, records done, records in all or None).

    Returns
    -------
    list of Row
        In the order of ``designs``.

    Raises
    ------
    ArgumentError
        There is no design or no round, or the machine has something where ``slot_changes`` would put slots.
    FormatError
        The trace is truncated or corrupt, or has no records.

    Notes
    -----
    CPU time is the vCPU's: what KVM does within the slot changes themselves is not in it.
    """
    index_in("rounds", rounds, 1, 1000)
    if not designs:
        raise ArgumentError("designs: there is none")
    numbers = list(range(len(designs)))
    reports: list[list[ReplayReport]] = [[] for _ in designs]
    for turn in range(rounds):
        at = turn % len(designs)
        for number in numbers[at:] + numbers[:at]:
            design = designs[number]

            def show(done: int, total: int | None, what: str = f"{design}; round {turn + 1} of {rounds}") -> None:
                if progress is not None:
                    progress(what, done, total)

            reports[number].append(
                replay(
                    trace,
                    mmu=design.mmu,
                    behaviour=design.behaviour,
                    tlb=tlb,
                    slot_changes=slot_changes,
                    progress=show,
                )
            )
    if not reports[0][0].events:
        raise FormatError(f"{trace.path}: kind: no records, so nothing to compare designs on")
    samples = {str(number): [report.cpu_seconds for report in reports[number]] for number in numbers}
    return [Row(design, reports[number][0], ratios(samples, str(number), "0")) for number, design in enumerate(designs)]
