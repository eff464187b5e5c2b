"""Other people's walkers over the same tables, in the same process: one call at a time, and many at once."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.records import TRANSLATION


def beside(name: str) -> object:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refs, peers = beside("refs"), beside("peers")

SPAN, ROOT, FRAMES = 64 << 20, 0x1000, 0x1000000
CALLS, BATCH = 4096, 8192  # Volatility remembers the last 1024 pages
COMPARED = 50
ONE_BY_ONE = ("python", "bochscpu", "memprocfs", "volatility3", "unicorn")
CODE, DATA = SPAN, SPAN + 0x10000  # pages of Unicorn's guest program
CODE_FRAME, DATA_FRAME = 0x6000000, 0x6010000


class Guest:
    """64 MiB of 4 KiB pages in scattered frames: 140 KiB of tables."""

    def __init__(self, compile_c: Callable[[str], ctypes.CDLL]) -> None:
        self.memory = refs.aligned(1 << 20)
        frames = np.random.default_rng(1).permutation(SPAN // 4096).tolist()
        pairs = [(page * 4096, FRAMES + frame * 4096) for page, frame in enumerate(frames)]
        program = [(CODE, CODE_FRAME), *((DATA + at, DATA_FRAME + at) for at in range(0, 0x20000, 4096))]
        refs.map_pages(self.memory.view(np.uint64), ROOT, 0x2000, pairs + program)
        self.paging = km.Paging(**refs.LONG_MODE, cr3=ROOT, cpu=km.GuestCpu(maxphyaddr=46), memory=self.memory)
        self.tables = peers.Tables(self.memory, ROOT, compile_c)


@pytest.fixture(scope="module")
def guest(compile_c: Callable[[str], ctypes.CDLL]) -> Guest:
    return Guest(compile_c)


@pytest.mark.benchmark(group="one translation at a time from Python, loop included")
def bench_one_by_one(against: Callable[..., None], guest: Guest, kernels: ModuleType) -> None:
    """``no_walk`` beside them: an integer in, an integer out, and nothing between."""
    gvas = np.random.default_rng(2).integers(0, SPAN, CALLS).tolist()
    walk = guest.paging.walk
    names: dict[str, object] = {"gvas": gvas, "walk": walk, "no_walk": kernels.no_walk}
    contestants, absent = {"no_walk": "for gva in gvas: no_walk(gva)"}, {}
    for name in ONE_BY_ONE:
        try:
            call = getattr(guest.tables, name)()
        except peers.AbsentError as why:
            absent[name] = str(why)
            continue
        wrong = [hex(gva) for gva in gvas[:COMPARED] if call(gva) != walk(gva)]
        assert not wrong, f"{name} gives another answer for {wrong}"
        names[name] = call
        contestants[name] = f"for gva in gvas: {name}(gva)"
    if "bochscpu" in contestants:
        names["bochscpu"], (names["root"],) = guest.tables.bochscpu_call()
        contestants["bochscpu"] = "for gva in gvas: bochscpu(root, gva)"
    against("for gva in gvas: walk(gva)", items=CALLS, absent=absent, names=names, **contestants)


def vectorised(words: np.ndarray, root: int, gvas: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The walk in NumPy, every check of the others: all addresses one level at a time."""
    u = np.uint64
    reserved, address = u(0x000FC00000000000), u(0x000FFFFFFFFFF000)
    gpa = np.full(len(gvas), -1, np.int64)
    left = np.flatnonzero((gvas >> u(47) == 0) | (gvas >> u(47) == u(0x1FFFF)))
    table, rights = np.full(len(left), root, u), np.full(len(left), 6, u)
    for level in (4, 3, 2, 1):
        shift = u(12 + 9 * (level - 1))
        entry = words[(table >> u(3)) + (gvas[left] >> shift & u(511))]
        good = (entry & u(1) != 0) & (entry & reserved == 0)
        if not good.all():
            left, entry, rights = left[good], entry[good], rights[good]
        rights &= entry
        leaf = np.ones(len(left), bool) if level == 1 else (entry & u(0x80) != 0)
        if leaf.any():
            done = leaf & (rights & u(6) == u(6))
            offset = (u(1) << shift) - u(1)
            gpa[left[done]] = (entry[done] & address & ~offset) | (gvas[left[done]] & offset)
            left, entry, rights = left[~leaf], entry[~leaf], rights[~leaf]
        table = entry & address
    return gpa


def shapes(shape: str) -> np.ndarray:  # type: ignore[type-arg]
    if shape == "new page":
        return np.arange(BATCH, dtype=np.uint64) * np.uint64(4096) % np.uint64(SPAN)
    if shape == "64 a page":
        return np.arange(BATCH, dtype=np.uint64) * np.uint64(64)
    return np.random.default_rng(3).integers(0, SPAN // 8, BATCH, np.uint64) * np.uint64(8)


@pytest.mark.parametrize("shape", ["64 a page", "new page", "random"])
@pytest.mark.benchmark(group="8,192 translations at once, tables in cache")
def bench_at_once(against: Callable[..., None], guest: Guest, shape: str) -> None:
    gvas = shapes(shape)
    out = np.zeros(BATCH, TRANSLATION)
    words = guest.memory.view(np.uint64)

    def work() -> None:
        guest.paging.translate_into(gvas, out, "w", 3, False, False, False)

    contestants: dict[str, Callable[[], object]] = {"numpy": functools.partial(vectorised, words, ROOT, gvas)}
    absent = {}
    work()
    assert np.array_equal(out["gpa"], vectorised(words, ROOT, gvas))
    try:
        contestants["unicorn"] = guest.tables.unicorn_loads(gvas, CODE, DATA, (CODE_FRAME, DATA_FRAME))
    except peers.AbsentError as why:
        absent["unicorn"] = str(why)
    against(work, items=BATCH, absent=absent, **contestants)
