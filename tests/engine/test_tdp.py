"""EPT and NPT: trees over guest-physical addresses, by the TDP MMU and by the older direct MMU."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.check import Snapshot
from kvmmmu.errors import MemslotError
from machine import DATA, FLAT, LONG, MMIO, P32, PAE3, PAGING, PKE, USER, A, D, Machine, Mode, P, U, W

OK, IO, PF = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF
FLAVOURS = [("ept", True), ("ept", False), ("npt", True), ("npt", False)]
flavours = pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
MiB = 1 << 20


def flat(mmu: str, tdp_mmu: bool, **how: object) -> Machine:
    return Machine(mmu, FLAT, tdp_mmu=tdp_mmu, **how)


def leaves(m: Machine) -> list[int]:
    return [m.vm.stats[name] for name in ("pages_4k", "pages_2m", "pages_1g")]


def root_level(m: Machine) -> int:
    s = Snapshot(m.vm._core.snapshot())
    return s.role(s.vcpus[0].roots[0][0]) & 15


@flavours
@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
def test_guest_tables_change_without_exits(mmu: str, tdp_mmu: bool, mode: Mode) -> None:
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu)
    m.map(mode.user, DATA)
    m.map(mode.user + 0x1000, DATA + 0x1000)
    for gva in (mode.user, mode.user + 0x1000, mode.window + m.entry_gpa(mode.user)):
        m.access(gva)
    m.load_cr3(m.cr3)  # PAE: the processor reads the PDPTEs through EPT
    count = m.count("pf_taken", "pf_guest", "invlpg", "insn_emulation")
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    assert m.access(mode.user).gpa == DATA + 0x1000
    m.invlpg(mode.user)
    m.load_cr3(m.cr3)
    m.set_entry(mode.user, 0)
    assert m.access(mode.user).outcome is PF
    assert count.grown() == {}


@flavours
@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
def test_accessed_and_dirty_bits_of_the_guest_are_the_processors_doing(mmu: str, tdp_mmu: bool, mode: Mode) -> None:
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu)
    where = m.map(mode.user, DATA, P | W | U)
    m.access(mode.user)
    assert m.peek(where) & (A | D) == A
    count = m.count("pf_taken")
    m.access(mode.user, "w")
    assert m.peek(where) & (A | D) == A | D
    assert count["pf_taken"] == 0


@flavours
@pytest.mark.parametrize("size", ["4K", "2M", "1G"])
def test_the_host_backing_bounds_the_size_of_mappings(mmu: str, tdp_mmu: bool, size: str) -> None:
    m = flat(mmu, tdp_mmu, page_size=size)
    m.access(DATA)
    if size == "4K":
        # The direct MMU maps its neighbours ahead, the TDP MMU does not.
        assert leaves(m) == [1 if tdp_mmu else 8, 0, 0]
    else:
        assert leaves(m) == [0, 1, 0]  # a slot of 8 MiB holds no page of 1 GiB


@flavours
def test_a_slot_of_a_gibibyte_is_mapped_by_one_entry(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    memory = np.zeros(1 << 30, np.uint8)
    m.vm.memslots.create(gpa=1 << 30, memory=memory, page_size="1G")
    m.access((1 << 30) + 0x123_4567, "w", value=7)
    assert leaves(m) == [0, 0, 1]
    assert memory[0x123_4567] == 7
    assert m.access((1 << 30) + 0x3FFF_FFFF).exits == 0


@flavours
def test_a_host_without_gibibyte_pages_uses_smaller_ones(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu, host=km.HostCpu(gbpages=False, ept_1g=False))
    m.vm.memslots.create(gpa=1 << 30, memory=np.zeros(1 << 30, np.uint8), page_size="1G")
    m.access(1 << 30)
    assert leaves(m) == [0, 1, 0]


def test_ept_without_large_pages_uses_4_kib() -> None:
    m = flat("ept", True, page_size="2M", host=km.HostCpu(ept_2m=False, ept_1g=False))
    m.access(DATA)
    assert leaves(m) == [1, 0, 0]


@flavours
def test_the_ragged_ends_of_a_slot_are_mapped_by_4_kib(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    base = 0x2000_0000 + 4096
    m.vm.memslots.create(gpa=base, memory=np.zeros(4 * MiB, np.uint8), page_size="2M", pfn_offset=1)
    for gpa in (base, base + 2 * MiB, base + 4 * MiB - 4096):
        m.access(gpa)
    assert leaves(m)[1] == 1
    assert leaves(m)[0] >= 2


@flavours
def test_a_frame_that_does_not_match_its_gfn_modulo_2_mib_forbids_large_pages(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    m.vm.memslots.create(gpa=0x2000_0000, memory=np.zeros(4 * MiB, np.uint8), page_size="2M", pfn_offset=1)
    m.access(0x2000_0000 + 2 * MiB)
    assert leaves(m)[1] == 0


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize(
    ("la57", "maxphyaddr", "level"), [(False, 40, 4), (True, 40, 4), (True, 48, 4), (True, 52, 5), (False, 46, 4)]
)
def test_five_levels_only_where_host_and_guest_need_them(mmu: str, la57: bool, maxphyaddr: int, level: int) -> None:
    host = km.HostCpu(maxphyaddr=52 if la57 else 46, la57=la57)
    m = Machine(mmu, LONG, host=host, cpu=km.GuestCpu(maxphyaddr=maxphyaddr))
    m.access(m.mode.window)
    assert root_level(m) == level


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_five_levels_reach_what_four_cannot(mmu: str) -> None:
    m = Machine(mmu, LONG, host=km.HostCpu(maxphyaddr=52, la57=True), cpu=km.GuestCpu(maxphyaddr=52))
    memory = np.zeros(4096, np.uint8)
    m.vm.memslots.create(gpa=1 << 50, memory=memory)
    m.map(m.mode.user, 1 << 50)
    m.map(m.mode.user + 0x1000, 1 << 51)
    assert m.access(m.mode.user, "w", value=3).gpa == 1 << 50
    assert memory[0] == 3
    assert m.access(m.mode.user + 0x1000).mmio == ((1 << 51, 1),)


@flavours
def test_an_address_beyond_four_levels_is_no_other_address(mmu: str, tdp_mmu: bool) -> None:
    m = Machine(mmu, LONG, tdp_mmu=tdp_mmu, host=km.HostCpu(maxphyaddr=52), cpu=km.GuestCpu(maxphyaddr=52))
    m.map(m.mode.user, 1 << 48 | DATA)
    m.map(m.mode.user + 0x1000, DATA)
    m.access(m.mode.user + 0x1000)
    for _ in range(2):
        assert m.access(m.mode.user).mmio == ((1 << 48 | DATA, 1),)
    assert m.access(m.mode.user + 0x1000).exits == 0
    with pytest.raises(MemslotError):
        m.vm.memslots.create(gpa=1 << 48, memory=np.zeros(4096, np.uint8))


@flavours
def test_deleting_a_slot_takes_the_whole_tree_and_the_next_access_builds_another(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    slot = m.vm.memslots.create(gpa=0x2000_0000, memory=np.zeros(4096, np.uint8))
    m.access(DATA)
    m.access(0x2000_0000)
    m.vm.memslots.delete(slot)
    m.vm.check()
    assert leaves(m) == [0, 0, 0]
    assert m.access(DATA).outcome is OK
    assert m.access(0x2000_0000).outcome is IO


@flavours
def test_a_moved_slot_is_found_at_its_new_place_only(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    memory = np.zeros(4096, np.uint8)
    slot = m.vm.memslots.create(gpa=0x2000_0000, memory=memory)
    m.access(0x2000_0000, "w", value=5)
    m.vm.memslots.move(slot, 0x3000_0000)
    assert m.access(0x2000_0000).outcome is IO
    assert m.access(0x3000_0000).gpa == 0x3000_0000
    assert m.vcpu.read(0x3000_0000, 1) == b"\x05"


@flavours
def test_two_slots_may_show_the_same_memory(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    m.vm.memslots.create(gpa=0x2000_0000, memory=m.ram[:4096])
    m.access(0x2000_0000, "w", value=9)
    assert m.vcpu.read(0, 1) == b"\x09"


@flavours
def test_vcpus_share_the_tree(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    m.access(DATA)
    m.vcpu = m.vm.create_vcpu()
    m.start()
    assert m.access(DATA).exits == 0


@flavours
def test_a_switched_off_vcpu_leaves_the_tree_to_the_others(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu)
    m.access(DATA)
    first, m.vcpu = m.vcpu, m.vm.create_vcpu()
    m.start()
    m.access(DATA)
    slot = m.vm.memslots.create(gpa=0x2000_0000, memory=np.zeros(4096, np.uint8))
    m.vm.memslots.delete(slot)
    m.vm.check()
    assert m.access(DATA).outcome is OK  # the first vCPU still holds the zapped root
    m.vcpu = first
    assert m.access(DATA).exits == 0
    m.vm.check()


# -- misconfiguration and violation


def test_an_ept_violation_that_protects_nothing_is_repaired_and_a_misconfiguration_is_mmio() -> None:
    m = flat("ept", True)
    m.vm.events.enable(["kvm_page_fault", "handle_mmio_page_fault", "mark_mmio_spte"])
    m.access(MMIO)
    m.vcpu = m.vm.create_vcpu()
    m.start()
    m.access(MMIO)
    text = m.vm.events.text()
    assert text.count("mark_mmio_spte") == 1
    assert text.count("handle_mmio_page_fault") == 1
    assert text.count("kvm_page_fault") == 1  # the misconfiguration exit has no such line


@pytest.mark.parametrize("tdp_mmu", [True, False])
def test_without_ept_accessed_and_dirty_bits_pages_are_mapped_all_the_same(tdp_mmu: bool) -> None:
    m = Machine("ept", LONG, tdp_mmu=tdp_mmu, host=km.HostCpu(ept_ad=False))
    where = m.map(m.mode.user, DATA, P | W | U)
    m.map(m.mode.user + 0x1000, MMIO)
    for kind in "rwx":
        assert m.access(m.mode.user, kind).outcome is OK
    assert m.peek(where) & (A | D) == A | D
    assert [m.access(m.mode.user + 0x1000).outcome for _ in range(2)] == [IO, IO]
    s = Snapshot(m.vm._core.snapshot())
    assert (s.sptes[s.leaf] >> np.uint64(52) & np.uint64(3) == 1).all()  # marked as without A/D
    assert (s.sptes[s.leaf] & np.uint64(0x300) == 0).all()


def test_without_ept_accessed_bits_nothing_is_mapped_ahead() -> None:
    m = Machine("ept", FLAT, tdp_mmu=False, host=km.HostCpu(ept_ad=False))
    m.access(DATA)
    assert leaves(m) == [1, 0, 0]


# -- what the guest's own tables still decide


@flavours
@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
def test_a_fault_of_the_guests_own_does_not_exit(mmu: str, tdp_mmu: bool, mode: Mode) -> None:
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu)
    m.map(mode.user, DATA, P | U | A | D)
    m.access(mode.user)
    count = m.count("pf_taken", "pf_guest")
    result = m.access(mode.user, "w", cpl=3)
    assert (result.outcome, result.error_code, result.exits) == (PF, 7, 0)
    assert count.grown() == {}


@flavours
def test_protection_keys_are_the_processors_alone(mmu: str, tdp_mmu: bool) -> None:
    m = Machine(mmu, LONG, tdp_mmu=tdp_mmu)
    m.map(m.mode.user, DATA, USER | 5 << 59)
    m.vcpu.mov_cr4(m.mode.cr4 | PKE)
    m.vcpu.set_sregs(pkru=1 << 10)
    result = m.access(m.mode.user, "r", cpl=3)
    assert (result.outcome, result.error_code) == (PF, 0x25)
    m.vcpu.set_sregs(pkru=0)
    assert m.access(m.mode.user, "r", cpl=3).outcome is OK


@flavours
def test_a_fetch_behind_a_table_that_is_a_device_is_the_guests_fault(mmu: str, tdp_mmu: bool) -> None:
    # KVM cannot read the instruction: its walk of the guest's tables finds no memory where the table should be.
    m = Machine(mmu, P32, tdp_mmu=tdp_mmu)
    m.poke(m.entry_gpa(m.mode.user, 2), MMIO | USER)
    result = m.access(m.mode.user, "x")
    assert (result.outcome, result.error_code, result.path) == (PF, 0, km.Path.EMULATED)
    assert m.access(m.mode.user + 1, "r").outcome is PF


@flavours
def test_kvm_takes_the_address_of_an_exit_for_the_accesss_when_their_offsets_agree(mmu: str, tdp_mmu: bool) -> None:
    # The exit was for a table entry at offset 0 of a device, and so is the access: it is taken for MMIO there.
    m = Machine(mmu, P32, tdp_mmu=tdp_mmu)
    m.poke(m.entry_gpa(m.mode.user, 2), MMIO | USER)
    assert m.access(m.mode.user, "r").mmio == ((MMIO, 1),)


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_a_guest_table_in_read_only_memory_never_lets_go(mmu: str) -> None:
    """Reading a table counts as a write; the slot refuses; zapping shadow pages helps nobody."""
    m = Machine(mmu, LONG)
    rom = np.zeros(4096, np.uint8)
    rom.view(np.uint64)[0] = DATA | USER
    m.vm.memslots.create(gpa=0x2000_0000, memory=rom, readonly=True)
    reader = m.mode.user + 0x40_0000
    m.map(reader, 0x2000_0000)
    m.map(m.mode.user, DATA)
    m.poke(m.entry_gpa(m.mode.user, 2), 0x2000_0000 | USER)
    # An absent mapping of the table: its exit carries P = 0 and ends in emulation, which reads the table itself.
    for _ in range(2):
        result = m.access(m.mode.user + 1)
        assert (result.outcome, result.path) == (OK, km.Path.EMULATED)
    # Mapped for reading it refuses with P = 1, and that is taken for a shadowed table to be unprotected.
    assert m.access(reader).outcome is OK
    assert m.access(m.mode.user + 1).outcome is km.Outcome.HANG


def test_svm_does_not_look_at_pdptes_when_cr3_is_loaded_and_vmx_does() -> None:
    for mmu in ("npt", "ept"):
        m = Machine(mmu, PAE3)
        bad = m.new_table()
        m.poke(bad, 1 << 8 | P)
        if mmu == "npt":
            m.load_cr3(bad)
            result = m.access(m.mode.user & 0x3FFF_FFFF)
            assert (result.outcome, result.error_code & 9) == (PF, 9)
        else:
            with pytest.raises(km.errors.GuestFaultError):
                m.load_cr3(bad)
            assert m.access(m.mode.window).outcome is OK


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("tdp_mmu", [True, False])
def test_with_the_mitigation_huge_pages_are_not_executable_and_a_fetch_splits_them(mmu: str, tdp_mmu: bool) -> None:
    m = flat(mmu, tdp_mmu, page_size="2M", nx_huge_pages=True)
    m.access(DATA)
    assert leaves(m)[1] == 1
    assert m.access(DATA, "x").outcome is OK
    assert leaves(m)[1] == 0
    assert m.vm.stats["nx_lpage_splits"] == 1
    assert m.access(DATA, "x").exits == 0
    m.access(DATA + 0x5000)  # a data fault inside stays small
    assert leaves(m)[1] == 0
    m.vm.check()


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_pages_split_for_the_dirty_log_may_be_executed_again(mmu: str) -> None:
    m = flat(mmu, True, page_size="2M", nx_huge_pages=True)
    m.access(DATA)
    m.vm.memslots.set_region(0, memory=m.ram, flags=1)
    assert leaves(m) == [512, 0, 0]
    count = m.count("pf_taken")
    assert m.access(DATA + 0x1000, "x").outcome is OK
    assert count.grown() == {}
