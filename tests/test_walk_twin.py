"""The walk of the kernels against one written from the manual: random tables, registers and processors."""

import random

import numpy as np
import pytest

import walk_twin as twin
from kvmmmu.cpu import GuestCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.paging import Paging
from kvmmmu.walks import Fault

PAGES = 16
FAULTS = {Fault.NONE: twin.NONE, Fault.PF: twin.PF, Fault.GP: twin.GP}


def cpu_of(pick: random.Random, mode: str) -> twin.Cpu:
    cr4 = {"32": 0, "pae": 1 << 5, "4": 1 << 5, "5": 1 << 5 | 1 << 12, "compat": 1 << 5, "none": 0}[mode]
    for number in (twin.PSE, twin.SMEP, twin.SMAP, *((twin.PKE,) if mode in ("4", "5") else ())):
        cr4 |= pick.getrandbits(1) << number
    efer = 0x500 if mode in ("4", "5", "compat") else 0
    return twin.Cpu(
        cr0=1 | (mode != "none") << 31 | pick.getrandbits(1) << 16,
        cr3=0,
        cr4=cr4,
        efer=efer | pick.getrandbits(1) << 11,
        pkru=pick.getrandbits(32) if pick.getrandbits(1) else 0,
        maxphyaddr=pick.choice((36, 39, 40, 42, 46, 48, 52)),
        gbpages=bool(pick.getrandbits(1)),
        compat=mode == "compat",
    )


def entry_of(pick: random.Random, size: int) -> int:
    """Mostly usable, now and then anything."""
    if pick.random() < 0.04:
        return pick.getrandbits(8 * size)
    entry = pick.randrange(PAGES) << 12 | 7
    for number, chance in ((0, 0.03), (1, 0.2), (2, 0.2)):
        if pick.random() < chance:
            entry &= ~(1 << number)
    for number, chance in ((5, 0.5), (6, 0.5), (7, 0.25), (8, 0.3), (13, 0.05), (20, 0.05), (21, 0.05)):
        if pick.random() < chance:
            entry |= 1 << number
    if size == 8:
        entry |= pick.getrandbits(4) << 59 if pick.random() < 0.4 else 0
        entry |= 1 << 63 if pick.random() < 0.15 else 0
        entry |= 1 << pick.randrange(30, 59) if pick.random() < 0.1 else 0
    return entry


def address_of(pick: random.Random, mode: str) -> int:
    """Low indexes, so that few entries are many addresses; sign-extended, or seldom not."""
    index, levels = (10, 2) if mode == "32" else (9, {"5": 5}.get(mode, 4))
    gva = pick.randrange(4096)
    for level in range(levels):
        gva |= pick.choice((0, 1, 2, 3, (1 << index) - 1)) << 12 + index * level
    if mode in ("4", "5"):
        top = 12 + 9 * levels
        if gva >> top - 1 & 1 and pick.random() < 0.9:
            gva |= (1 << 64) - (1 << top)
    elif pick.random() < 0.9:
        gva &= 0xFFFFFFFF
    return gva


@pytest.mark.parametrize("mode", ["none", "32", "pae", "4", "5", "compat"])
def test_every_answer_and_every_bit_set_is_the_manuals(mode: str) -> None:
    pick = random.Random(f"walks {mode}")
    size = 4 if mode == "32" else 8
    places = [0, 1, 2, 3, 4096 // size - 1]
    seen = {twin.NONE: 0, twin.PF: 0, twin.GP: 0}
    errors = set()
    for _ in range(250):
        cpu = cpu_of(pick, mode)
        memory = np.zeros(PAGES * 4096, np.uint8)
        words = memory.view(np.uint32 if size == 4 else np.uint64)
        for page in range(PAGES):
            for place in places:
                words[page * (4096 // size) + place] = entry_of(pick, size)
        cpu.cr3 = pick.randrange(PAGES) << 12 | pick.choice((0, 0x18, 0x20 if mode == "pae" else 0))
        if mode == "pae":
            cpu.pdptes = tuple((pick.randrange(PAGES) << 12 | 1) if pick.random() < 0.8 else 0 for _ in range(4))
        guest = GuestCpu(maxphyaddr=cpu.maxphyaddr, gbpages=cpu.gbpages)
        paging = Paging(
            cpu.cr0,
            cpu.cr3,
            cpu.cr4,
            cpu.efer,
            guest,
            pkru=cpu.pkru,
            memory=memory,
            compat=cpu.compat,
            pdptes=cpu.pdptes or None,
        )

        def read(gpa: int, count: int, memory: np.ndarray = memory) -> int:
            return int.from_bytes(memory[gpa : gpa + count].tobytes(), "little") if gpa < memory.size else 0

        for _ in range(40):
            gva = address_of(pick, mode)
            access, user = pick.choice("rwx"), bool(pick.getrandbits(1))
            ac, implicit = bool(pick.getrandbits(1)), pick.random() < 0.2
            wanted = twin.walk(cpu, read, gva, access, user, ac, implicit)
            before = memory.copy()
            got = paging.walk_result(gva, access, 3 * user, ac=ac, implicit=implicit, set_ad=True)
            what = f"{cpu} {gva:#x} {access} user={user} ac={ac} implicit={implicit}: {got}"
            assert FAULTS[got.fault] == wanted.fault, what
            seen[wanted.fault] += 1
            if wanted.fault == twin.PF:
                assert got.error_code == wanted.error, what
                errors.add(wanted.error)
            elif wanted.fault == twin.NONE:
                assert (got.gpa, got.page_shift) == (wanted.gpa, wanted.size), what
                for gpa, added in wanted.updates.items():
                    before[gpa] |= added
            assert np.array_equal(memory, before), what
    if mode != "none":
        assert min(seen[twin.NONE], seen[twin.PF]) > 300
        assert seen[twin.GP] > 100 or mode not in ("4", "5")
        assert len(errors) > 8


def test_pdptes_that_the_manual_reserves_are_refused() -> None:
    for number in (1, 2, 5, 6, 7, 8, 40, 52, 62, 63):
        memory = np.zeros(4096, np.uint8)
        memory[:8] = np.frombuffer((1 | 1 << number).to_bytes(8, "little"), np.uint8)
        with pytest.raises(ArgumentError, match="PDPTE"):
            Paging(0x80000001, 0, 1 << 5, 0x800, GuestCpu(maxphyaddr=40), memory=memory)
