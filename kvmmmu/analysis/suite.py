"""The benchmark suite as ``kvmmmu bench`` runs it: rows of ratios, the machine they were taken on, what changed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kvmmmu
from kvmmmu.analysis.goals import judge
from kvmmmu.errors import ArgumentError

__all__ = ["changes", "load", "run", "suite_directory"]

SECONDS, QUICK_SECONDS = 1.0, 0.1
PEERS = ("numpy", "unicorn", "bochscpu-python", "memprocfs", "volatility3", "Cython", "pytest-benchmark")
_LINE = re.compile(r"::(.+) (PASSED|FAILED|ERROR|SKIPPED)(?: \((.*)\))?.*\[ *(\d+)%\]")


def suite_directory() -> Path:
    """Where the benchmarks are: in an installed package inside it, in a checkout beside it."""
    package = Path(kvmmmu.__file__).resolve().parent
    for directory in (package / "benchmarks", package.parent / "benchmarks"):
        if (directory / "pytest.ini").is_file():
            return directory
    raise ArgumentError(f"the benchmarks are neither in {package} nor beside it; install a wheel, or use a checkout")


def _require() -> None:
    for module in ("pytest", "pytest_benchmark", "Cython", "setuptools"):
        if importlib.util.find_spec(module) is None:
            raise ArgumentError(f"the benchmarks need {module}: pip install 'kvmmmu[bench]'")
    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("cc") is None:
        raise ArgumentError("the benchmarks need a C compiler (gcc or cc) for their reference loops")


def _cpu() -> tuple[str, list[str]]:
    """Model and features, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor(), []
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = re.search(r"^flags\s*: (.*)$", text, re.M)
    return (model[1] if model else platform.processor()), (flags[1].split() if flags else [])


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"kvmmmu": kvmmmu.__version__, "python": platform.python_version()}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _circumstances(directory: Path) -> dict[str, Any]:
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc") or "cc"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu()[0],
            "cpus": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load": list(os.getloadavg()),
        },
        "compiler": version.splitlines()[0],
        "versions": _versions(),
        "references": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted([*directory.glob("*.c"), *directory.glob("*.pyx")])
        },
    }


