"""The command line: exit status 0 agreed, 1 not, 2 bad input with one line that says what."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import kvmmmu.analysis.compare
import kvmmmu.conform.replay
import kvmmmu.conform.run
from kvmmmu._version import __version__
from kvmmmu.analysis.compare import COLUMNS
from kvmmmu.cli import main
from kvmmmu.conform.replay import ReplayReport
from kvmmmu.conform.report import FileReport
from kvmmmu.sptes import SpteFormat
from kvmmmu.traces import Trace


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def one_line(result: Result) -> str:
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_version_is_the_packages() -> None:
    assert run("--version").output.split()[-1] == __version__


def test_every_command_explains_itself() -> None:
    for command in ("replay", "compare", "conform", "walk", "decode", "bench"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert len(result.output.splitlines()) > 5


# ---- decode


def test_decode_says_in_words_what_an_spte_is() -> None:
    spte = SpteFormat("ept").mmio_encode(0xFEE00, 0, 7)
    result = run("decode", hex(spte), "--mmu", "ept")
    assert result.exit_code == 0
    assert "mmio" in result.output
    assert "0xfee00" in result.output
    assert "generation 7" in result.output


def test_decode_gives_json_to_programs() -> None:
    document = json.loads(run("decode", "0x827", "--level", "2", "--json").output)
    assert document["kind"] == "table"
    assert document["spte"] == 0x827


def test_decode_takes_the_hosts_own_layout() -> None:
    spte = SpteFormat("shadow", l1tf=True, cache_bits=44).mmio_encode(1 << 30, 6, 0)
    assert "0x40000000;" in run("decode", str(spte), "--l1tf", "--cache-bits", "44").output
    assert "0x40000000;" not in run("decode", str(spte)).output


def test_decode_takes_a_tdx_guests_layout() -> None:
    assert "empty" in run("decode", hex(1 << 63), "--mmu", "ept", "--tdx").output
    assert "mmio: gfn 0xfee00;" in run("decode", "0xfee00010", "--mmu", "ept", "--tdx").output
    assert "mmio" not in run("decode", "0xfee00010", "--mmu", "ept").output


@pytest.mark.parametrize("spte", ["-1", "18446744073709551616", "0x", "words"])
def test_decode_refuses_what_is_no_64_bit_word(spte: str) -> None:
    assert run("decode", "--", spte).exit_code == 2


def test_decode_refuses_a_host_that_cannot_be() -> None:
    assert "maxphyaddr: 60 is outside 32…52" in one_line(run("decode", "1", "--maxphyaddr", "60"))


# ---- replay (what is printed; the engine is not asked here)


def made_report(mmu: str, **change: Any) -> ReplayReport:
    report: dict[str, Any] = {
        "trace": "run.npz",
        "mmu": mmu,
        "mmio_scheme": None,
        "events": 1_234_567,
        "disagreements": 0,
        "first": None,
        "tables_compared": 512,
        "tables_different": 0,
        "exits": 77,
        "mmio": {"vCPU cache": 11, "mmio spte": 22, "slow path": 33},
        "faults": {"pf_taken": 44},
        "counters": {"mmu_unsync": 55},
        "seconds": 0.5,
        "cpu_seconds": 0.4,
    }
    return ReplayReport(**{**report, **change})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Replaces the replay by ready-made reports; lists what was asked for."""
    calls: list[tuple[str, str | None]] = []

    def stand_in(trace: Trace, *, mmu: str, mmio_scheme: str | None, tlb: Any, progress: Any) -> ReplayReport:
        progress(1, trace.n_records)
        calls.append((mmu, mmio_scheme))
        how = {"disagreements": 1, "first": "record 9: as told"} if mmio_scheme == "off" else {}
        if tlb is not None:
            how["tlb"] = {"tlb_hit": 7_654_321, "walk_refs_l1": 66}
        return made_report(mmu, **how)

    monkeypatch.setattr(kvmmmu.conform.replay, "replay", stand_in)
    return calls


def test_replay_without_a_trace_takes_the_bundled_one_in_all_modes(asked: list[tuple[str, str | None]]) -> None:
    result = run("replay")
    assert result.exit_code == 0
    assert asked == [("shadow", None), ("ept", None), ("npt", None)]
    for text in ("shadow", "ept", "npt", "1,234,567", "0 of 512", "vCPU cache", "pf_taken", "mmu_unsync", "2,469,134"):
        assert text in result.output


def test_replay_in_one_mode_with_one_scheme(asked: list[tuple[str, str | None]]) -> None:
    run("replay", "--mmu", "ept", "--mmio-scheme", "zap_all")
    assert asked == [("ept", "zap_all")]


