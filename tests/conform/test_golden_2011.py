"""Real Linux 3.1.3's runs: profile 3.1 agrees on outcomes, counters, trees and tracepoints."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmmmu.cli import main
from kvmmmu.conform.golden import linux31
from kvmmmu.conform.golden.runner import check

DATA = Path(__file__).parents[1] / "data" / "golden-3.1"
OLD = ("shadow", "tdp")


@pytest.mark.parametrize("archive", OLD)
def test_a_run_of_2011_agrees_on_every_level(archive: str) -> None:
    reports = {(report.level, report.part): report for report in check(DATA / f"{archive}.tar.xz")}
    for (level, part), report in reports.items():
        assert report.behaviour == "3.1"
        if level is not None:
            assert report.ok, f"{part}: {report.agreed} of {report.total}: {report.disagreements}"


def test_the_junk_behind_a_short_mmio_access_is_cut_and_nothing_else() -> None:
    short = "kvm_mmio: mmio read len 2 gpa 0xfe000000 val 0xc7c6c5c4c3c2c1c0"
    whole = "kvm_mmio: mmio write len 8 gpa 0xfe000000 val 0xc7c6c5c4c3c2c1c0"
    other = "kvm_page_fault: address fe000000 error_code c"
    assert linux31.lines([short, whole, other]) == [short.replace("c7c6c5c4c3c2c1c0", "c1c0"), whole, other]


def test_the_same_scripts_agree_on_the_kernel_of_today() -> None:
    for report in check(DATA / "on-6.1-shadow.tar.xz"):
        assert report.behaviour == "6.1"
        assert report.ok, f"{report.part}: {report.disagreements}"


@pytest.mark.parametrize("archive", OLD)
def test_every_shared_run_of_2011_agrees(shared: Path, archive: str) -> None:
    path = shared / "golden-3.1" / f"{archive}.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for report in check(path):
        if report.level in (1, 3):
            assert report.ok, f"{report.part}: {report.agreed} of {report.total}: {report.disagreements}"
        assert report.agreed > 0.97 * report.total


def test_the_option_takes_the_runs_of_one_kernel() -> None:
    result = CliRunner().invoke(main, ["conform", str(DATA), "--behaviour", "6.1", "--level", "1", "--json"])
    assert result.exit_code == 0
    assert "on-6.1-shadow" in result.output
    assert '"config": "shadow"' not in result.output


def test_what_a_livelock_hides_is_exempt_and_said(shared: Path) -> None:
    path = shared / "golden-3.1" / "shadow.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    (report,) = check(path, level=1, only=lambda name: name == "smep_smap")
    assert report.exempt == 104
    assert report.total == 4