def run(
    *,
    quick: bool = False,
    only: str | None = None,
    progress: Callable[[str, int], None] = lambda name, percent: None,
) -> dict[str, Any]:
    """Run the suite in a process of its own.

    Parameters
    ----------
    quick : bool
        A tenth of the time for each row, and nothing that takes long to set up: for CI, not for figures.
    only : str, optional
        Only benchmarks whose name fits this pytest ``-k`` expression.
    progress : callable
        Called with the name of a finished benchmark and how far the suite is, in percent.

    Returns
    -------
    dict
        ``date``, ``machine``, ``compiler``, ``versions``, ``references`` (SHA-256 of the yardsticks), ``quick``,
        ``only``, ``rows``, ``failed`` and ``skipped`` (name of a benchmark and why), ``goals``.

    Raises
    ------
    ArgumentError
        A tool is missing, or no benchmark fits ``only``.
    """
    _require()
    directory = suite_directory()
    report = _circumstances(directory)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        command = [sys.executable, "-m", "pytest", "-c", str(directory / "pytest.ini"), str(directory)]
        command += ["-v", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--benchmark-disable"]
        command += [f"--ratios={rows}", f"--seconds={QUICK_SECONDS if quick else SECONDS}"]
        command += ["--quick"] if quick else []
        command += ["-k", only] if only else []
        failed, skipped, output, status = _follow(command, scratch, progress)
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if not found and not failed and not skipped:
        if status == 5:  # pytest: no tests collected
            raise ArgumentError(f"no benchmark fits {only!r}")
        raise ArgumentError(f"the suite did not run: {' '.join(output.split())[-400:]}")
    goals = judge(found, _cpu()[1], skipped)
    return report | {"quick": quick, "only": only, "rows": found, "failed": failed, "skipped": skipped, "goals": goals}


def _follow(
    command: list[str], scratch: str, progress: Callable[[str, int], None]
) -> tuple[list[dict[str, str]], list[dict[str, str]], str, int]:
    # Wide enough for the reason why something was skipped.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "240"}
    failed: list[str] = []
    skipped: list[dict[str, str]] = []
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=scratch, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if match := _LINE.search(line):
                progress(match[1], int(match[4]))
                if match[2] in ("FAILED", "ERROR"):
                    failed.append(match[1])
                elif match[2] == "SKIPPED":
                    skipped.append({"name": match[1], "why": match[3] or ""})
    output = "".join(lines)
    if process.returncode < 0:
        # What ran last has not said so: a peer brought the process down.
        broken = [{"name": "the suite", "why": f"ended by signal {-process.returncode}"}]
        return broken, skipped, output, process.returncode
    return [{"name": name, "why": _why(name, output)} for name in failed], skipped, output, process.returncode


def _why(name: str, output: str) -> str:
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")) and line.split(" - ")[0].endswith(f"::{name}"):
            return line.split(" - ", 1)[-1]
    return "see pytest -c benchmarks/pytest.ini benchmarks"


def load(path: Path) -> dict[str, Any]:
    """Read what ``kvmmmu bench`` wrote."""
    try:
        report = json.loads(path.read_text())
        # What can be compared with itself can be compared.
        changes(report, report)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(f"{path}: not what kvmmmu bench writes: {error!r}") from None
    assert isinstance(report, dict)
    return report


def _by_peer(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    return {(row["name"], peer): ratio for row in report["rows"] for peer, ratio in row["over"].items()}


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is different between two reports.

    Returns
    -------
    dict
        ``rows``: for each benchmark and peer in both, ``old`` and ``new`` (own time over the peer's), ``change`` (a
        fraction, positive is slower) and ``clear`` (the quartiles do not overlap); ``goals`` that were measured in
        both and changed sides; ``references`` whose text changed; ``gone`` and ``added`` benchmarks, none where a
        report is of some benchmarks only; ``circumstances`` under which the two differ, by name.
    """
    before, after = _by_peer(old), _by_peer(new)
    rows = []
    for key in after.keys() & before.keys():
        was, now = before[key], after[key]
        rows.append(
            {
                "name": key[0],
                "peer": key[1],
                "old": was["median"],
                "new": now["median"],
                "change": now["median"] / was["median"] - 1,
                "clear": was["q3"] < now["q1"] or now["q3"] < was["q1"],
            }
        )
    met = {goal["name"]: goal["met"] for goal in old["goals"]}
    hashes = old["references"], new["references"]
    some = _part(old) or _part(new)
    was_so, is_so = _circumstances_of(old), _circumstances_of(new)
    return {
        "rows": sorted(rows, key=lambda row: (-abs(row["change"]), row["name"])),
        # A goal that nothing was measured for is neither met nor missed.
        "goals": [g for g in new["goals"] if {met.get(g["name"]), g["met"]} == {True, False}],
        "references": sorted(n for n in hashes[0].keys() | hashes[1].keys() if hashes[0].get(n) != hashes[1].get(n)),
        "gone": [] if some else sorted({name for name, _ in before.keys() - after.keys()}),
        "added": [] if some else sorted({name for name, _ in after.keys() - before.keys()}),
        "circumstances": {name: [was_so[name], is_so[name]] for name in was_so if was_so[name] != is_so[name]},
    }


def _part(report: dict[str, Any]) -> bool:
    return bool(report.get("quick") or report.get("only"))


def _circumstances_of(report: dict[str, Any]) -> dict[str, Any]:
    """What makes two reports hard to compare where it differs."""
    return {
        "quick": report.get("quick"),
        "cpu": report.get("machine", {}).get("cpu"),
        "compiler": report.get("compiler"),
        "python": report.get("versions", {}).get("python"),
    }
