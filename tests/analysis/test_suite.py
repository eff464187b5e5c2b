"""The report of ``kvmmmu bench``: what was measured, held against its goals and an older report."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvmmmu.analysis import goals, suite
from kvmmmu.analysis.goals import Goal, judge
from kvmmmu.cli import main
from kvmmmu.errors import ArgumentError


def row(name: str, absent: dict[str, str] | None = None, **over: float) -> dict[str, Any]:
    quartiles = {peer: {"q1": ratio * 0.9, "median": ratio, "q3": ratio * 1.1} for peer, ratio in over.items()}
    own = {"items": 1, "seconds": {"median": 1e-9}}
    return {"group": "g", "name": name, **own, "over": quartiles, "absent": absent or {}}


def report(*rows: dict[str, Any], met: bool | None = True, reference: str = "1", **more: Any) -> dict[str, Any]:
    verdict = {"name": "goal", "ratio": 1.0, "goal": 2.0, "bound": "at most", "met": met, "bench": "b", "why": None}
    return {"rows": list(rows), "goals": [verdict], "references": {"ref_walk.c": reference}, **more}


@pytest.fixture
def two_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (Goal("fast", "bench_a[*]", "c", least=2), Goal("lean", "bench_a[*]", "len", most=3))
    monkeypatch.setattr(goals, "GOALS", table)


@pytest.mark.usefixtures("two_goals")
def test_the_worst_row_decides_whether_a_goal_is_met() -> None:
    fast, lean = judge([row("bench_a[x]", c=0.25, len=1.0), row("bench_a[y]", c=0.6, len=2.9)], [])
    assert (fast["met"], fast["bench"]) == (False, "bench_a[y]")
    assert fast["ratio"] == pytest.approx(1 / 0.6)
    assert (lean["met"], lean["ratio"]) == (True, 2.9)


@pytest.mark.usefixtures("two_goals")
def test_a_goal_without_a_measurement_is_neither_met_nor_missed_and_says_why() -> None:
    fast, lean = judge([row("bench_a[x]", {"c": "no compiler"}), row("bench_b", len=1.0)], [])
    assert (fast["ratio"], fast["met"], fast["why"]) == (None, None, "c is absent: no compiler")
    assert (lean["met"], lean["why"]) == (None, "not measured")
    skipped = [{"name": "bench_a[x]", "why": "needs a checkout"}]
    assert [verdict["why"] for verdict in judge([], [], skipped)] == ["skipped: needs a checkout"] * 2


def test_a_goal_for_a_feature_that_the_cpu_lacks_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "GOALS", (Goal("wide", "bench_a", "c", least=2, needs="avx512f"),))
    rows = [row("bench_a", c=1.0)]
    assert judge(rows, ["sse2"])[0]["met"] is None
    assert judge(rows, ["avx512f"])[0]["met"] is False


def test_a_rate_is_judged_by_the_slowest_in_millions_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "GOALS", (Goal("replay", "bench_a|bench_b", goals.RATE, least=4),))
    slow = row("bench_b") | {"items": 3_000_000, "seconds": {"median": 1.0}}
    fast = row("bench_a") | {"items": 9_000_000, "seconds": {"median": 1.0}}
    (verdict,) = judge([slow, fast], [])
    assert (verdict["met"], verdict["bench"]) == (False, "bench_b")
    assert verdict["ratio"] == pytest.approx(3)


def test_every_goal_has_a_name_of_its_own_and_one_bound() -> None:
    names = [goal.name for goal in goals.GOALS]
    assert len(names) == len(set(names))
    assert all((goal.least is None) != (goal.most is None) for goal in goals.GOALS)


def test_a_change_is_clear_only_when_the_quartiles_part() -> None:
    found = suite.changes(report(row("a", c=1.0), row("b", c=1.0)), report(row("a", c=1.1), row("b", c=1.5)))
    assert [(entry["name"], entry["clear"]) for entry in found["rows"]] == [("b", True), ("a", False)]
    assert found["rows"][0]["change"] == pytest.approx(0.5)


def test_a_changed_yardstick_and_a_lost_goal_are_reported() -> None:
    found = suite.changes(report(row("a", c=1.0)), report(row("z", c=1.0), met=False, reference="2"))
    assert found["references"] == ["ref_walk.c"]
    assert [goal["met"] for goal in found["goals"]] == [False]
    assert (found["gone"], found["added"]) == (["a"], ["z"])


@pytest.mark.parametrize(("before", "after"), [(True, None), (None, False), (None, True), (False, None), (True, True)])
def test_a_goal_that_was_not_measured_in_both_reports_has_not_changed_sides(
    before: bool | None, after: bool | None
) -> None:
    assert suite.changes(report(met=before), report(met=after))["goals"] == []


@pytest.mark.parametrize("part", [{"only": "bench_a"}, {"quick": True}])
def test_what_a_report_of_some_benchmarks_lacks_is_not_gone(part: dict[str, Any]) -> None:
    whole, some = report(row("a", c=1.0), row("b", c=1.0)), report(row("a", c=1.0), **part)
    for pair in ((whole, some), (some, whole)):
        found = suite.changes(*pair)
        assert (found["gone"], found["added"]) == ([], [])
    assert suite.changes(whole, report(row("a", c=1.0)))["gone"] == ["b"]


def test_circumstances_that_differ_are_named() -> None:
    pair = [report(machine={"cpu": cpu}, compiler="gcc", quick=quick) for cpu, quick in (("A", False), ("B", True))]
    assert suite.changes(*pair)["circumstances"] == {"cpu": ["A", "B"], "quick": [False, True]}


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": []}',
        "[]",
        "{",
        '{"rows": 1, "goals": [], "references": {}}',
        '{"rows": [{}], "goals": [], "references": {}}',
    ],
)
def test_what_bench_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.json"
    other.write_text(text)
    with pytest.raises(ArgumentError, match=r"other\.json: not what kvmmmu bench writes"):
        suite.load(other)
    assert CliRunner().invoke(main, ["bench", "--compare", str(other)]).exit_code == 2


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "--output", str(tmp_path / "none" / "x.json")])
    assert (result.exit_code, "is no directory" in result.stderr) == (2, True)


def test_bench_runs_a_row_writes_it_and_compares_it(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    arguments = ["bench", "--quick", "--only", "bench_decode_one"]
    first = CliRunner().invoke(main, [*arguments, "--output", str(old)])
    assert first.exit_code == 0, first.output
    assert "bench_decode_one" in first.output
    written = json.loads(old.read_text())
    assert [entry["name"] for entry in written["rows"]] == ["bench_decode_one"]
    assert len(written["references"]["ref_walk.c"]) == 64
    assert {goal["met"] for goal in written["goals"]} == {None}
    second = CliRunner().invoke(main, [*arguments, "--compare", str(old), "--json"])
    assert [entry["name"] for entry in json.loads(second.output)["changes"]["rows"]] == ["bench_decode_one"]


def test_a_figure_shows_shapes_and_slots_and_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra 'bench'")
    from kvmmmu.analysis.bench_figure import draw

    rows = [row("bench_shape[L2-new page]", c=0.3, c_unrolled=0.5), row("bench_slot[512-local]", binary=0.2)]
    for name in ("one.svg", "two.svg"):
        draw(report(*rows), tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert "new page, L2" in text and "binary search in C" in text
    assert text == (tmp_path / "two.svg").read_text()
    with pytest.raises(ArgumentError, match="nothing to draw"):
        draw(report(row("bench_other", c=1.0)), tmp_path / "none.svg")
    with pytest.raises(ArgumentError, match=r"figure\.doc"):
        draw(report(*rows), tmp_path / "figure.doc")


def test_an_expression_that_fits_nothing_is_bad_input() -> None:
    result = CliRunner().invoke(main, ["bench", "--quick", "--only", "no_such_bench"])
    assert result.exit_code == 2
    assert "no benchmark fits 'no_such_bench'" in result.stderr
