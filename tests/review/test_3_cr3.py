"""Remark 3: loading CR3 and mmio sptes of unsync tables."""

import pytest

from kvmmmu.analysis.review import DEVICE, NEIGHBOUR, OTHER_DEVICE, ReviewGuest

PRESENT, READ_ONLY = 0x67, 0x65
MEMORY = 0x10_0000
HERE, THERE, RAM = f"device {DEVICE:#x}", f"device {OTHER_DEVICE:#x}", f"memory {MEMORY:#x}"


def reloaded(profile: str, entry: int) -> ReviewGuest:
    guest = ReviewGuest(profile)
    guest.lay(DEVICE)
    # A table that maps something else as well: one with nothing left would go as a whole.
    guest.touch(NEIGHBOUR)
    assert [guest.touch(), guest.touch()] == [HERE, HERE]
    guest.remap(entry)
    guest.reload_cr3()
    return guest


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", RAM), ("6.1", RAM)])
def test_a_device_that_became_memory(profile: str, answer: str) -> None:
    assert reloaded(profile, MEMORY | PRESENT).touch() == answer


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", "#PF 0x0"), ("6.1", "#PF 0x0")])
def test_an_entry_that_is_gone(profile: str, answer: str) -> None:
    assert reloaded(profile, 0).touch() == answer


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", THERE), ("6.1", THERE)])
def test_another_gfn(profile: str, answer: str) -> None:
    assert reloaded(profile, OTHER_DEVICE | PRESENT).touch() == answer


@pytest.mark.parametrize("profile", ["3.1", "6.1"])
def test_the_same_gfn_with_other_rights_keeps_its_spte_and_the_new_rights_hold(profile: str) -> None:
    guest = reloaded(profile, DEVICE | READ_ONLY)
    before = guest.vcpu.stats["mmio_spte_hit"]
    assert guest.touch() == HERE
    assert guest.vcpu.stats["mmio_spte_hit"] == before + 1
    result = guest.vcpu.access(0x40_0000, "w", value=1, size=8, cpl=0)
    assert (result.outcome.name, result.error_code) == ("PF", 3)


def test_a_table_that_maps_nothing_any_more_is_zapped_in_3_1_and_kept_in_6_1() -> None:
    zapped = {}
    for profile in ("3.1", "6.1"):
        guest = ReviewGuest(profile)
        guest.lay(DEVICE)
        guest.touch()
        guest.remap(0)
        before = guest.vm.stats["mmu_shadow_zapped"]
        guest.reload_cr3()
        guest.touch()
        zapped[profile] = guest.vm.stats["mmu_shadow_zapped"] - before
    assert zapped == {"3.1": 1, "6.1": 0}
