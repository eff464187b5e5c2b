"""Tracepoints of a VM: recording, reading, and KVM's ftrace text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvmmmu._arguments import index_of
from kvmmmu._core import EVENT_DTYPE, EVENT_KINDS, VmCore
from kvmmmu.errors import ArgumentError
from kvmmmu.events31 import PRINTED, page_31

__all__ = ["EVENT_DTYPE", "EVENT_NAMES", "Events", "render"]

#: Tracepoints that can be recorded, by kind; kind 0 is none.
EVENT_NAMES: Final[tuple[str, ...]] = tuple(name for name in EVENT_KINDS if name is not None)
_KIND: Final = MappingProxyType({name: kind for kind, name in enumerate(EVENT_KINDS) if name is not None})

MAX_CAPACITY: Final = 1 << 28

_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_MMU_PRESENT: Final = 1 << 11
_ERROR_PFN: Final = 0xFFF << 52

_ACCESS: Final = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")
# Linux 6.1 names these five and in this order.
_PFERR: Final = ((1, "P"), (2, "W"), (4, "U"), (8, "RSVD"), (16, "F"))

_EXCEPTIONS: Final = MappingProxyType(
    {0: "#DE", 1: "#DB", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP"}
    | {12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC"}
)
_ISA_VMX: Final = 1
_INTR_VALID: Final = 1 << 31
# Exit reasons: SDM vol. 3D appendix C; APM vol. 2 appendix C.
_EXITS: Final = (
    MappingProxyType({0x40 + vector: f"{name[1:]} excp" for vector, name in _EXCEPTIONS.items()})
    | {0x00: "read_cr0", 0x03: "read_cr3", 0x04: "read_cr4", 0x10: "write_cr0", 0x13: "write_cr3", 0x14: "write_cr4"}
    | {0x60: "interrupt", 0x65: "cr0_sel_write", 0x72: "cpuid", 0x78: "hlt", 0x79: "invlpg", 0x7B: "io"}
    | {0x7C: "msr", 0x7F: "shutdown", 0x400: "npf"},
    MappingProxyType(
        {0: "EXCEPTION_NMI", 1: "EXTERNAL_INTERRUPT", 2: "TRIPLE_FAULT", 10: "CPUID", 12: "HLT", 14: "INVLPG"}
        | {28: "CR_ACCESS", 30: "IO_INSTRUCTION", 31: "MSR_READ", 32: "MSR_WRITE", 48: "EPT_VIOLATION"}
        | {49: "EPT_MISCONFIG"}
    ),
)
_INSN_MODES: Final = MappingProxyType({0: "real", 16: "prot16", 32: "prot32", 64: "prot64"})
_MMIO_TYPES: Final = ("unsatisfied-read", "read", "write")
# Tracepoints about a shadow page: their role_* companions in recordings that print the raw role word.
_PAGE_EVENTS: Final = MappingProxyType(
    {
        "kvm_mmu_get_page": "role_get_page",
        "kvm_mmu_sync_page": "role_sync_page",
        "kvm_mmu_unsync_page": "role_unsync_page",
        "kvm_mmu_prepare_zap_page": "role_prepare_zap_page",
    }
)


class Events:
    """The ring of recorded tracepoints of a VM.

    Off until ``enable``; off it costs one test per event.  A full ring drops new records and
    counts them in ``dropped``; it never delays a vCPU.  One thread reads at a time.
    """

    def __init__(self, core: VmCore, era: str = "6.1") -> None:
        self._core = core
        self._era = era

    def enable(self, kinds: str | Iterable[str] | None = None, *, capacity: int = 1 << 16) -> None:
        """Record tracepoints.

        Parameters
        ----------
        kinds : str or iterable of str, optional
            Names from ``EVENT_NAMES``; all of them by default.  Replaces what was enabled.
        capacity : int
            Records the ring holds, rounded up to a power of two; 64 bytes each.  Changing it
            forgets the records not read yet.

        Raises
        ------
        ArgumentError
            A name is unknown, or ``capacity`` is outside 1 to 2^28.
        VmBusyError
            The capacity changes while a vCPU runs.
        """
        names = EVENT_NAMES if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
        kinds_wanted = {parse_kind(name) for name in names}
        room = index_of("capacity", capacity)
        if not 1 <= room <= MAX_CAPACITY:
            raise ArgumentError(f"capacity = {room}: allowed are 1 to 2^28")
        self._core.events_enable(sum(1 << kind for kind in kinds_wanted), 1 << (room - 1).bit_length())

    def disable(self) -> None:
        """Record nothing more; what is in the ring can still be read."""
        self._core.events_disable()

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the tracepoints being recorded."""
        mask = self._core.events_mask
        return tuple(name for name in EVENT_NAMES if mask >> _KIND[name] & 1)

    @property
    def capacity(self) -> int:
        """Records the ring holds; 0 before the first ``enable``."""
        return self._core.events_capacity

    @property
    def dropped(self) -> int:
        """Records lost so far because the ring was full."""
        return self._core.events_dropped

    def emit(self, name: str, *words: int, vcpu: int = 0) -> None:
        """Add a record between the engine's own: an exit or an instruction of whoever runs the guest.

        Parameters
        ----------
        name : str
            One of ``EVENT_NAMES``; without effect while it is not enabled.
        words : int
            Up to seven words, by kind as ``engine/events.pxd`` says; the rest is 0.
        vcpu : int

        Raises
        ------
        ArgumentError
            The name is unknown, or there are more than seven words.
        OverflowError
            A word is outside 0 to 2^64-1.
        """
        if len(words) > 7:
            raise ArgumentError(f"{len(words)} words: at most 7 are recorded")
        self._core.events_emit(parse_kind(name), vcpu, words + (0,) * (7 - len(words)))

    def drain(self) -> NDArray[np.void]:
        """Take the records out of the ring.

        Returns
        -------
        ndarray of EVENT_DTYPE
            Fields ``kind`` (index into the tracepoints, see ``EVENT_NAMES`` from 1), ``vcpu`` (id, or
            2^32-1 for the VM) and ``w`` (seven words, by kind as ``engine/events.pxd`` says), oldest first.
        """
        return self._core.events_take(True)

    def text(
        self,
        records: NDArray[np.void] | None = None,
        *,
        frames: bool = False,
        roles: bool = False,
        hva_name: Callable[[int], str] | None = None,
    ) -> str:
        """Render records as ftrace prints them, one line each; see ``render``.

        Without ``records``: those in the ring, which stay there.
        """
        if records is None:
            records = self._core.events_take(False)
        lines = render(records, frames=frames, roles=roles, hva_name=hva_name, era=self._era)
        return "".join(line + "\n" for line in lines)


