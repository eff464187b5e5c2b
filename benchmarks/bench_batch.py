"""Each kernel of batches beside the plain C loop, its unrolled twin and NumPy, by shape and size of tables.

As a program it prints the table of ``docs/performance.md``: medians of ratios, each taken within one round of one
process.  The functions above the benchmarks are plain: other suites may use them.
"""

import argparse
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvmmmu as km
from kvmmmu.records import TRANSLATION

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("refs", HERE / "refs.py")
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

ROWS = 8192  # of one call
ROOT, HOST_ROOT = 0x1000, 0x80000
WRITE, USER = 2, 4
ENTRY = 0x67  # present, writable, user, accessed, dirty
KERNELS = {"walk": 0, "ring": 1, "gather": 2}
SPANS = {"L2": 64 << 20, "L3": 1 << 30, "DRAM": 64 << 30}  # whose tables are 140 KiB, 2.1 MiB and 134 MiB
SHAPES = ("64 a page", "new page", "random")
Words = npt.NDArray[np.uint64]
Work = Callable[[], None]


def tables(span: int, *, large: float = 0.0, absent: float = 0.0) -> npt.NDArray[np.uint8]:
    """Four levels of tables for ``span`` bytes at 0, lower tables and leaves shuffled.

    ``large``: the share of 2 MiB pages; ``absent``: the share of 4 KiB leaves that are not present.
    """
    random = np.random.default_rng(1)
    n_lowest, n_middle = span >> 21, max(1, span >> 30)
    memory: npt.NDArray[np.uint8] = refs.aligned((3 + n_middle + n_lowest) * 4096)
    words = memory.view(np.uint64).reshape(-1, 512)
    frames = random.permutation(n_middle + n_lowest) + 3
    middle, lowest = frames[:n_middle], frames[n_middle:]
    shift, entry = np.uint64(12), np.uint64(ENTRY)
    words[1, 0] = 2 << 12 | ENTRY
    words[2, :n_middle] = middle.astype(np.uint64) << shift | entry
    entries = np.zeros(n_middle * 512, np.uint64)
    entries[:n_lowest] = lowest.astype(np.uint64) << shift | entry
    big = np.flatnonzero(random.random(n_lowest) < large)
    entries[big] = random.permutation(n_lowest)[big].astype(np.uint64) << np.uint64(21) | np.uint64(ENTRY | 0x80)
    words[middle] = entries.reshape(n_middle, 512)
    leaves = random.permutation(n_lowest * 512).astype(np.uint64) << shift | entry
    leaves[random.random(len(leaves)) < absent] &= ~np.uint64(1)
    words[lowest] = leaves.reshape(n_lowest, 512)
    return memory


def trace(shape: str, span: int, n: int) -> Words:
    """Addresses: every 64 bytes, one in every page in order, or anywhere."""
    random = np.random.default_rng(2)
    if shape == "64 a page":
        return np.arange(n, dtype=np.uint64) * np.uint64(64) % np.uint64(span)
    if shape == "new page":
        low = random.integers(0, 4096, n, np.uint64)
        return (np.arange(n, dtype=np.uint64) * np.uint64(4096) | low) % np.uint64(span)
    return random.integers(0, span, n, np.uint64)


