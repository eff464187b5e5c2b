"""A virtual processor of a VM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvmmmu._arguments import bytes_of, column_u64, index_in, index_of, index_u64
from kvmmmu._core import AccessResult, own_method
from kvmmmu.cpu import GuestCpu
from kvmmmu.errors import ArgumentError, GuestFaultError, MmioUnhandledError
from kvmmmu.execution import Execution, MmioExit, Registers, ReplayTotals
from kvmmmu.outcome import Outcome
from kvmmmu.records import ACCESS
from kvmmmu.stats import VCpuStats
from kvmmmu.tlb import Tlb
from kvmmmu.vcpu_replay import RecordedRuns
from kvmmmu.vcpu_tlb import TranslationCaches

if TYPE_CHECKING:
    from kvmmmu.vm import VM

__all__ = ["Execution", "MmioExit", "Registers", "ReplayTotals", "VCpu"]

_KIND_CODES = {"r": 0, "w": 1, "x": 2}
_PIECE = 64
# By number: INSN_*.
_INSNS = ("load", "store", "fetch", "add", "cmpxchg", "movs")


class VCpu(RecordedRuns, TranslationCaches):
    """A vCPU; made by ``VM.create_vcpu``.

    A vCPU is one thread's at a time; a second one gets ``VCpuBusyError``.

    Attributes
    ----------
    vm : VM
    cpu : GuestCpu
    stats : VCpuStats
        Counters of this vCPU.
    tlb : Tlb or None
        The geometry of its caches of translations; None: it has none.
    """

    def __init__(self, core: object, model: object, vm: VM, cpu: GuestCpu) -> None:
        self.vm = vm
        self.cpu = cpu
        self.stats = VCpuStats(self.core, self.id)
        self.tlb: Tlb | None = None

    # -- registers

    @property
    def regs(self) -> Registers:
        """The registers as they are now."""
        return Registers(*self.registers())

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 to 3."""
        return self.regs.cpl

    @cpl.setter
    def cpl(self, value: SupportsIndex) -> None:
        self.set_mode(index_in("cpl", value, 0, 3), self.regs.ac)

    @property
    def ac(self) -> bool:
        """EFLAGS.AC: with SMAP, explicit supervisor data accesses to user pages are allowed."""
        return self.regs.ac

    @ac.setter
    def ac(self, value: bool) -> None:
        self.set_mode(self.regs.cpl, bool(value))

    @property
    def smm(self) -> bool:
        """System management mode: memory is what the slots of address space 1 say (``memslots.create(as_id=1)``).

        Setting it drops every root and resets the context, as in KVM; registers stay, whoever enters SMM sets them.
        Raises ArgumentError in guest mode.
        """
        return self.regs.smm

    @smm.setter
    def smm(self, value: bool) -> None:
        self._check_l1("smm")
        self.set_smm(bool(value))

    def set_sregs(
        self,
        *,
        cr0: int | None = None,
        cr3: int | None = None,
        cr4: int | None = None,
        efer: int | None = None,
        pkru: int | None = None,
        compat: bool | None = None,
    ) -> None:
        """Set system registers at once, as KVM_SET_SREGS does; those not given stay.

        Parameters
        ----------
        cr0, cr3, cr4, efer, pkru : int, optional
        compat : bool, optional
            CS.L = 0: in long mode linear addresses are 32 bits wide.

        Raises
        ------
        GuestFaultError
            The values do not go together, or a PDPTE is bad; nothing changed.
        ArgumentError
            A control bit of a feature the guest CPU lacks.
        OverflowError
            A value is negative or wider than its register.
        """
        self._check_l1("set_sregs")
        now = self.regs
        values = {
            "cr0": now.cr0 if cr0 is None else index_u64("cr0", cr0),
            "cr3": now.cr3 if cr3 is None else index_u64("cr3", cr3),
            "cr4": now.cr4 if cr4 is None else index_u64("cr4", cr4),
            "efer": now.efer if efer is None else index_u64("efer", efer),
            "pkru": now.pkru if pkru is None else index_u64("pkru", pkru),
        }
        self.cpu.check_registers(values["cr4"], values["efer"])
        width = now.compat if compat is None else bool(compat)
        if not self.load_sregs(compat=width, **values):
            text = ", ".join(f"{name}={value:#x}" for name, value in values.items())
            raise GuestFaultError(f"#GP: {text} do not go together (or a PDPTE has reserved bits); nothing changed")

    def _load(self, n: int, name: str, value: int) -> None:
        self._check_l1(name)
        if not self.load_register(n, value):
            raise GuestFaultError(f"#GP: {name} = {value:#x} is refused in this mode; nothing changed")

    def load_cr3(self, value: int) -> None:
        """MOV to CR3.

        Parameters
        ----------
        value : int
            With CR4.PCIDE, bits 11:0 are the PCID and bit 63 keeps what is cached for it.

        Raises
        ------
        GuestFaultError
            #GP: address bits beyond MAXPHYADDR, or a bad PDPTE; nothing changed.
        """
        self._load(3, "cr3", value)

    def mov_cr0(self, value: int) -> None:
        """MOV to CR0; raises GuestFaultError for an illegal combination."""
        self._load(0, "cr0", value)

    def mov_cr4(self, value: int) -> None:
        """MOV to CR4; raises GuestFaultError for an illegal combination, ArgumentError for a missing feature."""
        self.cpu.check_registers(index_u64("cr4", value), self.regs.efer)
        self._load(4, "cr4", value)

    def write_efer(self, value: int) -> None:
        """WRMSR to EFER; raises GuestFaultError when LME changes under paging, ArgumentError for a missing feature."""
        self.cpu.check_registers(self.regs.cr4, index_u64("efer", value))
        self._load(8, "efer", value)

    # -- the guest of a hypervisor in the guest

    def enter_guest_mode(self, ncr3: SupportsIndex) -> None:
        """Run the guest of a hypervisor that runs in this guest (what VMRUN with nested paging does).

        Parameters
        ----------
        ncr3 : int
            Root of the hypervisor's nested tables, which have the levels of its own paging mode.

        Raises
        ------
        ArgumentError
            The VM has no shadow paging, the hypervisor is not in long mode, or ``ncr3`` is no table's address.

        Notes
        -----
        Until ``leave_guest_mode`` addresses are guest-physical ones of that inner guest (L2), user accesses to nested
        tables, which KVM shadows; ``Outcome.PF`` with bit 32 in its code is a nested page fault for the hypervisor, L1.
        L2's own paging and registers, exits to L1, and a second dimension below L1 are not modelled.
        """
        if not self.set_guest_mode(True, ncr3):
            raise ArgumentError(
                f"ncr3 = {index_u64('ncr3', ncr3):#x}: guest mode needs a VM with shadow paging, a hypervisor in long "
                f"mode, and a multiple of 4096 below 2^{self.cpu.maxphyaddr}"
            )

    def leave_guest_mode(self) -> None:
        """Go back to the hypervisor (#VMEXIT)."""
        self.set_guest_mode(False, 0)

    def _check_l1(self, what: str) -> None:
        if self.guest_mode:
            raise ArgumentError(f"{what}: the vCPU is in guest mode, and registers of L2 are not modelled")

    # -- accesses with data

    def _check(self, result: AccessResult, gva: int, verb: str) -> None:
        if result.outcome in (Outcome.OK, Outcome.MMIO):
            return
        raise GuestFaultError(f"{verb} at gva {gva:#x}: {result!r}", result)

    def _device_gap(self, result: AccessResult, gva: int, verb: str) -> MmioUnhandledError:
        where = ", ".join(f"gpa {gpa:#x} ({size} bytes)" for gpa, size in result.mmio)
        text = f"{verb} at gva {gva:#x} is MMIO at {where} and no device is registered there"
        return MmioUnhandledError(text, result)

    def read(self, gva: SupportsIndex, size: SupportsIndex, *, cpl: SupportsIndex | None = None) -> bytes:
        """Read guest memory or devices through the MMU.

        Parameters
        ----------
        gva : int
        size : int
            Bytes; more than 64 become several accesses.
        cpl : int, optional
            The vCPU's own by default.

        Returns
        -------
        bytes

        Raises
        ------
        GuestFaultError
            The guest would fault; ``result`` says how.
        MmioUnhandledError
            Part of it is MMIO that no registered device takes; ``result.mmio`` says where.
        """
        at, left, level = index_u64("gva", gva), index_u64("size", size), self._cpl(cpl)
        data = bytearray()
        while left:
            now = min(left, _PIECE)
            result, part = self.move(at, now, None, level, False)
            self._check(result, at, "read")
            piece = bytearray(part)
            for (gpa, length), offset in zip(result.mmio, self.mmio_offsets(result), strict=True):
                answer = self.vm.mmio.read(gpa, length)
                if answer is None:
                    raise self._device_gap(result, at, "read")
                piece[offset : offset + length] = answer
            data += piece
            at, left = at + now, left - now
        return bytes(data)

    def write(
        self, gva: SupportsIndex, data: bytes | bytearray | memoryview, *, cpl: SupportsIndex | None = None
    ) -> None:
        """Write guest memory or devices through the MMU; see ``read`` for parameters and errors.

        Accesses before a faulting one have taken place, as with a real string of stores.
        """
        at, level = index_u64("gva", gva), self._cpl(cpl)
        rest = bytes_of("data", data)
        while rest:
            part, rest = rest[:_PIECE], rest[_PIECE:]
            result, _ = self.move(at, len(part), part, level, True)
            self._check(result, at, "write")
            for (gpa, length), offset in zip(result.mmio, self.mmio_offsets(result), strict=True):
                if not self.vm.mmio.write(gpa, part[offset : offset + length]):
                    raise self._device_gap(result, at, "write")
            at += len(part)

    def access_many(
        self, gvas: npt.ArrayLike, kinds: str | npt.ArrayLike = "r", *, cpl: SupportsIndex | None = None, size: int = 1
    ) -> npt.NDArray[np.void]:
        """Make a column of accesses, in order; the same answers as ``access`` bit for bit.

        Parameters
        ----------
        gvas : array_like of uint64
            Guest virtual addresses, any shape.
        kinds : {"r", "w", "x"} or array_like of uint8, of the same shape
            One kind for all, or a code each: 0 read, 1 write, 2 fetch.
        cpl : int, optional
            The vCPU's own by default.
        size : int
            Bytes of every access, 1 to 64.

        Returns
        -------
        structured array
            Same shape; fields of ``kvmmmu.records.ACCESS``: gpa (all ones where there is none), error_code,
            fault_gva, mmio_gpa, mmio_size, mmio_offset, n_mmio, outcome, path, exits.

        Raises
        ------
        TypeError, OverflowError
            Addresses that are no integers, or outside 0 .. 2**64 - 1.
        ArgumentError
            No array at all, another code or shape of ``kinds``, a bad ``size`` or ``cpl``.

        Notes
        -----
        Nothing is moved; the GIL is released.  Without a TLB pages may be remembered from one row to the next for as
        long as the vCPU stays in the guest, as a processor may: who takes a translation away must flush.
        """
        addresses = column_u64("gvas", gvas)
        if isinstance(kinds, str):
            if kinds not in _KIND_CODES:
                raise ArgumentError(f"kinds is {kinds!r}; allowed are 'r', 'w', 'x' or an array of codes 0, 1, 2")
            codes = np.full(addresses.shape, _KIND_CODES[kinds], np.uint8)
        else:
            given = np.asarray(kinds)
            if (given.dtype.kind not in "iu" and given.size) or given.shape != addresses.shape:
                raise ArgumentError(
                    f"kinds has dtype {given.dtype} and shape {given.shape}; wanted are integers of shape "
                    f"{addresses.shape}"
                )
            if given.size and (int(given.min()) < 0 or int(given.max()) > 2):
                raise ArgumentError(f"kinds has values {given.min()} .. {given.max()}; allowed are 0, 1 and 2")
            codes = np.require(given, np.uint8, "C")
        out = np.empty(addresses.shape, ACCESS)
        self.access_into(addresses, codes, out, self._cpl(cpl), index_in("size", size, 1, 64))
        return out

    def __repr__(self) -> str:
        regs = self.regs
        values = ", ".join(f"{name}={getattr(regs, name):#x}" for name in ("cr0", "cr3", "cr4", "efer"))
        return f"VCpu({self.id}, mmu={self.vm.mmu!r}: {values}, cpl={regs.cpl})"

    def execute(
        self,
        op: str,
        gva: SupportsIndex,
        *,
        size: int = 8,
        value: int = 0,
        expected: int = 0,
        src: SupportsIndex = 0,
        code_gva: SupportsIndex = 0,
        code_size: int = 0,
        cpl: SupportsIndex | None = None,
        split_rmw: bool = False,
        refetch: bool = False,
        vectoring: int | None = None,
        mmio_read: Callable[[int, int], bytes] | None = None,
    ) -> Execution:
        """Run one instruction with its memory operands, KVM's emulator included.

        Parameters
        ----------
        op : {"load", "store", "fetch", "add", "cmpxchg", "movs"}
            ``add`` reads, modifies and writes; ``cmpxchg`` is locked; ``movs`` copies from ``src``; ``fetch``
            jumps to ``gva``.
        gva : int
            The operand (of ``movs``: where it writes).
        size : {1, 2, 4, 8}
            Bytes of the operand.
        value : int
            What is stored or added.
        expected : int
            What ``cmpxchg`` compares with.
        src : int
            Where ``movs`` reads.
        code_gva, code_size : int
            Where the instruction stands and its length: KVM's emulator fetches it from there.
        cpl : int, optional
            The vCPU's own by default.
        split_rmw : bool
            The processor reports a faulting ``add`` or ``cmpxchg`` as a read first (some emulators do).
        refetch : bool
            The processor keeps no translation over a VM exit: it fetches the instruction anew after each.
        vectoring : int, optional
            The access belongs to the delivery of this exception; 8 is a double fault, beyond which there is none.
        mmio_read : callable, optional
            ``mmio_read(gpa, size)`` answers MMIO reads; by default the devices of ``vm.mmio`` do, and where
            there is none all bytes are ones.

        Returns
        -------
        Execution

        Raises
        ------
        ArgumentError
            ``op``, ``size`` or ``cpl`` out of range.
        """
        if op not in _INSNS:
            raise ArgumentError(f"op is {op!r}; allowed are {', '.join(map(repr, _INSNS))}")
        nbytes = index_of("size", size)
        if nbytes not in (1, 2, 4, 8):
            raise ArgumentError(f"size is {nbytes}; allowed are 1, 2, 4 and 8")

        def device(gpa: int, length: int) -> bytes:
            answer = self.vm.mmio.read(gpa, length)
            return b"\xff" * length if answer is None else answer

        result, suberror, exits, value_out = self.run_insn(
            _INSNS.index(op),
            gva,
            nbytes,
            value,
            expected,
            src,
            code_gva,
            index_in("code_size", code_size, 0, 15),
            self._cpl(cpl),
            split_rmw,
            refetch,
            0 if vectoring is None else index_in("vectoring", vectoring, 1, 31),
            device if mmio_read is None else mmio_read,
        )
        return Execution(result, suberror, tuple(MmioExit(*e) for e in exits), value_out)

    def fetch_by_kvm(self, code_gva: SupportsIndex, code_size: SupportsIndex) -> Execution:
        """Let KVM fetch and decode an instruction that it carries out itself or steps over.

        Parameters
        ----------
        code_gva, code_size : int
            Where it stands, and its length, 1 to 15 bytes.

        Returns
        -------
        Execution
            ``Outcome.OK``, the fault of the fetch, or an internal error where no memory is.
        """
        size = index_in("code_size", code_size, 1, 15)
        result, suberror = self.fetch_software(index_u64("code_gva", code_gva), size)
        return Execution(result, suberror, (), 0)

    def inject(self, vector: SupportsIndex, error_code: SupportsIndex | None = None) -> None:
        """Trace that KVM injects an exception (what the guest then does is its own business)."""
        code = 0 if error_code is None else index_u64("error_code", error_code)
        self.trace_injection(index_in("vector", vector, 0, 31), error_code is not None, code)


own_method(VCpu, "access")
