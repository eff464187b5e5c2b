"""Every case of the lockless walk holds in the interleaving that is forced on it, and notices when that is gone."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

CASES = re.findall(r'case_add\(c, b"(\w+)"', (HERE / "forced.pyx").read_text())


def run(program: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("native_build", HERE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native.build("forced", out=tmp_path_factory.mktemp("forced"))


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
    for point in points:
        code, text = run(forced, "--without", point, case)
        assert code == 1, f"without {point}: {code} {text}"


@pytest.mark.parametrize("case", CASES)
def test_the_case_finds_the_faults_planted_for_it(forced: Path, mutants: dict[str, list[str]], case: str) -> None:
    for mutant in mutants[case]:
        code, text = run(forced, "--mutant", mutant, case)
        assert code == 1, f"with {mutant}: {code} {text}"


def test_an_unknown_case_or_point_is_an_error(forced: Path) -> None:
    assert run(forced, "no_such_case")[0] == 2
    assert run(forced, "--without", "NO_SUCH_POINT", CASES[0])[0] == 2


def test_a_release_has_no_trace_of_points_and_mutants() -> None:
    import kvmmmu._core

    binary = Path(kvmmmu._core.__file__).read_bytes()
    assert b"kvmmmu_test_yield" not in binary
    assert b"kvmmmu_test_mutant" not in binary
