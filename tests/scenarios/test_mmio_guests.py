"""Scenarios S9 to S12, S17 and S19: MMIO faults that are cached, and what the guest's own tables say by now.

All under profile 6.1; S17 under 3.1 as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError
from machine import DATA, FLAT, LONG, LONG5, MMIO, P32, RAM, USER, A, D, Machine, P, U, W
from scene import FLAVOURS, FROM_CACHE, FROM_SPTE, IO, MAPPED, OK, PF, SHADOW, SLOW, TDP, Flavour, Scene, page

shadow = pytest.mark.parametrize("flavour", SHADOW, ids=str)
PAGED = tuple(flavour for flavour in FLAVOURS if flavour.mode.levels)
ROM = 0x2000_0000


# -- S9: the table lags behind


@shadow
def test_s9_a_remapped_address_is_a_device_by_the_record_until_invlpg(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.step()
    stale = s.spte()
    s.set_entry(s.gva, DATA | USER)
    assert any(table.unsync for table in s.vm.page_tables())
    assert s.spte() == stale
    assert s.step().counted == FROM_CACHE
    s.invlpg(s.gva)
    # INVLPG itself drops the mmio spte and maps what the guest's entry says now.
    assert s.mmio_spte() is None and s.spte() != 0
    read = s.step()
    assert (read.outcome, read.result.gpa, read.result.exits) == (OK, DATA, 0)
    assert read.counted == {} and read.events == []


@shadow
def test_s9_a_remapped_address_is_a_device_by_its_spte_when_the_record_names_another_page(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.step()
    far = s.at(32, MMIO + 0x5000)
    s.set_entry(s.gva, DATA | USER)
    assert s.vcpu.access(far).outcome is IO
    generation = s.vm.memslots.generation()
    read = s.step()
    assert (read.outcome, read.counted) == (IO, FROM_SPTE)
    assert read.events == [s.checked(generation, generation), s.handled(), s.matched()]
    s.invlpg(s.gva)
    assert s.step().result.gpa == DATA


@shadow
def test_s9_loading_cr3_brings_the_table_in_line_as_well(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.step()
    s.set_entry(s.gva, DATA | USER)
    s.load_cr3(s.cr3)
    read = s.step()
    assert (read.outcome, read.result.gpa) == (OK, DATA)


# -- S10: the table is write-protected, so KVM makes the store itself


def synced_scene() -> Scene:
    """The guest's level-1 table serves as a directory too: it can never be unsync."""
    s = Scene(Flavour("shadow", LONG))
    s.map(s.mode.user + 0x20_0000, ROM)
    s.vm.memslots.create(gpa=ROM, memory=page(), readonly=True)
    s.track(s.entry_gpa(s.gva))
    assert s.step().outcome is IO
    return s


def test_s10_a_store_that_kvm_emulates_zaps_the_mmio_spte_itself() -> None:
    s = synced_scene()
    assert s.mmio_spte() is not None
    count = s.count("mmu_pte_write", "remote_tlb_flush_requests")
    assert s.set_entry(s.gva, DATA | USER).path is km.Path.EMULATED
    assert s.spte() == 0
    # The processor caches no translation of an entry that always faults: nothing to flush.
    assert count.grown() == {"mmu_pte_write": 1}
    read = s.step()
    assert (read.outcome, read.result.gpa, read.counted) == (OK, DATA, MAPPED)


def test_s10_the_vcpus_record_of_the_gva_outlives_it_until_invlpg() -> None:
    s = synced_scene()
    s.set_entry(s.gva, DATA | USER)
    s.poke(DATA, 0x1122_3344_5566_7788)
    rom_gva = s.mode.user + 0x20_0000
    # Stores to read-only memory are emulated, and then the emulator asks the record for the source.
    how: dict[str, Any] = {"src": s.gva, "code_gva": s.mode.window + DATA + 0x5000, "code_size": 2}
    done = s.vcpu.execute("movs", rom_gva, mmio_read=lambda gpa, size: b"\xee" * size, **how)
    assert [(e.write, e.gpa) for e in done.mmio] == [(False, MMIO), (True, ROM)]
    assert done.mmio[1].data == 0xEEEE_EEEE_EEEE_EEEE
    s.invlpg(s.gva)
    done = s.vcpu.execute("movs", rom_gva, mmio_read=lambda gpa, size: b"\xee" * size, **how)
    assert [(e.write, e.gpa, e.data) for e in done.mmio] == [(True, ROM, 0x1122_3344_5566_7788)]


# -- S11: what was cached was the supervisor's


