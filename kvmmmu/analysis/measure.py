"""Ratios of CPU time between contestants in one process.

On a shared machine times move by a factor of two from one minute to the next; ratios of times taken next to each other
hardly do.  So contestants are called in turn, in an order that rotates; each is called once untimed before its sample,
because the one before has filled the caches with its own data; and what is kept is the ratio within each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from timeit import Timer
from typing import Any

__all__ = ["Quartiles", "Work", "quartiles", "race", "ratios"]

#: A callable, or a statement for calls so short that a function around them would be most of the time.
Work = Callable[[], object] | str

SAMPLE_SECONDS = 300e-6  # the clock's own cost and grain do not show in a sample of this length
LONG_SECONDS = 50e-3  # a call of this length warms itself up
MOST_CALLS = 1 << 20
LEAST_ROUNDS = 7
MOST_ROUNDS = 2000


@dataclass(frozen=True)
class Quartiles:
    """The middle half of a sample."""

    q1: float
    median: float
    q3: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"q1": self.q1, "median": self.median, "q3": self.q3}


def quartiles(values: Sequence[float]) -> Quartiles:
    """First, second and third quartile."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def _calls(timer: Timer) -> tuple[int, bool]:
    """How many calls a sample takes, and whether they need warming up."""
    number = 1
    while True:
        seconds = timer.timeit(number)
        if seconds > SAMPLE_SECONDS or number >= MOST_CALLS:
            return number, seconds < LONG_SECONDS
        number *= 4


def race(
    contestants: Mapping[str, Work],
    *,
    seconds: float = 1.0,
    net: bool = False,
    namespace: dict[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of thread CPU time that one call of each takes, a value each round.

    Parameters
    ----------
    contestants : mapping of name to callable or statement
    seconds : float
        Wall time to spend, about.
    net : bool
        Take away what the loop round the calls costs by itself.
    namespace : dict, optional
        Names that statements use.

    Returns
    -------
    dict of list of float
        One element a round; the same round has the same index in every list.
    """
    timers = {name: Timer(work, timer=time.thread_time, globals=namespace or {}) for name, work in contestants.items()}
    empty = Timer("pass", timer=time.thread_time)
    calls = {name: _calls(timer) for name, timer in timers.items()}
    order = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in order}
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        turn = done % len(order)
        for name in order[turn:] + order[:turn]:
            number, warm = calls[name]
            if warm:
                timers[name].timeit(number // 4 or 1)
            loop = empty.timeit(number) if net else 0.0
            samples[name].append((timers[name].timeit(number) - loop) / number)
    return samples


def ratios(samples: Mapping[str, Sequence[float]], own: str, peer: str) -> Quartiles:
    """How many times the peer's time ``own`` takes, round by round."""
    return quartiles([a / b for a, b in zip(samples[own], samples[peer], strict=True)])
