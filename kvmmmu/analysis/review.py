"""The review of 2011, point by point: what a guest gets under the patch as mailed, as merged, and in Linux 6.1.

Each point is a short script for a guest of its own; the answer is what the model gives.  For Linux 3.1 and 6.1 a golden
script of the same steps, run by real KVM, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvmmmu.behaviour import Behaviour, MmioScheme
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.outcome import Outcome
from kvmmmu.vm import VM

__all__ = ["POINTS", "PROFILES", "Point", "ReviewGuest", "answers", "markdown"]

PROFILES: Final = ("seed", "3.1", "6.1")

_PAGE: Final = 4096
_RAM: Final = 2 << 20
_PML4, _PDPT, _PD, _PT = 0x10000, 0x11000, 0x12000, 0x13000
_W_PDPT, _W_PD, _W_PT = 0x3000, 0x4000, 0x5000
_WINDOW: Final = 0xFFFF_8000_0000_0000
_PRESENT: Final = 0x67  # P, W, U, A, D
_CR0, _CR4, _EFER = 0x8001_0001, 0x20, 0xD00
#: No slot stands here at first.
DEVICE: Final = 0xFE00_0000
OTHER_DEVICE: Final = 0xFD00_0000
_MEMORY: Final = 0x10_0000
#: The guest's page under test.
GVA: Final = 0x40_0000
#: Memory, mapped by the same table, too far off to be filled in ahead.
NEIGHBOUR: Final = GVA + 16 * 4096


class ReviewGuest:
    """A long-mode guest of 2 MiB with one page that may be a device, and a window to its own tables.

    Parameters
    ----------
    profile : str or Behaviour
    host : HostCpu, optional
    cpu : GuestCpu, optional
    mmio_scheme : str, optional
    """

    def __init__(
        self,
        profile: str | Behaviour,
        *,
        host: HostCpu | None = None,
        cpu: GuestCpu | None = None,
        mmio_scheme: MmioScheme | None = None,
    ) -> None:
        self.vm = VM("shadow", behaviour=profile, host=host or HostCpu(maxphyaddr=40), mmio_scheme=mmio_scheme)
        self.ram = np.zeros(_RAM, np.uint8)
        self.base = 0
        self.slot = self.vm.memslots.create(gpa=0, memory=self.ram, slot=0)
        self._entry(_PML4, _PDPT | _PRESENT)
        self._entry(_PML4 + 8 * 256, _W_PDPT | _PRESENT)
        self._entry(_PDPT, _PD | _PRESENT)
        self._entry(_PD + 8 * 2, _PT | _PRESENT)
        self._entry(_W_PDPT, _W_PD | _PRESENT)
        self._entry(_W_PD, _W_PT | _PRESENT)
        for page in range(_RAM // _PAGE):
            self._entry(_W_PT + 8 * page, page * _PAGE | _PRESENT)
        self.lay(_MEMORY + _PAGE, NEIGHBOUR)
        self.vcpu = self.vm.create_vcpu(cpu or GuestCpu(maxphyaddr=40))
        self.vcpu.set_sregs(cr0=_CR0, cr3=_PML4, cr4=_CR4, efer=_EFER)

    def _entry(self, gpa: int, value: int) -> None:
        self.ram[gpa : gpa + 8] = np.frombuffer(value.to_bytes(8, "little"), np.uint8)

    def lay(self, gpa: int, gva: int = GVA) -> None:
        """Map a page before the guest runs."""
        self._entry(_PT + 8 * (gva >> 12 & 511), gpa | _PRESENT)

    def remap(self, entry: int, gva: int = GVA) -> None:
        """The guest stores to its own page table."""
        where = _WINDOW + _PT + 8 * (gva >> 12 & 511)
        assert self.vcpu.access(where, "w", value=entry, size=8, cpl=0).outcome is Outcome.OK

    def touch(self, gva: int = GVA) -> str:
        """One load, in words."""
        result = self.vcpu.access(gva, "r", size=8, cpl=0)
        if result.outcome is Outcome.MMIO:
            return f"device {result.mmio[0][0] & ~(_PAGE - 1):#x}"
        if result.outcome is Outcome.OK:
            return f"memory {(result.gpa or 0) & ~(_PAGE - 1):#x}"
        return f"#PF {result.error_code:#x}" if result.outcome is Outcome.PF else result.outcome.name

    def reload_cr3(self) -> None:
        """MOV CR3 of the same value."""
        self.vcpu.load_cr3(_PML4)

    def new_slot(self, number: int, gpa: int, pages: int = 4) -> None:
        """Create a memslot with memory of its own."""
        self.vm.memslots.create(gpa=gpa, memory=np.zeros(pages * _PAGE, np.uint8), slot=number)

    def close(self) -> None:
        """Give the VM back."""
        self.vm.close()


@dataclass(frozen=True)
class Point:
    """One point of the review.

    Attributes
    ----------
    remark : int
        Which of the review's seven remarks.
    steps : str
        What happens, up to the access whose answer counts.
    run : callable
        Carries the steps out on a guest; returns the answer.
    golden : str
        The script that real Linux 3.1.3 and 6.1 ran.
    """

    remark: int
    steps: str
    run: Callable[[ReviewGuest], str]
    golden: str


def _device(guest: ReviewGuest, gpa: int = DEVICE) -> None:
    guest.lay(gpa)
    guest.touch(NEIGHBOUR)
    guest.touch()
    guest.touch()


def _create(guest: ReviewGuest) -> str:
    _device(guest)
    guest.new_slot(1, DEVICE)
    return guest.touch()


def _recreate(guest: ReviewGuest) -> str:
    guest.lay(DEVICE)
    guest.new_slot(1, DEVICE)
    guest.touch()
    guest.vm.memslots.delete(1)
    guest.touch()
    guest.new_slot(1, DEVICE)
    return guest.touch()


def _gfn0(guest: ReviewGuest) -> str:
    # Another guest, whose RAM begins at 16 MiB and that maps gpa 0.
    low = LowGuest(guest.vm.behaviour)
    low.touch()
    low.new_slot(1, 0)
    answer = low.touch()
    low.close()
    return answer


def _remap_only(guest: ReviewGuest) -> str:
    _device(guest)
    guest.remap(_MEMORY | _PRESENT)
    return guest.touch()


def _remap_invlpg(guest: ReviewGuest) -> str:
    _device(guest)
    guest.remap(_MEMORY | _PRESENT)
    guest.vcpu.invlpg(GVA)
    return guest.touch()


def _remap_cr3(guest: ReviewGuest) -> str:
    _device(guest)
    guest.remap(_MEMORY | _PRESENT)
    guest.reload_cr3()
    return guest.touch()


def _gone_cr3(guest: ReviewGuest) -> str:
    _device(guest)
    guest.remap(0)
    guest.reload_cr3()
    return guest.touch()


def _other_cr3(guest: ReviewGuest) -> str:
    _device(guest)
    guest.remap(OTHER_DEVICE | _PRESENT)
    guest.reload_cr3()
    return guest.touch()


def _flushed(guest: ReviewGuest) -> str:
    """Walks of the guest's tables for a repeated access after a flush, beside the emulator's own fetches."""
    _device(guest)
    guest.reload_cr3()
    before = guest.vcpu.stats["guest_walk"]
    answer = guest.touch()
    return f"{answer}, {guest.vcpu.stats['guest_walk'] - before} guest walks"


def _wide(guest: ReviewGuest) -> str:
    wide = ReviewGuest(guest.vm.behaviour, host=HostCpu(maxphyaddr=52))
    _device(wide)
    answer = wide.touch()
    wide.close()
    return "a frame of the host's" if answer.startswith("memory") else answer


def _overlap(guest: ReviewGuest) -> str:
    big = ReviewGuest(guest.vm.behaviour, host=HostCpu(maxphyaddr=51), cpu=GuestCpu(maxphyaddr=51))
    big.lay(1 << 49 | DEVICE)
    big.lay(OTHER_DEVICE, GVA + _PAGE)
    big.touch()
    big.touch(GVA + _PAGE)
    answer = big.touch()
    big.close()
    return answer


def _no_nxe(guest: ReviewGuest) -> str:
    guest.lay(_MEMORY | 1 << 63)
    guest.touch()
    guest.vcpu.write_efer(_EFER & ~0x800)
    return guest.touch()


class LowGuest(ReviewGuest):
    """The same guest with its memory at 16 MiB, so that gfn 0 has no slot."""

    _BASE: Final = 16 << 20

    def __init__(self, profile: str | Behaviour) -> None:
        super().__init__(profile)
        self.vm.close()
        self.vm = VM("shadow", behaviour=profile, host=HostCpu(maxphyaddr=40))
        self.vm.memslots.create(gpa=self._BASE, memory=self.ram, slot=0)
        for table in (_PML4, _PDPT, _PD, _W_PDPT, _W_PD, _W_PT):
            for index in range(512):
                at = table + 8 * index
                value = int.from_bytes(self.ram[at : at + 8].tobytes(), "little")
                if value:
                    self._entry(at, value + self._BASE)
        self._entry(_PT, _PRESENT)
        self.vcpu = self.vm.create_vcpu(GuestCpu(maxphyaddr=40))
        self.vcpu.set_sregs(cr0=_CR0, cr3=_PML4 + self._BASE, cr4=_CR4, efer=_EFER)


POINTS: Final = (
    Point(1, "device page cached; slot created over it", _create, "seed_a_create_long"),
    Point(1, "slot deleted, its page touched, slot created again at the same base", _recreate, "seed_b_recreate_long"),
    Point(1, "device page at gfn 0 cached; slot created there", _gfn0, "seed_c_gfn0_long"),
    Point(2, "device page remapped to memory, no INVLPG", _remap_only, "seed_d_remap_long"),
    Point(2, "device page remapped to memory, INVLPG", _remap_invlpg, "seed_d_remap_long"),
    Point(3, "device page remapped to memory, CR3 reloaded", _remap_cr3, "seed_e_remap_long"),
    Point(3, "device page unmapped, CR3 reloaded", _gone_cr3, "seed_e_remap_long"),
    Point(3, "device page remapped to another device, CR3 reloaded", _other_cr3, "seed_e_remap_long"),
    Point(4, "device page cached, CR3 reloaded, touched again", _flushed, "seed_e_remap_long"),
    Point(6, "device page cached on a host with 52 address bits", _wide, "(6.1: shadow-pa52/mmio_slot)"),
    Point(6, "device at 0x20000fe000000 and another page cached, touched again", _overlap, "none"),
    Point(7, "memory page with NX cached, EFER.NXE cleared (no mmio spte there)", _no_nxe, "nx_toggle"),
)


def answers() -> Iterator[tuple[Point, dict[str, str]]]:
    """Run every point under every profile."""
    for point in POINTS:
        row = {}
        for profile in PROFILES:
            guest = ReviewGuest(profile)
            row[profile] = point.run(guest)
            guest.close()
        yield point, row


def markdown() -> str:
    """The table of ``docs/review.md``."""
    lines = [
        "| remark | steps | " + " | ".join(PROFILES) + " | golden script |",
        "| --- " * (len(PROFILES) + 3) + "|",
    ]
    for point, row in answers():
        cells = " | ".join(row[profile] for profile in PROFILES)
        lines.append(f"| {point.remark} | {point.steps} | {cells} | `{point.golden}` |")
    return "\n".join(lines)