def render(
    records: NDArray[np.void],
    *,
    frames: bool = False,
    roles: bool = False,
    hva_name: Callable[[int], str] | None = None,
    era: str = "6.1",
) -> Iterator[str]:
    """KVM's text of records, line by line.

    Parameters
    ----------
    records : ndarray of EVENT_DTYPE
    frames : bool
        Show host frames: the address bits of sptes, pfns, and the place of an spte (``sptep``).
        Otherwise they are left out, as in a recording that is to be compared with another host's.
    roles : bool
        After each line about a shadow page one more with the raw role word.
    hva_name : callable, optional
        What to print for a host address; hexadecimal by default.
    era : {"6.1", "3.1"}
        Whose text: Linux 3.1 prints fewer tracepoints, and less of each.

    Raises
    ------
    ArgumentError
        A record is of no known kind.
    """
    if not isinstance(records, np.ndarray) or records.dtype != EVENT_DTYPE or records.ndim != 1:
        what = f"{records.dtype} {records.shape}" if isinstance(records, np.ndarray) else type(records).__name__
        raise ArgumentError(f"records: {what}; wanted is a column of EVENT_DTYPE, as drain returns it")
    old = era == "3.1"
    renderer = (_Renderer31 if old else _Renderer)(frames, hva_name or (lambda hva: f"{hva:#018x}"))
    for kind, vcpu, words in zip(
        records["kind"].tolist(), records["vcpu"].tolist(), records["w"].tolist(), strict=True
    ):
        name = EVENT_KINDS[kind] if 0 < kind < len(EVENT_KINDS) else None
        if name is None:
            raise ArgumentError(f"kind = {kind}: allowed are 1 to {len(EVENT_KINDS) - 1}")
        if old and name not in PRINTED:
            continue
        body: str = getattr(renderer, name)(vcpu, *words)
        yield f"{name}: {body}"
        if roles and not old and name in _PAGE_EVENTS:
            yield f"{_PAGE_EVENTS[name]}: gfn={words[0]:#x} role={words[1] & 0xFFFFFFFF:#x}"


def _flags(pferr: int) -> str:
    return "|".join(letter for bit, letter in _PFERR if pferr & bit)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


