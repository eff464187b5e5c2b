"""The invariants hold in states that ordinary use reaches, and a planted fault is named."""

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.check.lists import hash_chains
from kvmmmu.check.snapshot import Snapshot

RAM = 1 << 20


def used_vm(mmu: str, cr0: int) -> tuple[km.VM, km.VCpu]:
    vm = km.VM(mmu)
    vm.memslots.create(gpa=0, memory=np.zeros(RAM, np.uint8))
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=cr0)
    vcpu.access(0)
    return vm, vcpu


@pytest.mark.parametrize("cr0", [0x10, 0x80000011])
@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_a_slot_may_go_while_a_vcpu_still_holds_its_roots(mmu: str, cr0: int):
    vm, vcpu = used_vm(mmu, cr0)
    vm.memslots.move(0, 1 << 31)
    vm.check()
    vm.memslots.delete(0)
    vm.check()
    vcpu.access(0)
    vm.check()


def test_a_zapped_root_in_use_is_missed_when_it_leaves_the_hash():
    vm, _ = used_vm("shadow", 0x80000011)
    vm.memslots.delete(0)
    snapshot = Snapshot(vm._core.snapshot())
    assert list(hash_chains(snapshot)) == []
    snapshot.hash[:] = 0
    assert {v.found for v in hash_chains(snapshot)} == {"is in use, expected in the hash"}
