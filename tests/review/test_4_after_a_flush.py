"""Remark 4: after a flush the vCPU's record is filled from the mmio spte, and no guest table is read for it."""

import pytest

from kvmmmu.analysis.review import DEVICE, GVA, ReviewGuest


def device(profile: str, **how: str) -> ReviewGuest:
    guest = ReviewGuest(profile, **how)
    guest.lay(DEVICE)
    guest.touch()
    return guest


@pytest.mark.parametrize("profile", ["seed", "3.1", "6.1"])
@pytest.mark.parametrize("flush", ["cr3", "invlpg"])
def test_the_spte_gives_the_record_back_without_a_walk(profile: str, flush: str) -> None:
    guest = device(profile)
    if flush == "cr3":
        guest.reload_cr3()
    else:
        guest.vcpu.invlpg(GVA)
    before = dict(guest.vcpu.stats)
    assert guest.touch() == f"device {DEVICE:#x}"
    after = guest.vcpu.stats
    assert after["mmio_spte_hit"] == before["mmio_spte_hit"] + 1
    assert after["mmio_refill"] == before["mmio_refill"] + 1
    assert after["guest_walk"] == before["guest_walk"]
    assert guest.touch() == f"device {DEVICE:#x}"
    assert guest.vcpu.stats["mmio_cache_hit"] == before["mmio_cache_hit"] + 1


def test_without_caching_every_access_walks_and_searches_slots() -> None:
    guest = ReviewGuest("6.1", mmio_scheme="off")
    guest.lay(DEVICE)
    guest.touch()
    before = dict(guest.vcpu.stats)
    guest.reload_cr3()
    guest.touch()
    assert guest.vcpu.stats["guest_walk"] > before["guest_walk"]
    assert guest.vcpu.stats["mmio_slow"] == before["mmio_slow"] + 1
