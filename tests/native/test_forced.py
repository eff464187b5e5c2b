"""Every case of the lockless walk holds in the interleaving that is forced on it, and notices when that is gone."""

import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent

CASES = re.findall(r'case_add\(c, b"(\w+)"', (HERE / "forced.pyx").read_text())


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def all_fail(program: Path, case: str, option: str, values: list[str]) -> None:
    """A control mostly waits until its patience ends, so several run at once."""
    with ThreadPoolExecutor(8) as pool:
        for value, (code, text) in zip(values, pool.map(lambda v: run(program, option, v, case), values), strict=True):
            assert code == 1, f"{option} {value}: {code} {text}"


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


def test_the_program_has_the_cases_that_are_tested(mutants: dict[str, list[str]]) -> None:
    assert list(mutants) == CASES


@pytest.mark.parametrize("case", CASES)
def test_the_case_holds_when_its_interleaving_is_forced(forced: Path, case: str) -> None:
    assert run(forced, case) == (0, "")


@pytest.mark.parametrize("case", CASES)
def test_the_case_fails_without_any_one_of_its_points(forced: Path, case: str) -> None:
    points = run(forced, "--points", case)[1].split()
    assert points
    all_fail(forced, case, "--without", points)


@pytest.mark.parametrize("case", CASES)
def test_the_case_finds_the_faults_planted_for_it(forced: Path, mutants: dict[str, list[str]], case: str) -> None:
    all_fail(forced, case, "--mutant", mutants[case])


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
