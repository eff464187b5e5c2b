"""The VM's face: options, profiles, counters, life and death."""

import pytest

from kvmmmu import _core
from kvmmmu.behaviour import Behaviour
from kvmmmu.cpu import HostCpu
from kvmmmu.errors import ArgumentError, VmClosedError
from kvmmmu.vm import VM


def test_a_vm_says_what_it_was_made_of():
    host = HostCpu(maxphyaddr=40, vendor="amd")
    vm = VM("npt", host=host, behaviour="3.1")
    assert (vm.mmu, vm.host, vm.behaviour) == ("npt", host, Behaviour("3.1"))
    assert repr(vm) == "VM(mmu='npt', behaviour='3.1': 0 slots)"
    vm.close()
    assert repr(vm) == "VM(mmu='npt', behaviour='3.1': closed)"


def test_profiles_differ_in_named_switches():
    table = {p: (b := Behaviour(p), b.mmio_scheme, b.tdp_mmu, b.nx_huge_pages)[1:] for p in ("6.1", "3.1", "seed")}
    assert table == {
        "6.1": ("generation", True, False),
        "3.1": ("zap_all", False, False),
        "seed": ("unguarded", False, False),
    }


def test_each_switch_can_be_set_alone_on_any_profile():
    assert VM(behaviour="3.1", mmio_scheme="off").behaviour == Behaviour("3.1", mmio_scheme="off")
    base = Behaviour("6.1", nx_huge_pages=True)
    vm = VM(behaviour=base, tdp_mmu=False)
    assert vm.behaviour == Behaviour("6.1", nx_huge_pages=True, tdp_mmu=False)
    assert base.tdp_mmu


def test_a_profile_cannot_be_changed():
    with pytest.raises(AttributeError):
        Behaviour().tdp_mmu = False


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"mmu": "tdp"}, ArgumentError, "mmu = 'tdp'"),
        ({"behaviour": "2.6"}, ArgumentError, "behaviour = '2.6'"),
        ({"mmio_scheme": "none"}, ArgumentError, "mmio_scheme = 'none'"),
        ({"tdp_mmu": 1}, ArgumentError, "tdp_mmu = 1"),
        ({"nx_huge_pages": "force"}, ArgumentError, "nx_huge_pages = 'force'"),
        ({"host": 46}, TypeError, "HostCpu"),
    ],
)
def test_a_bad_option_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        VM(**arguments)


def test_counters_carry_kvms_names_and_those_of_vcpus_are_added_up():
    vm = VM()
    vcpus = [vm.create_vcpu() for _ in range(3)]
    assert [vcpu.id for vcpu in vcpus] == [0, 1, 2]
    assert set(vm.stats) == {*_core.VM_STATS_ORDER, *_core.VCPU_STATS_ORDER} and len(vm.stats) == len(set(vm.stats))
    assert set(vcpus[0].stats) == set(_core.VCPU_STATS_ORDER)
    assert {"pf_taken", "pf_mmio_spte_created", "mmu_shadow_zapped", "remote_tlb_flush_requests"} < set(vm.stats)
    assert not any(vm.stats.values()) and not any(vcpus[0].stats.values())


def test_an_unknown_counter_is_a_key_error_and_counters_are_read_only():
    vm = VM()
    with pytest.raises(KeyError, match="pf_nothing"):
        vm.stats["pf_nothing"]
    with pytest.raises(TypeError):
        vm.stats["pf_taken"] = 1


def test_there_are_64_vcpus_at_most():
    vm = VM()
    for _ in range(64):
        vm.create_vcpu()
    with pytest.raises(ArgumentError, match="64"):
        vm.create_vcpu()


def test_a_closed_vm_refuses_vcpus_but_shows_its_counters():
    with VM() as vm:
        vcpu = vm.create_vcpu()
    with pytest.raises(VmClosedError):
        vm.create_vcpu()
    assert vm.stats["pf_taken"] == vcpu.stats["pf_taken"] == 0


def test_many_vms_come_and_go():
    """Ten GiB of address space each: without release a few thousand would not fit."""
    for _ in range(20000):
        VM().close()
