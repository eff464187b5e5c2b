"""The recorded run with its MMIO, under each scheme of caching, while slots that it does not use come and go."""

import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import kvmmmu
from kvmmmu.conform.replay import replay
from kvmmmu.traces import open_trace
from kvmmmu.vm import VM

SAMPLE = Path(kvmmmu.__file__).parent / "traces" / "data" / "linux-x86_64-4level-mmio.npz"
EVERY = {"never": 0, "every 16,384 events": 1 << 14, "every 2,048 events": 1 << 11}
COUNTERS = {
    "slow": "mmio_slow",
    "memslot searches": "slot_search",
    "guest walks": "guest_walk",
    "mmio sptes": "pf_mmio_spte_created",
    "zapped pages": "mmu_shadow_zapped",
}


class Restless(VM):
    """Each time the replay would ask for invariants, a slot far from the run's memory is made, moved or deleted."""

    base = 1 << 38

    def check(self) -> None:
        if not hasattr(self, "chance"):
            self.chance = random.Random(1)
            self.spare = np.zeros(64 << 10, np.uint8)
            self.slot: Any = None
        at = self.base + (self.chance.randrange(1024) << 20)
        if self.slot is None:
            self.slot = self.memslots.create(gpa=at, memory=self.spare)
        elif self.chance.random() < 0.5:
            self.memslots.move(self.slot, gpa=at)
        else:
            self.memslots.delete(self.slot)
            self.slot = None


@pytest.mark.parametrize("changes", EVERY)
@pytest.mark.parametrize("scheme", ["off", "zap_all", "generation"])
@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.benchmark(group="replay while slots change")
def bench_schemes(benchmark: Any, mmu: Any, scheme: Any, changes: str) -> None:
    reports = []

    def work() -> None:
        clock = SimpleNamespace(perf_counter=time.thread_time)
        with patch.object(kvmmmu.conform.replay, "time", clock), patch.object(kvmmmu.conform.replay, "VM", Restless):
            reports.append(replay(open_trace(SAMPLE), mmu=mmu, mmio_scheme=scheme, check_every=EVERY[changes]))

    benchmark.pedantic(work, rounds=3 if benchmark.enabled else 1)
    assert all(report.ok for report in reports)
    last = reports[-1]
    counted = {**last.counters, **last.faults}
    benchmark.extra_info.update({name: counted[key] for name, key in COUNTERS.items()})
    benchmark.extra_info["ms"] = round(min(report.seconds for report in reports) * 1e3, 1)
