"""Reserved bits of KVM's own tables, as the processor that reads them sees them, against the manuals' tables."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmmu.errors import ArgumentError
from kvmmmu.sptes import SpteFormat

ENTRY = st.integers(0, 2**64 - 1) | st.builds(
    lambda bits: sum(1 << b for b in bits), st.sets(st.integers(0, 63), max_size=6)
)


def ordinary_reserved(entry: int, level: int, maxphyaddr: int, gbpages: bool) -> bool:
    """SDM vol. 3A tables 4-14 to 4-20, EFER.NXE = 1, bit by bit."""
    if not entry & 1:
        return False
    bits = {bit for bit in range(64) if entry >> bit & 1}
    reserved = set(range(maxphyaddr, 52))
    if level >= 4 or (level == 3 and not gbpages):
        reserved.add(7)
    elif 7 in bits and level > 1:
        reserved |= set(range(13, 12 + 9 * (level - 1)))
    return bool(bits & reserved)


def ept_misconfigured(entry: int, level: int, maxphyaddr: int, exec_only: bool, leaf_2m: bool, leaf_1g: bool) -> bool:
    """SDM vol. 3C section 29.3.3.1, bit by bit."""
    read, write, execute = entry & 1, entry >> 1 & 1, entry >> 2 & 1
    if not (read or write or execute):
        return False
    if write and not read:
        return True
    if execute and not read and not write and not exec_only:
        return True
    bits = {bit for bit in range(64) if entry >> bit & 1}
    if bits & set(range(maxphyaddr, 52)):
        return True
    large = 7 in bits
    if level == 1 or (level == 2 and large and leaf_2m) or (level == 3 and large and leaf_1g):
        memory_type = entry >> 3 & 7
        return memory_type in (2, 3, 7) or bool(level > 1 and bits & set(range(12, 12 + 9 * (level - 1))))
    return bool(bits & {3, 4, 5, 6, 7})


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
@given(entry=ENTRY, level=st.integers(1, 5), maxphyaddr=st.integers(36, 52), gbpages=st.booleans())
def test_ordinary_tables_reserve_what_the_manual_reserves(
    mmu: str, entry: int, level: int, maxphyaddr: int, gbpages: bool
) -> None:
    form = SpteFormat(mmu, maxphyaddr=maxphyaddr, gbpages=gbpages)  # type: ignore[arg-type]
    for word in (entry, entry | 1):
        expected = ordinary_reserved(word, level, maxphyaddr, gbpages)
        assert form.is_reserved(word, level=level) == expected
        assert form.is_reserved(np.array([word], np.uint64), level=level).tolist() == [expected]  # type: ignore[union-attr]


@given(
    entry=ENTRY, level=st.integers(1, 5), maxphyaddr=st.integers(36, 52), capabilities=st.tuples(*[st.booleans()] * 3)
)
def test_ept_entries_are_misconfigured_as_the_manual_says(
    entry: int, level: int, maxphyaddr: int, capabilities: tuple[bool, bool, bool]
) -> None:
    exec_only, leaf_2m, leaf_1g = capabilities
    form = SpteFormat("ept", maxphyaddr=maxphyaddr, ept_exec_only=exec_only, ept_2m=leaf_2m, ept_1g=leaf_1g)
    for word in (entry, entry | 1, entry | 7):
        expected = ept_misconfigured(word, level, maxphyaddr, *capabilities)
        assert form.is_reserved(word, level=level) == expected
        assert form.is_reserved(np.array([word], np.uint64), level=level).tolist() == [expected]  # type: ignore[union-attr]


@pytest.mark.parametrize("mmu", ["shadow", "npt", "ept"])
@pytest.mark.parametrize("maxphyaddr", [36, 46, 51, 52])
def test_every_mmio_spte_faults_with_reserved_bits(mmu: str, maxphyaddr: int) -> None:
    form = SpteFormat(mmu, maxphyaddr=maxphyaddr)  # type: ignore[arg-type]
    if not form.mmio_caching:
        assert (mmu, maxphyaddr) in (("shadow", 52), ("npt", 52))
        return
    gfns = np.arange(0, form.max_gfn, max(1, form.max_gfn // 999), dtype=np.uint64)
    for gen in (0, 1, 2**19 - 1):
        assert form.is_reserved(form.mmio_encode(gfns, 7, gen)).all()  # type: ignore[union-attr]


def test_what_kvm_writes_as_a_mapping_has_no_reserved_bits() -> None:
    assert not SpteFormat("shadow").is_reserved(0x827, level=4)
    assert not SpteFormat("npt").is_reserved(0x80000000004008E7, level=2)
    assert not SpteFormat("ept").is_reserved(0x907, level=4)
    assert not SpteFormat("ept").is_reserved(0x5F7, level=1)


def test_a_level_that_no_table_has_is_refused() -> None:
    for level in (0, 6):
        with pytest.raises(ArgumentError, match="level"):
            SpteFormat().is_reserved(1, level=level)
        with pytest.raises(ArgumentError, match="level"):
            SpteFormat().is_reserved([1], level=level)


def test_decode_names_the_reserved_bits() -> None:
    words = SpteFormat("shadow", maxphyaddr=46).decode(1 << 50 | 0x827, level=2)
    assert words.facts["reserved bits"] == hex(1 << 50)
