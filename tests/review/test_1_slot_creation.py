"""Remark 1: what becomes of a cached MMIO page when a memslot is created over it."""

import pytest

from kvmmmu.analysis.review import DEVICE, GVA, LowGuest, ReviewGuest
from kvmmmu.errors import MemslotError

HERE, MEMORY = f"device {DEVICE:#x}", f"memory {DEVICE:#x}"


def cached(profile: str) -> ReviewGuest:
    guest = ReviewGuest(profile)
    guest.lay(DEVICE)
    assert [guest.touch(), guest.touch()] == [HERE, HERE]
    return guest


def recreated(profile: str, base: int = DEVICE) -> ReviewGuest:
    """A slot deleted, its first page touched, and created again; ``base``: the address the deletion names."""
    guest = ReviewGuest(profile)
    guest.lay(DEVICE)
    guest.lay(DEVICE + 4096, GVA + 4096)
    guest.new_slot(1, DEVICE)
    assert guest.touch() == MEMORY
    guest.vm.memslots.set_region(1, gpa=base, size=0)
    assert guest.touch() == HERE
    guest.new_slot(1, DEVICE)
    return guest


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", MEMORY), ("6.1", MEMORY)])
def test_a_slot_of_a_fresh_id_over_a_cached_device(profile: str, answer: str) -> None:
    guest = cached(profile)
    guest.new_slot(1, DEVICE)
    assert guest.touch() == answer


def test_linux_3_1_pays_with_every_shadow_page_and_6_1_with_none() -> None:
    zapped = {}
    for profile in ("3.1", "6.1"):
        guest = cached(profile)
        before = guest.vm.stats["mmu_shadow_zapped"]
        guest.new_slot(1, DEVICE)
        zapped[profile] = guest.vm.stats["mmu_shadow_zapped"] - before
    assert zapped["3.1"] >= 4
    assert zapped["6.1"] == 0


@pytest.mark.parametrize(("profile", "answer"), [("seed", HERE), ("3.1", HERE), ("6.1", MEMORY)])
def test_a_slot_created_again_at_the_same_base(profile: str, answer: str) -> None:
    guest = recreated(profile)
    assert guest.touch() == answer


def test_in_3_1_such_a_slot_is_a_mixture_of_memory_and_device() -> None:
    guest = recreated("3.1")
    assert guest.touch(GVA + 4096) == f"memory {DEVICE + 4096:#x}"


def test_in_3_1_the_address_that_the_deletion_names_counts() -> None:
    guest = recreated("3.1", base=DEVICE + (1 << 20))
    assert guest.touch() == MEMORY


@pytest.mark.parametrize(("profile", "answer"), [("seed", "device 0x0"), ("3.1", "device 0x0"), ("6.1", "memory 0x0")])
def test_a_slot_at_gfn_0(profile: str, answer: str) -> None:
    guest = LowGuest(profile)
    assert guest.touch() == "device 0x0"
    guest.new_slot(1, 0)
    assert guest.touch() == answer


def test_in_3_1_the_next_zapping_of_everything_cures_both_holes() -> None:
    low = LowGuest("3.1")
    low.touch()
    low.new_slot(1, 0)
    low.new_slot(2, DEVICE)
    assert low.touch() == "memory 0x0"
    guest = recreated("3.1")
    guest.new_slot(2, DEVICE + (1 << 20))
    assert guest.touch() == MEMORY


def test_deleting_a_slot_zaps_everything_in_every_era() -> None:
    for profile in ("seed", "3.1", "6.1"):
        guest = ReviewGuest(profile)
        guest.lay(DEVICE)
        guest.new_slot(1, DEVICE)
        assert guest.touch() == MEMORY
        guest.vm.memslots.delete(1)
        assert guest.touch() == HERE


def test_moving_a_mapped_slot_is_told_as_the_crash_it_was_in_3_1() -> None:
    for profile, refused in (("3.1", True), ("6.1", False)):
        guest = ReviewGuest(profile)
        guest.lay(DEVICE)
        guest.new_slot(1, DEVICE)
        guest.vm.memslots.move(1, DEVICE + (1 << 20))
        guest.vm.memslots.move(1, DEVICE)
        assert guest.touch() == MEMORY
        if refused:
            with pytest.raises(MemslotError, match="crashes the host under Linux 3"):
                guest.vm.memslots.move(1, DEVICE + (1 << 20))
            assert guest.touch() == MEMORY
        else:
            guest.vm.memslots.move(1, DEVICE + (1 << 20))
            assert guest.touch() == HERE