class _Renderer:
    """One method per tracepoint, named after it: (vcpu, words) to text."""

    def __init__(self, frames: bool, hva_name: Callable[[int], str]) -> None:
        self.frames = frames
        self.hva_name = hva_name

    def spte(self, spte: int) -> str:
        # An entry without KVM's present bit names no frame: it is empty, frozen, or an mmio spte.
        return f"{spte & ~_ADDRESS if spte & _MMU_PRESENT and not self.frames else spte:x}"

    def page(self, gfn: int, role_word: int, flags: int) -> str:
        role = role_word & 0xFFFFFFFF
        parts: Sequence[str] = (
            f"sp gen {flags >> 8:x} gfn {gfn:x} l{role & 15} {4 if role & 0x10 else 8}-byte q{role >> 5 & 3}",
            " direct" if role & 0x80 else "",
            f" {_ACCESS[role >> 8 & 7]}",
            " invalid" if role & 0x800 else "",
            " " if role & 0x1000 else " !",
            "nxe ",
            "!" if role & 0x10000 else "",
            f"ad root {role_word >> 32} {'un' * (flags & 1)}sync",
        )
        return "".join(parts)

    def kvm_mmu_pagetable_walk(self, _vcpu: int, gva: int, pferr: int, *_: int) -> str:
        return f"addr {gva:x} pferr {pferr:x} {_flags(pferr)}"

    def kvm_mmu_paging_element(self, _vcpu: int, gpte: int, level: int, *_: int) -> str:
        return f"pte {gpte:x} level {level}"

    def kvm_mmu_set_accessed_bit(self, _vcpu: int, gpa: int, *_: int) -> str:
        return f"gpa {gpa:x}"

    kvm_mmu_set_dirty_bit = kvm_mmu_set_accessed_bit

    def kvm_mmu_walker_error(self, _vcpu: int, pferr: int, *_: int) -> str:
        return f"pferr {pferr:x} {_flags(pferr)}"

    def kvm_mmu_get_page(self, _vcpu: int, gfn: int, role: int, flags: int, *_: int) -> str:
        return f"{self.page(gfn, role, flags)} {'new' if flags & 2 else 'existing'}"

    def kvm_mmu_sync_page(self, _vcpu: int, gfn: int, role: int, flags: int, *_: int) -> str:
        return self.page(gfn, role, flags)

    kvm_mmu_unsync_page = kvm_mmu_sync_page
    kvm_mmu_prepare_zap_page = kvm_mmu_sync_page

    def mark_mmio_spte(self, _vcpu: int, sptep: int, gfn: int, access: int, gen: int, *_: int) -> str:
        place = f"sptep:{sptep:#x} " if self.frames else ""
        return f"{place}gfn {gfn:x} access {access:x} gen {gen:x}"

    def handle_mmio_page_fault(self, _vcpu: int, gva: int, gfn: int, access: int, *_: int) -> str:
        return f"addr:{gva:x} gfn {gfn:x} access {access:x}"

    def check_mmio_spte(self, _vcpu: int, spte: int, kvm_gen: int, spte_gen: int, *_: int) -> str:
        return f"spte {spte:x} kvm_gen {kvm_gen:x} spte-gen {spte_gen:x} valid {int(kvm_gen == spte_gen)}"

    def fast_page_fault(
        self, vcpu: int, gva: int, code: int, sptep: int, old: int, new: int, spurious: int, fixed: int
    ) -> str:
        place = f" sptep {sptep:#x}" if self.frames else ""
        return (
            f"vcpu {vcpu} gva {gva:x} error_code {_flags(code)}{place} old {self.spte(old)} new {self.spte(new)}"
            f" spurious {spurious} fixed {fixed}"
        )

    def kvm_mmu_zap_all_fast(self, _vcpu: int, valid_gen: int, used_pages: int, *_: int) -> str:
        return f"kvm-mmu-valid-gen {valid_gen} used_pages {used_pages:x}"

    def kvm_mmu_set_spte(self, _vcpu: int, gfn: int, spte: int, sptep: int, level: int, rights: int, *_: int) -> str:
        letters = "-r"[rights & 1] + "-w"[spte >> 1 & 1] + "-x"[rights >> 1 & 1]
        if rights & 8:
            letters += "-u"[rights >> 2 & 1]
        place = f"sptep {sptep:#x}" if self.frames else f"idx {sptep & 511}"
        return f"gfn {gfn:x} spte {self.spte(spte)} ({letters}) level {level} {place}"

    def kvm_mmu_spte_requested(self, _vcpu: int, gfn: int, pfn: int, level: int, *_: int) -> str:
        shown = f"{pfn:x}" if self.frames or pfn & _ERROR_PFN else "ok"
        return f"gfn {gfn:x} pfn {shown} level {level}"

    def kvm_tdp_mmu_spte_changed(
        self, _vcpu: int, gfn: int, old: int, new: int, level: int, as_id: int, *_: int
    ) -> str:
        return f"as id {as_id} gfn {gfn:x} level {level} old_spte {self.spte(old)} new_spte {self.spte(new)}"

    def kvm_mmu_split_huge_page(self, _vcpu: int, gfn: int, spte: int, level: int, err: int, *_: int) -> str:
        return f"gfn {gfn:x} spte {self.spte(spte)} level {level} errno {_signed(err)}"

    def kvm_page_fault(self, vcpu: int, rip: int, address: int, code: int, *_: int) -> str:
        return f"vcpu {vcpu} rip {rip:#x} address {address:#018x} error_code {code:#x}"

    def vcpu_match_mmio(self, _vcpu: int, gva: int, gpa: int, write: int, gpa_match: int, *_: int) -> str:
        return f"gva {gva:#x} gpa {gpa:#x} {'Write' if write else 'Read'} {'GPA' if gpa_match else 'GVA'}"

    def kvm_mmio(self, _vcpu: int, kind: int, length: int, gpa: int, value: int, *_: int) -> str:
        name = _MMIO_TYPES[kind] if kind < len(_MMIO_TYPES) else f"{kind:#x}"
        return f"mmio {name} len {length} gpa {gpa:#x} val {value:#x}"

    def kvm_fast_mmio(self, _vcpu: int, gpa: int, *_: int) -> str:
        return f"fast mmio at gpa {gpa:#x}"

    def kvm_inj_exception(self, _vcpu: int, vector: int, has_error: int, code: int, reinjected: int, *_: int) -> str:
        error = f" ({code:#x})" if has_error else ""
        return f"{_EXCEPTIONS.get(vector, f'{vector:#x}')}{error}{' [reinjected]' if reinjected else ''}"

    def kvm_emulate_insn(
        self, _vcpu: int, csbase: int, rip: int, low: int, high: int, length: int, mode: int, failed: int
    ) -> str:
        code = (high << 64 | low).to_bytes(16, "little")[:length]
        name = _INSN_MODES.get(mode, f"{mode:#x}")
        return f"{csbase:x}:{rip:x}:{code.hex(' ')} ({name}){' failed' if failed else ''}"

    def kvm_unmap_hva_range(self, _vcpu: int, start: int, end: int, *_: int) -> str:
        return f"{self.hva_name(start)} len {end - start:#x}"

    def kvm_set_spte_hva(self, _vcpu: int, hva: int, *_: int) -> str:
        return self.hva_name(hva)

    kvm_test_age_hva = kvm_set_spte_hva
    kvm_age_hva = kvm_unmap_hva_range

    def kvm_age_page(self, _vcpu: int, hva: int, gfn: int, young: int, *_: int) -> str:
        return f"{self.hva_name(hva)} gfn {gfn:x} {'YOUNG' if young else 'OLD'}"

    def kvm_exit(self, _vcpu: int, isa: int, reason: int, rip: int, info1: int, info2: int, intr: int, err: int) -> str:
        name = _EXITS[isa == _ISA_VMX].get(reason, f"{reason:#x}")
        event = f" intr {intr | _INTR_VALID:x} err {err:x}" if intr else ""
        return f"{name} rip {rip:x} info1 {info1:x} info2 {info2:x}{event}"

    def kvm_cr(self, _vcpu: int, write: int, cr: int, value: int, *_: int) -> str:
        return f"cr_{'write' if write else 'read'} {cr:x} = {value:#x}"

    def kvm_msr(self, _vcpu: int, write: int, index: int, value: int, refused: int, *_: int) -> str:
        return f"msr_{'write' if write else 'read'} {index:x} = {value:#x}{' (#GP)' if refused else ''}"


