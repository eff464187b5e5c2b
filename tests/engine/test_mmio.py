"""MMIO: how an access to no memory is found, remembered, and forgotten when slots or tables change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import InvariantError
from machine import DATA, FLAT, LONG, MMIO, MMUS, P32, PAGING, USER, Machine, Mode, P, U, W

OK, IO, PF = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF
SERVED = ("mmio_cache_hit", "mmio_spte_hit", "mmio_slow", "pf_taken", "pf_emulate", "pf_mmio_spte_created")
SLOW = {"mmio_slow": 1, "pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1}
FROM_CACHE = {"mmio_cache_hit": 1}
FROM_SPTE = {"mmio_spte_hit": 1}
FLAVOURS = [("shadow", True), ("ept", True), ("ept", False), ("npt", True), ("npt", False)]


def device(mmu: str = "shadow", tdp_mmu: bool = True, mode: Mode = LONG, gpa: int = MMIO, **how: Any) -> Machine:
    """A machine whose ``user`` page is a device."""
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu, **how)
    if mode.levels:
        m.map(mode.user, gpa, USER)
    return m


def where(m: Machine) -> int:
    return m.mode.user if m.mode.levels else MMIO


def page(n: int = 1) -> np.ndarray[Any, Any]:
    return np.zeros(4096 * n, np.uint8)


def served(m: Machine, gva: int, kind: str = "r", **how: Any) -> dict[str, int]:
    count = m.count(*SERVED)
    assert m.access(gva, kind, **how).outcome is IO
    return count.grown()


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
@pytest.mark.parametrize("mode", (FLAT, *PAGING), ids=lambda mode: mode.name)
def test_the_first_access_makes_an_mmio_spte_and_the_next_needs_no_slot_search(
    mmu: str, tdp_mmu: bool, mode: Mode
) -> None:
    m = device(mmu, tdp_mmu, mode)
    gva = where(m)
    # A fault on the way may be one of the guest's own tables, so only what MMIO did is compared.
    first, second = served(m, gva), served(m, gva)
    assert {name: first[name] for name in ("mmio_slow", "pf_mmio_spte_created")} == {
        "mmio_slow": 1,
        "pf_mmio_spte_created": 1,
    }
    assert second == FROM_CACHE


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_another_vcpu_finds_the_mmio_spte_of_the_first(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user)
    m.vcpu = m.vm.create_vcpu()
    m.start()
    assert served(m, m.mode.user) == FROM_SPTE
    assert served(m, m.mode.user) == FROM_CACHE


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_a_slot_created_over_a_device_is_memory_at_once(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user)
    ram = page()
    ram[:4] = 0x11
    m.vm.memslots.create(gpa=MMIO, memory=ram)
    count = m.count()
    result = m.access(m.mode.user)
    assert (result.outcome, result.gpa) == (OK, MMIO)
    assert (count["pf_taken"], count["pf_fixed"], count["mmio_spte_hit"]) == (1, 1, 0)
    assert m.vcpu.read(m.mode.user, 4) == b"\x11\x11\x11\x11"


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_an_unrelated_slot_costs_one_slow_access_and_no_zap(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user)
    m.vm.memslots.create(gpa=MMIO + 0x10_0000, memory=page())
    count = m.count("mmu_shadow_zapped")
    assert served(m, m.mode.user) == SLOW
    assert served(m, m.mode.user) == FROM_CACHE
    assert count["mmu_shadow_zapped"] == 0


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_flags_of_a_slot_count_as_a_change_too(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user)
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    # Dirty logging protects what was mapped, so under EPT and NPT a table is faulted in anew as well.
    grown = served(m, m.mode.user)
    assert (grown["mmio_slow"], grown["pf_mmio_spte_created"], grown.get("mmio_cache_hit", 0)) == (1, 1, 0)


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_a_deleted_slot_becomes_a_device_and_a_recreated_one_memory_again(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    ram = page()
    slot = m.vm.memslots.create(gpa=MMIO, memory=ram)
    assert m.access(m.mode.user, "w", value=7).outcome is OK
    m.vm.memslots.delete(slot)
    assert m.access(m.mode.user).outcome is IO
    m.vm.memslots.create(gpa=MMIO, memory=ram)
    assert m.access(m.mode.user).outcome is OK
    assert m.vcpu.read(m.mode.user, 1) == b"\x07"


def test_under_the_rules_of_3_1_a_slot_recreated_at_its_base_stays_a_device() -> None:
    # The zap compared bases only: delete and create at the same one changed nothing.
    m = device(behaviour="3.1")
    slot = m.vm.memslots.create(gpa=MMIO, memory=page(), slot=5)
    m.vm.memslots.delete(slot)
    served(m, m.mode.user)
    m.vm.memslots.create(gpa=MMIO, memory=page(), slot=5)
    assert served(m, m.mode.user) == FROM_CACHE


def test_under_the_rules_of_3_1_a_slot_at_another_base_zaps_everything() -> None:
    m = device(behaviour="3.1")
    served(m, m.mode.user)
    count = m.count()
    m.vm.memslots.create(gpa=MMIO, memory=page(), slot=5)
    assert count["mmu_shadow_zapped"] > 0
    assert m.access(m.mode.user).outcome is OK


def test_gfn_0_is_never_found_by_its_gpa_but_by_its_mmio_spte() -> None:
    # 0 marks an empty record, so the gpa half can never name gfn 0.
    m = Machine("ept", FLAT)
    m.vm.memslots.delete(m.slot)
    assert served(m, 0)["mmio_slow"] == 1
    assert served(m, 0) == FROM_SPTE
    assert served(m, 0) == FROM_SPTE


def test_gva_0_is_never_found_by_its_gva() -> None:
    m = Machine("shadow", LONG)
    m.map(0, MMIO)
    assert served(m, 0) == SLOW
    assert served(m, 0) == FROM_SPTE
    assert served(m, 8) == FROM_SPTE


def test_gfn_0_gets_memory_under_the_rules_of_3_1_only_when_a_base_changed() -> None:
    m = Machine("shadow", FLAT, behaviour="3.1")
    m.vm.memslots.delete(m.slot)
    served(m, 0)
    m.vm.memslots.create(gpa=0, memory=page(), slot=9)  # a new slot's last base counts as 0
    for _ in range(2):
        # The stale mmio spte sends it to the emulator, which finds memory because no record names gfn 0.
        result = m.access(0)
        assert (result.outcome, result.path, result.gpa) == (OK, km.Path.EMULATED, 0)


@pytest.mark.parametrize("mmu", MMUS)
def test_the_last_gfn_that_an_mmio_spte_can_hold(mmu: str) -> None:
    host, guest = km.HostCpu(maxphyaddr=46), km.GuestCpu(maxphyaddr=46)
    m = device(mmu, gpa=(1 << 46) - 4096, host=host, cpu=guest)
    assert served(m, m.mode.user)["pf_mmio_spte_created"] == 1
    result = m.access(m.mode.user + 0xFF0, size=8)
    assert (result.outcome, result.mmio) == (IO, (((1 << 46) - 16, 8),))


def test_a_gfn_the_host_cannot_address_is_emulated_without_an_spte() -> None:
    m = device(gpa=1 << 45, host=km.HostCpu(maxphyaddr=40), cpu=km.GuestCpu(maxphyaddr=46))
    for _ in range(2):
        grown = served(m, m.mode.user)
        assert grown == {"mmio_slow": 1, "pf_taken": 1, "pf_emulate": 1}


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
def test_a_host_of_52_address_bits_has_no_reserved_bit_to_mark_mmio_with(mmu: str) -> None:
    m = device(mmu, host=km.HostCpu(maxphyaddr=52, la57=True))
    served(m, m.mode.user)
    for _ in range(3):
        assert served(m, m.mode.user) == {"mmio_slow": 1, "pf_taken": 1, "pf_emulate": 1}


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_with_caching_off_every_access_is_slow_and_no_spte_is_made(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu, mmio_scheme="off")
    served(m, m.mode.user)
    assert served(m, m.mode.user) == {"mmio_slow": 1, "pf_taken": 1, "pf_emulate": 1}


def test_a_vcpus_record_does_not_outlive_the_slots_it_was_made_under_even_with_caching_off() -> None:
    m = device(mmio_scheme="off")
    served(m, m.mode.user)
    m.vm.memslots.create(gpa=MMIO, memory=page(), readonly=True)
    # A write to read-only memory is emulated: were the record believed, the read below would be MMIO as well.
    assert m.access(m.mode.user, "w").outcome is IO
    assert m.access(m.mode.user, "r").outcome is OK


@pytest.mark.parametrize("l1tf_bits", [36, 39, 44])
def test_the_l1tf_split_of_an_mmio_spte_keeps_every_gfn(l1tf_bits: int) -> None:
    host = km.HostCpu(maxphyaddr=46, l1tf=True, cache_bits=l1tf_bits)
    m = Machine("shadow", LONG, host=host, cpu=km.GuestCpu(maxphyaddr=46))
    gpas = [1 << bit for bit in range(28, l1tf_bits)] + [(1 << l1tf_bits) - 4096]
    for i, gpa in enumerate(gpas):
        m.map(m.mode.user + i * 4096, gpa)
    for i, gpa in enumerate(gpas):
        served(m, m.mode.user + i * 4096)
    m.vcpu = m.vm.create_vcpu(km.GuestCpu(maxphyaddr=46))
    m.start()
    for i, gpa in enumerate(gpas):
        assert m.access(m.mode.user + i * 4096 + 4, size=4).mmio == ((gpa + 4, 4),)


# -- what the guest's tables say


def test_a_remapped_gva_stays_a_device_until_invlpg() -> None:
    m = device()
    served(m, m.mode.user)
    m.set_entry(m.mode.user, DATA | USER)
    assert served(m, m.mode.user) == FROM_CACHE
    m.invlpg(m.mode.user)
    result = m.access(m.mode.user)
    assert (result.outcome, result.gpa) == (OK, DATA)


def test_without_the_record_the_mmio_spte_of_a_lagging_table_still_answers() -> None:
    m = device()
    served(m, m.mode.user)
    far = m.mode.user + 0x9000  # outside the window that a fault fills
    m.map(far, MMIO + 0x1000)
    m.set_entry(m.mode.user, DATA | USER)
    served(m, far)  # the record names another page now
    assert served(m, m.mode.user) == FROM_SPTE


def test_a_store_that_kvm_emulates_removes_the_mmio_spte_itself() -> None:
    m = device()
    served(m, m.mode.user)
    m.track(m.entry_gpa(m.mode.user))
    served(m, m.mode.user)
    assert m.set_entry(m.mode.user, DATA | USER).path is km.Path.EMULATED
    # The record still names the gva, but without a reserved-bit fault nobody asks it.
    assert m.access(m.mode.user).gpa == DATA


def test_the_gva_half_of_the_record_goes_with_invlpg_and_the_gpa_half_stays() -> None:
    m = device()
    served(m, m.mode.user)
    m.vm.events.enable("vcpu_match_mmio")
    m.access(m.mode.user)
    assert "GVA" in m.vm.events.text()
    m.invlpg(m.mode.user)
    m.access(m.mode.user)  # the mmio spte fills the gva half again
    m.vm.events.disable()
    assert served(m, m.mode.user) == FROM_CACHE


def test_a_record_made_by_the_supervisor_does_not_let_user_code_in() -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, MMIO, P | W | 0x60)  # a supervisor page
    served(m, m.mode.user, "w", cpl=0)
    result = m.access(m.mode.user, "w", cpl=3)
    assert (result.outcome, result.error_code) == (PF, 7)
    assert served(m, m.mode.user, "w", cpl=0) != {}


@pytest.mark.parametrize("kind", ["r", "w"])
@pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
def test_a_read_only_mapping_of_a_device_refuses_writes_however_it_was_cached(mode: Mode, kind: str) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, MMIO, P | U | 0x60)
    assert served(m, mode.user, "r", cpl=3)["mmio_slow"] == 1
    for _ in range(2):
        result = m.access(mode.user, kind, cpl=3)
        assert result.outcome is (IO if kind == "r" else PF)


def test_the_first_write_after_reads_sets_the_guests_dirty_bit() -> None:
    m = Machine("shadow", LONG)
    where = m.map(m.mode.user, MMIO, P | W | U)
    served(m, m.mode.user, "r")
    assert m.peek(where) & 0x60 == 0x20
    served(m, m.mode.user, "w")
    assert m.peek(where) & 0x60 == 0x60


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_a_device_page_can_be_read_and_written_by_both_halves_of_the_record(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user, "w")
    for kind in "rwrw":
        assert served(m, m.mode.user + 0x100, kind) == FROM_CACHE


# -- read-only slots


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_a_write_to_a_read_only_slot_leaves_the_vm_and_a_read_does_not(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu, gpa=0x2000_0000)
    rom = page()
    rom[0] = 0x55
    m.vm.memslots.create(gpa=0x2000_0000, memory=rom, readonly=True)
    count = m.count()
    assert m.access(m.mode.user, "w", value=1).outcome is IO
    assert count["pf_mmio_spte_created"] == 0
    assert m.access(m.mode.user).outcome is OK
    assert m.vcpu.read(m.mode.user, 1) == b"\x55"
    count = m.count()
    assert m.access(m.mode.user).exits == 0
    result = m.access(m.mode.user, "w", value=1)
    assert (result.outcome, result.path) == (IO, km.Path.EMULATED)
    assert m.access(m.mode.user).exits == 0  # the mapping stayed
    assert rom[0] == 0x55
    assert count["mmio_cache_hit"] == 0  # such writes are not remembered


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_a_slot_over_a_device_may_be_read_only(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    served(m, m.mode.user)
    m.vm.memslots.create(gpa=MMIO, memory=page(), readonly=True)
    assert m.access(m.mode.user).outcome is OK
    assert m.access(m.mode.user, "w").outcome is IO


# -- generations


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
def test_when_the_stored_generation_wraps_everything_is_zapped_once(mmu: str, tdp_mmu: bool) -> None:
    m = device(mmu, tdp_mmu)
    far = 0x2000_0000
    m.vm.memslots.create(gpa=far, memory=page(), slot=1)
    flags = False
    for _ in range((1 << 18) - 8 - m.vm.memslots.generation() // 2):
        flags = not flags
        m.vm._core.set_region(1, int(flags), far, None, None, 0, 0)
    served(m, m.mode.user)
    valid = m.vm._core.mmu_valid_gen
    zaps = 0
    for _ in range(16):
        flags = not flags
        m.vm._core.set_region(1, int(flags), far, None, None, 0, 0)
        zaps += m.vm._core.mmu_valid_gen != valid
        valid = m.vm._core.mmu_valid_gen
    assert zaps == 1
    assert m.vm.memslots.generation() >> 19 == 1
    assert m.access(m.mode.user).outcome is IO
    m.vm.check()


def test_a_sync_renews_an_mmio_spte_although_a_slot_stands_there_by_now() -> None:
    """Linux 6.1 rewrites a same-gfn mmio spte with the current generation and does not look for a slot."""
    m = device()
    served(m, m.mode.user)
    m.set_entry(m.mode.user + 0x5000, 0)  # the table is unsync from here on
    m.vm.memslots.create(gpa=MMIO, memory=page())
    m.vcpu.sync_roots()
    with pytest.raises(InvariantError, match="a sync renews"):
        m.vm.check(holes=True)
    m.vm.check()  # not reported unless asked for
    assert m.vcpu.access(m.mode.user).outcome is IO


# -- devices


def test_a_registered_device_completes_the_access() -> None:
    m = device(mode=P32)
    seen: list[tuple[int, int, int]] = []
    m.vm.mmio.register(MMIO, 0x100, read=lambda gpa, size: gpa & 0xFF, write=lambda *call: seen.append(call))
    assert m.vcpu.read(m.mode.user + 0x10, 4) == b"\x10\x00\x00\x00"
    m.vcpu.write(m.mode.user + 0x20, b"\x01\x02")
    assert seen == [(MMIO + 0x20, 2, 0x0201)]
