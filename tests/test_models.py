"""The models of ``models/``: they name functions that exist, they hold, and their controls fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
SOURCES = [
    *(ROOT / "kvmmmu" / "engine").glob("*.pxd"),
    *(ROOT / "kvmmmu" / "bits").glob("*.pxd"),
    *(ROOT / "kvmmmu" / "include").rglob("*.h"),
]
PROTOCOLS = ("reader_handshake", "slot_generation", "unsync_writable", "table_write", "frozen_entries", "leave_guest")

_FUNCTION = re.compile(r"^(?:cdef inline|static (?:inline )?(?:__attribute__\(\(.*?\)\) )?)[^(\n]*?(\w+)\s*\(", re.M)
_STEP = re.compile(r"/\* engine: ([^*]+) \*/")
_NAMED = re.compile(r'\((\w+)\)\\n"')


def engine_functions() -> set[str]:
    names = {name for path in SOURCES for name in _FUNCTION.findall(path.read_text())}
    # The atomics of every width are made by one macro, and known by their short names.
    return names | set(
        re.findall(r"^    \w[\w *]*?\b(\w+) \"kvmmmu_", (ROOT / "kvmmmu/engine/atomics.pxd").read_text(), re.M)
    )


def steps(path: Path) -> list[str]:
    return [name for found in _STEP.findall(path.read_text()) for name in found.split(", ")]


@pytest.fixture(scope="module")
def spin() -> str:
    if shutil.which("spin") is None:
        pytest.skip("models not checked: no spin (Debian: apt-get install spin)")
    return "spin"


@pytest.mark.parametrize("model", PROTOCOLS)
def test_every_step_of_a_model_names_a_function_of_the_engine(model: str) -> None:
    found = steps(MODELS / f"{model}.pml")
    assert len(found) >= 8
    assert sorted(set(found) - engine_functions()) == []


@pytest.mark.parametrize("model", PROTOCOLS)
def test_what_a_step_prints_names_a_function_of_the_engine(model: str) -> None:
    found = set(_NAMED.findall((MODELS / f"{model}.pml").read_text()))
    assert sorted(found - engine_functions()) == []


def test_a_name_that_does_not_exist_would_be_seen(tmp_path: Path) -> None:
    model = tmp_path / "one.pml"
    model.write_text("/* engine: zap_commit, no_such_function */\n")
    assert set(steps(model)) - engine_functions() == {"no_such_function"}


def test_every_protocol_has_its_model_and_every_control_its_run() -> None:
    listed = (MODELS / "check.py").read_text()
    for model in PROTOCOLS:
        text = (MODELS / f"{model}.pml").read_text()
        flags = set(re.findall(r"\b(?:NO_\w+|[A-Z]+_[A-Z_]+)\b", text.split("Controls:")[1].split("*/")[0]))
        assert flags
        assert {flag for flag in flags if flag not in listed} == set()


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(MODELS / "check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "model",
    ["unsync_writable -DDEPTH=1", "table_write -DDEPTH=1", "slot_generation -DONE_VCPU", "leave_guest -DMEMBARRIER"],
)
def test_a_model_holds(spin: str, model: str) -> None:
    done = check("--quick", "--only", model)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "control",
    [
        "reader_handshake -DNO_READER_BARRIER",
        "reader_handshake -DNO_HANDSHAKE",
        "slot_generation -DNO_BUMP",
        "table_write -DNO_SECOND_READ",
    ],
)
def test_spin_finds_what_a_control_breaks(spin: str, control: str) -> None:
    done = check("--quick", "--trace", "--only", control)
    assert done.returncode == 0, done.stdout
    assert re.search(r"fails +[\d,]+ states", done.stdout)
    assert "assert(" in done.stdout


def test_a_control_that_is_not_found_fails_the_run(spin: str, tmp_path: Path) -> None:
    shutil.copytree(MODELS, tmp_path / "models")
    model = tmp_path / "models" / "unsync_writable.pml"
    model.write_text(
        model.read_text().replace("#ifdef SWAPPED", "#ifdef NEVER").replace("#ifndef SWAPPED", "#ifndef NEVER")
    )
    command = [sys.executable, str(tmp_path / "models" / "check.py"), "--only", "SWAPPED"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WRONG, expected to fail" in done.stdout
