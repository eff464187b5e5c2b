"""The part of a vCPU that runs what was recorded."""

from __future__ import annotations

from typing import Any

from kvmmmu.execution import ReplayTotals
from kvmmmu.outcome import Outcome
from kvmmmu.vcpu_explain import Explanations

__all__ = ["RecordedRuns"]

_DIFFERENCES = (
    "nothing",
    "outcome",
    "guest-physical address",
    "#PF error code",
    "fault address",
    "register load",
    "event kind",
)


class RecordedRuns(Explanations):
    """What ``VCpu`` has of them: a stretch of a trace, compared record by record."""

    def replay(
        self,
        columns: Any,
        *,
        start: int = 0,
        values: bool = False,
        stop_after: int = 0,
    ) -> ReplayTotals:
        """Run a stretch of a recorded trace and compare every event with its record.

        Parameters
        ----------
        columns : object
            With attributes ``a``, ``b``, ``c`` (uint64) and ``kind``, ``size``, ``flags``, ``cpl`` (uint8), one
            element a record: a ``kvmmmu.traces.Chunk``.
        start : int
            Number of the first record, for messages.
        values : bool
            Records of ordinary stores carry their values (raw traces), so that memory follows.
        stop_after : int
            End after this many disagreements; 0 goes on.

        Returns
        -------
        ReplayTotals
        """
        c = columns
        for name in ("a", "b", "c", "kind", "size", "flags", "cpl"):
            if not hasattr(c, name):
                raise TypeError(f"columns must have the columns of a trace: {type(c).__name__} has no {name!r}")
        t = self.replay_into(c.a, c.b, c.c, c.kind, c.size, c.flags, c.cpl, values, stop_after)
        first = None
        if t["what"]:
            first = self._difference(t, start, int(c.flags[t["index"]]), int(c.kind[t["index"]]))
        names = ("events", "disagreements", "mmio", "mmio_cache", "mmio_spte", "mmio_slow", "page_faults", "exits")
        return ReplayTotals(**{name: t[name] for name in names}, first=first)

    def _difference(self, t: dict[str, Any], start: int, flags: int, kind: int) -> tuple[int, str, str, str, str]:
        what = _DIFFERENCES[t["what"]]
        if what == "outcome":
            expected, got = Outcome(t["expected"]).name, repr(t["access"])
        else:
            expected, got = hex(t["expected"]), hex(t["got"])
        access = "x" if kind == 1 else "w" if flags & 1 else "r"
        return start + t["index"], f"{what} of gva {t['gva']:#x}", expected, got, self.explain(t["gva"], access)