@shadow
def test_s11_user_code_does_not_get_in_by_what_the_supervisor_cached(flavour: Flavour) -> None:
    s = Scene(flavour, bits=P | W | A | D)
    s.step("w", cpl=0)
    assert s.mmio_spte() == (MMIO >> 12, W, s.vm.memslots.generation())
    assert s.step("w", cpl=0).counted == FROM_CACHE
    walks = s.count("guest_walk")
    refused = s.step("w", cpl=3)
    assert (refused.outcome, refused.result.error_code, refused.result.gva) == (PF, P | W | U, s.gva)
    # The fault is MMIO by the record, but the record's rights refuse user code: the guest's tables are asked.
    assert refused.counted == {"mmio_cache_hit": 1, "pf_guest": 1}
    assert walks["guest_walk"] == 1
    assert refused.events == ["kvm_inj_exception: #PF (0x7)"]
    # Delivering the #PF invalidated the address: the record lost its gva half, the synced table its spte not.
    assert s.step("w", cpl=0).counted == FROM_SPTE


@shadow
def test_s11_a_user_write_is_refused_where_the_guest_lets_users_only_read(flavour: Flavour) -> None:
    s = Scene(flavour, bits=P | U | A)
    assert s.step("r", cpl=3).outcome is IO
    refused = s.step("w", cpl=3)
    assert (refused.outcome, refused.result.error_code) == (PF, P | W | U)
    assert refused.counted["pf_guest"] == 1 and "mmio_exits" not in refused.counted


# -- S12: a read-only slot


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
def test_s12_a_write_to_a_read_only_slot_is_emulated_without_an_spte_and_a_read_maps_it(flavour: Flavour) -> None:
    s = Scene(flavour, gpa=ROM)
    rom = page(0x55)
    s.vm.memslots.create(gpa=ROM, memory=rom, readonly=True)
    if s.mode.levels:
        assert s.access(s.mode.user + 16 * 4096).outcome is OK
    without_spte = {"pf_taken": 1, "pf_emulate": 1, "mmio_exits": 1}
    write = s.step("w", value=1)
    assert (write.outcome, write.result.mmio, write.counted) == (IO, ((ROM, 1),), without_spte)
    assert write.events == []
    assert s.spte() == 0
    read = s.step()
    assert (read.outcome, read.counted) == (OK, MAPPED)
    facts = s.format.decode(s.spte()).facts
    # Mapped, and neither writable nor to be made so: host-W is 0.
    assert (facts["host-writable"], facts["MMU-writable"]) == (False, False)
    assert "W" not in str(facts["rights"])
    assert s.mmio_spte() is None
    mapped = s.spte()
    again = s.step("w", value=1)
    assert (again.outcome, again.counted) == (IO, without_spte)
    assert again.of("mark_mmio_spte", "vcpu_match_mmio", "kvm_mmu_set_spte") == []
    assert s.spte() == mapped
    assert s.step().result.exits == 0
    assert np.array_equal(rom, page(0x55))


# -- S17: the guest of a hypervisor in the guest


def nested(bits: int = USER, **how: Any) -> tuple[Machine, int, int]:
    """A hypervisor's tables for its guest: an L2 page that is RAM, and one that is a device to L1."""
    m = Machine("shadow", how.pop("mode", LONG), **how)
    ncr3 = m.new_table()
    l2_ram, l2_device = 0x5000, 0x40_0000
    m.map(l2_ram, DATA + 0x3000, bits, cr3=ncr3)
    m.map(l2_device, MMIO, bits, cr3=ncr3)
    m.cr3_of_l2 = ncr3  # type: ignore[attr-defined]
    m.vcpu.enter_guest_mode(ncr3)
    m.vm.events.enable(("check_mmio_spte", "handle_mmio_page_fault", "vcpu_match_mmio", "mark_mmio_spte"))
    return m, l2_ram, l2_device


def test_s17_a_reserved_bit_fault_of_an_inner_guest_is_never_answered_by_the_gva_record() -> None:
    m, _, gpa2 = nested()
    served = ("mmio_cache_hit", "mmio_spte_hit", "mmio_slow", "mmio_exits")
    count = m.count(*served)
    assert m.access(gpa2).mmio == ((MMIO, 1),)
    assert count.grown() == {"mmio_slow": 1, "mmio_exits": 1}
    for _ in range(3):
        m.vm.events.drain()
        count = m.count(*served)
        assert m.access(gpa2).mmio == ((MMIO, 1),)
        # By the spte each time; L1's gfn is what the record keeps, and by it the emulator knows the device.
        assert count.grown() == FROM_SPTE
        lines = [line.partition(" ")[0] for line in m.vm.events.text().splitlines()]
        assert lines == ["check_mmio_spte:", "handle_mmio_page_fault:", "vcpu_match_mmio:"]
        assert m.vm.events.text().splitlines()[-1].endswith("Read GPA")


def test_s17_the_same_address_of_the_hypervisor_is_another_thing() -> None:
    m, _, gpa2 = nested()
    m.access(gpa2)
    m.vcpu.leave_guest_mode()
    m.map(gpa2, DATA, USER)  # L1 has memory at the gva that equals the L2 gpa
    result = m.access(gpa2)
    assert (result.outcome, result.gpa) == (OK, DATA)
    # And the other way round: what L1 cached by gva says nothing of L2.
    m.map(gpa2 + 0x1000, MMIO, USER)
    assert [m.access(gpa2 + 0x1000).outcome for _ in range(2)] == [IO, IO]
    m.vcpu.enter_guest_mode(m.cr3_of_l2)  # type: ignore[attr-defined]
    result = m.access(gpa2 + 0x1000)
    assert (result.outcome, result.error_code) == (PF, 1 << 32 | U)


@pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)
def test_s17_kvm_shadows_the_nested_tables_as_user_accesses_whatever_the_privilege_level(mode: Any) -> None:
    m, gpa2, _ = nested(mode=mode)
    for cpl in (0, 3):
        result = m.access(gpa2, "w", cpl=cpl, value=9)
        assert (result.outcome, result.gpa) == (OK, DATA + 0x3000)
    assert m.peek(DATA + 0x3000, 1) == 9
    roles = {table.role >> 17 & 1 for table in m.vm.page_tables()}
    assert roles == {1}  # pages of guest mode are their own
    guarded, gpa2, _ = nested(P | W | A | D, mode=mode)
    result = guarded.access(gpa2, cpl=0)
    # No user page in L1's nested tables: a nested page fault that L1 gets, no exception of L2.
    assert (result.outcome, result.error_code) == (PF, 1 << 32 | P | U)
    assert guarded.vm.stats["pf_guest"] == 0


def test_s17_a_stale_mmio_spte_of_an_inner_guest_is_noticed_by_its_generation() -> None:
    m, _, gpa2 = nested()
    m.access(gpa2)
    m.vm.memslots.create(gpa=MMIO, memory=page(0x77))
    assert m.access(gpa2).outcome is OK


def test_s17_under_the_rules_of_3_1_the_record_of_an_inner_guest_holds_no_gva_either() -> None:
    m, _, gpa2 = nested(behaviour="3.1")
    assert [m.vcpu.access(gpa2).outcome for _ in range(3)] == [IO] * 3
    assert m.vm.stats["mmio_slow"] == 1
    m.vcpu.leave_guest_mode()
    m.map(gpa2, DATA, USER)
    assert m.vcpu.access(gpa2).gpa == DATA


def test_s17_guest_mode_is_for_a_hypervisor_in_long_mode_under_shadow_paging() -> None:
    for m in (Machine("npt"), Machine("ept"), Machine("shadow", P32), Machine("shadow", FLAT)):
        with pytest.raises(ArgumentError, match="guest mode needs"):
            m.vcpu.enter_guest_mode(0x1000)
        assert not m.vcpu.guest_mode
    m = Machine()
    for bad in (0x1001, 1 << 40):
        with pytest.raises(ArgumentError, match="below 2"):
            m.vcpu.enter_guest_mode(bad)
    m.vcpu.enter_guest_mode(m.cr3)
    with pytest.raises(ArgumentError, match="registers of L2"):
        m.vcpu.load_cr3(m.cr3)
    with pytest.raises(ArgumentError, match="registers of L2"):
        m.vcpu.set_sregs(cr3=m.cr3)
    m.vcpu.leave_guest_mode()
    m.vcpu.load_cr3(m.cr3)


# -- S19: two pages


@pytest.mark.parametrize("flavour", PAGED, ids=str)
@pytest.mark.parametrize("second", ["absent", "supervisor"])
def test_s19_a_fault_in_the_second_page_comes_before_any_exit_of_the_first(flavour: Flavour, second: str) -> None:
    s = Scene(flavour)
    if second == "supervisor":
        s.at(1, MMIO + 0x1000, P | W | A | D)
    for warm in (False, True):
        read = s.step("r", s.gva + 4096 - 3, size=8, cpl=3)
        code = U if second == "absent" else P | U
        assert (read.outcome, read.result.error_code, read.result.gva) == (PF, code, s.gva + 4096)
        assert read.result.mmio == ()
        assert read.counted["pf_guest"] == 1
        assert "mmio_exits" not in read.counted
        assert (read.counted.get("mmio_slow", 0) == 0) == warm


@pytest.mark.parametrize("flavour", PAGED, ids=str)
def test_s19_without_the_fault_both_pieces_leave(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.at(1, MMIO + 0x8000)
    read = s.step("r", s.gva + 4096 - 3, size=8)
    assert read.result.mmio == ((MMIO + 4093, 3), (MMIO + 0x8000, 5))
    assert (read.outcome, read.counted["mmio_exits"]) == (IO, 1)


@pytest.mark.parametrize("flavour", TDP, ids=str)
def test_s19_half_memory_half_device_moves_the_memory_half_only(flavour: Flavour) -> None:
    s = Scene(flavour)
    s.at(1, DATA + 0x1000)
    read = s.step("r", s.gva + 4096 - 3, size=8)
    assert read.result.mmio == ((MMIO + 4093, 3),)
    assert read.counted["mmio_slow"] == SLOW["mmio_slow"]
    assert RAM > DATA + 0x1000
