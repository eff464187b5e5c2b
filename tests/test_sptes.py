"""The codecs' face: words, shapes and refusals."""

import numpy as np
import pytest

from kvmmmu.errors import ArgumentError
from kvmmmu.sptes import SpteFormat, decode


@pytest.mark.parametrize(
    ("spte", "mmu", "level", "kind"),
    [
        (0, "shadow", 1, "empty"),
        (0x5A0, "npt", 1, "removed"),
        (0x5A0, "ept", 3, "removed"),
        (0x827, "shadow", 4, "table"),
        (0x12345E67, "shadow", 1, "leaf"),
        (0x80000000004000E7 | 1 << 11, "npt", 2, "leaf"),
        (0x00080000FEE00007, "shadow", 1, "mmio"),
        (0xFEE00006, "ept", 1, "mmio"),
        (0x1000, "shadow", 1, "not present"),
    ],
)
def test_an_spte_is_named_by_its_kind(spte: int, mmu: str, level: int, kind: str) -> None:
    words = decode(spte, mmu=mmu, level=level)  # type: ignore[arg-type]
    assert words.kind == kind
    assert kind in str(words)
    assert f"{spte:#018x}" in str(words)


def test_a_leaf_tells_its_frame_its_rights_and_its_bits() -> None:
    facts = decode(0x12345E67).facts
    assert facts["pfn"] == 0x12345
    assert facts["rights"] == "RWXU"
    assert (facts["accessed"], facts["dirty"], facts["host-writable"], facts["MMU-writable"]) == (True,) * 4
    facts = decode(0x8000000012345A05).facts
    assert facts["rights"] == "R--U"
    assert (facts["accessed"], facts["dirty"], facts["host-writable"], facts["MMU-writable"]) == (
        False,
        False,
        True,
        False,
    )


def test_an_ept_leaf_without_hardware_dirty_bits_says_so() -> None:
    present = 1 << 11
    host_writable, mmu_writable, ad_off = 1 << 57, 1 << 58, 1 << 52
    leaf = 0x5077 | present | host_writable | mmu_writable | ad_off
    words = SpteFormat("ept", ept_ad=False).decode(leaf)
    assert words.facts["rights"] == "RWX"
    assert words.facts["A/D bits"] == "off"
    assert words.facts["memory type"] == "WB, PAT ignored"
    assert "dirty" not in words.facts
    tracked = SpteFormat("ept", ept_ad=False).decode(0x5000 | 0x70 | present | ad_off | 1 << 54 | 1 << 56)
    assert tracked.facts["access-tracked, saved"] == "RX"


def test_an_mmio_spte_tells_gfn_access_and_generation() -> None:
    spte = SpteFormat().mmio_encode(0xFEE00, 6, 300)
    assert decode(spte).facts == {"gfn": 0xFEE00, "gpa": 0xFEE00000, "access": "-WU", "generation": 300}


def test_the_same_word_means_different_things_to_different_hosts() -> None:
    spte = SpteFormat("ept").mmio_encode(0xFEE00, 0, 1)
    assert decode(spte, mmu="ept").kind == "mmio"
    assert decode(spte, mmu="shadow").kind == "not present"


def test_integers_give_integers_and_arrays_give_arrays_of_the_broadcast_shape() -> None:
    form = SpteFormat()
    assert type(form.mmio_encode(np.uint64(1), 0, True)) is int
    assert form.mmio_encode([1, 2, 3], [[0], [1]], 0).shape == (2, 3)
    assert form.mmio_encode([], 0, 0).shape == (0,)
    assert form.mmio_decode(form.mmio_encode([[1, 2]], 0, 0)).gfn.shape == (1, 2)
    assert form.is_mmio([0, 1]).tolist() == [False, False]


def test_every_second_element_of_an_array_is_read_as_such() -> None:
    gfns = np.arange(10, dtype=np.uint64)[::2]
    form = SpteFormat()
    assert form.mmio_decode(form.mmio_encode(gfns, 0, 0)).gfn.tolist() == [0, 2, 4, 6, 8]
    assert form.mmio_decode(form.mmio_encode(gfns, 0, 0)[::-1]).gfn.tolist() == [8, 6, 4, 2, 0]


@pytest.mark.parametrize("bad", [-1, 2**64, [-1], [2**64], np.array([-5], np.int8)])
def test_numbers_that_are_no_64_bit_words_overflow_by_name(bad: object) -> None:
    form = SpteFormat()
    with pytest.raises(OverflowError, match="spte"):
        form.mmio_decode(bad)  # type: ignore[arg-type]
    with pytest.raises(OverflowError, match="gen"):
        form.mmio_encode(0, 0, bad)  # type: ignore[arg-type]
    with pytest.raises(OverflowError, match="gfn"):
        form.mmio_encode(bad, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [1.5, [1.5], ["1"], None, np.array([True])])
def test_what_is_no_integer_is_refused_by_name(bad: object) -> None:
    with pytest.raises((ArgumentError, TypeError), match="gfn"):
        SpteFormat().mmio_encode(bad, [0], 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mmu": "tdp"}, "mmu"),
        ({"maxphyaddr": 31}, "maxphyaddr"),
        ({"maxphyaddr": 53}, "maxphyaddr"),
        ({"maxphyaddr": 40, "phys_bits": 41}, "phys_bits"),
        ({"cache_bits": 60}, "cache_bits"),
    ],
)
def test_a_host_that_cannot_be_is_refused_by_name(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        SpteFormat(**arguments)  # type: ignore[arg-type]


def test_access_and_level_and_shapes_have_ranges() -> None:
    form = SpteFormat()
    with pytest.raises(ArgumentError, match="access"):
        form.mmio_encode(0, 8, 0)
    with pytest.raises(ArgumentError, match="access"):
        form.mmio_encode([0], 8, 0)
    with pytest.raises(ArgumentError, match="broadcast"):
        form.mmio_encode([0, 1], [1, 2, 3], 0)
    for level in (0, 6):
        with pytest.raises(ArgumentError, match="level"):
            form.decode(0, level=level)
