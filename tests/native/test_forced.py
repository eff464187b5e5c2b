"""Every case of the lockless walk holds in the interleaving that is forced on it, and notices when that is gone."""

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent

#: The runs of one kind that a case must fail, by the point left out or the fault planted.
Controls = dict[str, Future[tuple[int, str]]]

CASES = re.findall(r'case_add\(c, b"(\w+)"', (HERE / "forced.pyx").read_text())


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def all_fail(controls: Controls) -> None:
    for control, done in controls.items():
        code, text = done.result()
        assert code == 1, f"{control}: {code} {text}"


@pytest.fixture(scope="session")
def native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def forced(native: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program: Path = native.build("forced", out=tmp_path_factory.mktemp("forced"))
    return program


@pytest.fixture(scope="session")
def mutants(forced: Path) -> dict[str, list[str]]:
    lines = run(forced, "--list")[1].splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


@pytest.fixture(scope="session")
def controls(
    request: pytest.FixtureRequest, forced: Path, mutants: dict[str, list[str]]
) -> Iterator[dict[tuple[str, str], Controls]]:
    """Of every case that is tested.  Most wait until their patience ends, so several run at once."""
    chosen = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    started: dict[tuple[str, str], Controls] = {}
    with ThreadPoolExecutor(8) as pool:
        for case in (case for case in CASES if case in chosen):
            values = {"--without": run(forced, "--points", case)[1].split(), "--mutant": mutants[case]}
            for option in values:
                started[case, option] = {v: pool.submit(run, forced, option, v, case) for v in values[option]}
        yield started


def test_the_program_has_the_cases_that_are_tested(mutants: dict[str, list[str]]) -> None:
    assert list(mutants) == CASES


@pytest.mark.parametrize("case", CASES)
def test_the_case_holds_when_its_interleaving_is_forced(forced: Path, case: str) -> None:
    assert run(forced, case) == (0, "")


@pytest.mark.parametrize("case", CASES)
def test_the_case_fails_without_any_one_of_its_points(controls: dict[tuple[str, str], Controls], case: str) -> None:
    assert controls[case, "--without"]
    all_fail(controls[case, "--without"])


@pytest.mark.parametrize("case", CASES)
def test_the_case_finds_the_faults_planted_for_it(controls: dict[tuple[str, str], Controls], case: str) -> None:
    all_fail(controls[case, "--mutant"])


def test_an_unknown_case_or_point_is_an_error(forced: Path) -> None:
    assert run(forced, "no_such_case")[0] == 2
    assert run(forced, "--without", "NO_SUCH_POINT", CASES[0])[0] == 2


def test_a_release_has_no_trace_of_points_and_mutants() -> None:
    import kvmmmu._core

    binary = Path(kvmmmu._core.__file__).read_bytes()
    assert b"kvmmmu_test_yield" not in binary
    assert b"kvmmmu_test_mutant" not in binary


def test_nothing_is_wrong_when_everything_changes_at_once(native: ModuleType, tmp_path: Path) -> None:
    program = native.build("stress", out=tmp_path)
    # A round for each MMU; .ci/run has slices under the sanitizers.
    assert native.run_checked(program, ["--seconds", "7"]) == 0
