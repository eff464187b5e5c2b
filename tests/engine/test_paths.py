"""Paths that single reads remember: every read answers as if nothing were remembered, whatever was stored between."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmmu import GuestCpu, Paging

PAGES = 12
# (cr0, cr3, cr4, efer).
MODES = {
    "4-level": (0x80010001, 0, 0x20, 0xD00),
    "5-level": (0x80010001, 0, 0x1020, 0xD00),
    "4-level, PKE": (0x80010001, 0, 0x400020, 0xD00),
    "PAE": (0x80010001, 0, 0x20, 0x800),
    "32-bit": (0x80010001, 0, 0x10, 0),
}
low = st.sampled_from([0x67, 0x67, 0x67, 0x27, 0x07, 0x63, 0x66, 0xE7, 0xE7, 0x1E7])
high = st.sampled_from([0, 0, 0, 0, 0, 1 << 63, 1 << 51, 1 << 59])
entries = st.builds(lambda page, low, high: page << 12 | low | high, st.integers(0, PAGES - 1), low, high)
places = st.tuples(st.integers(0, PAGES - 1), st.integers(0, 3))
# Few tables, few entries of each, so that addresses share paths and come again.
addresses = st.builds(
    lambda indexes, offset: sum(at << 12 + 9 * n for n, at in enumerate(indexes)) | offset,
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.integers(0, 4095),
)


def canonical(gva: int, bits: int) -> int:
    return gva | (-1 << bits & (1 << 64) - 1) if gva >> bits - 1 & 1 else gva & (1 << bits) - 1


def answers(paging: Paging, gva: int) -> None:
    """Both calls that remember, against the walk that keeps a record and against a batch's row."""
    result = paging.walk_result(gva)
    row = paging.translate([gva])[0]
    one = paging.translate_one(gva)
    assert paging.walk(gva) == (-1 if result.fault else result.gpa)
    fields = (one.gva, one.gpa or 0, one.error_code, one.fault_gpa, one.entry, one.fault, one.page_shift)
    assert (*fields, one.rights, one.level) == row.item()
    assert row["fault"] == result.fault


@settings(max_examples=200)
@given(
    mode=st.sampled_from(sorted(MODES)),
    tables=st.lists(st.lists(entries, min_size=4, max_size=4), min_size=PAGES, max_size=PAGES),
    gvas=st.lists(addresses, min_size=1, max_size=6),
    stores=st.lists(st.tuples(places, entries), max_size=8),
    pkru=st.sampled_from([0, 0xC, 0x5555]),
)
def test_a_read_sees_every_store_made_before_it(mode, tables, gvas, stores, pkru):  # type: ignore[no-untyped-def]
    words = np.zeros((PAGES, 512), np.uint64)
    words[:, :4] = tables
    cr0, cr3, cr4, efer = MODES[mode]
    pdptes = [1 << 12 | 1] * 4 if mode == "PAE" else None
    paging = Paging(cr0, cr3, cr4, efer, GuestCpu(maxphyaddr=44), pkru=pkru, memory=words, pdptes=pdptes)
    bits = 57 if mode == "5-level" else 48 if efer & 0x100 else 32
    gvas = [canonical(gva, bits) if bits > 32 else gva & 0xFFFFFFFF for gva in gvas]
    for (page, at), entry in [((0, 0), tables[0][0]), *stores]:
        words[page, at] = entry
        # The second read of 2 MiB makes its path, the third takes it.
        for gva in gvas * 3:
            answers(paging, gva)


# (table, its entry, what it becomes): where 0x3123 goes then.
STORES = {
    "PML4E gone": (1, 0, 0, -1),
    "PDPTE gone": (2, 0, 0, -1),
    "PDPTE a 1 GiB page": (2, 0, 0x40000000 | 0xE7, 0x40003123),
    "PDE gone": (3, 0, 0, -1),
    "PDE of another table": (3, 0, 5 << 12 | 0x67, 0x7123),
    "PDE a 2 MiB page": (3, 0, 0x400000 | 0xE7, 0x403123),
    "PTE gone": (4, 3, 0, -1),
    "PTE of another frame": (4, 3, 6 << 12 | 0x67, 0x6123),
    "PTE with a reserved bit": (4, 3, 3 << 12 | 0x67 | 1 << 51, -1),
}


@pytest.mark.parametrize("store", sorted(STORES))
def test_a_path_ends_with_any_of_its_entries(store: str) -> None:
    """A path in use, and one store to a level of it: the next read, and those after it, follow it; back again too."""
    table, at, entry, gpa = STORES[store]
    words = np.zeros((8, 512), np.uint64)
    for number in (1, 2, 3):
        words[number, 0] = (number + 1) << 12 | 0x67
    words[4] = np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(0x67)
    words[5] = np.uint64(7 << 12 | 0x67)
    paging = Paging(0x80010001, 0x1000, 0x20, 0xD00, GuestCpu(maxphyaddr=44), memory=words)
    before = int(words[table, at])
    for value, goes in ((before, 0x3123), (entry, gpa), (before, 0x3123)):
        words[table, at] = value
        assert [paging.walk(0x3123) for _ in range(4)] == [goes] * 4
        answers(paging, 0x3123)


def test_an_address_that_is_not_canonical_shares_no_path_with_one_that_is() -> None:
    """Bits 63:48 are part of what is compared."""
    words = np.zeros((8, 512), np.uint64)
    for table in (1, 2, 3, 4):
        words[table, 0] = (table + 1) << 12 | 0x67
    paging = Paging(0x80010001, 0x1000, 0x20, 0xD00, memory=words)
    for _ in range(3):
        assert paging.walk(0x123) == 0x5123
        assert paging.walk(1 << 63 | 0x123) == -1
        assert paging.walk(1 << 48 | 0x123) == -1
