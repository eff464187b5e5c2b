#!/usr/bin/env python3
"""Check every model with Spin, and every control: a model with a rule taken out, where Spin must find the failure.

Needs ``spin`` and a C compiler.  Exit status 0: all models hold and every control was found; 1: not so; 2: no Spin.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MEMORY_MIB = 7800
SECONDS = 600
DEPTH = 100_000


@dataclass(frozen=True)
class Run:
    model: str
    flags: str
    holds: bool
    quick: bool = True

    @property
    def title(self) -> str:
        return f"{self.model} {self.flags}".strip()


def runs(model: str, *flags: str, holds: bool, quick: bool = True) -> list[Run]:
    return [Run(model, one, holds, quick) for one in flags]


RUNS = [
    *runs(
        "reader_handshake",
        "-DVISITS=1 -DSTEPS=3",
        "-DONE_READER -DSTEPS=4",
        "-DDEPTH=1 -DONE_READER -DSTEPS=4",
        "-DMEMBARRIER -DONE_READER -DSTEPS=4",
        holds=True,
    ),
    *runs("reader_handshake", "-DVISITS=1 -DSTEPS=4", "-DVISITS=2 -DSTEPS=3", holds=True, quick=False),
    *runs("reader_handshake", "-DMEMBARRIER -DVISITS=1 -DSTEPS=3", holds=True, quick=False),
    *runs("reader_handshake", "-DFORM=1 -DVISITS=1 -DSTEPS=3", "-DFORM=3 -DVISITS=1 -DSTEPS=3", holds=True),
    *runs(
        "reader_handshake", "-DFORM=1 -DVISITS=1 -DSTEPS=4", "-DFORM=3 -DVISITS=1 -DSTEPS=4", holds=True, quick=False
    ),
    *(
        Run("reader_handshake", f"{flags} -DONE_READER -DVISITS=1 -DSTEPS=3", False)
        for flags in (
            "-DNO_READER_BARRIER",
            "-DNO_WRITER_BARRIER",
            "-DNO_HANDSHAKE",
            "-DREAD_TWICE",
            "-DNO_BUMP",
            "-DMEMBARRIER -DNO_MEMBARRIER",
            "-DFORM=1 -DNO_WRITER_BARRIER",
            "-DFORM=1 -DNO_GRACE",
            "-DFORM=3 -DNO_GRACE",
        )
    ),
    *runs("slot_generation", "-DONE_VCPU -DUPDATES=5", "-DUPDATES=2", holds=True),
    *runs("slot_generation", "-DNO_UPDATE_BIT -DONE_VCPU -DUPDATES=5", holds=True),
    *runs("slot_generation", "-DUPDATES=4", holds=True, quick=False),
    *(
        Run("slot_generation", f"-D{flag} -DONE_VCPU -DUPDATES=5", False)
        for flag in (
            "NO_BUMP",
            "BUMP_FIRST",
            "NO_READER_MARK",
            "NO_WRAP_ZAP",
            "WRAP_AFTER_BUMP",
            "NO_INVALID",
            "UNSTAMPED_RECORD",
            "GENERATION_AFTER_WALK",
        )
    ),
    *runs("unsync_writable", "", "-DROUNDS=3", "-DDEPTH=1", "-DWEAK", holds=True),
    *runs(
        "unsync_writable",
        "-DSWAPPED",
        "-DWEAK -DNO_BARRIER",
        "-DNO_READER_MARK",
        "-DNO_FLUSH",
        "-DNO_WRITE_PROTECT",
        holds=False,
    ),
    *runs("table_write", "", "-DEXISTING", "-DDEPTH=1", holds=True),
    *runs(
        "table_write",
        "-DNO_WRITE_BARRIER",
        "-DNO_COUNT_BARRIER",
        "-DNO_SECOND_READ",
        "-DEXISTING -DNO_SECOND_READ",
        "-DNO_READER_MARK",
        "-DNO_FLUSH",
        holds=False,
    ),
    *runs("frozen_entries", "", holds=True),
    *runs("frozen_entries", "-DTRIES=3", holds=True, quick=False),
    *runs(
        "frozen_entries",
        "-DNO_GRACE",
        "-DWALKERS_ONLY",
        "-DNO_FREEZE",
        "-DPLAIN_STORE",
        "-DOVERWRITE_REMOVED",
        "-DREAD_AGAIN",
        "-DREMOVED_TAKEN",
        "-DPASS_STORES",
        holds=False,
    ),
    *runs("leave_guest", "", "-DFAULTS=3", "-DMEMBARRIER", holds=True),
    *runs(
        "leave_guest",
        "-DNO_KICK",
        "-DKICK_FIRST",
        "-DSECOND_LOOK",
        "-DTAKEN_BACK",
        "-DMEMBARRIER -DNO_MEMBARRIER",
        holds=False,
    ),
]


@dataclass
class Result:
    run: Run
    errors: int
    states: int
    depth: int
    mib: float
    seconds: float
    trace: list[str]
    trouble: str

    @property
    def good(self) -> bool:
        return not self.trouble and (self.errors == 0) == self.run.holds


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    return float(found[1]) if found else 0.0


def story(folder: Path, run: Run) -> list[str]:
    """What the steps of a failing trail print, and the claim that fails."""
    text = subprocess.run(
        ["spin", "-t", *run.flags.split(), f"{run.model}.pml"], cwd=folder, capture_output=True, text=True, check=False
    ).stdout
    lines = [line.strip() for line in text.split("spin: trail ends")[0].splitlines()]
    claim = [line.removeprefix("spin: text of failed assertion: ") for line in lines if "text of failed" in line]
    return [line for line in lines if line and not line.startswith("spin:")] + claim


def check(run: Run) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path in HERE.glob("*.pml"):
            shutil.copy(path, folder)
        made = subprocess.run(
            ["spin", "-a", *run.flags.split(), f"{run.model}.pml"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if not (folder / "pan.c").exists():
            return Result(run, 0, 0, 0, 0, 0, [], made.stdout + made.stderr)
        subprocess.run(
            [
                "cc",
                # A control ends at its first failure: it takes longer to compile than to run.
                "-O0" if not run.holds else "-O1" if run.quick else "-O2",
                "-w",
                "-DSAFETY",
                "-DCOLLAPSE",
                f"-DMEMLIM={MEMORY_MIB}",
                "-o",
                "pan",
                "pan.c",
            ],
            cwd=folder,
            check=True,
        )
        began = time.perf_counter()
        try:
            out = subprocess.run(
                ["./pan", f"-m{DEPTH}", "-w20" if run.quick else "-w26"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            ).stdout
        except subprocess.TimeoutExpired:
            return Result(run, 0, 0, 0, 0, SECONDS, [], f"not done after {SECONDS} s")
        seconds = time.perf_counter() - began
        counted = re.search(r"errors: (\d+)", out)
        trouble = "" if counted else out
        if "max search depth too small" in out or "out of memory" in out:
            trouble = "the search was cut short"
        errors = int(counted[1]) if counted else 0
        return Result(
            run,
            errors,
            int(number(r"(\d+) states, stored", out)),
            int(number(r"depth reached (\d+)", out)),
            number(r"([\d.]+)\s+total actual memory", out),
            seconds,
            story(folder, run) if errors else [],
            trouble,
        )


def row(result: Result) -> str:
    verdict = "holds" if not result.errors else "fails"
    if not result.good:
        verdict = result.trouble or f"{verdict}: WRONG, expected to {'hold' if result.run.holds else 'fail'}"
    return (
        f"{result.run.title:66} {verdict:6} {result.states:>11,} states  depth {result.depth:>4}"
        f"  {result.mib:>6.0f} MiB  {result.seconds:>6.1f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the runs of seconds only, every control among them")
    parser.add_argument("--only", default="", help="runs whose title contains this")
    parser.add_argument("--trace", action="store_true", help="print the failing trail of each control")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    if shutil.which("spin") is None:
        print("models not checked: no spin (Debian: apt-get install spin)", file=sys.stderr)
        return 2
    chosen = [run for run in RUNS if arguments.only in run.title and (run.quick or not arguments.quick)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = []
        for result in pool.map(check, chosen):
            print(row(result), flush=True)
            if arguments.trace:
                print("\n".join(f"    {line}" for line in result.trace), flush=True)
            results.append(result)
    bad = [result for result in results if not result.good]
    controls = sum(not result.run.holds for result in results)
    print(f"{len(results) - controls} models hold, {controls} controls found" if not bad else f"{len(bad)} WRONG")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    sys.exit(main())
