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


@dataclass(frozen=True)
class Goal:
    """One line of the table of goals.

    Attributes
    ----------
    name : str
    bench : str
        Name of the benchmark; ``*`` stands for anything.
    peer : str
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
        return fnmatchcase(name, self.bench.replace("[", "[[]"))


GOALS: tuple[Goal, ...] = (
    Goal("Paging.walk(gva), int result, in calls of len()", "bench_single[walk]", "len", most=3.3),
    Goal("Paging.walk_one(gva), result object, in calls of len()", "bench_single[walk_one]", "len", most=2.5),
    Goal("vcpu.access(gva, 'w', cpl=0), in calls of len()", "bench_single[access]", "len", most=6),
    Goal("mmio spte encode, arrays, against C", "bench_encode[*]", "c", most=1.1),
    Goal("mmio spte decode, arrays, against C", "bench_decode[*]", "c", most=1.1),
    Goal("reserved-bit check, arrays, against C", "bench_reserved[*]", "c", most=1.1),
    Goal("the same loop in Cython, not slower than C", "bench_same_loop[*]", "c", most=1.05),
    Goal("the same loop in Cython, not faster than C", "bench_same_loop[*]", "c", least=0.95),
)


def judge(rows: Iterable[dict[str, Any]], features: Iterable[str]) -> list[dict[str, Any]]:
    """Hold measured rows against the goals.

    Parameters
    ----------
    rows : iterable of dict
        As ``suite.run`` returns them.
    features : iterable of str
        Features of this CPU, by Linux' names.

    Returns
    -------
    list of dict
        ``name``, ``ratio`` (None where nothing was measured), ``goal``, ``bound`` ("at least" or "at most"), ``met``
        (None: does not apply here), ``bench`` (the row that decided) and ``why`` (why there is no ratio).
    """
    measured, present = list(rows), set(features)
    return [_judge(goal, measured, present) for goal in GOALS]


def _judge(goal: Goal, rows: list[dict[str, Any]], features: set[str]) -> dict[str, Any]:
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
    over = [(row["over"][goal.peer]["median"], row["name"]) for row in found if goal.peer in row["over"]]
    if not over:
        reasons = [row["absent"][goal.peer] for row in found if goal.peer in row["absent"]]
        return verdict | {"why": f"{goal.peer} is absent: {reasons[0]}" if reasons else "not measured"}
    ratio, bench = max(over)
    if goal.most is not None:
        return verdict | {"ratio": ratio, "met": ratio <= goal.most, "bench": bench}
    return verdict | {"ratio": 1 / ratio, "met": 1 / ratio >= bound, "bench": bench}