def test_replay_with_a_tlb_shows_hits_and_references_and_without_one_says_nothing_of_it(
    asked: list[tuple[str, str | None]],
) -> None:
    result = run("replay", "--tlb")
    assert result.exit_code == 0
    assert "tlb_hit" in result.output and "7,654,321" in result.output and "walk_refs_l1" in result.output
    assert json.loads(run("replay", "--tlb", "--json").output)["modes"][0]["tlb"]["walk_refs_l1"] == 66
    assert "tlb_hit" not in run("replay").output and "tlb" not in json.loads(run("replay", "--json").output)["modes"][0]


def test_a_disagreement_in_a_replay_is_exit_status_1_and_is_told(asked: list[tuple[str, str | None]]) -> None:
    result = run("replay", "--mmu", "npt", "--mmio-scheme", "off")
    assert result.exit_code == 1
    assert "npt: first disagreement: record 9: as told" in result.output


def test_replay_gives_json_to_programs(asked: list[tuple[str, str | None]]) -> None:
    document = json.loads(run("replay", "--json").output)
    assert [mode["mmu"] for mode in document["modes"]] == ["shadow", "ept", "npt"]
    assert document["modes"][0]["events_per_second"] == 2_469_134
    assert document["modes"][0]["mmio"]["mmio spte"] == 22


def test_replay_refuses_a_trace_that_is_none(tmp_path: Path) -> None:
    assert "absent.npz: file: no such file" in one_line(run("replay", str(tmp_path / "absent.npz")))
    (tmp_path / "cut.npz").write_bytes(b"PK")
    (tmp_path / "memory-map.json").write_text('{"cut": [{"start": 0, "end": 4095, "kind": "ram"}]}')
    assert "cut.npz" in one_line(run("replay", str(tmp_path / "cut.npz")))
    assert run("replay", "--mmu", "tdp").exit_code == 2


# ---- compare

FIRST_60K = Path(__file__).with_name("data") / "traces" / "linux-i686-pae-mixed-first60k.npz"


def cells(output: str, title: str) -> dict[str, list[str]]:
    """The rows of one table by their first cell; the headings under ``"design"``."""
    lines = output.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.strip() == title) + 1 :]
    end = next(i for i, line in enumerate(lines) if line.startswith("└"))
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines[:end] if line[0] in "│┃"]
    return {row[0]: row[1:] for row in rows}


def test_compare_prints_the_numbers_that_it_gives_to_programs() -> None:
    arguments = ["compare", str(FIRST_60K), "--rounds", "1", "--tlb", "--mmu", "shadow", "--mmu", "ept"]
    arguments += ["--mmio-scheme", "generation"]
    printed, given = run(*arguments), run(*arguments, "--json")
    assert printed.exit_code == given.exit_code == 0
    document = json.loads(given.output)
    assert document["trace"] == str(FIRST_60K) and document["rounds"] == 1
    assert [row["design"] for row in document["designs"]] == ["shadow, generation", "ept, generation"]
    shown = 0
    for part in dict.fromkeys(column.part for column in COLUMNS):
        table = cells(printed.output, part)
        for column in (column for column in COLUMNS if column.part == part):
            at = table["design"].index(column.heading)
            for row in document["designs"]:
                value = row[column.key]
                expected = "–" if value is None else f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
                assert table[row["design"]][at] == expected, column.heading
                shown += 1
    assert shown == 2 * len(COLUMNS)
    assert "every answer of every design is the recorded one" in printed.output


def test_compare_says_nothing_of_a_tlb_that_is_not_there() -> None:
    result = run("compare", str(FIRST_60K), "--rounds", "1", "--mmu", "npt", "--mmio-scheme", "off", "--no-tlb")
    assert result.exit_code == 0
    assert "memslot searches" in result.output and "TLB hits" not in result.output


def test_a_disagreement_under_one_design_is_exit_status_1_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(trace: Trace, *, mmu: str, **how: Any) -> ReplayReport:
        faults = {"pf_taken": 44}
        counters = {column.key: 1 for column in COLUMNS}
        change = {"disagreements": 3, "first": "record 9: as told"} if mmu == "ept" else {}
        return made_report(mmu, faults=faults, counters=counters, **change)

    monkeypatch.setattr(kvmmmu.analysis.compare, "replay", stand_in)
    result = run("compare", "--mmio-scheme", "off")
    assert result.exit_code == 1
    assert "ept, off: 3 disagreements with the recording; first: record 9: as told" in result.output
    assert "npt, off: " not in result.output
    document = json.loads(run("compare", "--mmio-scheme", "off", "--json").output)
    assert [row["disagreements"] for row in document["designs"]] == [0, 3, 0]
    assert document["designs"][1]["first_disagreement"] == "record 9: as told"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--switch", "nosuch=on"], "switch 'nosuch' is unknown: allowed are tdp_mmu, nx_huge_pages, mmio_wide"),
        (["--switch", "one_root"], "switch 'one_root': expected one_root=on or one_root=off"),
        (["--switch", "one_root=1"], "switch 'one_root=1': expected one_root=on or one_root=off"),
        (["--behaviour", "2.6"], "behaviour = '2.6': allowed are '6.1', '3.1', 'seed'"),
        (["absent.npz"], "absent.npz: file: no such file"),
    ],
)
def test_compare_refuses_what_it_does_not_know_by_name(arguments: list[str], why: str) -> None:
    assert why in one_line(run("compare", *arguments))


