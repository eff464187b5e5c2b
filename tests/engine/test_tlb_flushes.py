"""For whom a translation is cached, and what drops it: PCIDs, INVLPG and its kin, KVM's flushes (SDM 3A 4.10.4)."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from cached import IO, LARGE, OK, OTHER, PAGE, behind, cost, machine, mmus, references, tdp
from kvmmmu.errors import ArgumentError, GuestFaultError
from machine import DATA, MMIO, NOFLUSH, P32, PCIDE, PGE, RAM, SMEP, USER, G, Machine

# ---- for whom: PCIDs and global pages ----------------------------------------------------------


@tdp
def test_global_pages_outlive_a_cr3_load_and_others_do_not(mmu: str) -> None:
    m = machine(mmu, cr4=PGE)
    m.map(m.mode.user, DATA)
    m.map(m.mode.user + PAGE, DATA + PAGE, USER | G)
    for gva in (m.mode.user, m.mode.user + PAGE):
        m.access(gva)
        behind(m, gva, OTHER | USER)
    m.load_cr3(m.cr3)
    assert m.access(m.mode.user).gpa == OTHER
    assert m.access(m.mode.user + PAGE).gpa == DATA + PAGE
    m.vcpu.mov_cr4(m.mode.cr4)  # PGE 1 -> 0
    assert m.access(m.mode.user + PAGE).gpa == OTHER


@tdp
def test_without_pge_no_page_is_global(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA, USER | G)
    m.access(m.mode.user)
    behind(m, m.mode.user, OTHER | USER)
    m.load_cr3(m.cr3)
    assert m.access(m.mode.user).gpa == OTHER


def two_spaces(mmu: str, cr4: int = 0, bits: int = USER) -> tuple[Machine, int, int]:
    """PCID 1 maps the user page to DATA, PCID 2 to OTHER; both are cached, PCID 1 is current."""
    m = machine(mmu, cr4=PCIDE | cr4)
    first, second = m.cr3 | 1, m.new_space()
    m.open_window(second)
    m.map(m.mode.user, DATA, bits)
    m.map(m.mode.user, OTHER, bits, cr3=second)
    second |= 2
    for cr3, gpa in ((second, OTHER), (first, DATA)):
        m.load_cr3(cr3)
        m.access(m.mode.user)
        m.access(m.mode.user)
        assert m.access(m.mode.user).gpa == gpa
    return m, first, second


@mmus
def test_a_pcid_keeps_its_entries_while_another_runs(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    if mmu == "shadow":  # the load that made the first current was KVM's to carry out: it flushed the whole VPID
        for cr3 in (second, first):
            m.load_cr3(cr3 | NOFLUSH)
            m.access(m.mode.user)
    m.load_cr3(second | NOFLUSH)
    assert cost(m, m.mode.user) == -1
    assert m.access(m.mode.user).gpa == OTHER
    m.load_cr3(first | NOFLUSH)
    assert cost(m, m.mode.user) == -1
    assert m.access(m.mode.user).gpa == DATA


@tdp
def test_a_cr3_load_without_bit_63_drops_the_pcid_it_names_alone(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    m.load_cr3(second)
    assert cost(m, m.mode.user) > 0
    m.load_cr3(first | NOFLUSH)
    assert cost(m, m.mode.user) == -1


@tdp
def test_invlpg_is_for_the_current_pcid(mmu: str) -> None:
    m, _, second = two_spaces(mmu)
    m.invlpg(m.mode.user)
    assert cost(m, m.mode.user) > 0
    m.load_cr3(second | NOFLUSH)
    assert cost(m, m.mode.user) == -1


@tdp
def test_invlpg_takes_global_pages_of_every_pcid(mmu: str) -> None:
    m, first, second = two_spaces(mmu, PGE)
    gva = m.mode.user + PAGE
    m.map(gva, DATA, USER | G)
    m.map(gva, OTHER, USER | G, cr3=second & ~0xFFF)
    assert m.access(gva).gpa == DATA
    m.load_cr3(second | NOFLUSH)
    assert m.access(gva).gpa == DATA  # the guest's own fault: one global page, two meanings
    m.invlpg(gva)
    assert m.access(gva).gpa == OTHER
    m.load_cr3(first | NOFLUSH)
    assert m.access(gva).gpa == OTHER


@tdp
@pytest.mark.parametrize(
    ("kind", "pcid", "gone"), [(0, 1, (1,)), (0, 2, (2,)), (1, 2, (2,)), (1, 1, (1,)), (2, 0, (1, 2)), (3, 0, (1, 2))]
)
def test_invpcid_reaches_what_its_type_says(mmu: str, kind: int, pcid: int, gone: tuple[int, ...]) -> None:
    m, first, second = two_spaces(mmu)
    m.vcpu.invpcid(kind, pcid, m.mode.user)
    for number, cr3 in ((1, first), (2, second)):
        m.load_cr3(cr3 | NOFLUSH)
        assert (cost(m, m.mode.user) > 0) == (number in gone)


@tdp
@pytest.mark.parametrize(("kind", "kept"), [(0, True), (1, True), (2, False), (3, True)])
def test_invpcid_spares_global_pages_unless_it_means_them(mmu: str, kind: int, kept: bool) -> None:
    m = machine(mmu, cr4=PGE | PCIDE)
    m.map(m.mode.user, DATA, USER | G)
    m.access(m.mode.user)
    m.vcpu.invpcid(kind, 0, m.mode.user)
    assert (cost(m, m.mode.user) == -1) == kept


@mmus
@pytest.mark.parametrize(
    ("cr4", "kind", "pcid", "gva"),
    [(PCIDE, 4, 0, 0), (PCIDE, 1, 4096, 0), (0, 0, 1, 0), (0, 1, 1, 0), (PCIDE, 0, 1, 1 << 62)],
)
def test_invpcid_refuses_bad_operands_with_gp(mmu: str, cr4: int, kind: int, pcid: int, gva: int) -> None:
    m = machine(mmu, cr4=cr4)
    with pytest.raises(GuestFaultError, match="#GP: INVPCID"):
        m.vcpu.invpcid(kind, pcid, gva)


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_with_shadow_paging_kvm_carries_invpcid_out(kind: int) -> None:
    m, _, second = two_spaces("shadow")
    m.set_entry(m.mode.user, DATA + PAGE | USER)
    assert m.access(m.mode.user).gpa == DATA
    m.vcpu.invpcid(kind, 1, m.mode.user)
    assert m.access(m.mode.user).gpa == DATA + PAGE
    m.load_cr3(second | NOFLUSH)
    assert m.access(m.mode.user).gpa == OTHER


@tdp
def test_leaving_pcids_forgets_them_all(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    m.load_cr3(first & ~0xFFF)
    m.vcpu.mov_cr4(m.mode.cr4)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    m.load_cr3(second | NOFLUSH)
    assert cost_with_exits(m, m.mode.user) > 0


def cost_with_exits(m: Machine, gva: int) -> int:
    before = references(m)
    assert m.access(gva).outcome is OK
    return references(m) - before


@tdp
@pytest.mark.parametrize("change", ["PG off and on", "SMEP on", "NXE off", "PGE"])
def test_control_registers_that_change_what_tables_mean_empty_the_tlb(mmu: str, change: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    behind(m, m.mode.user, OTHER | USER)
    regs = m.vcpu.regs
    if change == "PG off and on":
        m.vcpu.set_sregs(compat=True)
        m.vcpu.mov_cr0(regs.cr0 & ~(1 << 31))
        m.vcpu.mov_cr0(regs.cr0)
        m.vcpu.set_sregs(compat=False)
    elif change == "SMEP on":
        m.vcpu.mov_cr4(regs.cr4 | SMEP)
    elif change == "PGE":
        m.vcpu.mov_cr4(regs.cr4 | PGE)
    else:
        m.vcpu.write_efer(regs.efer & ~0x800)
    assert m.access(m.mode.user).gpa == OTHER


# ---- INVLPG and what hangs on an address ---------------------------------------------------------


def test_invlpg_drops_every_table_known_of_the_pcid_but_only_its_own_page() -> None:
    m = machine("ept")
    gvas = [m.mode.user + n * PAGE for n in range(3)]
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva)
    m.vcpu.invvpid(2)
    assert cost(m, gvas[0]) == 4  # guest entries alone: guest-physical mappings were kept
    m.invlpg(1 << 40)
    assert cost(m, gvas[0]) == -1
    assert cost(m, gvas[1]) == 4


@tdp
def test_invlpg_of_a_large_page_drops_all_the_parts_it_is_cached_in(mmu: str) -> None:
    m = machine(mmu, page_size="4K")
    gva = 0x4000_0000
    m.map(gva, DATA, level=2)
    m.access(gva), m.access(gva + PAGE)
    assert cost(m, gva) == cost(m, gva + PAGE) == -1
    m.invlpg(gva + PAGE)
    assert cost(m, gva) > 0
    assert cost(m, gva + PAGE) > 0


@tdp
def test_a_4_mib_page_is_cached_in_two_halves_and_dropped_as_one(mmu: str) -> None:
    m = machine(mmu, P32, page_size="2M", ram=2 * RAM)
    m.map(0x4000_0000, RAM, level=2)
    m.access(0x4000_0000), m.access(0x4000_0000 + LARGE)
    assert set(m.vcpu.tlb_entries()["page_shift"]) >= {21}
    assert m.access(0x4000_0000 + LARGE).gpa == RAM + LARGE
    m.invlpg(0x4000_0000)
    assert cost(m, 0x4000_0000 + LARGE) > 0


def test_invlpg_that_kvm_carries_out_drops_the_address_from_the_processor_as_well() -> None:
    m = machine("shadow")
    gvas = (m.mode.user, m.mode.user + PAGE)
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva), m.access(gva)
    m.invlpg(gvas[0])
    assert [cost(m, gva) for gva in gvas] == [4, -1]


@tdp
def test_invlpg_of_an_address_that_is_not_canonical_does_nothing(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    m.invlpg(m.mode.user | 1 << 62)
    assert cost(m, m.mode.user) == -1


def test_invept_takes_guest_physical_mappings_and_invvpid_leaves_them() -> None:
    m = machine("ept")
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    m.vcpu.invvpid(1)
    count = m.count("tlb_nested_hit", "tlb_nested_miss")
    m.access(m.mode.user)
    assert count.grown() == {"tlb_nested_hit": 5}
    m.vcpu.invept()
    count = m.count("tlb_nested_hit", "tlb_nested_miss")
    m.access(m.mode.user)
    assert count.grown() == {"tlb_nested_miss": 5}


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
def test_invept_needs_ept(mmu: str) -> None:
    with pytest.raises(ArgumentError, match="mmu='ept'"):
        machine(mmu).vcpu.invept()


def test_invvpid_but_global_and_of_one_address() -> None:
    m = machine("ept", cr4=PGE)
    m.map(m.mode.user, DATA)
    m.map(m.mode.user + PAGE, DATA + PAGE, USER | G)
    gvas = (m.mode.user, m.mode.user + PAGE)
    for gva in gvas:
        m.access(gva)
    m.vcpu.invvpid(3)
    assert [cost(m, gva) == -1 for gva in gvas] == [False, True]
    m.vcpu.invvpid(0, gvas[1])
    assert [cost(m, gva) == -1 for gva in gvas] == [True, False]


@pytest.mark.parametrize(("la57", "limit"), [(False, 1 << 47), (True, 1 << 56)])
def test_invvpid_of_one_address_takes_only_canonical_ones(la57: bool, limit: int) -> None:
    vcpu = km.VM("ept").create_vcpu(km.GuestCpu(la57=la57), tlb=km.Tlb())
    for gva in (limit - 1, (1 << 64) - limit):
        vcpu.invvpid(0, gva)
    for gva in (limit, (1 << 64) - limit - 1):
        with pytest.raises(ArgumentError, match="gva: .* is not canonical"):
            vcpu.invvpid(0, gva)
        vcpu.invvpid(1, gva)


# ---- KVM's flushes --------------------------------------------------------------------------------


@mmus
def test_a_slot_that_goes_is_gone_from_the_tlb_as_well(mmu: str) -> None:
    m = machine(mmu)
    extra = m.vm.memslots.create(gpa=1 << 30, memory=np.zeros(PAGE, np.uint8))
    m.map(m.mode.user, 1 << 30)
    assert m.access(m.mode.user).outcome is OK
    assert m.access(m.mode.user).outcome is OK
    m.vm.memslots.delete(extra)
    assert m.access(m.mode.user).outcome is IO


@mmus
def test_a_write_after_the_dirty_log_was_read_is_logged_again(mmu: str) -> None:
    m = machine(mmu)
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    m.map(m.mode.user, DATA)
    for _ in range(3):
        m.access(m.mode.user, "w"), m.access(m.mode.user, "w")
        log = m.vm.get_dirty_log(m.slot)
        assert int(log[DATA >> 18]) >> (DATA >> 12 & 63) & 1


@mmus
def test_a_host_page_given_back_is_read_as_zero_at_once(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.vcpu.write(m.mode.user, b"\x55")
    m.vm.host_dontneed(m.slot, first_page=DATA >> 12, npages=1)
    assert m.vcpu.read(m.mode.user, 1) == b"\0"


@mmus
def test_other_vcpus_are_flushed_before_they_run_again(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    second = m.vm.create_vcpu(tlb=km.Tlb())
    second.set_sregs(cr0=m.mode.cr0, cr3=m.cr3, cr4=m.mode.cr4, efer=m.mode.efer)
    for _ in range(2):
        assert second.access(m.mode.user).outcome is OK
    moved = m.vm.memslots.move(m.slot, 1 << 31)
    assert moved.gpa == 1 << 31
    assert second.access(m.mode.user).outcome is not OK
    m.vm.check()


@mmus
def test_mmio_is_never_cached_as_a_translation(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, MMIO)
    for _ in range(3):
        count = m.count("tlb_hit")
        assert m.access(m.mode.user).outcome is IO
        assert count["tlb_hit"] == 0
    assert MMIO not in m.vcpu.tlb_entries()["gpa"].tolist()


@mmus
def test_a_guest_without_paging_is_served_too(mmu: str) -> None:
    m = Machine(mmu, tlb=km.Tlb(), start=False)
    assert m.vcpu.access(DATA).gpa == DATA
    count = m.count("tlb_hit", "tlb_nested_hit")
    assert m.access(DATA).gpa == DATA
    # Under EPT and NPT only guest-physical mappings are used (SDM vol. 3C section 29.4.2).
    assert count.grown() == ({"tlb_hit": 1} if mmu == "shadow" else {"tlb_nested_hit": 1})
