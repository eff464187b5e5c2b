"""The walk that single calls have to themselves: where it answers, and where it hands over."""

import inspect
import pydoc
from types import MethodDescriptorType

import numpy as np
import pytest

from kvmmmu import GuestCpu, Paging, VCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.outcome import Fault, Rights

LONG = {"cr0": 0x80010001, "cr4": 0x20, "efer": 0xD00}
LINK = 0x67


def tables(leaf: int, level: int, top: int = 4) -> np.ndarray:  # type: ignore[type-arg]
    """One path to a leaf: table n stands in page n, the topmost in page 5 or 4."""
    words = np.zeros((8, 512), np.uint64)
    for at in range(top, level, -1):
        words[at, 0] = (at - 1) << 12 | LINK
    words[level, 0] = leaf
    return words


@pytest.mark.parametrize(
    ("leaf", "level", "gva", "gpa", "shift"),
    [
        (0x5000 | LINK, 1, 0x123, 0x5123, 12),
        (0x600000 | LINK | 0x80, 2, 0x12345, 0x612345, 21),
        (0x80000000 | LINK | 0x80, 3, 0x1234567, 0x81234567, 30),
    ],
)
@pytest.mark.parametrize("top", [4, 5])
def test_a_page_of_every_size_is_found_under_four_and_five_levels(
    leaf: int, level: int, gva: int, gpa: int, shift: int, top: int
) -> None:
    registers = LONG | {"cr4": 0x1020 if top == 5 else 0x20}
    cpu = GuestCpu(maxphyaddr=46, la57=True) if top == 5 else GuestCpu(maxphyaddr=46)
    paging = Paging(**registers, cr3=top << 12, cpu=cpu, memory=tables(leaf, level, top))
    row = paging.translate_one(gva)
    assert paging.walk(gva) == row.gpa == gpa
    assert (row.ok, row.fault, row.page_shift, row.level) == (True, Fault.NONE, shift, level)
    assert (row.entry, row.rights) == (leaf, Rights.X | Rights.W | Rights.U)


def test_one_entry_without_a_right_takes_it_from_all() -> None:
    words = tables(0x5000 | LINK, 1)
    words[3, 0] = 2 << 12 | (LINK & ~2)
    words[2, 0] = 1 << 12 | LINK | 1 << 63
    paging = Paging(**LONG, cr3=0x4000, cpu=GuestCpu(maxphyaddr=46), memory=words)
    assert paging.translate_one(0).rights is Rights.U
    assert paging.walk_for(0, "w") == paging.walk_for(0, "x") == -1
    assert paging.walk_for(0, "r", 3) == 0x5000


def test_tables_in_several_areas_are_walked_all_the_same() -> None:
    words = tables(0x5000 | LINK, 1)
    areas = [(page << 12, words[page].copy()) for page in (1, 2, 3, 4)]
    paging = Paging(**LONG, cr3=0x4000, cpu=GuestCpu(maxphyaddr=46), memory=areas)
    for _ in range(3):
        assert paging.walk(0x123) == paging.translate_one(0x123).gpa == 0x5123


def test_a_fault_has_no_address_and_says_where_the_walk_ended() -> None:
    paging = Paging(**LONG, cr3=0x4000, cpu=GuestCpu(maxphyaddr=46), memory=tables(0, 2))
    row = paging.translate_one(0x1000)
    assert (row.gpa, row.fault, row.level, row.error_code, row.ok) == (None, Fault.PF, 2, 0, False)
    assert repr(row) == "TranslationRow(gva=0x1000, PF, error_code=0x0, level=2)"
    assert paging.translate_one(1 << 50).fault is Fault.GP


def test_paging_without_memory_answers_too() -> None:
    assert Paging(**LONG, cr3=0x4000).walk(0) == -1
    assert Paging(0, 0, 0, 0).translate_one(0x123).gpa == 0x123


@pytest.mark.parametrize("name", ["walk", "translate_one"])
def test_what_is_no_address_is_refused_by_name(name: str) -> None:
    call = getattr(Paging(**LONG, cr3=0x4000), name)
    for wrong in (-1, 1 << 64):
        with pytest.raises(OverflowError, match="gva"):
            call(wrong)
    with pytest.raises(TypeError, match="gva must be an integer, not str"):
        call("0")
    assert call(np.uint64(0)) is not None
    assert call((1 << 64) - 1) is not None  # the largest address there is


def test_help_and_signature_show_how_the_fast_methods_are_called() -> None:
    assert str(inspect.signature(Paging.translate_one)) == "(self, gva, /)"
    assert str(inspect.signature(Paging.walk)) == "(self, gva, /)"
    assert list(inspect.signature(Paging.walk_for).parameters)[1:4] == ["gva", "access", "cpl"]
    assert "cpl" in pydoc.render_doc(Paging.walk_for)
    with pytest.raises(ArgumentError, match="cpl is 4"):
        Paging(**LONG, cr3=0x4000).walk_for(0, "r", 4)


@pytest.mark.parametrize("method", [Paging.walk, Paging.walk_for, Paging.translate_one, VCpu.access])
def test_a_fast_method_belongs_to_the_class_it_is_called_on(method: MethodDescriptorType) -> None:
    # CPython's instruction for a call of a C method asks for exactly the class that the method was made for.
    assert isinstance(method, MethodDescriptorType)
    assert method.__objclass__ in (Paging, VCpu)
    with pytest.raises(TypeError, match="doesn't apply"):
        method(object(), 0)
