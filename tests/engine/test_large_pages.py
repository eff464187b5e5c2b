"""Large guest pages of every size under every MMU, at addresses and frames above 4 GiB."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from machine import LONG, LONG5, MMUS, P32, PAE3, USER, Machine, MiB, Mode

GiB = 1 << 30
HIGH = 5 * GiB  # where the slot stands
MEMORY = 8 * MiB
SIZES = [
    (P32, 4 * MiB, 2),
    (PAE3, 2 * MiB, 2),
    (LONG, 2 * MiB, 2),
    (LONG, GiB, 3),
    (LONG5, 2 * MiB, 2),
    (LONG5, GiB, 3),
]
sizes = pytest.mark.parametrize(("mode", "size", "level"), SIZES, ids=lambda value: getattr(value, "name", str(value)))
FLAVOURS = [("shadow", True), *((mmu, tdp) for mmu in MMUS[1:] for tdp in (True, False))]


def machine(mmu: str, tdp_mmu: bool, mode: Mode, page_size: str) -> Machine:
    # 4 MiB pages have four more address bits than a 32-bit entry shows.
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu, cpu=km.GuestCpu(maxphyaddr=36 if mode is P32 else 40))
    m.vm.memslots.create(gpa=HIGH, memory=np.zeros(MEMORY, np.uint8), page_size=page_size)  # type: ignore[arg-type]
    return m


def entry(mode: Mode, gpa: int) -> int:
    return (gpa & 0xFFC0_0000) | (gpa >> 32 & 0xF) << 13 if mode is P32 else gpa


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
@pytest.mark.parametrize("page_size", ["4K", "2M"])
@sizes
def test_a_large_guest_page_leads_to_every_byte_of_its_memory(
    mmu: str, tdp_mmu: bool, page_size: str, mode: Mode, size: int, level: int
) -> None:
    m = machine(mmu, tdp_mmu, mode, page_size)
    gvas = [0x8000_0000] if mode.levels < 4 else [GiB, 4 * GiB, 5 * GiB, 0x7F_8000_0000]
    for gva in gvas:
        m.map(gva, entry(mode, HIGH), USER, level=level)
        for offset, kind in ((0, "r"), (0x12_3456, "w"), (0x1F_F000, "x"), (min(size, MEMORY) - 1, "r")):
            result = m.access(gva + offset, kind)
            assert (result.outcome, result.gpa) == (km.Outcome.OK, HIGH + offset), (hex(gva), hex(offset))


@pytest.mark.parametrize(("mmu", "tdp_mmu"), FLAVOURS)
@pytest.mark.parametrize("gva", [GiB, 4 * GiB + GiB])
def test_the_part_of_a_1_gib_page_that_no_slot_holds_is_a_device(mmu: str, tdp_mmu: bool, gva: int) -> None:
    m = machine(mmu, tdp_mmu, LONG, "2M")
    m.map(gva, HIGH, USER, level=3)
    assert m.access(gva + MEMORY - 4096).outcome is km.Outcome.OK
    for offset in (MEMORY, GiB - 8):
        result = m.access(gva + offset, "r", size=8)
        assert (result.outcome, result.mmio) == (km.Outcome.MMIO, ((HIGH + offset, 8),))