# The walker is told whether it is a write, a user's access or a fetch; the rest of the code is not its business.
_WALK_31: Final = 2 | 4 | 16


class _Renderer31(_Renderer):
    """The tracepoints of Linux 3.1 that differ."""

    def page(self, gfn: int, role_word: int, flags: int) -> str:
        return page_31(gfn, role_word & 0xFFFFFFFF, role_word >> 32, bool(flags & 1))

    def mark_mmio_spte(self, _vcpu: int, sptep: int, gfn: int, access: int, _gen: int, *_: int) -> str:
        return f"gfn {gfn:x} access {access & 6:x} idx {sptep & 511}"

    def kvm_mmu_pagetable_walk(self, vcpu: int, gva: int, pferr: int, *_: int) -> str:
        return super().kvm_mmu_pagetable_walk(vcpu, gva, pferr & _WALK_31)

    def kvm_page_fault(self, _vcpu: int, _rip: int, address: int, code: int, *_: int) -> str:
        return f"address {address:x} error_code {code & 0xFFFFFFFF:x}"

    def kvm_emulate_insn(
        self, vcpu: int, csbase: int, rip: int, low: int, high: int, length: int, mode: int, failed: int
    ) -> str:
        text = super().kvm_emulate_insn(vcpu, csbase, rip, low, high, length, mode, failed)
        base, address, code = text.split(":", 2)
        return f"{base}:{address}: {code.lstrip()}"


def parse_kind(name: str) -> int:
    """The number of a tracepoint in ``kind``.

    Raises
    ------
    ArgumentError
        The name is unknown.
    """
    if name not in _KIND:
        raise ArgumentError(f"{name!r} is no tracepoint: allowed are {', '.join(EVENT_NAMES)}")
    return _KIND[name]
