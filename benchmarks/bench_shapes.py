"""Batches by the span of memory they reach and the pattern they reach it in, beside plain and unrolled C."""

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvmmmu as km
from kvmmmu.records import ACCESS, TRANSLATION


def beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refs = beside("refs")

Words = npt.NDArray[np.uint64]
N = 1 << 16
ROOT = 0x1000
FIRST_FRAME = 1 << 25  # guest memory stands far above the tables
WRITE_USER = 6
# Where the tables of a span fit: 140 KiB, 2.1 MB and 134 MB of them.
SPANS = {"L2": 64 << 20, "L3": 1 << 30, "DRAM": 64 << 30}
PATTERNS = ("64 a page", "new page", "zipf", "random")
UNUSUAL = ("large pages", "10 % faulting", "10 % large pages")


def build(span: int, unusual: str) -> npt.NDArray[np.uint8]:
    """Four levels over ``span`` bytes in scattered frames, the tables themselves in random order."""
    random = np.random.default_rng(1)
    lowest, middle = span >> 21, max(span >> 30, 1)
    memory = refs.aligned((3 + middle + lowest) * 4096)
    words = memory.view(np.uint64).reshape(-1, 512)
    link = np.uint64(refs.PRESENT_WRITABLE_USER | refs.ACCESSED_DIRTY)
    twelve, large = np.uint64(12), np.uint64(0x80)
    order = (random.permutation(lowest) + 3 + middle).astype(np.uint64)
    words[1, 0] = np.uint64(2 << 12) | link
    words[2, :middle] = ((np.arange(middle, dtype=np.uint64) + np.uint64(3)) << twelve) | link
    words[3 : 3 + middle].reshape(-1)[:lowest] = (order << twelve) | link
    frames = (random.permutation(lowest * 512) + FIRST_FRAME).astype(np.uint64)
    words[order.astype(np.int64)] = ((frames << twelve) | link).reshape(-1, 512)
    if unusual == "10 % faulting":
        words[3 + middle :].reshape(-1)[random.random(lowest * 512) < 0.1] = 0
    elif unusual:
        chosen = random.random(lowest) < (1 if unusual == "large pages" else 0.1)
        places = words[3 : 3 + middle].reshape(-1)[:lowest]
        frame = random.permutation(lowest)[chosen].astype(np.uint64) + np.uint64(FIRST_FRAME >> 9)
        places[chosen] = (frame << np.uint64(21)) | link | large
    return memory  # type: ignore[no-any-return]


def addresses(pattern: str, span: int) -> Words:
    random = np.random.default_rng(2)
    if pattern == "64 a page":
        return np.arange(N, dtype=np.uint64) * np.uint64(64) % np.uint64(span)
    if pattern == "new page":
        return np.arange(N, dtype=np.uint64) * np.uint64(4096) % np.uint64(span)
    if pattern == "zipf":
        # Exponent 0.99, by the inverse of its distribution; popular pages stand anywhere.
        pages = span >> 12
        rank = (random.random(N) * (pages**0.01 - 1) + 1) ** 100
        return (rank.astype(np.uint64) * np.uint64(0x9E3779B1) % np.uint64(pages)) << np.uint64(12)
    return random.integers(0, span, N, np.uint64)


class Case:
    def __init__(self, compile_c: Callable[[str], ctypes.CDLL], span: str, unusual: str = "") -> None:
        self.memory = build(SPANS[span], unusual)
        self.words = self.memory.view(np.uint64)
        self.paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, cpu=km.GuestCpu(maxphyaddr=46), memory=self.memory)
        self.reference = refs.Paging.long_mode(ROOT, 46)
        self.areas = refs.Memory.of((0, len(self.memory) - 1, self.memory.ctypes.data))
        self.library = compile_c("ref_walk.c")
        self.own, self.other = np.zeros(N, TRANSLATION), np.zeros(N, TRANSLATION)

    def work(self, gvas: Words) -> None:
        self.paging.translate_into(gvas, self.own[: len(gvas)], "w", 3, False, False, False)

    def in_c(self, function: str, gvas: Words) -> None:
        pointers = ctypes.byref(self.reference), ctypes.byref(self.areas), refs.pointer(gvas)
        getattr(self.library, function)(*pointers, len(gvas), WRITE_USER, refs.pointer(self.other))

    def compare(self, against: Any, gvas: Words) -> None:
        peers = {
            "c": functools.partial(self.in_c, "ref_translate", gvas),
            "c_unrolled": functools.partial(self.in_c, "ref_translate_unrolled", gvas),
        }
        self.work(gvas)
        for peer in peers.values():
            self.other[:] = 0
            peer()
            assert np.array_equal(self.own, self.other)
        against(functools.partial(self.work, gvas), items=N, **peers)


