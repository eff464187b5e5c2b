"""Replay of the bundled recordings in each mode, beside the guest's own tables walked in plain C."""

import ctypes
import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmmmu.conform.replay import MMUS, Memory, replay
from kvmmmu.traces import Kind, bundled_trace, open_trace

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

#: Every record of a run, and a whole run of which the first access to each page is kept (``kvmmmu replay``).
RECORDINGS = {"raw": bundled_trace(raw=True), "sample": bundled_trace()}
ROUNDS = 5


class Columns(ctypes.Structure):
    _names = ("a", "b", "c", "kind", "size", "flags", "cpl")
    _fields_ = [(name, ctypes.c_void_p) for name in _names]


class Kinds(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint8) for name in ("mem", "fetch", "state", "memhi", "ptstore", "movcr", "store")]


KINDS = Kinds(Kind.MEM, Kind.FETCH, Kind.STATE, Kind.MEMHI, Kind.PTSTORE, Kind.MOVCR, 1)


def reference_seconds(library: ctypes.CDLL, recording: str) -> float:
    """CPU time of the whole recording in C, every address checked."""
    trace = open_trace(RECORDINGS[recording])
    memory = Memory(trace)
    host = memory.bytes.ctypes.data
    areas = refs.Memory.of(*((area.start_gpa, area.end_gpa, host + start) for area, start in memory.areas))
    paging = refs.Paging.long_mode(0, 40)
    library.ref_replay.restype = ctypes.c_size_t
    seconds = 0.0
    for chunk in trace.chunks():
        columns = Columns(*(getattr(chunk, name).ctypes.data for name in Columns._names))
        began = time.thread_time()
        wrong = library.ref_replay(*map(ctypes.byref, (paging, areas, columns, KINDS)), ctypes.c_size_t(len(chunk)))
        seconds += time.thread_time() - began
        assert wrong == 0
    return seconds


@pytest.fixture(scope="module")
def c_seconds(compile_c: Callable[[str], ctypes.CDLL]) -> Callable[[str], float]:
    return functools.partial(reference_seconds, compile_c("ref_replay.c"))


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("recording", RECORDINGS)
@pytest.mark.benchmark(group="replay of the bundled recordings")
def bench_replay(
    benchmark: Any,
    request: pytest.FixtureRequest,
    record: Callable[..., None],
    c_seconds: Callable[[str], float],
    mmu: Any,
    recording: str,
) -> None:
    reports, samples = [], {"": [], "c": []}

    def work() -> None:
        reports.append(replay(open_trace(RECORDINGS[recording]), mmu=mmu))

    # Unpacking is left out: the figures of interest are those inside the model.
    for _ in range(ROUNDS if benchmark.enabled or request.config.getoption("--ratios") else 1):
        work()
        # CPU time on both sides: wall time under load would be compared with the machine's other work.
        samples[""].append(reports[-1].cpu_seconds)
        samples["c"].append(c_seconds(recording))
    assert all(report.ok for report in reports)
    record(samples, items=reports[0].events)
    benchmark.pedantic(work, rounds=1)
