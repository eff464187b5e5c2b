"""What a vCPU says about an address: the guest's tables, then KVM's own, each entry, and what KVM meant by the last."""

import os
from errno import EINVAL

import numpy as np
import pytest

from kvmmmu.cpu import HostCpu
from kvmmmu.outcome import Outcome
from kvmmmu.vm import VM
from planted import planted

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


def test_without_tables_there_are_no_sptes_to_name(vcpu):
    assert vcpu.explain_sptes(0x1000).endswith("0x1000: KVM has built no tables for this address")
    with pytest.raises(OverflowError):
        vcpu.explain_sptes(1 << 64)


def test_the_sptes_of_an_address_are_named_from_the_root_to_the_last(vcpu):
    vcpu.access(APIC, "r")
    title, *lines = vcpu.explain_sptes(APIC).split("\n")
    assert title == f"sptes of {'gva' if vcpu.vm.mmu == 'shadow' else 'gpa'} 0xfee00000:"
    assert ["table" in line for line in lines] == [True] * (len(lines) - 1) + [False]
    assert " level 1 (4 KiB): mmio: gfn 0xfee00;" in lines[-1]


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc/self/mem to break an spte")
@pytest.mark.parametrize(("level", "bit"), [(1, 51), (4, 7)], ids=["address bit of a leaf", "large bit at level 4"])
def test_after_a_bug_the_broken_spte_is_named_in_the_hierarchy(vcpu, level, bit):
    if vcpu.vm.mmu == "shadow" and level == 4:
        level, bit = 2, 52  # paging is off: PAE tables, whose roots hold no rights
    assert vcpu.access(0x1000, "r").outcome is Outcome.OK
    with planted(vcpu, 0x1000, level, 1 << bit) as broken:
        exits = vcpu.vm.stats["mmio_exits"]
        result = vcpu.access(0x1000, "r")
        assert (result.outcome, result.error_code, vcpu.vm.stats["mmio_exits"]) == (Outcome.ERROR, EINVAL, exits)
        lines = vcpu.explain_sptes(0x1000).split("\n")[1:]
        (line,) = (line for line in lines if "reserved bits" in line)
        assert f"{broken:#018x} level {level} " in line
        assert line.endswith(f"reserved bits {1 << bit:#x}")
    assert vcpu.access(0x1000, "r").outcome is Outcome.OK
    assert not vcpu.vm.check()


def test_explaining_changes_nothing(vcpu):
    vcpu.access(APIC, "r")
    before = dict(vcpu.vm.stats), str(vcpu.vm.page_tables(vcpu))
    vcpu.explain(APIC, "w", cpl=3)
    vcpu.explain_sptes(APIC)
    assert (dict(vcpu.vm.stats), str(vcpu.vm.page_tables(vcpu))) == before


def test_a_vcpu_shows_its_registers(vcpu):
    assert repr(vcpu) == f"VCpu(0, mmu={vcpu.vm.mmu!r}: cr0=0x0, cr3=0x0, cr4=0x0, efer=0x0, cpl=0)"
