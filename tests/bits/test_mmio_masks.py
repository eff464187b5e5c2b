"""Value, mask and access mask of mmio sptes: hosts that encrypt memory, masks set by hand, TDX guests."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError
from kvmmmu.sptes import Mmu, SpteFormat

P, W, U = 1, 2, 4
BIT63 = 1 << 63


def bits(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


# -- a host that encrypts memory


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
@pytest.mark.parametrize(
    ("maxphyaddr", "phys_bits", "c_bit", "lowest"),
    [(48, 43, 47, 43), (48, 47, 47, 48), (52, 47, 51, 47), (52, 51, 51, None), (52, 50, 50, 51), (52, 52, 51, None)],
)
def test_with_encryption_every_bit_from_the_reduced_width_up_marks_mmio_but_a_c_bit_that_stands_lowest(
    mmu: Mmu, maxphyaddr: int, phys_bits: int, c_bit: int, lowest: int | None
) -> None:
    form = SpteFormat(mmu, maxphyaddr=maxphyaddr, phys_bits=phys_bits, c_bit=c_bit)
    wanted = 0 if lowest is None else bits(51, lowest) | P
    assert (form.masks["mmio_value"], form.masks["mmio_mask"]) == (wanted, wanted)
    assert form.masks["mmio_access"] == W | U
    assert form.mmio_caching == (lowest is not None)
    if lowest is not None:
        spte = form.mmio_encode(form.max_gfn, W, 12345)
        assert form.mmio_decode(spte) == (form.max_gfn, W, 12345)
        assert form.is_reserved(spte) and form.mmio_faults


def test_ept_does_not_look_at_a_c_bit_and_no_caching_stays_no_caching() -> None:
    assert SpteFormat("ept", c_bit=47).masks == SpteFormat("ept").masks
    assert not SpteFormat("npt", maxphyaddr=48, phys_bits=43, c_bit=47, mmio_caching=False).mmio_caching


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
@pytest.mark.parametrize(("phys_bits", "cached"), [(47, True), (51, False)])
def test_a_machine_on_an_encrypting_host_of_52_bits_caches_mmio_only_if_a_bit_is_left(
    mmu: str, phys_bits: int, cached: bool
) -> None:
    host = km.HostCpu(maxphyaddr=52, phys_bits=phys_bits, c_bit=51, vendor="amd")
    counted = mmio_twice(host, mmu)
    assert counted == {"made": int(cached), "from_spte": int(cached)}


def mmio_twice(host: km.HostCpu, mmu: str) -> dict[str, int]:
    """Read one device address by two vCPUs: sptes made, and accesses served by one."""
    with km.VM(mmu=mmu, host=host) as vm:
        vm.memslots.create(gpa=0, memory=np.zeros(1 << 20, np.uint8))
        for _ in range(2):
            vcpu = vm.create_vcpu()
            assert vcpu.access(0xFEE000F0, "r", size=4).outcome is km.Outcome.MMIO
        assert not vm.check()
        return {"made": vm.stats["pf_mmio_spte_created"], "from_spte": vm.stats["mmio_spte_hit"]}


# -- masks set by hand


LOW = bits(45, 12)  # of the address, on a host of 46 bits without the L1TF flaw
GOOD = (1 << 51 | P, 1 << 51 | P, W | U)


@pytest.mark.parametrize(
    ("rule", "masks"),
    [
        ("the access mask fits 32 bits", (GOOD[0], GOOD[1], 1 << 32 | W | U)),
        ("the mask leaves the generation alone", (GOOD[0], GOOD[1] | 1 << 52, W | U)),
        ("the mask leaves bit 11 alone", (GOOD[0], GOOD[1] | 1 << 11, W | U)),
        ("the mask leaves bit 3 alone", (GOOD[0], GOOD[1] | 1 << 3, W | U)),
        ("the value is clear of the address", (GOOD[0] | 1 << 45, GOOD[1] | 1 << 45, W | U)),
        ("the value is within the mask", (GOOD[0], 1 << 51, W | U)),
        ("0 is no value: an entry being torn down has it too", (0, GOOD[1], W | U)),
    ],
)
def test_masks_that_break_a_rule_leave_the_host_without_mmio_sptes(rule: str, masks: tuple[int, int, int]) -> None:
    form = SpteFormat("shadow", mmio_masks=masks)
    assert (form.mmio_caching, form.masks["mmio_value"]) == (False, 0), rule
    with pytest.raises(ArgumentError, match="masks refused"):
        form.mmio_encode(0xFEE00, 6, 1)
    assert mmio_twice(km.HostCpu(mmio_masks=masks), "npt") == {"made": 0, "from_spte": 0}


@pytest.mark.parametrize(
    "masks",
    [GOOD, (1 << 46 | P, bits(51, 46) | P, W), (1 << 51 | P, BIT63 | bits(51, 46) | 7, 0)],
    ids=["as the host would", "lowest bit, W kept", "the widest mask, nothing kept"],
)
def test_masks_within_the_rules_are_taken_as_they_are(masks: tuple[int, int, int]) -> None:
    form = SpteFormat("npt", mmio_masks=masks)
    assert tuple(form.masks[name] for name in ("mmio_value", "mmio_mask", "mmio_access")) == masks
    spte = form.mmio_encode(0x3_FFFF_FFFF, W, 7)
    assert spte & masks[0] == masks[0]
    assert form.mmio_decode(spte) == (0x3_FFFF_FFFF, W & masks[2], 7)
    assert mmio_twice(km.HostCpu(mmio_masks=masks), "npt") == {"made": 1, "from_spte": 1}


def test_the_value_keeps_off_both_places_of_an_address_that_moved_for_l1tf() -> None:
    # Bits 39 to 43 are kept all ones; what stood there moves to 44 to 48.
    for bit, taken in ((38, False), (43, True), (44, False), (48, False), (49, True)):
        value = 1 << bit | P
        form = SpteFormat("shadow", l1tf=True, cache_bits=44, mmio_masks=(value, value, W | U))
        assert form.mmio_caching is taken, bit


@pytest.mark.parametrize(
    ("mmu", "masks"),
    [
        ("npt", (P, P, 6)),  # a mapping
        ("npt", (BIT63, BIT63, 6)),  # what every page that is not executable has
        ("ept", (6, 6, 0)),  # a writable page looks like it
        ("ept", (6, 7, 7)),  # with U kept it may be a mapping
    ],
)
def test_a_machine_refuses_masks_whose_entries_would_not_fault_though_kvm_takes_them(
    mmu: Mmu, masks: tuple[int, int, int]
) -> None:
    assert SpteFormat(mmu, mmio_masks=masks).mmio_caching
    with pytest.raises(ArgumentError, match="would not fault"):
        km.VM(mmu=mmu, host=km.HostCpu(mmio_masks=masks))


def test_a_host_names_what_it_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="c_bit is 47; vendor 'intel'"):
        km.HostCpu(c_bit=47)
    with pytest.raises(ArgumentError, match=r"c_bit is 52; allowed are 32 \.\. 51"):
        km.HostCpu(c_bit=52, vendor="amd")
    with pytest.raises(ArgumentError, match="has 2 words"):
        km.HostCpu(mmio_masks=(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="mmio_masks is -1"):
        km.HostCpu(mmio_masks=(-1, 0, 0))
    with pytest.raises(ArgumentError, match="ve is True"):
        SpteFormat("npt", ve=True)
