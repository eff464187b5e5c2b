"""Real KVM's runs, operation by operation: the model agrees on every level, and a planted difference is seen."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmmmu.conform.golden.comparison import PARTS
from kvmmmu.conform.golden.configuration import ARTEFACTS, Configuration, configure
from kvmmmu.conform.golden.runner import check, compare
from kvmmmu.errors import FormatError
from kvmmmu.golden import (
    Archive,
    OpEvents,
    Result,
    Script,
    parse_events,
    parse_result,
    parse_script,
    parse_setup,
)

DATA = Path(__file__).parents[1] / "data"
RUNS = sorted(path for folder in ("golden", "golden-intel") for path in (DATA / folder).glob("*.tar.xz"))
RUNS = [path for path in RUNS if path.name != "scripts.tar.xz"]

Loaded = tuple[Configuration, Script, Result, Sequence[OpEvents]]


def load(path: Path, name: str) -> Loaded:
    runs, scripts = Archive(path), Archive(path.parent / "scripts.tar.xz")
    return (
        configure(parse_setup(runs.setup(), "setup.txt"), "setup.txt"),
        parse_script(scripts.script(name), name),
        parse_result(runs.result(name), name),
        parse_events(runs.events(name), name),
    )


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name.removesuffix('.tar.xz')}")
def test_every_operation_agrees_on_every_level(path: Path) -> None:
    reports = list(check(path))
    assert [report.part for report in reports] == list(PARTS.values())
    for report in reports:
        assert report.ok, f"{report.part}: {report.disagreements}"
        assert report.scripts_agreed == report.scripts > 0
        assert report.config == path.name.removesuffix(".tar.xz")


@pytest.mark.parametrize(
    "archive",
    [
        *(f"golden/{name}" for name in ("shadow", "shadow-pa52", "tdp0", "tdp1", "tdp1-nxforce")),
        *(f"golden-intel/{name}" for name in ("ept0", "ept1", "ept1-bdw", "ept1-tdp0", "eptad0")),
        "golden-3.1/on-6.1-shadow",
    ],
)
def test_every_shared_run_agrees_on_every_level(shared: Path, archive: str) -> None:
    path = shared / f"{archive}.tar.xz"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for report in check(path):
        assert report.ok, f"{report.part}: {report.agreed} of {report.total}: {report.disagreements}"


def test_an_archive_of_scripts_is_not_checked_by_itself() -> None:
    assert list(check(DATA / "golden" / "scripts.tar.xz")) == []


def test_one_level_can_be_asked_for() -> None:
    reports = list(check(DATA / "golden" / "tdp0.tar.xz", level=3, only=lambda name: name == "flat"))
    assert [(report.level, report.scripts) for report in reports] == [(3, 1), (3, 1)]


def test_the_emulators_quirks_are_listed_and_belong_to_their_configurations() -> None:
    switches = {
        path.name: {switch.split(":")[0] for switch in next(check(path, level=1, only=lambda name: False)).switches}
        for path in RUNS
    }
    assert all(names <= set(ARTEFACTS) for names in switches.values())
    assert "rsvd_alone" in switches["shadow.tar.xz"]
    assert "rsvd_alone" not in switches["ept0.tar.xz"]
    assert "pdpte_unchecked" in switches["tdp1.tar.xz"]
    assert "pdpte_unchecked" not in switches["shadow.tar.xz"]


def differing(loaded: Loaded, result: Result, events: Sequence[OpEvents]) -> set[str]:
    """The parts that no longer agree in full."""
    counts = compare(loaded[0], loaded[1], result, events, tuple(PARTS))
    return {part for part, (agreed, total, first) in counts.items() if agreed != total or first is not None}


@pytest.fixture(scope="module")
def unsync() -> Loaded:
    return load(DATA / "golden" / "shadow.tar.xz", "unsync_long")


def with_op(result: Result, index: int, **changes: object) -> Result:
    ops = list(result.ops)
    ops[index] = dataclasses.replace(ops[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(result, ops=tuple(ops))


def test_another_outcome_is_a_difference_of_level_1_alone(unsync: Loaded) -> None:
    result = with_op(unsync[2], 0, out=(("ok", {"rax": "1"}),))
    assert differing(unsync, result, unsync[3]) == {"1"}


@pytest.mark.parametrize(
    ("counter", "parts"), [("pf_taken", {"2", "2-flush"}), ("tlb_flush", {"2"}), ("io_exits", set())]
)
def test_another_counter_is_a_difference_of_level_2(unsync: Loaded, counter: str, parts: set[str]) -> None:
    stats = dict(unsync[2].ops[0].stats or {})
    stats[counter] = stats.get(counter, 0) + 1
    assert differing(unsync, with_op(unsync[2], 0, stats=stats), unsync[3]) == parts


@pytest.mark.parametrize(("bit", "parts"), [(5, {"3-ad"}), (1, {"3", "3-ad"}), (10, {"3", "3-ad"})])
def test_another_spte_is_a_difference_of_level_3(unsync: Loaded, bit: int, parts: set[str]) -> None:
    tree = list(unsync[2].ops[0].tree or ())
    page = tree[-1]
    entry = dataclasses.replace(page.entries[0], spte=page.entries[0].spte ^ 1 << bit)
    tree[-1] = dataclasses.replace(page, entries=(entry, *page.entries[1:]))
    assert differing(unsync, with_op(unsync[2], 0, tree=tuple(tree)), unsync[3]) == parts


def test_a_page_less_is_a_difference_of_level_3(unsync: Loaded) -> None:
    tree = (unsync[2].ops[0].tree or ())[:-1]
    assert differing(unsync, with_op(unsync[2], 0, tree=tree), unsync[3]) == {"3", "3-ad"}


@pytest.mark.parametrize(
    ("event", "parts"), [("kvm_mmu_set_spte", {"4", "5"}), ("kvm_exit", {"5"}), ("kvm_mmu_paging_element", {"5"})]
)
def test_a_line_less_is_a_difference_of_its_levels(unsync: Loaded, event: str, parts: set[str]) -> None:
    first = unsync[3][0]
    lines = list(first.lines)
    lines.remove(next(line for line in lines if line.startswith(event)))
    assert differing(unsync, unsync[2], [first._replace(lines=tuple(lines)), *unsync[3][1:]]) == parts


def test_two_lines_exchanged_are_a_difference(unsync: Loaded) -> None:
    first = unsync[3][0]
    lines = list(first.lines)
    places = [i for i, line in enumerate(lines) if line.startswith("kvm_mmu_set_spte")]
    lines[places[0]], lines[places[1]] = lines[places[1]], lines[places[0]]
    assert differing(unsync, unsync[2], [first._replace(lines=tuple(lines)), *unsync[3][1:]]) == {"4", "5"}


def test_the_destruction_of_the_vm_is_compared_too(unsync: Loaded) -> None:
    last = unsync[3][-1]
    assert last.lines[-1].startswith("role_prepare_zap_page")
    events = [*unsync[3][:-1], last._replace(lines=last.lines[:-1])]
    assert differing(unsync, unsync[2], events) == {"5"}


def test_a_kernel_without_a_profile_is_refused() -> None:
    raw = Archive(DATA / "golden" / "shadow.tar.xz").setup().replace(b" 6.1.", b" 5.4.")
    with pytest.raises(FormatError, match=r"kernel 5\.4"):
        configure(parse_setup(raw, "setup.txt"), "setup.txt")


def test_runs_without_their_scripts_are_refused(tmp_path: Path) -> None:
    lonely = tmp_path / "shadow.tar.xz"
    lonely.write_bytes((DATA / "golden" / "shadow.tar.xz").read_bytes())
    with pytest.raises(FormatError, match=r"scripts\.tar\.xz: file: the scripts of golden runs are missing"):
        list(check(lonely))
