"""What the benchmarks are asked to show, and whether they did.

A goal names a benchmark (or several, by pattern: the worst counts), the peer it is measured against, and a bound: of
``peer's time / own time`` for "at least", of ``own time / peer's time`` for "at most".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

__all__ = ["GOALS", "Goal", "judge"]


#: In place of a peer: how many million items a second.
RATE = "rate"
AVX512 = "avx512f"
ONE_BY_ONE = "bench_one_by_one"
LEN = "len"
PAGE_MISSES = "bench_at_once[new page]|bench_at_once[random]"


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals.

    Attributes
    ----------
    name : str
    bench : str
        Name of the benchmark; ``*`` stands for anything, ``|`` between alternatives.
    peer : str
        ``RATE``: no peer, but millions of items a second.
    least : float, optional
        The peer must take at least so many times the own time.
    most : float, optional
        The own time must be at most so many times the peer's.
    needs : str, optional
        Feature of the CPU without which the goal does not apply.
    """

    name: str
    bench: str
    peer: str
    least: float | None = None
    most: float | None = None
    needs: str | None = None

    def matches(self, name: str) -> bool:
        """Whether a benchmark counts for this goal."""
        # Brackets are part of pytest's names, not classes of characters.
        return any(fnmatchcase(name, part.replace("[", "[[]")) for part in self.bench.split("|"))


GOALS: tuple[Goal, ...] = (
    Goal("batch, 64 accesses a page, against C", "bench_shape[L2-64 a page]", "c", least=8),
    Goal("batch, a new page each, against C", "bench_shape[L2-new page]", "c", least=3),
    Goal("batch, random, tables in L2, against C", "bench_shape[L2-random]", "c", least=2.7),
    Goal("batch, random, tables in L3, against C", "bench_shape[L3-random]", "c", least=5),
    Goal("batch, random, tables in DRAM, against C", "bench_shape[DRAM-random]", "c", least=4),
    Goal("batch with AVX-512, a new page each, against C", "bench_shape[L2-new page]", "c", least=3.5, needs=AVX512),
    Goal("batch with AVX-512, random, tables in L2, against C", "bench_shape[L2-random]", "c", least=3.5, needs=AVX512),
    Goal("batch, the worst shape, against C", "bench_shape[*]|bench_unusual[*]", "c", least=2),
    Goal("batch, the worst shape, against unrolled C", "bench_shape[*]|bench_unusual[*]", "c_unrolled", least=1),
    Goal("batch of 8,192, tables in cache, against NumPy", "bench_at_once[*]", "numpy", least=4),
    Goal("batch of 8,192, random, tables in DRAM, against NumPy", "bench_at_once_dram", "numpy", least=2),
    Goal("batch, page-miss shapes, against Unicorn's loads", PAGE_MISSES, "unicorn", least=15),
    Goal("batch in two dimensions, warm, against C", "bench_nested[*]", "c", least=4),
    Goal("access_many on RAM hits, no TLB, rate over translate's", "bench_ram_hits[*-no TLB]", "translate", least=0.5),
    Goal("single call against bochscpu", ONE_BY_ONE, "bochscpu", least=4),
    Goal("single call against memprocfs", ONE_BY_ONE, "memprocfs", least=9),
    Goal("single call against pure Python", ONE_BY_ONE, "python", least=35),
    Goal("single call against volatility3", ONE_BY_ONE, "volatility3", least=150),
    Goal("walk(gva), bound before, int result, in calls of len()", "bench_single[walk]", LEN, most=3.3),
    Goal("translate_one(gva), bound before, in calls of len()", "bench_single[translate_one]", LEN, most=2.5),
    Goal("access(gva, 'w', cpl=0), bound before, shadow, in calls of len()", "bench_single[access]", LEN, most=6),
    Goal("the same as vcpu.access(gva, 'w', cpl=0)", "bench_single[access, bound anew]", LEN, most=6),
    Goal("the same, bound before, under EPT", "bench_single[access, EPT]", LEN, most=6),
    Goal("the same, bound before, under NPT", "bench_single[access, NPT]", LEN, most=6),
    Goal("the same, bound before, shadow, with the TLB", "bench_single[access, TLB]", LEN, most=6),
    Goal("fault install under EPT, in reference walks", "bench_install[ept]", "walk", most=4),
    Goal("fault install under NPT, in reference walks", "bench_install[npt]", "walk", most=4),
    Goal("fault install under shadow paging, in reference walks", "bench_install[shadow]", "walk", most=6),
    Goal("slot lookup, against a binary search of structs", "bench_slot[*]", "binary", most=0.45),
    Goal("raw replay with the TLB, million records a second", "bench_replay_tlb[raw-*]", RATE, least=15),
    Goal("raw replay without, million records a second", "bench_replay[raw-*]", RATE, least=4),
    Goal("MMIO by spte, 32 slots, against binary search", "bench_mmio_spte[shadow-32]", "binary", least=4),
    Goal("MMIO by spte, 512 slots, against binary search", "bench_mmio_spte[shadow-512]", "binary", least=6),
    Goal("MMIO by spte, 32,764 slots, against binary search", "bench_mmio_spte[shadow-32764]", "binary", least=10),
    Goal("MMIO by spte, 32 slots, against the slow path", "bench_mmio_spte[shadow-32]", "slow", least=2.5),
    Goal("MMIO by spte, 512 slots, against the slow path", "bench_mmio_spte[shadow-512]", "slow", least=3),
    Goal("MMIO by spte, 32,764 slots, against the slow path", "bench_mmio_spte[shadow-32764]", "slow", least=6),
    Goal("MMIO by spte, 512 slots, against the scan of 2011", "bench_mmio_spte[shadow-512]", "linear", least=20),
    Goal("MMIO by the vCPU's record, against a binary search", "bench_mmio_record[*]", "binary", least=15),
    Goal("MMIO by the vCPU's record, against the slow path", "bench_mmio_record[*]", "slow", least=10),
    Goal("mmio spte encode, arrays, against C", "bench_encode[*]", "c", most=1.1),
    Goal("mmio spte decode, arrays, against C", "bench_decode[*]", "c", most=1.1),
    Goal("reserved-bit check, arrays, against C", "bench_reserved[*]", "c", most=1.1),
    Goal("the same loop in Cython, time over C's", "bench_same_loop[*]", "c", most=1.05),
)


