"""The recorded run with its MMIO, under each scheme of caching, while slots that it does not use come and go."""

from typing import Any

import pytest

from kvmmmu.conform.replay import replay
from kvmmmu.conform.slot_changes import SlotChanges
from kvmmmu.traces import bundled_trace, open_trace

EVERY = {"never": 0, "every 16,384 events": 1 << 14, "every 2,048 events": 1 << 11}
COUNTERS = {
    "slow": "mmio_slow",
    "memslot searches": "slot_search",
    "guest walks": "guest_walk",
    "mmio sptes": "pf_mmio_spte_created",
    "zapped pages": "mmu_shadow_zapped",
}


@pytest.mark.parametrize("changes", EVERY)
@pytest.mark.parametrize("scheme", ["off", "zap_all", "generation"])
@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.benchmark(group="replay while slots change")
def bench_schemes(benchmark: Any, mmu: Any, scheme: Any, changes: str) -> None:
    reports = []

    def work() -> None:
        every = SlotChanges(EVERY[changes]) if EVERY[changes] else None
        reports.append(replay(open_trace(bundled_trace()), mmu=mmu, mmio_scheme=scheme, slot_changes=every))

    benchmark.pedantic(work, rounds=3 if benchmark.enabled else 1)
    assert all(report.ok for report in reports)
    last = reports[-1]
    counted = {**last.counters, **last.faults}
    benchmark.extra_info.update({name: counted[key] for name, key in COUNTERS.items()})
    benchmark.extra_info["ms"] = round(min(report.cpu_seconds for report in reports) * 1e3, 1)