def numpy_translate(words: Words, gvas: Words, out: npt.NDArray[Any]) -> None:
    """The same rows by NumPy, a level at a time for all addresses; 4 KiB pages, a user's write, A/D checked."""
    reserved = np.uint64((1 << 52) - (1 << 46))
    index = np.full(len(gvas), ROOT >> 3, np.uint64)
    every = np.full(len(gvas), np.uint64(0xFFFF_FFFF_FFFF_FFFF))
    some = np.zeros(len(gvas), np.uint64)
    entry = some
    for level in (4, 3, 2, 1):
        entry = words[index + (gvas >> np.uint64(12 + 9 * (level - 1)) & np.uint64(511))]
        every &= entry
        some |= entry
        index = (entry & np.uint64(0x000F_FFFF_FFFF_F000)) >> np.uint64(3)
    canonical = (gvas.view(np.int64) << 16 >> 16).view(np.uint64) == gvas
    usual = every & np.uint64(0x27) == np.uint64(0x27)
    usual &= (some & reserved == 0) & (entry & np.uint64(0x40) != 0) & canonical
    if not usual.all():
        raise ValueError("this reference knows plain pages only")
    out["gva"] = gvas
    out["gpa"] = index << np.uint64(3) | gvas & np.uint64(4095)
    out["error_code"] = 0
    out["fault_gpa"] = 0
    out["entry"] = entry
    out["fault"] = 0
    out["page_shift"] = 12
    out["access"] = (some >> np.uint64(63) ^ np.uint64(1)) | every & np.uint64(6)
    out["level"] = 1


def calls(gvas: Words) -> list[Words]:
    """Addresses cut to one call each."""
    return [gvas[i : i + ROWS] for i in range(0, len(gvas), ROWS)]


def contestants(
    library: ctypes.CDLL, memory: npt.NDArray[np.uint8], gvas: Words, kernels: list[str], *, numpy: bool = False
) -> dict[str, Work]:
    """A user's writes by each contestant; all rows were compared before this returns."""
    paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, cpu=km.GuestCpu(maxphyaddr=46), memory=memory)
    reference = refs.Paging.long_mode(ROOT, 46)
    areas = refs.Memory.of((0, len(memory) - 1, memory.ctypes.data))
    own, other = np.zeros(ROWS, TRANSLATION), np.zeros(ROWS, TRANSLATION)
    parts = calls(gvas)
    arguments = (ctypes.byref(reference), ctypes.byref(areas))

    def c_loop(function: Any, part: Words) -> None:
        function(
            *arguments, refs.pointer(part), ctypes.c_size_t(len(part)), ctypes.c_uint64(WRITE | USER),
            refs.pointer(other),
        )  # fmt: skip

    def kernel(name: str, part: Words) -> None:
        paging.kernel = KERNELS[name]
        paging.translate_into(part, own, "w", 3, False, False, False)

    rounds: dict[str, Callable[[Words], None]] = {
        "c": lambda part: c_loop(library.ref_translate, part),
        "unrolled": lambda part: c_loop(library.ref_translate_unrolled, part),
        **{name: (lambda part, name=name: kernel(name, part)) for name in kernels},
    }
    if numpy:
        words = memory.view(np.uint64)
        rounds["numpy"] = lambda part: numpy_translate(words, part, own)
    for part in parts[:8]:
        for name, work in rounds.items():
            rounds["c"](part)
            own[:] = other if name in ("c", "unrolled") else 0
            work(part)
            assert np.array_equal(own, other), f"{name} gives other rows than the C loop"
    return {name: (lambda work=work: [work(part) for part in parts] and None) for name, work in rounds.items()}


def nested_contestants(library: ctypes.CDLL, gvas: Words, kernels: list[str]) -> dict[str, Work]:
    """64 MiB of 4 KiB pages over nested tables of 4 KiB pages, beside a plain C nested loop."""
    span = SPANS["L2"]
    memory = refs.aligned(1 << 20)
    words = memory.view(np.uint64)
    frames = np.random.default_rng(1).permutation(span // 4096).tolist()
    refs.map_pages(words, ROOT, 0x2000, [(page * 4096, 0x1000000 + f * 4096) for page, f in enumerate(frames)])
    below = [(gpa, gpa) for gpa in range(0, HOST_ROOT, 4096)] + [(0x1000000 + f * 4096,) * 2 for f in frames]
    refs.map_pages(words, HOST_ROOT, HOST_ROOT + 4096, below)
    nested = km.NptTables(HOST_ROOT, cpu=km.HostCpu(maxphyaddr=46, vendor="amd"))
    paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, cpu=km.GuestCpu(maxphyaddr=46), memory=memory, nested=nested)
    own, other = np.zeros(ROWS, TRANSLATION), np.zeros(ROWS, TRANSLATION)
    pagings = refs.Paging.long_mode(ROOT, 46), refs.Paging.long_mode(HOST_ROOT, 46)
    areas = refs.Memory.of((0, len(memory) - 1, memory.ctypes.data))
    parts = calls(gvas)

    def reference() -> None:
        for part in parts:
            library.ref_translate2(
                *map(ctypes.byref, (*pagings, areas)), refs.pointer(part), ctypes.c_size_t(len(part)),
                ctypes.c_uint64(WRITE | USER), refs.pointer(other),
            )  # fmt: skip

    def kernel(name: str) -> None:
        paging.kernel = KERNELS[name]
        for part in parts:
            paging.translate_into(part, own, "w", 3, False, False, False)

    reference()
    for name in kernels:
        kernel(name)
        assert np.array_equal(own, other), f"{name} gives other rows than the C loop"
    return {"c": reference, **{name: (lambda name=name: kernel(name)) for name in kernels}}


