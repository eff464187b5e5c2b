"""Scenarios S8, S13, S14, S15 and S20: what the host's processor and an encoding make of a cached MMIO fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.constants import TABLE
from kvmmmu.paging import EptTables
from kvmmmu.sptes import SplitSpte, SpteFormat
from kvmmmu.walks import Fault, WalkResult
from machine import MMIO
from scene import FLAVOURS, FROM_CACHE, FROM_SPTE, IO, OK, SLOW_WITHOUT_SPTE, TDP, Flavour, Scene, page

flavours = pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
LEGACY = tuple(flavour for flavour in FLAVOURS if flavour.mmu != "ept")


# -- S8: the encoding of Linux 5.1 to 5.6 (commit cae7ed3c2cb0, mended by 34c0f6f2695a), beside that of today


LOW_BITS, HIGH_BITS = 9, 9  # of the generation, at entry bits 3 and 54


def spread(generation: int, shift_of_high: int) -> int:
    """Both fields of a generation; what stands in the high one is the generation shifted down by ``shift_of_high``."""
    low = generation & (1 << LOW_BITS) - 1
    high = generation >> shift_of_high & (1 << HIGH_BITS) - 1
    return low << 3 | high << 54


def gathered(spte: int) -> int:
    return (spte >> 3 & (1 << LOW_BITS) - 1) | (spte >> 54 & (1 << HIGH_BITS) - 1) << LOW_BITS


def historic(generation: int) -> int:
    """Both halves were shifted to where their field starts, so the high field repeats the low bits."""
    return spread(generation, 0)


def mended(generation: int) -> int:
    return spread(generation, LOW_BITS)


@pytest.mark.parametrize(("encode", "first_miss"), [(historic, 1), (mended, None)])
def test_s8_the_historic_encoding_gives_back_another_number_and_the_mended_one_never(
    encode: Callable[[int], int], first_miss: int | None
) -> None:
    missed = [gen for gen in range(1 << 18) if gathered(encode(gen)) != gen]
    assert (missed[0] if missed else None) == first_miss


def test_s8_a_reader_with_the_same_mistake_hides_it_until_generation_512() -> None:
    # The old reader took both fields as they were written: each repeats bits 0 to 8, so nothing above ever matches.
    def seen(spte: int) -> int:
        return (spte >> 3 & 0x1FF) | (spte >> 54 & 0x1FF)

    hits = np.array([seen(historic(gen)) == gen for gen in range(1 << 12)])
    assert hits[:512].all()
    assert not hits[512:].any()


@flavours
def test_s8_with_the_encoding_of_today_the_cache_hits_beyond_generation_512(flavour: Flavour) -> None:
    s = Scene(flavour)
    slot = s.vm.memslots.create(gpa=1 << 34, memory=page())
    for wanted in (510, 512, 514, 1 << 10, 3 << 16):
        flags = 0
        while s.vm.memslots.generation() < wanted:
            flags ^= 1
            s.vm._core.set_region(slot.id, flags, 1 << 34, None, None, 0, 0)
        s.vm._core.set_region(slot.id, 0, 1 << 34, None, None, 0, 0)
        assert s.step().outcome is IO
        generation = s.vm.memslots.generation()
        found = s.mmio_spte()
        assert found is not None and found.gen == generation
        s.another_vcpu()
        read = s.step()
        assert read.counted == FROM_SPTE
        assert read.of("check_mmio_spte") == [s.checked(generation, generation)]


# -- S13: no reserved address bit is left


@pytest.mark.parametrize("flavour", LEGACY, ids=str)
def test_s13_on_a_host_of_52_address_bits_every_mmio_access_is_slow_and_leaves_no_spte(flavour: Flavour) -> None:
    s = Scene(flavour, host=km.HostCpu(maxphyaddr=52, la57=True))
    assert not s.format.mmio_caching
    for _ in range(3):
        read = s.step()
        assert (read.outcome, read.counted) == (IO, SLOW_WITHOUT_SPTE)
        assert read.of("mark_mmio_spte", "check_mmio_spte", "handle_mmio_page_fault") == []
        assert s.spte() == 0
    s.vm.memslots.create(gpa=MMIO, memory=page())
    assert s.step().outcome is OK


@pytest.mark.parametrize("flavour", [f for f in TDP if f.mmu == "ept"], ids=str)
def test_s13_ept_marks_mmio_by_its_rights_and_needs_no_address_bit(flavour: Flavour) -> None:
    s = Scene(flavour, host=km.HostCpu(maxphyaddr=52, la57=True))
    s.step()
    assert s.mmio_spte() is not None
    assert s.step().counted == FROM_CACHE


@pytest.mark.parametrize("flavour", LEGACY, ids=str)
def test_s13_key_bits_of_the_kernel_do_not_count_but_the_processors_own_width_does(flavour: Flavour) -> None:
    s = Scene(flavour, host=km.HostCpu(maxphyaddr=52, phys_bits=46, la57=True))
    assert s.step().counted == SLOW_WITHOUT_SPTE
    s = Scene(flavour, host=km.HostCpu(maxphyaddr=51, phys_bits=46))
    s.step()
    assert s.spte() >> 51 & 1 and s.step().counted == FROM_CACHE


# -- S14: L1TF


@pytest.mark.parametrize("flavour", [f for f in FLAVOURS if f.mode.levels >= 3], ids=str)
@pytest.mark.parametrize("bits", [[39], [43], [40, 42], [39, 40, 41, 42, 43]], ids=str)
def test_s14_address_bits_that_the_flawed_cache_looks_at_move_up_by_five(flavour: Flavour, bits: list[int]) -> None:
    host = km.HostCpu(maxphyaddr=46, l1tf=True, cache_bits=44)
    gpa = 0x1234_5000 | sum(1 << bit for bit in bits)
    s = Scene(flavour, gpa=gpa, host=host, cpu=km.GuestCpu(maxphyaddr=46))
    read = s.step()
    assert (read.outcome, read.result.mmio) == (IO, ((gpa, 1),))
    spte = s.spte()
    # Bits 39 to 43 are all ones, so that the cache finds no line there; the address keeps them in 44 to 48.
    assert spte >> 39 & 0x1F == 0x1F
    assert spte >> 44 & 0x1F == gpa >> 39 & 0x1F
    found = s.mmio_spte()
    assert found is not None and found.gfn == gpa >> 12
    s.another_vcpu()
    read = s.step("r", s.gva + 8)
    assert (read.result.mmio, read.counted) == (((gpa + 8, 1),), FROM_SPTE)


# -- S15: a TDX guest, whose own mmio value is 0


GUEST_TABLES_OFF = (0, 0, 0, 0)  # CR0, CR3, CR4, EFER: a gva is a gpa
TDX_HOST = km.HostCpu(maxphyaddr=52)
TDX = SpteFormat.of(TDX_HOST, "ept", ve=True)
TDX_GPA = 0x5000


def tdx_walk(entry: int, access: str = "r", *, level: int = 1) -> WalkResult:
    """What the processor makes of one gpa, the last entry of whose EPT walk is ``entry``."""
    tables = np.zeros((5, 512), np.uint64)
    for at in range(4, level, -1):
        tables[at, 0] = (at - 1) << 12 | 7 | 1 << 63
    tables[level, TDX_GPA >> 12 if level == 1 else 0] = entry
    paging = km.Paging(*GUEST_TABLES_OFF, memory=tables.view(np.uint8).reshape(-1), nested=EptTables(0x401E, TDX_HOST))
    walk = paging.walk_result(TDX_GPA, access).second
    assert walk is not None and walk.entries[-1].value == entry
    return walk


@pytest.mark.parametrize("access", ["r", "w", "x"])
@pytest.mark.parametrize("generation", [0, 2, 4096, (1 << 19) - 2])
@pytest.mark.parametrize("gfn", [0, 0xFEE00, TDX.max_gfn])
def test_s15_an_mmio_spte_of_a_tdx_guest_tells_the_guest_and_does_not_exit(
    gfn: int, generation: int, access: str
) -> None:
    spte = TDX.mmio_encode(gfn, 7, generation)
    assert spte & (1 << 63 | 7) == 0
    assert TDX.mmio_decode(spte) == (gfn, 0, generation)
    assert TDX.raises_ve(spte)
    walk = tdx_walk(spte, access)
    assert (walk.fault, walk.convertible) == (Fault.EPT_VIOLATION, True)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["empty", "removed"])
def test_s15_an_entry_that_maps_nothing_exits_at_every_level(kind: str, level: int) -> None:
    entry = TDX.empty | (TABLE["REMOVED_SPTE"] if kind == "removed" else 0)
    assert TDX.empty == 1 << 63
    assert TDX.decode(entry, level=level).kind == kind
    assert not TDX.is_mmio(entry) and not TDX.raises_ve(entry, level=level)
    walk = tdx_walk(entry, level=level)
    assert (walk.fault, walk.convertible) == (Fault.EPT_VIOLATION, False)


def test_s15_a_page_that_forbids_an_access_exits_because_kvm_suppresses_ve_in_it() -> None:
    read_only = 1 << 63 | 1 << 11 | 0x9000 | 0x31 | 4
    assert not TDX.is_mmio(read_only) and not TDX.raises_ve(read_only)
    walk = tdx_walk(read_only, "w")
    assert (walk.fault, walk.convertible) == (Fault.EPT_VIOLATION, False)
    walk = tdx_walk(read_only & ~(1 << 63), "w")
    assert (walk.fault, walk.convertible) == (Fault.EPT_VIOLATION, True)


def test_s15_the_mmio_spte_of_other_guests_is_a_misconfiguration_and_always_exits() -> None:
    spte = SpteFormat.of(TDX_HOST, "ept").mmio_encode(0xFEE00, 7, 4)
    assert not TDX.is_mmio(spte) and not TDX.raises_ve(spte)
    walk = tdx_walk(spte)
    assert (walk.fault, walk.convertible) == (Fault.EPT_MISCONFIG, False)
    assert SpteFormat.of(TDX_HOST, "ept").empty == 0
    assert not SpteFormat.of(TDX_HOST, "ept").raises_ve(0)  # its processor has no #VE switched on


# -- S20: two halves


FORMAT = SpteFormat("shadow", maxphyaddr=40)
NEAR = FORMAT.mmio_encode(0xFEE00, 6, 3)
FAR = FORMAT.mmio_encode(0x23_4567, 6, 3)  # above 4 GiB: its high half holds address bits too
LEAF = 1 << 11 | 0x67 | 0x1234 << 12
EMULATE, RETRY, BUG = "emulate", "retry", "bug"


def verdict(spte: int, *, notice_zaps: bool = True) -> str:
    """Linux 3.1 on what the lockless walk read of a direct table after a reserved-bit fault."""
    if FORMAT.is_mmio(spte):
        return EMULATE
    if notice_zaps:
        return RETRY if FORMAT.is_being_zapped(spte) else BUG
    return RETRY if spte == 0 else BUG


def stores(*changes: tuple[str, int]) -> list[tuple[str, int, int]]:
    """The steps of several stores, one after the other."""
    trial = SplitSpte(0)
    steps = []
    for how, spte in changes:
        step, done = 0, False
        while not done:
            done = getattr(trial, how)(spte, step)
            steps.append((how, spte, step))
            step += 1
    return steps


def read_between(start: int, steps: list[tuple[str, int, int]], when: tuple[int, ...]) -> int:
    """Read while stores happen: store number i after ``when[i]`` steps of the reader."""
    entry, done, at, i = SplitSpte(start), 0, 0, 0
    while True:
        while i < len(steps) and when[i] <= done:
            how, spte, step = steps[i]
            getattr(entry, how)(spte, step)
            i += 1
        value = entry.read(at)
        done, at = done + 1, at + 1
        if value == -1:
            at = 0
        elif value is not None:
            return value


def every_read(start: int, steps: list[tuple[str, int, int]]) -> Iterator[int]:
    """What the reader may get, over every interleaving with the stores."""
    most = 4 * (len(steps) + 1)
    for when in itertools.combinations_with_replacement(range(most + 1), len(steps)):
        yield read_between(start, steps, when)


@pytest.mark.parametrize("spte", [NEAR, FAR], ids=hex)
def test_s20_a_reader_between_the_halves_of_a_cleared_mmio_spte_never_finds_a_bug(spte: int) -> None:
    found = set(every_read(spte, stores(("clear", 0))))
    torn = spte & ~0xFFFF_FFFF
    # Whole before, whole after, and the one torn value that the counter cannot tell: the low half gone already.
    assert found == {spte, torn, 0}
    assert {value: verdict(value) for value in found} == {spte: EMULATE, torn: RETRY, 0: RETRY}


@pytest.mark.parametrize("spte", [NEAR, FAR], ids=hex)
def test_s20_without_the_rule_for_entries_being_zapped_that_reader_would_find_one(spte: int) -> None:
    found = set(every_read(spte, stores(("clear", 0))))
    assert {verdict(value, notice_zaps=False) for value in found} == {EMULATE, RETRY, BUG}


@pytest.mark.parametrize("spte", [NEAR, FAR], ids=hex)
def test_s20_an_mmio_spte_being_made_is_empty_or_on_its_way_until_it_is_whole(spte: int) -> None:
    found = set(every_read(0, stores(("set", spte))))
    assert found == {0, spte & ~0xFFFF_FFFF, spte}
    assert {verdict(value) for value in found} == {RETRY, EMULATE}


@pytest.mark.parametrize(("old", "new"), [*itertools.permutations([NEAR, FAR, NEAR | 1 << 42], 2)])
def test_s20_one_mmio_spte_after_another_is_never_mixed_with_it(old: int, new: int) -> None:
    found = set(every_read(old, stores(("clear", 0), ("set", new))))
    assert {value for value in found if FORMAT.is_mmio(value)} == {old, new}
    assert BUG not in {verdict(value) for value in found}


def test_s20_a_mapping_read_in_halves_is_the_old_one_the_new_one_or_none() -> None:
    # Frames that differ above 4 GiB only: the low halves are equal, and the count of clears alone tells them apart.
    old, new = LEAF | 0x1 << 32, LEAF | 0x2 << 32
    found = set(every_read(old, stores(("clear", 0), ("set", new))))
    whole = {value for value in found if value & 1}
    assert whole == {old, new}
    steps = [step for step in stores(("clear", 0), ("set", new)) if step != ("clear", 0, 2)]
    torn = {value for value in every_read(old, steps) if value & 1} - {old, new}
    assert torn == {LEAF}  # half of one and half of none: what the count is for


def test_s20_an_entry_is_being_zapped_only_if_what_is_left_is_an_mmio_sptes() -> None:
    assert FORMAT.is_being_zapped(0)
    assert not FORMAT.is_being_zapped(LEAF & ~0xFFFF_FFFF | 1 << 33)
    assert not FORMAT.is_being_zapped(NEAR)
    assert not FORMAT.is_being_zapped(LEAF)
    assert not SpteFormat("shadow", maxphyaddr=52).is_being_zapped(1 << 40)
    with pytest.raises(OverflowError):
        FORMAT.is_being_zapped(1 << 64)
