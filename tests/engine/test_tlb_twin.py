"""What the TLB answers is what a slow twin answers that keeps nothing but sets, ways and ages; replays as accesses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import kvmmmu as km
from kvmmmu.traces import Kind
from machine import DATA, LONG, MMUS, NOFLUSH, PCIDE, PGE, PKE, PS, SMAP, USER, A, D, G, Machine, MiB, P, U, W

PAGE, PAGES, FRAMES = 4096, 6, 4
GLOBAL = -1
READ, WRITE, FETCH = 0, 1, 2


# ---- the twin -----------------------------------------------------------------------------


@dataclass
class Entry:
    page: int = -1
    whose: int = 0
    epoch: int = -1
    frame: int = 0
    used: int = 0


class Array:
    def __init__(self, sets: int, ways: int) -> None:
        self.sets = [[Entry() for _ in range(ways)] for _ in range(sets)]

    def ways(self, page: int) -> list[Entry]:
        return self.sets[page % len(self.sets)]


class Twin:
    """4 KiB pages of PCIDs and global ones in two arrays, searched way by way."""

    def __init__(self, first: tuple[int, int], second: tuple[int, int]) -> None:
        self.first, self.second = Array(*first), Array(*second)
        self.epochs: dict[int, int] = {}
        self.pcid = self.clock = self.hits = 0
        self.last = {False: Entry(), True: Entry()}

    def alive(self, e: Entry) -> bool:
        return e.page >= 0 and e.epoch == self.epochs.get(e.whose, 0)

    def matches(self, e: Entry, page: int) -> bool:
        return self.alive(e) and e.page == page and e.whose in (self.pcid, GLOBAL)

    def put(self, array: Array, new: Entry) -> Entry:
        """Over itself, or over the dead, or over the least recently used."""
        ways = array.ways(new.page)
        at = next((e for e in ways if self.alive(e) and (e.page, e.whose) == (new.page, new.whose)), None)
        at = at or min(ways, key=lambda e: e.used if self.alive(e) else 0)
        at.__dict__.update(new.__dict__)
        return at

    def find(self, page: int, fetch: bool) -> Entry | None:
        self.clock += 1
        e: Entry | None = self.last[fetch]
        assert e is not None
        if not self.matches(e, page):
            e = next((e for e in self.first.ways(page) if self.matches(e, page)), None)
            if e is None:
                e = next((e for e in self.second.ways(page) if self.matches(e, page)), None)
                if e is not None:
                    e.used = self.clock
                    e = self.put(self.first, e)
            if e is None:
                return None
            self.last[fetch] = e
        e.used = self.clock
        return e

    def access(self, page: int, fetch: bool, entry: int) -> int:
        """The frame that serves an access; ``entry``: what the tables say now."""
        e = self.find(page, fetch)
        if e is not None:
            self.hits += 1
            return e.frame
        whose = GLOBAL if entry & G else self.pcid
        frame = (entry - DATA) // PAGE
        for array in (self.first, self.second):
            self.put(array, Entry(page, whose, self.epochs.get(whose, 0), frame, self.clock))
        return frame

    def forget(self, whose: int) -> None:
        self.epochs[whose] = self.epochs.get(whose, 0) + 1

    def invlpg(self, page: int) -> None:
        for e in chain(self.first.ways(page), self.second.ways(page)):
            if self.matches(e, page):
                e.page = -1

    def held(self) -> Iterator[tuple[str, int, int, int]]:
        for place, array in (("pages_4k", self.first), ("second_level", self.second)):
            for e in chain(*array.sets):
                if self.alive(e):
                    yield place, LONG.user + e.page * PAGE, DATA + e.frame * PAGE, e.whose


# ---- the machine beside it ------------------------------------------------------------------


GEOMETRIES = [((2, 2), (2, 3)), ((1, 2), (1, 4)), ((4, 4), (8, 12))]
rows = st.lists(st.tuples(st.integers(0, PAGES - 1), st.sampled_from((READ, WRITE, FETCH))), min_size=1, max_size=12)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("rows"), rows),
        st.tuples(st.just("rows"), rows),
        st.tuples(st.just("map"), st.integers(0, PAGES - 1), st.integers(0, FRAMES - 1), st.booleans()),
        st.tuples(st.just("space"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("invlpg"), st.integers(0, PAGES - 1)),
        st.tuples(st.just("everything"), st.booleans()),
    ),
    max_size=24,
)


@functools.cache
def warm(mmu: str, first: tuple[int, int], second: tuple[int, int]) -> tuple[Machine, list[int]]:
    """A machine with two spaces in which nothing is left for KVM to do."""
    m = Machine(mmu, LONG, tlb=km.Tlb(first, second_level=second), start=False)
    m.start(cr4=LONG.cr4 | PCIDE | PGE)
    spaces = [m.cr3 | 1, m.new_space() | 2]
    for frame in range(FRAMES):
        for space, cr3 in enumerate(spaces):
            for page in range(PAGES):
                m.map(LONG.user + page * PAGE, DATA + frame * PAGE, cr3=cr3 & ~0xFFF)
            m.load_cr3(cr3)
            for kind in "wx":
                assert m.access(LONG.user, kind).outcome is km.Outcome.OK, space
    return m, spaces


def cold(mmu: str, first: tuple[int, int], second: tuple[int, int]) -> tuple[Machine, list[int]]:
    """The same with the first space loaded, every page mapped to frame 0, nothing cached."""
    m, spaces = warm(mmu, first, second)
    for cr3 in spaces:
        for page in range(PAGES):
            m.poke(m.entry_gpa(LONG.user + page * PAGE, cr3=cr3), DATA | USER)
    m.vcpu.load_cr3(spaces[0])
    m.vcpu.invpcid(2)
    return m, spaces


# A private and a global page for one address, the private one in the first way: no flush tells one from the other.
DOUBLE: list[Any] = [
    ("rows", [(0, READ), (0, READ), (2, READ)]),
    ("space", 1, True),
    ("map", 0, 1, True),
    ("rows", [(0, READ), (2, READ), (0, READ), (2, READ), (0, READ), (2, READ)]),
    ("space", 0, True),
    ("rows", [(2, READ), (0, READ)]),
]


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@example(program=DOUBLE)
@given(program=steps)
def test_rows_are_served_as_sets_ways_and_ages_say(mmu: str, geometry: Any, program: list[tuple[Any, ...]]) -> None:
    m, spaces = cold(mmu, *geometry)
    twin = Twin(*geometry)
    twin.pcid, space = 1, 0
    hits = m.vcpu.stats["tlb_hit"]
    for step, *what in program:
        if step == "rows":
            gvas = np.array([LONG.user + page * PAGE for page, _ in what[0]], np.uint64)
            done = m.vcpu.access_many(gvas, np.array([kind for _, kind in what[0]], np.uint8), cpl=0)
            for (page, kind), gpa in zip(what[0], done["gpa"].tolist(), strict=True):
                entry = m.peek(m.entry_gpa(LONG.user + page * PAGE, cr3=spaces[space])) & ~(USER | NOFLUSH)
                assert gpa == DATA + twin.access(page, kind == FETCH, entry) * PAGE
            assert m.vcpu.stats["tlb_hit"] - hits == twin.hits
        elif step == "map":
            page, frame, everywhere = what
            # Behind every cache: what is cached stays as it was.
            where = m.entry_gpa(LONG.user + page * PAGE, cr3=spaces[space])
            m.poke(where, DATA + frame * PAGE | USER | (G if everywhere else 0))
        elif step == "space":
            space, keep = what
            m.vcpu.load_cr3(spaces[space] | (NOFLUSH if keep else 0))
            twin.pcid = space + 1
            if not keep:
                twin.forget(twin.pcid)
        elif step == "invlpg":
            m.vcpu.invlpg(LONG.user + what[0] * PAGE)
            twin.invlpg(what[0])
        else:
            m.vcpu.invpcid(2 if what[0] else 3)
            for whose in (1, 2, GLOBAL) if what[0] else (1, 2):
                twin.forget(whose)
    entries = m.vcpu.tlb_entries()
    entries = entries[np.isin(entries["place"], ("pages_4k", "second_level"))]
    assert entries[["place", "address", "gpa", "pcid"]].tolist() == list(twin.held())


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("pages", [1, 63, 64, 65, 128, 448])
def test_a_small_page_that_is_still_cached_comes_before_a_large_one_cached_over_it(mmu: str, pages: int) -> None:
    m = Machine(mmu, LONG, ram=16 * MiB, page_size="2M", tlb=km.Tlb(), start=False)
    small, far = 0x4000_0000, 0x5000_5000
    other = small + pages * PAGE
    for page in range(512):
        m.map(small + page * PAGE, 6 * MiB + page * PAGE)
    m.map(far, 5 * MiB)
    m.start()
    reads = [small, far, small]
    assert [m.access(gva, "r").gpa for gva in reads] == [6 * MiB, 5 * MiB, 6 * MiB]
    # The guest makes all of them one page, and says so of the other alone.
    m.poke(m.entry_gpa(small, 2), 8 * MiB | USER | PS)
    m.vcpu.invlpg(other)
    large = 8 * MiB + pages * PAGE
    assert [m.access(gva, "r").gpa for gva in (other, far, other)] == [large, 5 * MiB, large]
    assert [m.access(gva, "r").gpa for gva in (far, small, far, small)] == [5 * MiB, 6 * MiB] * 2
    m.vcpu.invlpg(small)
    assert m.access(small, "r").gpa == 8 * MiB


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_a_miss_in_one_space_says_nothing_of_another(mmu: str) -> None:
    m = Machine(mmu, LONG, tlb=km.Tlb(), start=False)
    m.start(cr4=LONG.cr4 | PCIDE)
    spaces = [m.cr3 | 1, m.new_space() | 2]
    m.map(LONG.user, DATA, cr3=spaces[1] & ~0xFFF)
    m.map(LONG.user, DATA, 0, cr3=spaces[0] & ~0xFFF)
    for cr3 in (spaces[1], spaces[0], spaces[1] | NOFLUSH):
        m.load_cr3(cr3)
        hits = m.vcpu.stats["tlb_hit"]
        outcome = m.access(LONG.user, "r").outcome
        assert outcome is (km.Outcome.PF if cr3 == spaces[0] else km.Outcome.OK)
    assert m.vcpu.stats["tlb_hit"] == hits + 1


# ---- replays ----------------------------------------------------------------------------------


def columns(rows: list[tuple[int, int, int, int, int, int]], gpas: list[int]) -> Any:
    """Records of (page, offset, kind, size's power, cpl, value)."""

    def bytes_of(values: list[int]) -> npt.NDArray[np.uint8]:
        return np.array(values, np.uint8)

    return SimpleNamespace(
        kind=bytes_of([Kind.FETCH if kind == FETCH else Kind.MEM for _, _, kind, *_ in rows]),
        a=np.array([LONG.user + page * PAGE + offset for page, offset, *_ in rows], np.uint64),
        b=np.array(gpas, np.uint64),
        c=np.array([row[5] for row in rows], np.uint64),
        size=bytes_of([row[3] for row in rows]),
        flags=bytes_of([kind == WRITE for _, _, kind, *_ in rows]),
        cpl=bytes_of([row[4] for row in rows]),
    )


#: Rights of the pages: all, the supervisor's, read-only, clean, with a protection key, and all again.
BITS = (USER, P | W | A | D, P | U | A, P | W | U | A, USER | 1 << 59, USER)
records = st.lists(
    st.tuples(
        st.integers(0, PAGES - 1),
        st.sampled_from((0, 8, 4088, 4092, 4095)),
        st.sampled_from((READ, READ, WRITE, FETCH)),
        st.integers(0, 3),
        st.sampled_from((0, 3)),
        st.integers(0, (1 << 64) - 1),
    ),
    min_size=1,
    max_size=60,
)


@functools.cache
def twins(mmu: str, cr4: int) -> list[Machine]:
    machines = [Machine(mmu, LONG, tlb=km.Tlb(), start=False) for _ in range(2)]
    for m in machines:
        for page in range(PAGES):
            m.map(LONG.user + page * PAGE, DATA + page * PAGE)
        m.start(cr4=LONG.cr4 | cr4)
    return machines


# With shadow paging KVM offers no protection keys.
@pytest.mark.parametrize(
    ("mmu", "cr4"), [*((mmu, cr4) for mmu in MMUS for cr4 in (0, SMAP)), ("ept", PKE), ("npt", PKE)]
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(rows=records, stray=st.integers(0, 99), ac=st.booleans())
def test_a_replay_does_what_its_accesses_do_one_by_one(
    mmu: str, cr4: int, rows: list[tuple[int, int, int, int, int, int]], stray: int, ac: bool
) -> None:
    """Hits of which the replay asks only for the address; ``stray``: a record that tells another one."""
    pair = twins(mmu, cr4)
    for m in pair:
        for page, bits in enumerate(BITS):
            m.map(LONG.user + page * PAGE, DATA + page * PAGE, bits)
            m.vcpu.invlpg(LONG.user + page * PAGE)
        m.vcpu.ac = ac
        if cr4 & PKE:
            m.vcpu.set_sregs(pkru=1 << 3)  # key 1: no writes
    before = [dict(m.vcpu.stats) for m in pair]
    # A byte of a fetch is all that is asked for.
    rows = [(*row[:3], 0 if row[2] == FETCH else row[3], *row[4:]) for row in rows]
    gpas = [DATA + page * PAGE + offset + PAGE * (at == stray) for at, (page, offset, *_) in enumerate(rows)]
    report = pair[0].vcpu.replay(columns(rows, gpas), values=True)
    wrong = 0
    for (page, offset, kind, power, cpl, value), gpa in zip(rows, gpas, strict=True):
        size = 1 << power
        how = {"value": value & (1 << 8 * size) - 1} if kind == WRITE else {}
        result = pair[1].vcpu.access(LONG.user + page * PAGE + offset, "rwx"[kind], size=size, cpl=cpl, **how)
        wrong += result.outcome is not km.Outcome.OK or result.gpa != gpa
        if result.outcome is km.Outcome.OK and result.gpa != gpa:
            # Asked twice: the quick way says no more than that another address came out.
            pair[1].vcpu.access(LONG.user + page * PAGE + offset, "rwx"[kind], size=size, cpl=cpl, **how)
    assert (report.events, report.disagreements) == (len(rows), wrong)
    assert np.array_equal(pair[0].ram, pair[1].ram)
    assert pair[0].vcpu.tlb_entries().tolist() == pair[1].vcpu.tlb_entries().tolist()
    if stray >= len(rows):
        grown = [{k: n - was[k] for k, n in m.vcpu.stats.items()} for m, was in zip(pair, before, strict=True)]
        assert grown[0] == grown[1]