def test_compare_refuses_a_figure_that_cannot_be_drawn_before_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the designs were replayed first")

    monkeypatch.setattr(kvmmmu.analysis.compare, "replay", never)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert "the figure needs matplotlib: pip install 'kvmmmu[bench]'" in one_line(run("compare", "--figure", "a.svg"))


# ---- conform


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[FileReport]:
    """Replaces the checks by ready-made reports."""
    reports: list[FileReport] = []
    monkeypatch.setattr(kvmmmu.conform.run, "check_paths", lambda paths, **how: iter(reports))
    return reports


def test_conform_is_0_only_if_every_file_agreed(found: list[FileReport]) -> None:
    found.append(FileReport("a.npz", "vectors", 10_000, 10_000))
    result = run("conform", ".")
    assert result.exit_code == 0
    assert "10,000" in result.output
    found.append(FileReport("b.npz", "dump", 9, 10, ["row 3: expected this, got that"]))
    result = run("conform", ".")
    assert result.exit_code == 1
    assert "b.npz: row 3: expected this, got that" in result.output


def test_conform_is_1_when_nothing_was_checked(found: list[FileReport]) -> None:
    assert run("conform", ".").exit_code == 1
    found.append(FileReport("empty.npz", "vectors", 0, 0))
    assert run("conform", ".").exit_code == 1


def test_conform_gives_json_to_programs(found: list[FileReport]) -> None:
    found.append(FileReport("a.npz", "vectors", 9, 10, ["row 3"]))
    document = json.loads(run("conform", ".", "--json").output)
    assert document == {
        "files": [{"file": "a.npz", "kind": "vectors", "agreed": 9, "total": 10, "disagreements": ["row 3"]}]
    }


def test_conform_refuses_strangers_among_the_truth(tmp_path: Path) -> None:
    (tmp_path / "golden.xz").write_bytes(b"")
    assert "golden.xz: file: not vectors, a dump, a trace or golden runs" in one_line(run("conform", str(tmp_path)))
    assert "no such file" in one_line(run("conform", str(tmp_path / "absent")))
    assert run("conform").exit_code == 2


def test_conform_agrees_with_every_slice_of_truth_in_the_tests_data() -> None:
    data = Path(__file__).with_name("data")
    result = run("conform", str(data), "--json")
    files = json.loads(result.output)["files"]
    assert result.exit_code == 0
    assert {report["kind"] for report in files} == {"vectors", "dump", "trace", "golden"}
    assert all(report["agreed"] == report["total"] > 0 for report in files)


# ---- walk


def test_walk_tells_a_walk_of_a_dump_entry_by_entry() -> None:
    dump = sorted((Path(__file__).with_name("data") / "dumps").glob("pae*.npz"))[0]
    result = run("walk", str(dump), "0xc1000000", "--access", "w")
    assert result.exit_code == 0
    assert "0xc1000000" in result.output
    assert "PDPTE" in result.output


def test_walk_refuses_what_is_no_dump(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK")
    assert "x.npz" in one_line(run("walk", str(tmp_path / "x.npz"), "0"))
    assert "absent.npz" in one_line(run("walk", str(tmp_path / "absent.npz"), "0"))
    assert run("walk", str(tmp_path / "x.npz"), "word").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["replay", "--mmu", "vmx"],
        ["replay", "a", "b"],
        ["compare", "a", "b"],
        ["compare", "--mmu", "tdp"],
        ["compare", "--mmio-scheme", "flush"],
        ["compare", "--slot-changes", "0"],
        ["compare", "--rounds", "0"],
        ["compare", "--seed", "-1"],
        ["conform"],
        ["conform", "--show", "-1", "x"],
        ["walk", "x"],
        ["walk", "x", "zz"],
        ["walk", "x", "0x10000000000000000"],
        ["decode", "--", "-1"],
        ["decode", "5", "--level", "9"],
        ["decode", "5", "--maxphyaddr", "99"],
    ],
)
def test_wrong_arguments_get_one_line_and_exit_status_2(arguments: list[str]):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("kvmmmu: ")
    assert result.stderr.endswith("--help\n") or "outside" in result.stderr
