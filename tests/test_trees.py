"""``vm.page_tables``: a copy of the tables KVM built, page by page."""

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError, VmClosedError

PAGE = 4096
PG, PE, PAE, LONG = 1 << 31, 1, 1 << 5, 1 << 8 | 1 << 10


def machine(mmu: str, **options: bool) -> tuple[km.VM, km.VCpu, np.ndarray]:
    """16 pages of memory at 0, tables at pages 1 to 4 that map page 8 at gva 0x400000 and MMIO behind it."""
    vm = km.VM(mmu, host=km.HostCpu(maxphyaddr=40), **options)
    ram = np.zeros(16 * PAGE, np.uint8)
    words = ram.view(np.uint64)
    for table, index, entry in ((1, 0, 0x2027), (2, 0, 0x3027), (3, 2, 0x4027), (4, 0, 0x8067), (4, 1, 0xFE000067)):
        words[table * 512 + index] = entry
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=PG | PE, cr3=PAGE, cr4=PAE, efer=LONG)
    return vm, vcpu, ram


def test_there_are_no_tables_before_the_vcpu_runs() -> None:
    vm, vcpu, _ = machine("shadow")
    assert len(vm.page_tables()) == 0
    assert str(vm.page_tables(vcpu)) == ""


def test_the_root_comes_first_and_every_page_before_those_it_leads_to() -> None:
    vm, vcpu, _ = machine("shadow")
    assert vcpu.access(0x400000, "w").ok
    tables = vm.page_tables()
    assert [(page.level, page.gfn) for page in tables] == [(4, 1), (3, 2), (2, 3), (1, 4)]
    chain = [page.entries[0].ref for page in tables.pages[:-1]]
    assert chain == [page.id for page in tables.pages[1:]]
    assert tables.pages[0].root_count == 1
    assert not tables.pages[0].direct


def test_a_leaf_names_its_frame_and_an_mmio_spte_its_kind() -> None:
    vm, vcpu, _ = machine("shadow")
    vcpu.access(0x400000, "w")
    vcpu.access(0x401000, "r")
    leaf, mmio = vm.page_tables().pages[-1].entries
    frame = next(first for _, _, first, *_ in vm._core.host_ranges())
    assert (leaf.kind, leaf.index, leaf.address, leaf.ref) == ("leaf", 0, 0x400000, frame + 8)
    assert (mmio.kind, mmio.index, mmio.address, mmio.ref) == ("mmio", 1, 0x401000, 0)


@pytest.mark.parametrize("tdp_mmu", [False, True])
def test_under_ept_entries_translate_gpas_and_say_which_mmu_owns_them(tdp_mmu: bool) -> None:
    vm, vcpu, _ = machine("ept", tdp_mmu=tdp_mmu)
    vcpu.access(0x400000, "w")
    pages = vm.page_tables().pages
    assert [page.level for page in pages] == [4, 3, 2, 1]
    assert all(page.direct and page.tdp is tdp_mmu for page in pages)
    assert 8 * PAGE in [entry.address for entry in pages[-1].entries]


def test_addresses_of_the_upper_half_are_written_with_their_sign() -> None:
    vm, vcpu, ram = machine("shadow")
    ram.view(np.uint64)[512 + 511] = 0x2027
    vcpu.access(0xFFFFFF8000400000, "r")
    tables = vm.page_tables().pages
    assert [tables[0].entries[0].address, tables[-1].entries[0].address] == [0xFFFFFF8000000000, 0xFFFFFF8000400000]


def test_pae_roots_are_a_table_that_is_no_shadow_page() -> None:
    vm, vcpu, _ = machine("shadow")
    vcpu.set_sregs(cr0=PE, cr3=0, cr4=0, efer=0)
    vcpu.access(0x8000, "w")
    roots, *rest = vm.page_tables().pages
    assert (roots.special, roots.level, [entry.kind for entry in roots.entries]) == (True, 3, ["table"] * 4)
    assert {page.level for page in rest} == {1, 2}


def test_all_adds_pages_that_the_root_does_not_reach() -> None:
    vm, vcpu, ram = machine("shadow")
    vcpu.access(0x400000, "w")
    ram.view(np.uint64)[5 * 512] = 0x2027
    vcpu.load_cr3(5 * PAGE)
    assert vcpu.access(0x400000, "r").ok
    assert [page.gfn for page in vm.page_tables() if page.level == 4] == [5]
    everything = vm.page_tables(all=True)
    assert [page.gfn for page in everything if page.level == 4] == [5, 1]
    assert vm.page_tables(previous=0).pages[0].gfn == 1


def test_the_copy_does_not_change_with_the_machine_and_cannot_be_written() -> None:
    vm, vcpu, _ = machine("shadow")
    vcpu.access(0x400000, "r")
    tables = vm.page_tables()
    before = tables.sptes.copy()
    vcpu.access(0x401000, "r")
    assert np.array_equal(tables.sptes, before)
    assert not np.array_equal(vm.page_tables().sptes, before)
    with pytest.raises(ValueError, match="read-only"):
        tables.sptes[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        tables.records["gfn"] = 1


def test_looking_changes_nothing() -> None:
    vm, vcpu, _ = machine("shadow")
    vcpu.access(0x400000, "r")
    vm.events.enable()
    counters = dict(vm.stats)
    vm.page_tables(all=True)
    assert dict(vm.stats) == counters
    assert len(vm.events.drain()) == 0


def test_the_text_has_a_line_for_every_page_and_entry() -> None:
    vm, vcpu, _ = machine("shadow")
    vcpu.access(0x400000, "w")
    vcpu.access(0x401000, "r")
    text = str(vm.page_tables())
    assert len(text.splitlines()) == 4 + 3 + 2
    assert "level 1 gfn 0x4" in text
    assert "mmio" in text
    assert "leaf pfn" in text


def test_a_vcpu_must_be_named_when_there_are_several_and_be_the_vms_own() -> None:
    vm, vcpu, _ = machine("shadow")
    other, stranger, _ = machine("shadow")
    second = vm.create_vcpu()
    with pytest.raises(ArgumentError, match="the VM has 2 vCPUs"):
        vm.page_tables()
    assert len(vm.page_tables(vcpu)) == len(vm.page_tables(second)) == 0
    with pytest.raises(ArgumentError, match="another VM"):
        vm.page_tables(stranger)
    with pytest.raises(ArgumentError, match="previous"):
        vm.page_tables(vcpu, previous=3)
    other.close()
    with pytest.raises(VmClosedError):
        other.page_tables(stranger)
