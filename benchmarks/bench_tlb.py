"""Accesses of a processor with a TLB, by what serves them, and recorded runs with it and without."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.conform.replay import MMUS, replay
from kvmmmu.records import ACCESS
from kvmmmu.traces import open_trace


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refs, recorded = load("refs"), load("bench_replay")

N = 1 << 14
ROOT, GVA, GPA = 0x1000, 1 << 30, 64 << 20
RAM = 128 << 20
ROUNDS = 5
#: Pages that are used, and the counter that shows what served them.
SERVED = {"first level": 32, "second level": 1024, "walk cache": 8192}


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("served", SERVED)
@pytest.mark.benchmark(group="accesses with a TLB, 2^14 at once")
def bench_access(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], mmu: Any, served: str) -> None:
    """Random pages of so many that an array serves them; beside walks in C, and the same without a TLB."""
    pages = SERVED[served]
    ram = refs.aligned(RAM)
    refs.map_pages(ram.view(np.uint64), ROOT, 0x2000, [(GVA + n * 4096, GPA + n * 4096) for n in range(pages)])
    gvas = GVA + np.random.default_rng(1).integers(0, pages, N).astype(np.uint64) * np.uint64(4096)
    kinds, out = np.zeros(N, np.uint8), np.empty(N, ACCESS)
    vcpus = []
    for tlb in (km.Tlb(), None):
        vm = km.VM(mmu)
        vm.memslots.create(gpa=0, memory=ram)
        vcpus.append(vm.create_vcpu(tlb=tlb))
        vcpus[-1].set_sregs(**refs.LONG_MODE, cr3=ROOT)
        vcpus[-1].access_into(gvas, kinds, out, 0, 1)
        assert (out["outcome"] == km.Outcome.OK).all()
    before = dict(vcpus[0].stats)
    vcpus[0].access_into(gvas, kinds, out, 0, 1)
    hits = vcpus[0].stats["tlb_hit"] - before["tlb_hit"]
    assert hits < N // 2 if served == "walk cache" else hits == N
    library = compile_c("ref_walk.c")
    paging, areas = refs.Paging.long_mode(ROOT, 40), refs.Memory.of((0, RAM - 1, ram.ctypes.data))
    walked = np.zeros(N * 48, np.uint8)
    arguments = (ctypes.byref(paging), ctypes.byref(areas), refs.pointer(gvas), ctypes.c_size_t(N), ctypes.c_uint64(4))
    against(
        lambda: vcpus[0].access_into(gvas, kinds, out, 0, 1),
        items=N,
        c=lambda: library.ref_translate(*arguments, refs.pointer(walked)),
        plain=lambda: vcpus[1].access_into(gvas, kinds, out, 0, 1),
    )


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("recording", recorded.RECORDINGS)
@pytest.mark.benchmark(group="replay of the bundled recordings with a TLB")
def bench_replay_tlb(
    benchmark: Any,
    request: pytest.FixtureRequest,
    record: Callable[..., None],
    compile_c: Callable[[str], ctypes.CDLL],
    mmu: Any,
    recording: str,
) -> None:
    """Beside the guest's own tables walked in C, and the same replay without a TLB."""
    library = compile_c("ref_replay.c")
    samples: dict[str, list[float]] = {"": [], "c": [], "plain": []}
    events = 0
    for _ in range(ROUNDS if benchmark.enabled or request.config.getoption("--ratios") else 1):
        for name, tlb in (("", km.Tlb()), ("plain", None)):
            report = replay(open_trace(recorded.RECORDINGS[recording]), mmu=mmu, tlb=tlb)
            assert report.ok
            # CPU time on both sides: wall time under load would be compared with the machine's other work.
            samples[name].append(report.cpu_seconds)
            events = report.events
        samples["c"].append(recorded.reference_seconds(library, recording))
    record(samples, items=events)
    benchmark.pedantic(lambda: None, rounds=1)
