"""What a vCPU says about an address: the guest's tables, then KVM's own, each entry, and what KVM meant by the last."""

import numpy as np
import pytest

from kvmmmu.cpu import HostCpu
from kvmmmu.vm import VM

APIC = 0xFEE00000


@pytest.fixture(params=["shadow", "ept", "npt"])
def vcpu(request):
    vm = VM(request.param, host=HostCpu(maxphyaddr=46))
    vm.memslots.create(gpa=0, memory=np.zeros(1 << 20, np.uint8))
    return vm.create_vcpu()


def test_before_the_first_fault_kvm_has_built_nothing(vcpu):
    assert "no root is loaded" in vcpu.explain(0x1000)


def test_kvms_tables_lead_to_host_addresses(vcpu):
    vcpu.access(0x1000, "r")
    guest, built = vcpu.explain(0x1000).split("tables: ")[1:]
    assert "= gpa 0x1000" in guest
    assert "= host address 0x" in built and "= gpa" not in built
    assert built.startswith("gva" if vcpu.vm.mmu == "shadow" else "gpa")


def test_an_mmio_spte_is_told_from_an_entry_that_is_merely_wrong(vcpu):
    vcpu.access(APIC, "r")
    generation = vcpu.vm.memslots.generation(0)
    assert "that is mmio: gfn 0xfee00; gpa 0xfee00000" in vcpu.explain(APIC)
    assert f"generation {generation}" in vcpu.explain(APIC)
    assert "that is" not in vcpu.explain(0x1000)


def test_explaining_changes_nothing(vcpu):
    vcpu.access(APIC, "r")
    before = dict(vcpu.vm.stats), str(vcpu.vm.page_tables(vcpu))
    vcpu.explain(APIC, "w", cpl=3)
    assert (dict(vcpu.vm.stats), str(vcpu.vm.page_tables(vcpu))) == before


def test_a_vcpu_shows_its_registers(vcpu):
    assert repr(vcpu) == f"VCpu(0, mmu={vcpu.vm.mmu!r}: cr0=0x0, cr3=0x0, cr4=0x0, efer=0x0, cpl=0)"
