"""Finding an area by frame: what a scan of all areas finds, whatever their number, their layout and the last hit."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmmu import VM, GuestCpu, Outcome, Paging

PAGE = 4096
#: A search ends in a line of 8 areas and comes down nodes of 16 keys: full, one more and one less, at every level;
#: above 32,768 areas there is one level more than KVM's slots need.
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 127, 128, 129, 255, 256, 257, 2047, 2048, 2049)
LARGE_SIZES = (32_764, 32_768, 32_769)
HOSTILE = [1 << 51, (1 << 52) - 1, 1 << 52, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]

Areas = list[tuple[int, int]]  # first frame and number of frames, ascending


def layouts(widest: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """For each area the gap before it and its number of frames."""
    gaps = st.one_of(st.just(0), st.integers(1, 3), st.integers(0, widest))
    return st.lists(st.tuples(gaps, st.integers(1, 3)), max_size=300)


def laid_out(layout: list[tuple[int, int]]) -> Areas:
    ends = list(accumulate(gap + n for gap, n in layout))
    return [(end - n, n) for end, (_, n) in zip(ends, layout, strict=True)]


def some_layout(n: int) -> Areas:
    rng = np.random.default_rng(n)
    return laid_out(list(zip(rng.integers(0, 3, n).tolist(), rng.integers(1, 3, n).tolist(), strict=True)))


def holders(areas: Areas) -> dict[int, int]:
    """The area of every frame that is in one."""
    return {first + k: i for i, (first, n) in enumerate(areas) for k in range(n)}


def edges(areas: Areas, seed: int = 0) -> list[int]:
    """Frames at and beside both ends of each area, in no order, some of them twice in a row."""
    frames = {max(first + d, 0) for first, n in areas for d in (-1, 0, n - 1, n)} | {0}
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(np.array(sorted(frames), np.uint64))
    return np.repeat(shuffled, rng.integers(1, 3, len(shuffled))).tolist()


def machine(areas: Areas) -> VM:
    """A VM whose slots are the areas; what they hold is told from their frames."""
    vm, memory = VM("ept", mmio_scheme="off"), np.zeros(3 * PAGE, np.uint8)
    for i in np.random.default_rng(len(areas)).permutation(len(areas)).tolist():
        first, n = areas[i]
        vm.memslots.create(first << 12, memory[: n * PAGE], i)
    return vm


def assert_slots_are_found(areas: Areas) -> None:
    vm, holder = machine(areas), holders(areas)
    for gfn in edges(areas) + HOSTILE:
        found = vm._core.find_gfn(gfn, 0)
        assert (found and found[0]) == holder.get(gfn), gfn


def assert_a_vcpu_tells_memory_from_none(areas: Areas) -> None:
    """Its hint is the slot of the last fault, right or wrong; without mmio sptes every access to no slot searches."""
    vcpu, holder = machine(areas).create_vcpu(), holders(areas)
    for gfn in edges(areas):
        assert vcpu.access(gfn << 12, "r").outcome == (Outcome.OK if gfn in holder else Outcome.MMIO), gfn


@pytest.mark.parametrize("n", SIZES)
def test_a_slot_is_found_where_a_scan_finds_it(n: int) -> None:
    assert_slots_are_found(some_layout(n))


@settings(max_examples=50)
@given(layouts(1 << 20))
def test_a_slot_is_found_in_any_layout(layout: list[tuple[int, int]]) -> None:
    assert_slots_are_found(laid_out(layout))


@settings(max_examples=20)
@given(layouts(3000))  # below 4 GiB, which is all that a vCPU without paging has
def test_a_vcpu_finds_slots_whatever_it_found_last(layout: list[tuple[int, int]]) -> None:
    assert_a_vcpu_tells_memory_from_none(laid_out(layout))


def test_slots_are_found_after_every_change() -> None:
    """Sizes on the way up and down again, each table published with an index of its own."""
    areas = some_layout(140)
    vm, memory, held = VM("ept"), np.zeros(3 * PAGE, np.uint8), set()
    rng = np.random.default_rng(0)
    for i in [*rng.permutation(140).tolist(), *rng.permutation(140).tolist()]:
        first, n = areas[i]
        if i in held:
            vm.memslots.delete(i)
        else:
            vm.memslots.create(first << 12, memory[: n * PAGE], i)
        held ^= {i}
        there = {j: areas[j] for j in held}
        for j, (first, n) in enumerate(areas):
            found = vm._core.find_gfn(first + n - 1, 0)
            assert (found and found[0]) == (j if j in there else None)


class Tables:
    """Page directories whose every entry leads to one frame that is asked for.

    The tables that stand in areas are full of one leaf each, so a walk tells which page of which area it read; of
    pages there are a prime number, so that no two areas near each other share one.
    """

    ROOT = 1 << 39
    PAGES = 1021

    def __init__(self, areas: Areas, frames: list[int]) -> None:
        self.areas, self.frames = areas, frames
        directories = len(frames) + 511 >> 9
        tables = np.zeros((2 + directories, 512), np.uint64)
        tables[0, 0] = (self.ROOT + 1) << 12 | 3
        tables[1, :directories] = (self.ROOT + 2 + np.arange(directories, dtype=np.uint64)) << np.uint64(
            12
        ) | np.uint64(3)
        tables[2:].reshape(-1)[: len(frames)] = np.array(frames, np.uint64) << np.uint64(12) | np.uint64(3)
        leaves = np.repeat(np.arange(1, self.PAGES + 3, dtype=np.uint64) << np.uint64(12) | np.uint64(3), 512)
        self.memory = [(self.ROOT << 12, tables)]
        self.memory += [(first << 12, leaves[self.page(i) * 512 :][: n * 512]) for i, (first, n) in enumerate(areas)]
        self.paging = Paging(0x80010001, self.ROOT << 12, 0x20, 0xD00, GuestCpu(maxphyaddr=52), memory=self.memory)

    def page(self, area: int) -> int:
        return area * 7 % self.PAGES

    def expected(self) -> list[int]:
        """The leaf's page by frame asked for; -1 where no memory stands, whose bytes are 0."""
        page_of = {frame: 1 + self.page(i) + frame - self.areas[i][0] for frame, i in holders(self.areas).items()}
        return [page_of[frame] << 12 if frame in page_of else -1 for frame in self.frames]

    def walked(self) -> list[int]:
        return [self.paging.walk(n << 21) for n in range(len(self.frames))]


def assert_tables_are_found(areas: Areas, frames: list[int]) -> None:
    tables = Tables(areas, frames)
    assert tables.walked() == tables.expected()


@pytest.mark.parametrize("n", SIZES)
def test_a_table_is_found_where_a_scan_finds_it(n: int) -> None:
    areas = some_layout(n)
    assert_tables_are_found(areas, edges(areas))


@pytest.mark.parametrize("n", LARGE_SIZES)
def test_a_table_is_found_among_more_areas_than_kvm_has_slots(n: int) -> None:
    areas = some_layout(n - 1)  # and the one with the tables above them
    assert_tables_are_found(areas, edges(areas)[:40_000])


@settings(max_examples=50)
@given(layouts(1 << 20))
def test_a_table_is_found_in_any_layout(layout: list[tuple[int, int]]) -> None:
    areas = laid_out(layout)
    assert_tables_are_found(areas, edges(areas))
