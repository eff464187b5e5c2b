"""Control registers: what a write refuses, resets, drops and flushes."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.check import Snapshot
from kvmmmu.errors import ArgumentError, GuestFaultError
from machine import (
    DATA,
    FLAT,
    LA57,
    LMA,
    LME,
    LONG,
    LONG5,
    MODES,
    NXE,
    P32,
    PAE,
    PAE3,
    PAGING,
    PCIDE,
    PE,
    PG,
    PGE,
    PSE,
    SMAP,
    SMEP,
    USER,
    WP,
    Machine,
    Mode,
    P,
)

OK, PF = km.Outcome.OK, km.Outcome.PF
CD, NW = 1 << 30, 1 << 29


def ready(mode: Mode = LONG, mmu: str = "shadow", **how: object) -> Machine:
    m = Machine(mmu, mode, **how)
    if mode.levels:
        m.map(mode.user, DATA)
        m.access(mode.user, "w")
    else:
        m.access(DATA)
    return m


def refused(m: Machine, change: str, *args: int, **named: int) -> None:
    """A refused write raises and leaves registers, tables and memory as they were."""
    looks = {"slot_search", "guest_walk"}  # reading PDPTEs is looking
    before, regs, pages = {n: c for n, c in m.vm.stats.items() if n not in looks}, m.vcpu.regs, m.ram.copy()
    with pytest.raises(GuestFaultError):
        getattr(m.vcpu, change)(*args, **named)
    m.vm.check()
    assert m.vcpu.regs == regs
    assert {n: c for n, c in m.vm.stats.items() if n not in looks} == before
    assert (m.ram == pages).all()


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("mov_cr0", PG | WP),  # paging without protection
        ("mov_cr0", PE | PG | NW),  # NW without CD
        ("mov_cr0", PE | PG | 1 << 32),
        ("mov_cr4", 0),  # PAE off in long mode
        ("mov_cr4", PAE | LA57),  # LA57 in long mode
        ("write_efer", LMA | NXE),  # LME off under paging
        ("load_cr3", 1 << 45),  # beyond MAXPHYADDR 40
    ],
)
def test_a_write_the_architecture_refuses_changes_nothing(mmu: str, change: str, value: int) -> None:
    refused(ready(mmu=mmu), change, value)


def test_pcide_needs_long_mode_and_a_cr3_without_pcid() -> None:
    refused(ready(PAE3), "mov_cr4", PAE | PCIDE)
    m = ready()
    m.load_cr3(m.cr3 | 8)
    refused(m, "mov_cr4", m.mode.cr4 | PCIDE)
    m.load_cr3(m.cr3)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    refused(m, "mov_cr0", PE | WP)  # paging off with PCIDE


@pytest.mark.parametrize(
    "registers",
    [
        {"cr0": PG},
        {"cr0": PE | PG | WP, "cr4": 0, "efer": LME | LMA},
        {"cr0": PE | PG | WP, "cr4": PAE, "efer": LME},  # LMA must follow
        {"cr0": PE | PG | WP, "cr4": PAE, "efer": LMA},
        {"cr0": PE, "cr4": PAE, "efer": LME | LMA},
        {"cr3": 1 << 50},
    ],
)
def test_set_sregs_takes_all_or_nothing(registers: dict[str, int]) -> None:
    refused(ready(), "set_sregs", **registers)


def test_a_bad_pdpte_refuses_the_load_of_cr3() -> None:
    m = ready(PAE3)
    bad = m.new_table()
    m.poke(bad + 16, 1 << 45 | P)  # beyond MAXPHYADDR 40
    refused(m, "load_cr3", bad)
    refused(m, "load_cr3", 0x4000_0000)  # no memory there
    refused(m, "set_sregs", cr3=bad)
    m.poke(m.cr3, m.peek(m.cr3) | 2)
    refused(m, "load_cr3", m.cr3)  # the same CR3, whose table went bad


def test_turning_pae_paging_on_loads_the_pdptes() -> None:
    m = ready(PAE3)
    m.vcpu.mov_cr0(PE | WP)
    m.poke(m.cr3, 1 << 45 | P)
    refused(m, "mov_cr0", PE | WP | PG)
    m.poke(m.cr3, m.new_table() | P)
    m.vcpu.mov_cr0(PE | WP | PG)
    assert m.vcpu.regs.pdptes[0] == m.peek(m.cr3)


def test_features_the_guest_cpu_lacks_are_named() -> None:
    m = Machine("shadow", LONG, cpu=km.GuestCpu(smep=False, la57=False, nx=False), start=False)
    with pytest.raises(ArgumentError, match="smep"):
        m.vcpu.mov_cr4(SMEP)
    with pytest.raises(ArgumentError, match="la57"):
        m.vcpu.set_sregs(cr4=PAE | LA57)
    with pytest.raises(ArgumentError, match="nx"):
        m.vcpu.write_efer(NXE)


# -- roots


def builds(m: Machine) -> list[str]:
    """The get_page lines of entering the guest now, by how they end."""
    m.vm.events.enable("kvm_mmu_get_page")
    m.vm.events.drain()
    m.access(m.mode.window if m.mode.levels else DATA)
    lines = [line.rsplit(" ", 1)[1] for line in m.vm.events.text().splitlines()]
    m.vm.events.disable()
    return lines


TOPS = {FLAT: 4, P32: 4, PAE3: 4, LONG: 1, LONG5: 1}


@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
@pytest.mark.parametrize("bit", [PSE, SMEP, SMAP])
def test_cr4_bits_of_the_role_reset_the_context_and_find_the_old_pages(mode: Mode, bit: int) -> None:
    m = ready(mode)
    m.access(mode.window)
    m.vcpu.mov_cr4(m.vcpu.regs.cr4 ^ bit)
    assert builds(m)[: TOPS[mode]] == ["existing"] * TOPS[mode]


def test_cr0_wp_is_part_of_the_role_and_needs_other_pages() -> None:
    m = ready()
    m.access(m.mode.window)
    m.vcpu.mov_cr0(m.mode.cr0 & ~WP)
    assert set(builds(m)) == {"new"}
    m.vcpu.mov_cr0(m.mode.cr0)
    assert builds(m) == ["existing"]


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_cr0_wp_under_tdp_keeps_the_root(mmu: str) -> None:
    m = ready(mmu=mmu)
    m.access(m.mode.window)
    m.vcpu.mov_cr0(m.mode.cr0 & ~WP)
    assert builds(m) == []


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
@pytest.mark.parametrize("tdp_mmu", [True, False])
def test_efer_nx_resets_the_context(mmu: str, tdp_mmu: bool) -> None:
    m = ready(mmu=mmu, tdp_mmu=tdp_mmu)
    m.access(m.mode.window)
    m.vcpu.write_efer(m.mode.efer & ~NXE)
    # The TDP MMU keeps a reference to its root: dropping and taking it again prints nothing.
    assert builds(m) == ([] if mmu != "shadow" and tdp_mmu else ["existing"])


def test_equal_registers_reset_nothing_but_under_pae() -> None:
    for mode in (LONG, P32, PAE3):
        m = ready(mode)
        m.access(mode.window)
        m.start()
        assert builds(m) == (["existing"] * 4 if mode is PAE3 else [])


def test_pcide_on_drops_roots_and_off_flushes() -> None:
    m = ready()
    m.access(m.mode.window)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    assert builds(m) == ["existing"]
    count = m.count("tlb_flush")
    m.vcpu.mov_cr4(m.mode.cr4)
    assert builds(m) == []
    assert count["tlb_flush"] == 1


@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("what", "flushes"),
    [("pge", 1), ("smep", 1), ("same cr3", 1), ("nothing", 0)],
)
def test_what_flushes_the_guests_own_translations(mode: Mode, what: str, flushes: int) -> None:
    m = ready(mode)
    m.access(mode.window)
    m.access(mode.window)
    count = m.count("tlb_flush")
    if what == "pge":
        m.vcpu.mov_cr4(m.vcpu.regs.cr4 ^ PGE)
    elif what == "smep":
        m.vcpu.mov_cr4(m.vcpu.regs.cr4 | SMEP)
    elif what == "same cr3":
        m.load_cr3(m.cr3)
    m.access(mode.window)
    assert count["tlb_flush"] == flushes


def test_pdptes_changed_behind_an_equal_cr3_rebuild_the_root() -> None:
    m = ready(PAE3)
    m.access(m.mode.window)
    m.load_cr3(m.cr3)
    assert builds(m) == []
    fresh = m.new_table()
    m.poke(m.cr3 + 8, fresh | P)
    m.load_cr3(m.cr3)
    assert sorted(builds(m)) == ["existing"] * 3 + ["new"]


def test_pdptes_are_registers_a_store_to_the_table_does_nothing() -> None:
    m = ready(PAE3)
    m.store(m.cr3, 0)
    assert m.access(m.mode.user).outcome is OK
    m.load_cr3(m.cr3)
    assert m.access(m.mode.user).outcome is PF


@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
def test_a_root_outside_memory_is_a_triple_fault_and_not_for_ever(mode: Mode) -> None:
    m = ready(mode)
    if mode is PAE3:
        lost = m.new_table()
        m.poke(lost, 0x2000_0000 | P)
    else:
        lost = 0x2000_0000
    m.load_cr3(lost)
    result = m.access(mode.user)
    assert (result.outcome, result.exits) == (km.Outcome.SHUTDOWN, 0)
    m.load_cr3(m.cr3)
    assert m.access(mode.user).outcome is OK


def test_an_absent_pdpte_is_no_root() -> None:
    m = ready(PAE3)
    m.access(m.mode.window)
    half = m.new_table()
    m.poke(half + 24, m.peek(m.cr3 + 24))
    m.load_cr3(half)
    assert builds(m) == ["existing"]
    assert m.access(m.mode.user).error_code == 0


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_every_mode_can_follow_every_other(mmu: str) -> None:
    m = dict.fromkeys(MODES)
    machine = Machine(mmu, LONG)
    spaces: dict[Mode, int] = {}
    for mode in MODES:
        machine.mode = mode
        if mode.levels:
            machine.cr3 = spaces[mode] = machine.new_space()
            machine.map(mode.user, DATA)
    assert set(m) == set(MODES)
    for a in MODES:
        for b in MODES:
            for mode in (a, b):
                machine.vcpu.set_sregs(cr0=mode.cr0, cr3=spaces.get(mode, 0), cr4=mode.cr4, efer=mode.efer)
                assert machine.access(mode.user).gpa == (DATA if mode.levels else mode.user)


def test_the_way_a_processor_enters_long_mode() -> None:
    m = Machine("shadow", LONG, start=False)
    m.map(m.mode.user, DATA)
    v = m.vcpu
    v.mov_cr0(PE)
    assert m.access(DATA).gpa == DATA
    v.mov_cr4(PAE)
    v.load_cr3(m.cr3)
    v.write_efer(LME | NXE)
    v.mov_cr0(PE | PG | WP)
    assert v.regs.efer == LME | LMA | NXE
    assert m.access(m.mode.user).gpa == DATA
    with pytest.raises(GuestFaultError):
        v.mov_cr0(PE)  # not from 64-bit code
    v.set_sregs(compat=True)
    v.mov_cr0(PE)
    assert v.regs.efer == LME | NXE
    assert m.access(DATA).gpa == DATA


@pytest.mark.parametrize("name", ["cr0", "cr3", "cr4", "efer", "pkru"])
@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_numbers_out_of_range_are_named(name: str, value: int) -> None:
    m = ready()
    regs = m.vcpu.regs
    with pytest.raises(OverflowError, match=name):
        m.vcpu.set_sregs(**{name: value})
    assert m.vcpu.regs == regs


def roots_asked_for(m: Machine) -> int:
    """Shadow pages looked up by an access from here on."""
    m.vm.events.enable()
    m.access(m.mode.user)
    return m.vm.events.text().count("kvm_mmu_get_page")


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_under_tdp_a_change_of_wp_alone_keeps_the_root_and_with_another_bit_drops_it(mmu: str) -> None:
    m = ready(mmu=mmu, tdp_mmu=False)
    m.vcpu.mov_cr0(m.mode.cr0 & ~WP)
    assert roots_asked_for(m) == 0
    m.vcpu.mov_cr0(m.mode.cr0 | 1 << 5)
    assert roots_asked_for(m) == 1


@pytest.mark.parametrize(("mmu", "asked"), [("shadow", 1), ("ept", 0), ("npt", 0)])
def test_switching_pcids_on_drops_the_roots_of_shadow_paging_only(mmu: str, asked: int) -> None:
    m = ready(mmu=mmu, tdp_mmu=False)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    assert roots_asked_for(m) == asked


def test_a_pae_root_needs_a_slot_for_its_pdptes_and_not_only_for_what_they_name() -> None:
    m = Machine("shadow", PAE3)
    table = np.zeros(4096, np.uint8)
    table[:32] = m.ram[m.cr3 : m.cr3 + 32]
    slot = m.vm.memslots.create(gpa=0x2000_0000, memory=table)
    m.map(m.mode.user, DATA)
    m.load_cr3(0x2000_0000)
    assert m.access(m.mode.user).outcome is OK
    m.vm.memslots.delete(slot)
    assert m.access(m.mode.user).outcome is km.Outcome.SHUTDOWN


def test_invlpg_without_paging_leaves_the_record_of_the_last_mmio_page() -> None:
    m = Machine("shadow", FLAT)
    m.access(0x1000_0000)
    before = Snapshot(m.vm._core.snapshot()).vcpus[0].mmio_gva
    m.invlpg(0x1000_0000)
    assert Snapshot(m.vm._core.snapshot()).vcpus[0].mmio_gva == before == 0x1000_0000


LOADS = {
    "CR0.CD": (0, PAE3.cr0 | 1 << 30),
    "CR4.PGE": (4, PAE3.cr4 | PGE),
    "CR3": (3, None),
}


@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.parametrize("load", sorted(LOADS))
def test_pdptes_that_a_register_loads_are_those_the_next_walk_uses(mmu: str, load: str) -> None:
    """SDM vol. 3A section 4.4.1: MOV to CR3, to CR0 changing CD, NW or PG, to CR4 changing PAE, PGE, PSE or SMEP."""
    machine = Machine(mmu, PAE3)
    machine.map(PAE3.user, DATA)
    directory, table = machine.new_table(), machine.new_table()
    machine.poke(directory + 8 * (PAE3.user >> 21 & 511), table | USER)
    machine.poke(table + 8 * (PAE3.user >> 12 & 511), (DATA + 4096) | USER)
    assert [machine.vcpu.access(PAE3.user).gpa for _ in range(4)] == [DATA] * 4
    machine.poke(machine.cr3, directory | P)
    assert machine.vcpu.access(PAE3.user).gpa == DATA
    register, value = LOADS[load]
    assert machine.vcpu.load_register(register, machine.cr3 if value is None else value)
    assert machine.vcpu.regs.pdptes[0] == directory | P
    assert [machine.vcpu.access(PAE3.user).gpa for _ in range(4)] == [DATA + 4096] * 4
