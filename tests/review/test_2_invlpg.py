"""Remark 2: INVLPG and mmio sptes under shadow paging."""

import pytest

from kvmmmu.analysis.review import DEVICE, GVA, OTHER_DEVICE, ReviewGuest

PRESENT = 0x67
MEMORY = 0x10_0000
HERE, THERE, RAM = f"device {DEVICE:#x}", f"device {OTHER_DEVICE:#x}", f"memory {MEMORY:#x}"
PROFILES = ("seed", "3.1", "6.1")


def remapped(profile: str, entry: int) -> ReviewGuest:
    guest = ReviewGuest(profile)
    guest.lay(DEVICE)
    assert [guest.touch(), guest.touch()] == [HERE, HERE]
    guest.remap(entry)
    return guest


def mmio_sptes(guest: ReviewGuest) -> list[int]:
    """gvas that an mmio spte stands for."""
    return [e.address for page in guest.vm.page_tables(guest.vcpu).pages for e in page.entries if e.kind == "mmio"]


@pytest.mark.parametrize("profile", PROFILES)
def test_without_invlpg_a_remapped_device_stays_one(profile: str) -> None:
    assert remapped(profile, MEMORY | PRESENT).touch() == HERE


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", RAM), ("6.1", RAM)])
def test_invlpg_makes_a_remapped_device_memory(profile: str, answer: str) -> None:
    guest = remapped(profile, MEMORY | PRESENT)
    guest.vcpu.invlpg(GVA)
    assert guest.touch() == answer


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", THERE), ("6.1", THERE)])
def test_invlpg_makes_a_remapped_device_another_device(profile: str, answer: str) -> None:
    guest = remapped(profile, OTHER_DEVICE | PRESENT)
    guest.vcpu.invlpg(GVA)
    assert guest.touch() == answer


def test_the_new_device_has_its_spte_at_once_in_3_1_and_at_the_next_fault_in_6_1() -> None:
    found = {}
    for profile in ("3.1", "6.1"):
        guest = remapped(profile, OTHER_DEVICE | PRESENT)
        guest.vcpu.invlpg(GVA)
        found[profile] = mmio_sptes(guest)
    assert found == {"3.1": [GVA], "6.1": []}


def test_a_table_in_sync_is_left_alone_for_its_spte_cannot_be_stale() -> None:
    for profile in ("3.1", "6.1"):
        guest = ReviewGuest(profile)
        guest.lay(DEVICE)
        guest.touch()
        guest.vcpu.invlpg(GVA)
        assert mmio_sptes(guest) == [GVA]


@pytest.mark.parametrize("profile", PROFILES)
def test_invlpg_of_another_page_keeps_the_record_and_of_the_same_page_empties_it(profile: str) -> None:
    guest = ReviewGuest(profile)
    guest.lay(DEVICE)
    guest.touch()
    for gva, name in ((GVA + 4096, "mmio_cache_hit"), (GVA, "mmio_spte_hit")):
        guest.vcpu.invlpg(gva)
        before = guest.vcpu.stats[name]
        assert guest.touch() == HERE
        assert guest.vcpu.stats[name] == before + 1
