#!/usr/bin/env python3
"""Count instructions under valgrind: the repeatable gate for speed.

    python benchmarks/instructions.py                  # replay in three modes, and the portable kernels
    python benchmarks/instructions.py --only npt       # one mode of the replay; or kernels, replay, one kernel
    python benchmarks/instructions.py --update         # what is counted now becomes the expectation

Only the replay loop and the kernels' loops are counted, not the interpreter around them, with tracepoints off.
Expectations stand in instructions.json by compiler and major version; another compiler's numbers are only reported.
They hold for the default build (setup.py); install it so, then run this with that environment's Python.

Exit status: 0 within bounds or nothing to compare with, 1 out of bounds, 2 a failure, 77 no valgrind.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXPECTED = Path(__file__).with_name("instructions.json")
#: Relative change that counts as one, in either direction: a gain is to be written down too.
BOUNDS = {"replay": 0.05, "kernels": 0.03}
MMUS = ("shadow", "ept", "npt")
ITEMS = 1 << 16
# The C functions behind the doors; a pattern must not match a callee as well, or counting would stop there.
REPLAY = "VcpuCore_*replay_into"
KERNELS = {
    "mmio_encode": "SpteCodec_*make_many",
    "mmio_decode": "SpteCodec_*split_many",
    "is_mmio": "SpteCodec_*is_mmio_many",
    "reserved": "SpteCodec_*reserved_many",
    "translate": "PagingCore_*translate_into",
    "translate_run": "PagingCore_*translate_into",
}
NO_VALGRIND = 77


# ---- what runs under valgrind


def run_replay(mmu: str) -> None:
    import kvmmmu
    from kvmmmu.conform.replay import replay
    from kvmmmu.traces import open_trace

    sample = Path(kvmmmu.__file__).parent / "traces" / "data" / "linux-x86_64-4level-mmio.npz"
    report = replay(open_trace(sample), mmu=mmu)  # type: ignore[arg-type]
    if not report.ok:
        raise SystemExit(f"the replay disagrees: {report.first}")


def run_kernel(name: str) -> None:
    import numpy as np

    import kvmmmu as km
    from kvmmmu.sptes import SpteFormat

    random = np.random.default_rng(7)
    form = SpteFormat("shadow")
    gfn = random.integers(0, form.max_gfn, ITEMS, np.uint64)
    access, gen = random.integers(0, 8, ITEMS, np.uint32), random.integers(0, 1 << 19, ITEMS, np.uint64)
    sptes = form.mmio_encode(gfn, access, gen)
    if name == "mmio_decode":
        form.mmio_decode(sptes)
    elif name == "is_mmio":
        form.is_mmio(sptes)
    elif name == "reserved":
        SpteFormat("ept").is_reserved(sptes, level=1)
    elif name in ("translate", "translate_run"):
        # Four levels of tables over 64 MiB, walked at random or 64 times a page.
        memory = np.zeros(64 << 20, np.uint8)
        words, bits = memory.view(np.uint64), np.uint64(0x67)
        words[0], words[512] = 0x1067, 0x2067
        words[1024:1056] = (np.arange(3, 35, dtype=np.uint64) << np.uint64(12)) | bits
        words[1536 : 1536 + (1 << 14)] = (np.arange(1 << 14, dtype=np.uint64) << np.uint64(12)) | bits
        gvas = random.integers(0, 64 << 20, ITEMS, np.uint64)
        if name == "translate_run":
            gvas = np.arange(ITEMS, dtype=np.uint64) * np.uint64(64)
        done = km.Paging(0x8001_0001, 0, 0x20, 0xD00, memory=memory).translate(gvas)
        if not np.array_equal(done["gpa"], gvas):
            raise SystemExit("the walks are wrong")


# ---- counting


def compiler_of(extension: Path) -> str:
    """Compiler and major version that the extension says it was made by."""
    data = extension.read_bytes()
    clang = re.search(rb"clang version (\d+)", data)
    gcc = re.search(rb"GCC: \([^)]*\) (\d+)\.", data)
    return f"clang {clang[1].decode()}" if clang else f"gcc {gcc[1].decode()}" if gcc else "unknown"


def callgrind(valgrind: str, door: str, work: str) -> int:
    """Instructions inside one door while ``work`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [valgrind, "--tool=callgrind", "--collect-atstart=no", f"--callgrind-out-file={folder}/out"]
        command += [f"--toggle-collect=__pyx_pw_6kvmmmu_5_core_*{door}", sys.executable, __file__, "--run", work]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    collected = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or collected is None:
        raise SystemExit(f"{work} failed under valgrind:\n{done.stderr[-2000:]}")
    if not int(collected[1]):
        raise SystemExit(f"nothing was counted for {work}: no function {door} in the extension?")
    return int(collected[1])


def judge(found: dict[str, dict[str, int]], expected: dict[str, dict[str, int]] | None) -> list[tuple[str, str]]:
    """A line for every number, and the verdict: "ok", "OUT OF BOUNDS" or "reported only"."""
    lines = []
    for group, counts in found.items():
        for name, count in counts.items():
            want = (expected or {}).get(group, {}).get(name)
            text = f"{group} {name:12} {count:>14,} instructions"
            if want is None:
                lines.append((text, "reported only"))
                continue
            change = count / want - 1
            verdict = "ok" if abs(change) <= BOUNDS[group] else "OUT OF BOUNDS"
            lines.append((f"{text}, {change:+.2%} against {want:,} (allowed ±{BOUNDS[group]:.0%})", verdict))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=["replay", "kernels", *MMUS, *KERNELS], help="measure this group or item only"
    )
    parser.add_argument("--update", action="store_true", help="write what is counted as the expectation")
    parser.add_argument("--json", action="store_true", help="print counts, expectations and verdicts for programs")
    parser.add_argument("--run", choices=[*MMUS, *KERNELS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_replay(options.run) if options.run in MMUS else run_kernel(options.run)
        return 0
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        print("instructions: NOT MEASURED: no valgrind (apt-get install valgrind)", file=sys.stderr)
        return NO_VALGRIND
    from kvmmmu import _core

    compiler = compiler_of(Path(_core.__file__))
    table = json.loads(EXPECTED.read_text()) if EXPECTED.is_file() else {}
    found = {
        "replay": {mmu: callgrind(valgrind, REPLAY, mmu) for mmu in MMUS if options.only in (None, "replay", mmu)},
        "kernels": {
            name: callgrind(valgrind, door, name)
            for name, door in KERNELS.items()
            if options.only in (None, "kernels", name)
        },
    }
    if options.update:
        for group, counts in found.items():
            table.setdefault(compiler, {}).setdefault(group, {}).update(counts)
        EXPECTED.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    lines = judge(found, table.get(compiler))
    if options.json:
        print(json.dumps({"compiler": compiler, "found": found, "verdicts": [verdict for _, verdict in lines]}))
    else:
        print(f"instructions, built by {compiler}" + ("" if compiler in table else ": no expectation, reported only"))
        for text, verdict in lines:
            print(f"  {text}: {verdict}")
    return int(any(verdict == "OUT OF BOUNDS" for _, verdict in lines))


if __name__ == "__main__":
    sys.exit(main())