@pytest.fixture(scope="module")
def case(compile_c: Callable[[str], ctypes.CDLL]) -> Callable[[str, str], Case]:
    """The last case, kept: the largest takes seconds to build."""
    return functools.lru_cache(1)(functools.partial(Case, compile_c))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.benchmark(group="batches of 2^16, 4 KiB pages")
def bench_shape(against: Any, case: Callable[..., Case], quick: bool, span: str, pattern: str) -> None:
    if quick and span == "DRAM":
        pytest.skip("large tables take long to set up")
    now = case(span)
    gvas = addresses(pattern, SPANS[span])
    now.compare(against, gvas)
    assert (now.own["fault"] == 0).all()


@pytest.mark.benchmark(group="8,192 translations at once, tables in DRAM")
def bench_at_once_dram(against: Any, case: Callable[..., Case], quick: bool) -> None:
    if quick:
        pytest.skip("large tables take long to set up")
    now, vectorised = case("DRAM"), beside("bench_peers").vectorised
    # Other addresses each time: the tables of one batch would be in cache by the second round.
    columns = np.random.default_rng(3).integers(0, SPANS["DRAM"], (1024, 8192), np.uint64)
    turns = {name: itertools.cycle(columns) for name in ("", "numpy")}
    out = now.own[:8192]

    def work() -> None:
        now.work(next(turns[""]))

    def in_numpy() -> object:
        return vectorised(now.words, ROOT, next(turns["numpy"]))

    work()
    assert np.array_equal(out["gpa"], in_numpy())
    against(work, items=8192, numpy=in_numpy)


@pytest.mark.parametrize("unusual", UNUSUAL)
@pytest.mark.benchmark(group="batches of 2^16 at random over 1 GiB, unusual entries")
def bench_unusual(against: Any, compile_c: Callable[[str], ctypes.CDLL], unusual: str) -> None:
    now = Case(compile_c, "L3", unusual)
    now.compare(against, addresses("random", SPANS["L3"]))
    share = (now.own["fault"] != 0).mean() if unusual.endswith("faulting") else (now.own["page_shift"] == 21).mean()
    assert share == 1 if unusual == "large pages" else 0.05 < share < 0.15


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
@pytest.mark.benchmark(group="accesses to RAM that do not exit, beside translations of the same addresses")
def bench_ram_hits(against: Any, case: Callable[..., Case], mmu: str) -> None:
    span = 16 << 20
    ram = refs.aligned(64 << 20)
    frames = np.random.default_rng(1).permutation(span // 4096).tolist()
    pairs = [(page * 4096, (32 << 20) + frame * 4096) for page, frame in enumerate(frames)]
    refs.map_pages(ram.view(np.uint64), ROOT, 0x2000, pairs)
    vm = km.VM(mmu)  # type: ignore[arg-type]
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(**refs.LONG_MODE, cr3=ROOT)
    paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, memory=ram)
    gvas = np.random.default_rng(2).integers(0, span, N, np.uint64)
    kinds, out, rows = np.ones(N, np.uint8), np.zeros(N, ACCESS), np.zeros(N, TRANSLATION)

    def work() -> None:
        vcpu.access_into(gvas, kinds, out, 0, 1)

    def translate() -> None:
        paging.translate_into(gvas, rows, "w", 0, False, False, False)

    work()
    work()
    translate()
    assert np.array_equal(out["gpa"], rows["gpa"])
    assert (out["exits"] == 0).all()
    against(work, items=N, translate=translate)
