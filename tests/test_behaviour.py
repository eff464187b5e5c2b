"""Behaviour profiles: tables of named switches, each a bit that the engine reads and each settable alone."""

import pytest

from kvmmmu import Behaviour
from kvmmmu.analysis.review import DEVICE, GVA, ReviewGuest
from kvmmmu.behaviour import SWITCHES
from kvmmmu.constants import TABLE
from kvmmmu.errors import ArgumentError


def test_the_switches_are_the_engines_bits_no_more_and_no_fewer() -> None:
    bits = {name.removeprefix("ERA_").lower(): bit for name, bit in TABLE.items() if name.startswith("ERA_")}
    assert set(bits) == set(SWITCHES)
    assert sorted(bits.values()) == [1 << n for n in range(len(bits))]
    assert Behaviour("6.1", no_retry=True).bits == bits["no_retry"]
    assert Behaviour("6.1").bits == 0


def test_a_switch_is_set_alone_whatever_the_profile_says() -> None:
    merged = Behaviour("3.1")
    assert Behaviour("3.1", one_root=False).switches == merged.switches - {"one_root"}
    assert Behaviour("6.1", one_root=True).switches == {"one_root"}
    assert Behaviour("6.1", one_root=True) != Behaviour("6.1")
    assert eval(repr(Behaviour("3.1", one_root=False, mmio_survives=True))) == Behaviour(
        "3.1", one_root=False, mmio_survives=True
    )


def test_a_profile_of_one_switch_more_keeps_it_when_the_vm_changes_another() -> None:
    behaviour = Behaviour("6.1", no_retry=True).changed(tdp_mmu=False)
    assert (behaviour.switches, behaviour.tdp_mmu) == (frozenset({"no_retry"}), False)


@pytest.mark.parametrize(
    ("switches", "words"), [({"two_roots": True}, "'two_roots' is unknown"), ({"one_root": 1}, "one_root = 1")]
)
def test_a_bad_switch_is_named(switches: dict[str, bool], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Behaviour("6.1", **switches)


@pytest.mark.parametrize("switch", sorted(SWITCHES))
@pytest.mark.parametrize("profile", ["6.1", "3.1"])
def test_a_machine_with_one_switch_turned_over_keeps_its_invariants(profile: str, switch: str) -> None:
    if switch == "mmio_constant" and profile == "3.1":
        pytest.skip("the two masks exclude each other; tests/review/test_6_the_mask.py has this one")
    behaviour = Behaviour(profile, **{switch: switch not in Behaviour(profile).switches})
    guest = ReviewGuest(behaviour)
    guest.lay(DEVICE)
    guest.touch()
    for entry in (0x10_0067, DEVICE | 0x67, 0, 0x10_0065):
        guest.remap(entry)
        guest.touch()
        guest.vcpu.invlpg(GVA)
        guest.touch()
        guest.reload_cr3()
        guest.vm.check()
    guest.new_slot(1, DEVICE)
    guest.remap(DEVICE | 0x67)
    guest.reload_cr3()
    guest.vm.check()
    guest.vm.memslots.delete(1)
    guest.touch()
    guest.vm.check()