def judge(
    rows: Iterable[dict[str, Any]], features: Iterable[str], skipped: Iterable[dict[str, str]] = ()
) -> list[dict[str, Any]]:
    """Hold measured rows against the goals.

    Parameters
    ----------
    rows : iterable of dict
        As ``suite.run`` returns them.
    features : iterable of str
        Features of this CPU, by Linux' names.
    skipped : iterable of dict
        ``name`` and ``why`` of benchmarks that did not run, as ``suite.run`` returns them.

    Returns
    -------
    list of dict
        ``name``, ``ratio`` (None where nothing was measured), ``goal``, ``bound`` ("at least" or "at most"), ``met``
        (None: does not apply here), ``bench`` (the row that decided) and ``why`` (why there is no ratio).
    """
    measured, present, missing = list(rows), set(features), list(skipped)
    return [_judge(goal, measured, present, missing) for goal in GOALS]


def _judge(goal: Goal, rows: list[dict[str, Any]], features: set[str], skipped: list[dict[str, str]]) -> dict[str, Any]:
    bound = goal.least if goal.least is not None else goal.most
    assert bound is not None
    verdict: dict[str, Any] = {
        "name": goal.name,
        "ratio": None,
        "goal": bound,
        "bound": "at least" if goal.least is not None else "at most",
        "met": None,
        "bench": goal.bench,
        "why": None,
    }
    if goal.needs is not None and goal.needs not in features:
        return verdict | {"why": f"this CPU has no {goal.needs}"}
    found = [row for row in rows if goal.matches(row["name"])]
    # Our time over theirs: the larger, the worse.
    if goal.peer == RATE:
        over = [(row["seconds"]["median"] * 1e6 / row["items"], row["name"]) for row in found]
    else:
        over = [(row["over"][goal.peer]["median"], row["name"]) for row in found if goal.peer in row["over"]]
    if not over:
        reasons = [f"{goal.peer} is absent: {row['absent'][goal.peer]}" for row in found if goal.peer in row["absent"]]
        reasons += [f"skipped: {entry['why']}" for entry in skipped if goal.matches(entry["name"])]
        return verdict | {"why": reasons[0] if reasons else "not measured"}
    ratio, bench = max(over)
    if goal.most is not None:
        return verdict | {"ratio": ratio, "met": ratio <= goal.most, "bench": bench}
    return verdict | {"ratio": 1 / ratio, "met": 1 / ratio >= bound, "bench": bench}
