"""Instructions of the guest that leave it for reasons other than memory, and the tracepoints of such exits.

Which ones leave depends on the vendor and on who walks the guest's tables (Linux arch/x86/kvm documentation of the
tracepoints; SDM vol. 3C section 26.1.3; APM vol. 2 section 15.8-15.9).
"""

from __future__ import annotations

from typing import Final

__all__ = ["Exits"]

_CR0_PG, _CR0_WP, _CR0_TS, _CR0_MP = 1 << 31, 1 << 16, 1 << 3, 1 << 1
_CR0_CD, _CR0_NW = 1 << 30, 1 << 29
# CR4 bits that a VMX guest owns: PVI, TSD, DE, PCE, OSFXSR, OSXMMEXCPT, FSGSBASE, and with EPT PGE.
_CR4_GUEST: Final = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 16
_CR4_PGE: Final = 1 << 7
_EFER_MSR: Final = 0xC0000080
_RDI: Final = 7


class Exits:
    """The exits of one kind of host.

    Parameters
    ----------
    amd : bool
    tdp : bool
        The processor walks the guest's tables.
    old : bool
        Linux 3.1, which knows how long WRMSR and HLT are, and lets the guest have CR0 only while its FPU state is
        loaded: until the vCPU first left the kernel.
    """

    def __init__(self, amd: bool, tdp: bool, old: bool = False) -> None:
        self.amd = amd
        self.tdp = tdp
        self.old = old
        self.left = False

    def register(self, name: str, old: int, new: int) -> bool:
        """Whether loading a control register leaves the guest."""
        if name == "efer":
            return True
        if name == "cr3":
            return not self.tdp
        changed = old ^ new
        if name == "cr4":
            guest = _CR4_GUEST | (_CR4_PGE if self.tdp else 0)
            return self.amd or bool(changed & ~guest)
        if not self.amd:
            return bool(changed & ~(_CR0_TS | (_CR0_WP if self.tdp else 0)))
        return self.full_cr0(old) or bool(changed & ~(_CR0_TS | _CR0_MP))

    def full_cr0(self, cr0: int) -> bool:
        """SVM: every write of CR0 is intercepted, because the processor runs with another value than the guest's."""
        hidden = 0 if self.tdp else _CR0_PG | _CR0_WP
        if self.old and self.left:
            return True
        return (cr0 | hidden) & ~(_CR0_CD | _CR0_NW) != cr0

    def emulated(self, name: str) -> bool:
        """KVM fetches and decodes the instruction before it acts (the processor did not tell what it was)."""
        return self.amd and name != "efer"

    def skipped(self, name: str) -> bool:
        """KVM fetches and decodes the instruction only to step over it, after it acted."""
        return self.amd and not self.old and name in ("efer", "hlt")

    # -- lines

    def register_line(self, name: str, rip: int, cr0: int) -> str:
        """The exit of a load of a control register or EFER."""
        if name == "efer":
            return f"kvm_exit: msr rip {rip:x} info1 1 info2 0" if self.amd else self._vmx("MSR_WRITE", rip)
        number = int(name[2:])
        if not self.amd:
            return self._vmx("CR_ACCESS", rip, number | _RDI << 8)
        selective = "0x65" if self.old else "cr0_sel_write"
        reason = f"write_{name}" if name != "cr0" or self.full_cr0(cr0) else selective
        return f"kvm_exit: {reason} rip {rip:x} info1 0 info2 0"

    def value_line(self, name: str, value: int, refused: bool) -> str | None:
        """What is traced of the value itself."""
        if name == "efer":
            return f"kvm_msr: msr_write {_EFER_MSR:x} = {value:#x}{' (#GP)' if refused else ''}"
        return None if self.amd else f"kvm_cr: cr_write {name[2:]} = {value:#x}"

    def invlpg_line(self, rip: int, gva: int) -> str:
        """INVLPG under shadow paging."""
        return f"kvm_exit: invlpg rip {rip:x} info1 0 info2 0" if self.amd else self._vmx("INVLPG", rip, gva)

    def io_line(self, rip: int, port: int) -> str:
        """A byte written to a port by ``out %al, imm8``: user space takes over."""
        self.left = True
        if self.amd:
            return f"kvm_exit: io rip {rip:x} info1 {port << 16 | 0x10:x} info2 {rip + 2:x}"
        return self._vmx("IO_INSTRUCTION", rip, port << 16 | 0x40)

    def halt_line(self, rip: int) -> str:
        """HLT."""
        return f"kvm_exit: hlt rip {rip:x} info1 0 info2 0" if self.amd else self._vmx("HLT", rip)

    def shutdown_line(self, rip: int) -> str | None:
        """A triple fault of the processor itself; under shadow paging KVM finds it and nothing exits."""
        if not self.tdp:
            return None
        return f"kvm_exit: shutdown rip {rip:x} info1 0 info2 0" if self.amd else self._vmx("TRIPLE_FAULT", rip)

    @staticmethod
    def _vmx(reason: str, rip: int, info1: int = 0) -> str:
        return f"kvm_exit: {reason} rip {rip:x} info1 {info1:x} info2 0"
