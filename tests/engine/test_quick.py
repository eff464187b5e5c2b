"""The quick walk against the proper one: the same answer wherever it gives one, in every format."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmmu import EptTables, GuestCpu, HostCpu, NptTables, Paging
from kvmmmu.walks import Fault

PG_PE_WP = 0x80010001
PAGES = 24
# (cr0, cr4, efer): 32-bit with PSE, PAE, 4 levels, 5 levels.
MODES = {
    "32-bit": (PG_PE_WP, 0x10, 0),
    "PAE": (PG_PE_WP, 0x20, 0x800),
    "4-level": (PG_PE_WP, 0x20, 0xD00),
    "5-level": (PG_PE_WP, 0x1020, 0xD00),
    "4-level, SMEP, SMAP, PKE": (PG_PE_WP, 0x720020, 0xD00),
}
HOSTS = [None, "ept", "ept with A/D", "npt"]

# Entries that mostly lead on: present, often with every right and A/D set, inside the memory at hand.
rights = st.sampled_from([0x67, 0x67, 0x67, 0x27, 0x07, 0x63, 0x65, 0x66, 0xE7, 0x1E7])
extras = st.sampled_from([0, 0, 0, 0, 1 << 63, 1 << 51, 1 << 45, 1 << 59, 1 << 13])
gpte = st.builds(lambda page, low, high: page << 12 | low | high, st.integers(0, PAGES - 1), rights, extras)
ept_low = st.sampled_from([0x37, 0x337, 0x337, 0x337, 0x137, 0x31, 0x335, 0x3B7, 0x36, 0])
ept_entry = st.builds(lambda page, low: page << 12 | low, st.integers(0, PAGES - 1), ept_low)


def entries_at(words: np.ndarray, page: int, values: list[int], wide: bool) -> None:  # type: ignore[type-arg]
    """Fill a table page with a few values, over and over."""
    if wide:
        words[page] = np.resize(np.array(values, np.uint64), 512)
    else:
        words[page].view(np.uint32)[:] = np.resize(np.array([value & 0xFFFFFFFF for value in values], np.uint32), 1024)


def nested_tables(host: str | None) -> EptTables | NptTables | None:
    cpu = HostCpu(maxphyaddr=46)
    if host is None:
        return None
    if host == "npt":
        return NptTables(0x10000, cpu=cpu)
    return EptTables(0x1001E | (0x40 if host == "ept with A/D" else 0), cpu=cpu)


@settings(max_examples=150)
@given(
    mode=st.sampled_from(sorted(MODES)),
    host=st.sampled_from(HOSTS),
    tables=st.lists(st.lists(gpte, min_size=1, max_size=3), min_size=16, max_size=16),
    below=st.lists(st.lists(st.one_of(gpte, ept_entry), min_size=1, max_size=2), min_size=8, max_size=8),
    gvas=st.lists(st.integers(0, (1 << 64) - 1) | st.integers(0, (1 << 47) - 1), min_size=8, max_size=8),
    access=st.sampled_from("rwx"),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    pkru=st.integers(0, 0xFFFF),
)
def test_a_batch_is_walks_one_by_one(mode, host, tables, below, gvas, access, flags, pkru):  # type: ignore[no-untyped-def]
    words = np.zeros((PAGES, 512), np.uint64)
    for page, values in enumerate(tables):
        entries_at(words, page, values, mode != "32-bit")
    for page, values in enumerate(below):
        # The topmost nested tables lead to lower ones, so that something is translated at all.
        lead = [((17 + page) << 12) | (0x67 if host == "npt" else 0x307)]
        entries_at(words, 16 + page, lead if page < 3 else values, True)
    words[0, :4] = [1 << 12 | 1, 2 << 12 | 1, 3 << 12 | 1, 0] if mode == "PAE" else words[0, :4]
    cr0, cr4, efer = MODES[mode]
    once, again = words.copy(), words.copy()
    cpu = GuestCpu(maxphyaddr=44)
    nested = nested_tables(host)
    pdptes = [0x1001, 0x2001, 0x3001, 0] if mode == "PAE" and host != "npt" else None
    batch = Paging(cr0, 0, cr4, efer, cpu, pkru=pkru, memory=once, nested=nested, pdptes=pdptes)
    single = Paging(cr0, 0, cr4, efer, cpu, pkru=pkru, memory=again, nested=nested, pdptes=pdptes)
    cpl, ac, implicit, set_ad = 3 * flags[0], flags[1], flags[2], flags[3]
    # Twice: the second time nothing is left to set, and the quick walk answers.
    for _ in range(2):
        rows = batch.translate(gvas, access, cpl, ac=ac, implicit=implicit, set_ad=set_ad)
        for gva, row in zip(gvas, rows, strict=True):
            result = single.walk_result(gva, access, cpl, ac=ac, implicit=implicit, set_ad=set_ad)
            assert (row["fault"], row["error_code"]) == (result.fault, result.error_code)
            if result.fault is Fault.NONE:
                gpa = (result.second or result).gpa
                assert (row["gpa"], row["page_shift"]) == (gpa, result.page_shift)
                # A walk that sets bits may set them in the tables it used: the next one may end elsewhere.
                assert set_ad or single.walk_for(gva, access, cpl, ac=ac, implicit=implicit) == gpa
                assert row["access"] == result.rights
                assert (row["level"], row["entry"]) == (result.entries[-1].level, result.entries[-1].value)
            else:
                assert set_ad or single.walk_for(gva, access, cpl, ac=ac, implicit=implicit) == -1
        assert np.array_equal(once, again)
        # The same once more by the walk that single calls have to themselves.
        for gva, row in zip(gvas, single.translate(gvas), strict=True):
            one = single.translate_one(gva)
            fields = (one.gva, one.gpa or 0, one.error_code, one.fault_gpa, one.entry, one.fault, one.page_shift)
            assert (*fields, one.rights, one.level) == row.item()
            assert single.walk(gva) == (-1 if one.gpa is None else one.gpa)


@pytest.mark.parametrize("mode", ["PAE", "4-level", "5-level"])
def test_most_walks_of_sound_tables_end_well(mode: str) -> None:
    """The property above means something: sound tables do translate, in each mode."""
    words = np.zeros((PAGES, 512), np.uint64)
    for page in range(1, 6):
        words[page] = (page + 1) << 12 | 0x67
    cr0, cr4, efer = MODES[mode]
    pdptes = [0x2001] * 4 if mode == "PAE" else None
    paging = Paging(cr0, 0x1000, cr4, efer, memory=words, pdptes=pdptes)
    rows = paging.translate(np.arange(64, dtype=np.uint64) << np.uint64(12), "w", 3)
    assert (rows["fault"] == Fault.NONE).all()
