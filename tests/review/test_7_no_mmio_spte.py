"""Remark 7: a reserved-bit fault that finds no mmio spte, as far as one vCPU can show it."""

import pytest

from kvmmmu import Behaviour
from kvmmmu.analysis.review import NEIGHBOUR, ReviewGuest

MEMORY, NX = 0x10_0000, 1 << 63
NO_NXE = 0x500


def without_nxe(profile: str | Behaviour) -> ReviewGuest:
    """A present spte with NX set, and a processor for which that bit may have become reserved."""
    guest = ReviewGuest(profile)
    guest.lay(MEMORY | NX)
    assert guest.touch() == f"memory {MEMORY:#x}"
    guest.vcpu.write_efer(NO_NXE)
    return guest


@pytest.mark.parametrize(
    ("profile", "answer"),
    [("seed", "#PF 0x9"), ("3.1", "HANG"), ("6.1", f"memory {MEMORY:#x}")],
)
def test_the_mail_goes_on_3_1_tries_again_and_6_1_never_gets_there(profile: str, answer: str) -> None:
    assert without_nxe(profile).touch() == answer


def test_two_switches_make_the_difference_each_alone() -> None:
    assert without_nxe(Behaviour("3.1", mmio_miss_faults=True)).touch() == "#PF 0x9"
    assert without_nxe(Behaviour("3.1", nx_by_guest=False)).touch() == f"memory {MEMORY:#x}"


@pytest.mark.parametrize("profile", ["seed", "3.1", "6.1"])
def test_a_remapped_page_does_fault_as_mmio_until_the_guest_flushes(profile: str) -> None:
    guest = ReviewGuest(profile)
    guest.lay(0xFE00_0000)
    guest.lay(0xFD00_0000, NEIGHBOUR)
    guest.touch()
    guest.remap(MEMORY | 0x67)
    # Another page was cached meanwhile, so it is the spte that answers.
    guest.touch(NEIGHBOUR)
    before = guest.vcpu.stats["mmio_spte_hit"]
    assert guest.touch() == "device 0xfe000000"
    assert guest.vcpu.stats["mmio_spte_hit"] == before + 1
