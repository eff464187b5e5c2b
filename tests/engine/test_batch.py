"""Batches against walks one by one: the same rows and the same tables after, whatever the tables say."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmmu import EptTables, GuestCpu, HostCpu, NptTables, Paging
from kvmmmu.conform import vectors
from kvmmmu.records import TRANSLATION
from kvmmmu.walks import Fault

PG_PE_WP = 0x80010001
PAGES = 24
PDPT = 0xFE0  # in each page of tables, where few addresses lead
A, D = 0x20, 0x40
# (cr0, cr4, efer).
MODES = {
    "off": (1, 0, 0),
    "32-bit, PSE": (PG_PE_WP, 0x10, 0),
    "32-bit, SMEP, SMAP": (PG_PE_WP, 0x300010, 0),
    "PAE": (PG_PE_WP, 0x20, 0x800),
    "4-level": (PG_PE_WP, 0x20, 0xD00),
    "4-level, WP = 0": (0x80000001, 0x20, 0x500),
    "5-level": (PG_PE_WP, 0x1020, 0xD00),
    "4-level, SMEP, SMAP, PKE": (PG_PE_WP, 0x720020, 0xD00),
}
HOSTS = ["none", "ept", "ept with A/D", "5-level ept with A/D", "npt"]
KERNELS = range(1, Paging(0, 0, 0, 0).best_kernel + 1)

# Entries that mostly lead on: present, often with every right and A/D set, inside the memory at hand; tables are
# each other's leaves, so that a store of A or D may change what another walk has read.
rights = st.sampled_from([0x67, 0x67, 0x67, 0x67, 0x27, 0x07, 0x63, 0x65, 0x66, 0x61, 0xE7, 0xA7, 0x1E7])
extras = st.sampled_from([0, 0, 0, 0, 0, 1 << 63, 1 << 51, 1 << 45, 1 << 59, 3 << 59, 1 << 13])
gpte = st.builds(lambda page, low, high: page << 12 | low | high, st.integers(0, PAGES - 1), rights, extras)
ept_low = st.sampled_from([0x37, 0x337, 0x337, 0x337, 0x137, 0x31, 0x335, 0x3B7, 0x1B7, 0x36, 0x34, 0])
ept_entry = st.builds(lambda page, low: page << 12 | low, st.integers(0, PAGES - 1), ept_low)
# Mostly as a PDPTE must be; the last two have reserved bits.
pdpte_bits = st.sampled_from([1, 1, 1, 1, 9, 0xE01, 0, 0x21, 1 << 63 | 1])
pdpte = st.builds(lambda page, bits: page << 12 | bits, st.integers(8, 15), pdpte_bits)
# Few pages, met again and again, alone and in runs, also at the ends of the address space.
gvas = st.one_of(
    st.builds(lambda a, b, c: a << 30 | b << 21 | c << 12, *(st.integers(0, 3),) * 3),
    st.builds(lambda a, b: a << 39 | b << 21, st.integers(0, 511), st.integers(0, 3)),
    st.builds(lambda low: (1 << 64) - 1 - low, st.integers(0, 1 << 22)),
    st.integers(0, (1 << 64) - 1),
)
trace = st.lists(st.tuples(gvas, st.sampled_from([1, 1, 1, 2, 3, 20])), min_size=1, max_size=30)


def addresses(runs: list[tuple[int, int]], seed: int) -> np.ndarray:  # type: ignore[type-arg]
    """The runs in some order, over and over, to 200 addresses."""
    random = np.random.default_rng(seed)
    found: list[int] = []
    while len(found) < 200:
        page, length = runs[random.integers(len(runs))]
        found += [page & ~0xFFF | int(low) for low in random.integers(0, 4096, length)]
    return np.array(found, np.uint64)


def entries_at(words: np.ndarray, page: int, values: list[int], wide: bool) -> None:  # type: ignore[type-arg]
    """Fill a table page with a few values, over and over."""
    if wide:
        words[page] = np.resize(np.array(values, np.uint64), 512)
    else:
        words[page].view(np.uint32)[:] = np.resize(np.array([value & 0xFFFFFFFF for value in values], np.uint32), 1024)


def second_dimension(host: str) -> EptTables | NptTables | None:
    cpu = HostCpu(maxphyaddr=46, ept_exec_only=True)
    if host == "none":
        return None
    if host == "npt":
        return NptTables(0x10000, cpu=cpu)
    eptp = {"ept": 0x1001E, "ept with A/D": 0x1005E, "5-level ept with A/D": 0x10066}[host]
    return EptTables(eptp, cpu=cpu)


def compare(words, gvas, access, flags, make) -> None:  # type: ignore[no-untyped-def]
    """Twice the same batch by every kernel: the second time nothing is left to set."""
    cpl, ac, implicit, set_ad = 3 * flags[0], flags[1], flags[2], flags[3]
    answers = []
    for kernel in (0, *KERNELS):
        memory = words.copy()
        paging = make(memory)
        paging.kernel = kernel
        rows = [paging.translate(gvas, access, cpl, ac=ac, implicit=implicit, set_ad=set_ad) for _ in range(2)]
        answers.append((kernel, *(r.tobytes() for r in rows), memory.tobytes()))
    for kernel, *answer in answers[1:]:
        assert answer == list(answers[0][1:]), f"kernel {kernel}"


@settings(max_examples=400)
@given(
    mode=st.sampled_from(sorted(MODES)),
    host=st.sampled_from(HOSTS),
    dialect=st.sampled_from(["sdm", "kvm"]),
    tables=st.lists(st.lists(gpte, min_size=1, max_size=4), min_size=16, max_size=16),
    below=st.lists(st.lists(st.one_of(gpte, ept_entry), min_size=1, max_size=3), min_size=8, max_size=8),
    pdpt=st.lists(pdpte, min_size=4, max_size=4),
    runs=trace,
    seed=st.integers(0, 9),
    access=st.sampled_from("rwx"),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([True, True, False])),
    compat=st.booleans(),
    pkru=st.integers(0, 0xFFFF),
)
def test_a_batch_is_walks_one_by_one_bit_for_bit(  # type: ignore[no-untyped-def]
    mode, host, dialect, tables, below, pdpt, runs, seed, access, flags, compat, pkru
):
    words = np.zeros((PAGES, 512), np.uint64)
    for page, values in enumerate(tables):
        entries_at(words, page, values, "32-bit" not in mode)
    for page, values in enumerate(below):
        # The topmost nested tables lead to lower ones, so that something is translated at all.
        lead = [((17 + page) << 12) | (0x67 if host == "npt" else 0x307)]
        entries_at(words, 16 + page, lead if page < 3 and host != "none" else values, True)
    if mode == "PAE":
        # Under NPT it is read at each walk, wherever the nested tables put it.
        words[:16, PDPT // 8 :] = pdpt
    cr0, cr4, efer = MODES[mode]
    compare(
        words, addresses(runs, seed), access, flags,
        lambda memory: Paging(
            cr0, PDPT if mode == "PAE" else 0, cr4, efer, GuestCpu(maxphyaddr=44), pkru=pkru, memory=memory,
            nested=second_dimension(host), dialect=dialect, compat=compat,
            pdptes=[0x1001, 0x2001, 0x3001, 0] if mode == "PAE" else None,
        ),
    )  # fmt: skip


@settings(max_examples=300)
@given(
    dialect=st.sampled_from(["sdm", "kvm"]),
    tables=st.lists(st.lists(gpte, min_size=1, max_size=4), min_size=7, max_size=7),
    pdpt=st.lists(pdpte, min_size=4, max_size=4),
    below=st.dictionaries(st.integers(0, PAGES - 1), gpte, max_size=6),
    runs=trace,
    seed=st.integers(0, 9),
    access=st.sampled_from("rwx"),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([True, True, False])),
)
def test_a_pae_guest_over_nested_tables_that_mostly_map_each_page_to_itself(  # type: ignore[no-untyped-def]
    dialect, tables, pdpt, below, runs, seed, access, flags
):
    words = np.zeros((PAGES, 512), np.uint64)
    for page in range(3):
        words[page, 0] = (page + 1) << 12 | 0x67
    words[3, :PAGES] = np.arange(PAGES, dtype=np.uint64) << np.uint64(12) | np.uint64(0x67)
    for page, entry in below.items():
        words[3, page] = entry
    for page, values in enumerate(tables):
        entries_at(words, 9 + page, values, True)
    words[8, :4] = pdpt
    compare(
        words, addresses(runs, seed), access, flags,
        lambda memory: Paging(
            *(PG_PE_WP, 0x8000, 0x20, 0x800), GuestCpu(maxphyaddr=44), memory=memory, nested=NptTables(0),
            dialect=dialect,
        ),
    )  # fmt: skip


SLICES = sorted((Path(__file__).parents[1] / "data" / "vectors").glob("*.npz"))
SHARED = sorted((Path(__file__).parents[3] / "shared" / "vectors").glob("*.npz"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dialect", ["sdm", "kvm"])
@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_every_row_of_the_vectors_agrees_as_the_first_of_a_batch(path, dialect, kernel):  # type: ignore[no-untyped-def]
    report = vectors.check(path, dialect=dialect, kernel=kernel)
    assert report.ok, "\n".join(report.disagreements)


@pytest.mark.skipif(not SHARED, reason="the full vectors are not at ../shared: only the slices were walked in batches")
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_row_of_the_shared_vectors_agrees_as_the_first_of_a_batch(kernel: int) -> None:
    for path in SHARED:
        report = vectors.check(path, kernel=kernel)
        assert report.ok, "\n".join([report.file, *report.disagreements])


def long_mode(memory: np.ndarray, **options: object) -> Paging:  # type: ignore[type-arg]
    return Paging(PG_PE_WP, 0x1000, 0x20, 0xD00, memory=memory, **options)


def four_levels(pages: int = 16, bits: int = 0x67) -> np.ndarray:  # type: ignore[type-arg]
    """Tables in pages 1 to 4; the first 512 pages of the address space map to frames 0x100 on."""
    memory = np.zeros((pages, 512), np.uint64)
    for table in (1, 2, 3):
        memory[table, 0] = (table + 1) << 12 | bits
    memory[4] = (np.arange(512, dtype=np.uint64) + np.uint64(0x100)) << np.uint64(12) | np.uint64(bits)
    return memory


def batch(paging: Paging, gvas: list[int], kernel: int, *how: object, **options: object) -> np.ndarray:  # type: ignore[type-arg]
    paging.kernel = kernel
    return paging.translate(np.array(gvas, np.uint64), *how, **options)


@pytest.mark.parametrize("kernel", KERNELS)
class TestOrder:
    def test_the_first_access_of_a_page_sees_its_bits_clear_and_the_next_sees_them_set(self, kernel: int) -> None:
        memory = four_levels(bits=7)
        gvas = [page << 12 for _ in range(4) for page in range(30)]
        rows = batch(long_mode(memory), gvas, kernel, "w", 3, set_ad=True)
        assert (rows["entry"][:30] & (A | D) == 0).all()
        assert (rows["entry"][30:] & (A | D) == A | D).all()
        assert (rows["fault"] == 0).all()

    def test_in_one_run_of_a_page_too(self, kernel: int) -> None:
        rows = batch(long_mode(four_levels(bits=7)), list(range(0x5000, 0x5100)), kernel, "r", set_ad=True)
        assert [int(e) & (A | D) for e in rows["entry"][:3]] == [0, A, A]
        assert (rows["gpa"] == np.arange(0x105000, 0x105100)).all()

    def test_a_run_of_a_page_waits_for_the_row_of_that_page_before_it(self, kernel: int) -> None:
        gvas = [0, *(page << 12 for page in range(20, 28)), 0x10, 0x20, 0x30, *(page << 12 for page in range(30, 80))]
        rows = batch(long_mode(four_levels(bits=7)), gvas, kernel, "r", set_ad=True)
        assert [int(rows["entry"][i]) & A for i in (0, 9, 10, 11)] == [0, A, A, A]

    def test_a_bit_set_for_the_guest_that_breaks_a_table_below_is_seen_by_the_next_row(self, kernel: int) -> None:
        memory = np.zeros((32, 512), np.uint64)
        memory[0, 0], memory[1, 0] = 0x1007, 0x2007
        memory[2, :2] = 0x3007, 0x4007
        pages = np.arange(16, dtype=np.uint64)
        memory[3, :16] = pages << np.uint64(12) | np.uint64(0x37)
        memory[4, :16] = (pages + np.uint64(16)) << np.uint64(12) | np.uint64(0x37)
        memory[8, 0], memory[9, 0] = 0x9067, 0xA067
        memory[10, :2] = 0xB067, 0x2067  # the second lowest guest table is the table at 0x2000 of the EPT
        memory[11, :16] = (pages << np.uint64(12)) + np.uint64(0x200067)
        gvas = [page << 12 for page in range(16)] * 3 + [0x201000] + [page << 12 for page in range(16)] * 3
        answers = []
        for how in (0, kernel):
            tables = memory.copy()
            paging = Paging(PG_PE_WP, 0x8000, 0x20, 0xD00, memory=tables, nested=EptTables(0x1E))
            rows = batch(paging, gvas, how, "r", set_ad=True)
            answers.append((rows.tobytes(), tables.tobytes()))
            assert (rows["fault"][:49] == Fault.NONE).all()
            assert (rows["fault"][49:] == Fault.EPT_MISCONFIG).all()  # A of the guest is a reserved bit below
        assert answers[0] == answers[1]

    def test_a_bit_set_in_a_pdpte_is_reserved_to_the_next_row_that_reads_it_from_memory(self, kernel: int) -> None:
        memory = np.zeros((32, 512), np.uint64)
        pages = np.arange(32, dtype=np.uint64) << np.uint64(12)
        memory[0, 0], memory[1, 0], memory[2, 0] = 0x1067, 0x2067, 0x3067
        memory[3, :32] = pages | np.uint64(0x67)
        # The lowest guest table holds the PDPT as well: its entry 256 is the first PDPTE.
        memory[9, 0], memory[10, :32] = 0xA063, pages | np.uint64(0x63)
        memory[10, 256:258] = 0x9001, 0x9001
        first = [page << 12 for page in range(30)] * 3
        gvas = [*first, 256 << 12, *first, *(gva | 1 << 30 for gva in first)]
        answers = []
        for how in (0, kernel):
            tables = memory.copy()
            paging = Paging(PG_PE_WP, 0xA800, 0x20, 0x800, memory=tables, nested=NptTables(0))
            rows = batch(paging, gvas, how, "r", set_ad=True)
            answers.append((rows.tobytes(), tables.tobytes()))
            assert (rows["fault"] == [0] * 91 + [Fault.PF] * 90 + [0] * 90).all()
            assert (rows["error_code"][91:181] == 9).all() and (rows["level"][91:181] == 3).all()
            assert (rows["gpa"][181:] == first).all()
        assert answers[0] == answers[1]

    def test_a_table_that_is_its_own_leaf_shows_the_bits_that_earlier_rows_set(self, kernel: int) -> None:
        # Entry 511 of the top table points to itself: the tables are pages of the address space.
        memory = four_levels(bits=0x27)
        memory[1, 511] = 0x1027
        own = (1 << 64) - 4096  # maps the top table itself
        pml4 = [own + 8 * i for i in range(4)]
        window = [(511 << 39 | 511 << 30 | 511 << 21) - (1 << 48) + (1 << 64)]  # maps the table at page 2
        gvas = ([page << 12 for page in range(20)] + pml4 + window) * 3
        once, again = memory.copy(), memory.copy()
        rows = batch(long_mode(once), gvas, kernel, "w", 3, set_ad=True)
        singly = batch(long_mode(again), gvas, 0, "w", 3, set_ad=True)
        assert rows.tobytes() == singly.tobytes()
        assert (once == again).all() and int(once[1, 511]) & D

    def test_rows_written_over_the_tables_are_seen_by_the_rows_after_them(self, kernel: int) -> None:
        results = []
        for how in (0, kernel):
            memory = np.zeros((64, 512), np.uint64)
            memory[:16] = four_levels()
            out = memory[4].view(np.uint8)[:4080].view(TRANSLATION)  # the lowest table itself
            paging = long_mode(memory)
            paging.kernel = how
            gvas = np.arange(85, dtype=np.uint64) << np.uint64(12)
            paging.translate_into(gvas, out, "r", 0, False, False, False)
            results.append(memory.tobytes())
        assert results[0] == results[1]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("registers", "access", "cpl", "ac", "entry", "fault"),
    [
        ((PG_PE_WP, 0x20, 0xD00), "w", 3, False, 0x65, 7),
        ((PG_PE_WP, 0x20, 0xD00), "r", 3, False, 0x63, 5),
        ((PG_PE_WP, 0x20, 0xD00), "x", 3, False, 1 << 63 | 0x67, 0x15),
        ((PG_PE_WP, 0x20, 0xD00), "w", 0, False, 0x65, 3),
        ((PG_PE_WP, 0x200020, 0xD00), "r", 0, False, 0x67, 1),
        ((PG_PE_WP, 0x200020, 0xD00), "r", 0, True, 0x67, None),
        ((PG_PE_WP, 0x100020, 0xD00), "x", 0, False, 0x67, 0x11),
        ((PG_PE_WP, 0x400020, 0xD00), "r", 3, False, 1 << 59 | 0x67, 0x25),
        ((PG_PE_WP, 0x400020, 0xD00), "r", 3, False, 2 << 59 | 0x67, None),
        ((PG_PE_WP, 0x20, 0xD00), "r", 3, False, 1 << 50 | 0x67, 0xD),
        ((PG_PE_WP, 0x20, 0xD00), "r", 3, False, 0x66, 4),
    ],
)
def test_one_odd_page_among_plain_ones_gets_its_own_answer(  # type: ignore[no-untyped-def]
    registers, access, cpl, ac, entry, fault, kernel
):
    memory = four_levels(bits=0x67 if cpl == 3 or registers[1] & 0x300000 else 0x63)
    if registers[1] & 0x300000:
        memory[4] &= ~np.uint64(4)  # supervisor pages, which SMEP and SMAP do not mind
    memory[4, 7] = 0x107000 | entry
    cr0, cr4, efer = registers
    paging = Paging(cr0, 0x1000, cr4, efer, GuestCpu(maxphyaddr=44), memory=memory, pkru=4)
    gvas = [page << 12 for page in range(40)] * 4
    rows = batch(paging, gvas, kernel, access, cpl, ac=ac)
    odd = np.arange(len(gvas)) % 40 == 7
    assert (rows["fault"][~odd] == 0).all()
    if fault is None:
        assert (rows["gpa"][odd] == 0x107000).all() and (rows["fault"][odd] == 0).all()
    else:
        assert (rows["fault"][odd] == Fault.PF).all() and (rows["error_code"][odd] == fault).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("level", [2, 3])
def test_large_pages_are_translated_beside_small_ones(kernel: int, level: int) -> None:
    memory = four_levels()
    size = 1 << 12 + 9 * (level - 1)
    memory[5 - level, 1:] = np.arange(1, 512, dtype=np.uint64) * np.uint64(size) | np.uint64(0xE7)
    random = np.random.default_rng(1).integers(0, 20 * size, 500, np.uint64)
    gvas = np.concatenate([random, np.arange(2 * size, 2 * size + (1 << 17), 64, np.uint64)])
    paging = long_mode(memory)
    paging.kernel = kernel
    rows = paging.translate(gvas, "w", 3)
    large = gvas >= size
    assert (rows["gpa"][large] == gvas[large]).all()
    assert set(rows["page_shift"][large].tolist()) == {12 + 9 * (level - 1)}
    assert large.sum() > 2000 and (~large).any()


def test_kernels_are_chosen_among_those_the_processor_has() -> None:
    paging = long_mode(four_levels())
    assert paging.kernel in (1, 2) and paging.kernel <= paging.best_kernel
    with pytest.raises(ValueError, match=r"kernel is 9; allowed are 0 \.\. "):
        paging.kernel = 9
