"""Scenario S15 in a VM: a TDX guest gets #VE where no memory is, and exits only to be given an entry that says so."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError, GuestFaultError
from machine import DATA, FLAT, LONG, MMIO, MODES, USER, Machine, Mode
from scene import COUNTED, HANG, IO, OK

VE = km.Outcome.VE
HARDWARE, FAULT = km.Path.HARDWARE, km.Path.FAULT
EMPTY = 1 << 63  # suppress #VE: an access exits
MiB = 1 << 20
modes = pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)


def guest(mode: Mode = FLAT, **how: Any) -> Machine:
    return Machine("ept", mode, tdx=True, **how)


def entry(m: Machine, gpa: int) -> int:
    """The entry that ends the walk of a gpa."""
    return m.vcpu.walk_sptes(gpa)[-1][1]


def assert_every_entry_says_whether_to_exit(m: Machine) -> None:
    """Bit 63 is set in whatever is no mmio spte: in mappings, tables, and where there is nothing."""
    words = m.vm.page_tables(m.vcpu, all=True).sptes
    mmio = m.vm.spte_format.is_mmio(words)
    empty = ~mmio & (words & np.uint64(1 << 11) == 0)
    assert np.all(words[empty] == np.uint64(EMPTY))
    assert np.all(words[~mmio] >> np.uint64(63) == 1)


@modes
@pytest.mark.parametrize("kind", ["r", "w", "x"])
def test_the_first_access_exits_once_and_every_later_one_is_a_ve_without_an_exit(mode: Mode, kind: str) -> None:
    m = guest(mode)
    gva = MMIO if mode is FLAT else mode.user
    if mode is not FLAT:
        m.map(gva, MMIO)
        m.access(m.mode.window, "r")
    count = m.count(*COUNTED)
    result = m.access(gva + 8, kind)
    assert (result.outcome, result.path, result.exits) == (VE, FAULT, 1 if mode is FLAT else result.exits)
    assert (result.gpa, result.gva) == (MMIO + 8, gva + 8)
    grown = count.grown()
    assert (grown["pf_mmio_spte_created"], grown["pf_emulate"]) == (1, 1)
    # KVM cannot emulate: it sees no register of the guest.
    assert "mmio_exits" not in grown and "pf_guest" not in grown
    assert m.vm.spte_format.mmio_decode(entry(m, MMIO)).gfn == MMIO >> 12
    count = m.count()
    for _ in range(3):
        result = m.access(gva + 8, kind)
        assert (result.outcome, result.path, result.exits) == (VE, HARDWARE, 0)
        assert (result.gpa, result.gva) == (MMIO + 8, gva + 8)
    assert count.grown() == {}


@pytest.mark.parametrize(("kind", "bit"), [("r", 1), ("w", 2), ("x", 4)])
def test_the_information_of_a_ve_is_that_of_the_exit_it_replaces(kind: str, bit: int) -> None:
    m = guest()
    # The linear address is valid (bit 7), and its translation, not a table's, was refused (bit 8).
    assert m.access(MMIO, kind).error_code == 0x180 | bit


def test_a_guest_table_where_no_memory_is_names_the_table() -> None:
    m = guest(LONG)
    m.map(m.mode.user, MMIO + 0x1000, level=2)
    m.poke(m.entry_gpa(m.mode.user, 2), MMIO | USER)  # a table at MMIO
    result = m.access(m.mode.user + 5 * 4096)
    assert (result.outcome, result.gpa, result.gva) == (VE, MMIO + 5 * 8, m.mode.user + 5 * 4096)
    assert result.error_code & 0x180 == 0x080


def test_of_an_access_across_pages_the_part_without_memory_is_named() -> None:
    m = guest()
    end = m.ram.size
    result = m.access(end - 4, "w", size=8, value=1)
    assert (result.outcome, result.gpa, result.gva) == (VE, end, end)
    assert not m.ram[end - 4 :].any()


def test_nothing_of_it_is_kvms_to_trace() -> None:
    m = guest()
    m.access(MMIO)
    m.vm.events.enable()
    assert m.access(MMIO).outcome is VE
    assert not m.vm.events.text(m.vm.events.drain())


def test_columns_instructions_and_transfers_end_in_the_same_ve() -> None:
    m = guest()
    column = m.vcpu.access_many([MMIO, MMIO, DATA], "w", size=4)
    assert column["outcome"].tolist() == [VE, VE, OK]
    assert column["exits"].tolist() == [1, 0, 1]
    assert column["gpa"].tolist() == [MMIO, MMIO, DATA]
    done = m.vcpu.execute("add", MMIO + 0x1000, size=4, value=1)
    assert (done.result.outcome, done.result.exits, done.mmio) == (VE, 1, ())
    with pytest.raises(GuestFaultError, match="VE, path=HARDWARE"):
        m.vcpu.read(MMIO, 4)


def test_another_vcpu_finds_the_entry() -> None:
    m = guest()
    m.access(MMIO)
    m.vcpu = m.vm.create_vcpu()
    assert (m.access(MMIO).outcome, m.access(MMIO).exits) == (VE, 0)


def test_a_tlb_changes_nothing() -> None:
    m = guest(LONG, tlb=km.Tlb())
    m.map(m.mode.user, MMIO)
    m.map(m.mode.user + 0x1000, DATA)
    assert m.access(m.mode.user + 0x1000).outcome is OK
    assert [m.access(m.mode.user).exits for _ in range(3)] == [1, 0, 0]
    assert m.access(m.mode.user + 0x1000).exits == 0


def test_a_vm_that_is_no_tdx_guest_is_as_it_was() -> None:
    m = Machine("ept", FLAT)
    assert not m.vm.tdx
    assert (m.access(MMIO).outcome, m.access(MMIO).outcome) == (IO, IO)
    assert m.access(MMIO).exits == 1
    assert m.vm.spte_format.empty == 0
    assert not (m.vm.page_tables().sptes >> np.uint64(63)).any()


# -- what exits all the same


def test_what_stands_beside_an_mmio_spte_exits_and_is_mapped() -> None:
    m = guest()
    m.access(MMIO)
    m.vm.memslots.create(gpa=MMIO + 0x1000, memory=np.zeros(4096, np.uint8))
    result = m.access(MMIO + 0x1000, "w")
    assert (result.outcome, result.exits) == (OK, 1)


def test_a_store_to_a_page_of_the_dirty_log_exits_and_is_logged() -> None:
    m = guest()
    m.access(DATA, "w")
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    m.vm.get_dirty_log(m.slot)
    assert m.access(DATA, "r").exits == 0
    result = m.access(DATA, "w")
    assert (result.outcome, result.exits) == (OK, 1)
    assert int(m.vm.get_dirty_log(m.slot)[DATA >> 18]) == 1


def test_before_protected_mode_and_while_an_exception_is_delivered_there_is_no_ve() -> None:
    # KVM cannot emulate there either: a real guest would exit for ever.
    m = guest()
    assert m.vcpu.regs.cr0 == 1  # a TDX guest begins in protected mode
    m.access(MMIO)
    assert m.vcpu.execute("load", MMIO, vectoring=14).result.outcome is HANG
    assert m.vcpu.execute("load", MMIO).result.outcome is VE
    m.start(cr0=0)
    assert m.access(MMIO).outcome is HANG
    m.start(cr0=1)
    assert (m.access(MMIO).outcome, m.access(MMIO).exits) == (VE, 0)


def test_a_store_to_a_read_only_slot_hangs_because_nobody_can_emulate_it() -> None:
    m = guest()
    m.vm.memslots.create(gpa=MMIO, memory=np.zeros(4096, np.uint8), readonly=True)
    assert m.access(MMIO, "r").outcome is OK
    assert m.access(MMIO, "w").outcome is HANG


# -- what KVM takes away


def test_a_slot_created_over_an_mmio_spte_does_not_show_until_the_tree_is_rebuilt() -> None:
    # No access exits, so nobody compares the generation: the guest asks KVM, and learns it there.
    m = guest()
    m.access(MMIO)
    slot = m.vm.memslots.create(gpa=MMIO, memory=np.zeros(4096, np.uint8))
    assert (m.access(MMIO).outcome, m.access(MMIO).exits) == (VE, 0)
    m.vm.memslots.delete(m.vm.memslots.create(gpa=1 << 32, memory=np.zeros(4096, np.uint8)))
    assert (m.access(MMIO).outcome, m.access(MMIO).exits) == (OK, 0)
    m.vm.memslots.delete(slot)
    assert [m.access(MMIO).exits for _ in range(2)] == [1, 0]


def test_memory_taken_back_by_the_host_leaves_an_entry_that_exits() -> None:
    m = guest()
    m.access(DATA, "w")
    m.vm.host_dontneed(m.slot, first_page=DATA >> 12, npages=1)
    assert entry(m, DATA) == EMPTY
    assert_every_entry_says_whether_to_exit(m)
    assert (m.access(DATA).outcome, m.access(DATA).exits) == (OK, 0)


def test_logging_splits_and_collapses_large_pages_into_entries_that_exit() -> None:
    m = guest(page_size="2M")
    for gpa in (DATA, DATA + 2 * MiB, MMIO):
        m.access(gpa, "w")
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    assert m.vm.stats["pages_2m"] == 0
    assert_every_entry_says_whether_to_exit(m)
    m.vm.memslots.set_flags(m.slot, log_dirty=False)
    assert m.vm.stats["pages_4k"] == 0
    assert entry(m, DATA) == EMPTY
    assert_every_entry_says_whether_to_exit(m)
    assert m.access(DATA, "w").outcome is OK
    assert m.vm.stats["pages_2m"] == 1


def test_a_recovered_huge_page_leaves_an_entry_that_exits() -> None:
    m = guest(page_size="2M", nx_huge_pages=True)
    m.access(DATA, "x")
    assert m.vm.recover_nx_huge_pages(1) == 1
    assert entry(m, DATA) == EMPTY
    assert_every_entry_says_whether_to_exit(m)
    assert m.access(DATA, "x").outcome is OK


def test_a_page_used_again_has_no_entry_of_before() -> None:
    m = guest()
    for n in range(4):
        m.access(DATA + n * 2 * MiB % m.ram.size, "w")
        m.access(MMIO)
        m.vm.memslots.delete(m.slot)
        m.slot = m.vm.memslots.create(gpa=0, memory=m.ram)
        m.access(DATA)
        assert_every_entry_says_whether_to_exit(m)


@pytest.mark.parametrize("seed", range(4))
def test_the_entry_met_says_of_each_access_whether_it_exits(seed: int) -> None:
    pick = random.Random(seed)
    m = guest(page_size=pick.choice(["4K", "2M"]), nx_huge_pages=pick.random() < 0.5)
    other = np.zeros(2 * MiB, np.uint8)
    slot = None
    seen: set[km.Outcome] = set()
    for _ in range(300):
        step = pick.randrange(12)
        if step == 0:
            slot = m.vm.memslots.create(gpa=MMIO, memory=other) if slot is None else m.vm.memslots.delete(slot)
        elif step == 1:
            m.vm.memslots.set_flags(m.slot, log_dirty=pick.random() < 0.5)
        elif step == 2:
            m.vm.host_dontneed(m.slot, first_page=pick.randrange(2048), npages=1)
        elif step == 3:
            m.vm.recover_nx_huge_pages(pick.choice([1, 2]))
        else:
            gpa = pick.choice([DATA, DATA + MiB, MMIO, MMIO + MiB, 0]) + pick.randrange(4) * 4096
            before = m.vcpu.walk_sptes(gpa)
            mmio = bool(before) and bool(m.vm.spte_format.is_mmio(before[-1][1]))
            result = m.access(gpa, pick.choice("rwx"))
            if mmio:
                assert (result.outcome, result.exits) == (VE, 0)
            else:
                wanted = OK if gpa < m.ram.size or slot is not None else VE
                assert (result.outcome, result.exits > 0 or wanted is OK) == (wanted, True)
            seen.add(result.outcome)
        assert_every_entry_says_whether_to_exit(m)
        m.vm.check()
    assert seen == {OK, VE}


def test_vcpus_that_fault_beside_each_other_leave_the_same_entries() -> None:
    m = guest(page_size="2M")
    vcpus = [m.vm.create_vcpu() for _ in range(3)]
    gpas = np.concatenate([np.arange(n, n + 64) << 12 for n in (DATA >> 12, MMIO >> 12)]).astype(np.uint64)
    wrong: list[str] = []

    def run(vcpu: km.VCpu, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(40):
            order = rng.permutation(gpas)
            outcomes = vcpu.access_many(order, "w")["outcome"]
            if not np.array_equal(outcomes == VE, order >= MMIO):
                wrong.append(f"seed {seed}")

    threads = [threading.Thread(target=run, args=(vcpu, n)) for n, vcpu in enumerate(vcpus)]
    for thread in threads:
        thread.start()
    for n in range(20):
        m.vm.memslots.set_flags(m.slot, log_dirty=n % 2 == 0)
        m.vm.host_dontneed(m.slot, first_page=DATA >> 12, npages=64)
    for thread in threads:
        thread.join()
    assert not wrong
    m.vm.check()
    assert_every_entry_says_whether_to_exit(m)


# -- in words


def test_the_entries_and_the_ve_are_said_in_words() -> None:
    m = guest()
    m.access(MMIO)
    text = m.vcpu.explain(MMIO)
    assert "that is mmio: gfn 0x10000;" in text
    assert "EPT violation(0x1: read), #VE in the guest: the level 1 entry is not present" in text
    assert "#VE" not in m.vcpu.explain(MMIO + 0x1000)
    assert m.vcpu.explain_sptes(MMIO + 0x1000).endswith("level 1 (4 KiB): empty")
    kinds = {e.kind for page in m.vm.page_tables() for e in page.entries}
    assert kinds == {"table", "mmio"}
    assert repr(m.vm) == "VM(mmu='ept', behaviour='6.1', tdx=True: 1 slots)"


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"mmu": "npt"}, "mmu is 'npt'; allowed is 'ept'"),
        ({"mmu": "shadow"}, "mmu is 'shadow'"),
        ({"host": km.HostCpu(vendor="amd")}, "HostCpu.vendor is 'amd'"),
        ({"host": km.HostCpu(mmio_masks=(6, 7, 0))}, "HostCpu.mmio_masks is"),
        ({"tdp_mmu": False}, "tdp_mmu is False; allowed is True"),
        ({"behaviour": "3.1"}, "tdp_mmu is False"),
        ({"behaviour": "3.1", "tdp_mmu": True}, "behaviour.switches is .'mmio_wide'."),
        ({"mmio_scheme": "off"}, "mmio_scheme is 'off'"),
    ],
)
def test_hosts_and_behaviours_without_tdx_guests_are_refused(how: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=f"tdx is True and {named}"):
        km.VM(**{"mmu": "ept", "tdx": True} | how)
    with pytest.raises(TypeError, match="tdx must be True or False"):
        km.VM("ept", tdx=1)  # type: ignore[arg-type]