def ratios(work: dict[str, Work], over: str = "c", rounds: int = 7) -> dict[str, tuple[float, float, float]]:
    """How many times faster each is than ``over``: quartiles of ratios of CPU time within a round."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        seconds = {}
        for name, run in work.items():
            began = time.thread_time()
            run()
            seconds[name] = time.thread_time() - began
        for name in work:
            found[name].append(seconds[over] / seconds[name])
    quartiles = {name: np.percentile(values, (50, 25, 75)) for name, values in found.items() if name != over}
    return {name: (float(q[0]), float(q[1]), float(q[2])) for name, q in quartiles.items()}


def kernels_here() -> list[str]:
    """The batch kernels of this processor."""
    best = km.Paging(0, 0, 0, 0).best_kernel
    return [name for name, number in KERNELS.items() if 0 < number <= best]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", ["L2", "L3"])
@pytest.mark.benchmark(group="batch kernels, 8,192 at once")
def bench_kernels(
    against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], where: str, shape: str
) -> None:
    gvas = trace(shape, SPANS[where], 8 * ROWS)
    work = contestants(compile_c("ref_walk.c"), tables(SPANS[where]), gvas, kernels_here(), numpy=True)
    against(work.pop(kernels_here()[-1]), items=len(gvas), **work)


def _line(name: str, found: dict[str, tuple[float, float, float]]) -> None:
    sys.stdout.write(
        f"{name:34}" + "".join(f"  {k} {q[0]:.2f} ({q[1]:.2f} .. {q[2]:.2f})" for k, q in found.items()) + "\n"
    )
    sys.stdout.flush()


def main() -> None:
    """Print every row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-dram", action="store_true", help="leave out the tables of 134 MiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ref_walk.so"
        command = ["gcc", "-O3", "-fwrapv", "-shared", "-fPIC", str(HERE / "ref_walk.c"), "-o", str(out)]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(out))
    kernels = kernels_here()
    for where, span in SPANS.items():
        if where == "DRAM" and options.no_dram:
            continue
        memory = tables(span)
        for shape in SHAPES:
            work = contestants(library, memory, trace(shape, span, 32 * ROWS), kernels, numpy=True)
            _line(f"{where}, {shape}", ratios(work))
    for name, odd in (
        ("all large", {"large": 1.0}),
        ("a tenth large", {"large": 0.1}),
        ("a tenth absent", {"absent": 0.1}),
    ):
        for where in ("L2", "L3"):
            memory = tables(SPANS[where], **odd)
            for shape in SHAPES:
                work = contestants(library, memory, trace(shape, SPANS[where], 16 * ROWS), kernels)
                _line(f"{where}, {shape}, {name}", ratios(work))
    for shape in SHAPES:
        gvas = trace(shape, SPANS["L2"], 16 * ROWS)
        _line(f"two dimensions, {shape}", ratios(nested_contestants(library, gvas, ["ring"])))


if __name__ == "__main__":
    main()
