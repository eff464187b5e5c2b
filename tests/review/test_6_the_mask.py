"""Remark 6: what a reserved-bit fault without an mmio spte is, and where the mail's constant mask breaks."""

import numpy as np
import pytest

from kvmmmu import VM, Behaviour
from kvmmmu.analysis.review import DEVICE, GVA, OTHER_DEVICE, ReviewGuest
from kvmmmu.cpu import GuestCpu, HostCpu

HIGH = 1 << 49 | DEVICE


def mmio_sptes(guest: ReviewGuest) -> list[int]:
    return [e.spte for page in guest.vm.page_tables(guest.vcpu).pages for e in page.entries if e.kind == "mmio"]


def test_as_merged_the_mask_begins_at_the_hosts_own_address_width() -> None:
    guest = ReviewGuest("3.1", host=HostCpu(maxphyaddr=40))
    guest.lay(DEVICE)
    guest.touch()
    assert mmio_sptes(guest) == [0x7FFF_FF00_0000_0001 | DEVICE | 6]


def test_as_mailed_it_is_bits_49_to_56_and_bit_0_on_every_host() -> None:
    for width in (40, 46):
        guest = ReviewGuest("seed", host=HostCpu(maxphyaddr=width))
        guest.lay(DEVICE)
        guest.touch()
        assert mmio_sptes(guest) == [0x01FE_0000_0000_0001 | DEVICE | 6]


@pytest.mark.parametrize(("profile", "served"), [("seed", "hardware"), ("3.1", "mmio_slow"), ("6.1", "mmio_slow")])
def test_on_a_host_with_52_address_bits_nothing_of_the_constant_mask_is_reserved(profile: str, served: str) -> None:
    guest = ReviewGuest(profile, host=HostCpu(maxphyaddr=52))
    guest.lay(DEVICE)
    guest.touch()
    before = dict(guest.vcpu.stats)
    answer = guest.touch()
    if served == "hardware":
        # The processor takes the entry for a mapping: the load ends somewhere in the host, and KVM never hears of it.
        assert not answer.startswith("device")
        assert guest.vcpu.stats == before
    else:
        assert answer == f"device {DEVICE:#x}"
        assert guest.vcpu.stats[served] == before[served] + 1


@pytest.mark.parametrize(("profile", "second"), [("seed", DEVICE), ("3.1", HIGH), ("6.1", HIGH)])
def test_a_device_whose_address_overlaps_the_constant_mask_loses_those_bits(profile: str, second: int) -> None:
    guest = ReviewGuest(profile, host=HostCpu(maxphyaddr=51), cpu=GuestCpu(maxphyaddr=51))
    guest.lay(HIGH)
    guest.lay(OTHER_DEVICE, GVA + 4096)
    assert guest.touch() == f"device {HIGH:#x}"
    assert guest.touch(GVA + 4096) == f"device {OTHER_DEVICE:#x}"
    # The record is the other page's now: this one is served by its spte.
    assert guest.touch() == f"device {second:#x}"


@pytest.mark.parametrize(("profile", "value"), [("3.1", 0x01FE_0000_0000_0006), ("6.1", 6)])
def test_under_ept_write_and_execute_without_read_are_misconfigured(profile: str, value: int) -> None:
    vm = VM("ept", behaviour=Behaviour(profile, tdp_mmu=False), host=HostCpu(maxphyaddr=40))
    ram = np.zeros(1 << 16, np.uint8)
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    assert vcpu.access(DEVICE, "r").outcome.name == "MMIO"
    (spte,) = (e.spte for page in vm.page_tables(vcpu).pages for e in page.entries if e.kind == "mmio")
    generation = 0x7FF << 52 | 0xFF << 3 if profile == "6.1" else 0
    assert spte & ~generation == value | DEVICE
