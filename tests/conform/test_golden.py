"""Golden runs: real KVM's outcomes, counters, trees and tracepoints, operation by operation."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmmmu.conform.golden import runner

DATA = Path(__file__).parent.parent / "data"
SLICES = sorted(path for folder in ("golden", "golden-intel") for path in (DATA / folder).glob("*.tar.xz"))
RUNS = [path for path in SLICES if path.name != "scripts.tar.xz"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_operation_of_the_slice_agrees_with_real_kvm_at_every_level(path: Path) -> None:
    reports = list(runner.check(path))
    assert {report.level for report in reports} == {1, 2, 3, 4, 5}
    for report in reports:
        assert report.total > 0
        assert report.agreed == report.total, report.disagreements


@pytest.mark.parametrize("folder", ["golden", "golden-intel"])
def test_every_script_of_the_shared_runs_agrees(folder: str) -> None:
    shared = Path(__file__).parents[3] / "shared" / folder
    if not shared.is_dir():
        pytest.skip(f"{shared} is not beside this checkout: only the slices were checked")
    seen = 0
    for path in sorted(shared.glob("*.tar.xz")):
        for report in runner.check(path):
            seen += 1
            assert report.agreed == report.total, (path.name, report.disagreements)
    assert seen


def test_an_archive_of_scripts_is_checked_by_the_runs_beside_it() -> None:
    assert list(runner.check(DATA / "golden" / "scripts.tar.xz")) == []


def test_a_changed_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: one counter moved by one is one operation less."""
    real = runner.counters_differ
    seen = iter(range(1000))

    def off_by_one(expected, changes, *, flushes):
        moved = dict(changes, pf_taken=changes.get("pf_taken", 0) + (next(seen) == 0))
        return real(expected, moved, flushes=flushes)

    monkeypatch.setattr(runner, "counters_differ", off_by_one)
    counters, _ = runner.check(DATA / "golden" / "tdp0.tar.xz", level=2)
    assert counters.agreed == counters.total - 1
    assert "pf_taken" in counters.disagreements[0]
