"""The guest of a golden run: it executes the instructions that stand in its memory, one operation at a time."""

from __future__ import annotations

from contextlib import suppress
from typing import NoReturn

from kvmmmu.conform.golden import stubs
from kvmmmu.conform.golden.executor import GP, PAGE
from kvmmmu.conform.golden.host import Host
from kvmmmu.conform.golden.instructions import decode
from kvmmmu.conform.golden.more import IntegerExecutor
from kvmmmu.conform.golden.operands import MAX_LENGTH, Instruction, UndefinedInstruction, UnknownInstruction
from kvmmmu.conform.golden.processor import Done, Processor
from kvmmmu.golden import Script
from kvmmmu.outcome import Outcome

__all__ = ["Guest", "Outcomes"]

Outcomes = list[tuple[str, dict[str, str]]]

_UD, _DF, _PF = 6, 8, 14
_HAS_ERROR = frozenset({_DF, 10, 11, 12, GP, _PF, 17})
_KVM_EXIT_SHUTDOWN = 8
_EMULATION, _DELIVERY = 1, 3
# Beyond a triple fault there is nothing: more deliveries than these make no progress.
_MAX_DELIVERIES = 64
# A handler that faults uses up a page of stack in fewer exceptions than these.
_MAX_EXCEPTIONS = 128
# An operation is a few instructions; one that runs on through zeros is still finite.
_MAX_STEPS = 1 << 17


class _End(Exception):
    """The operation is over."""


class _Delivered(Exception):
    """An exception's handler is what runs next."""


class Guest(IntegerExecutor):
    """The one vCPU of a script.

    Parameters
    ----------
    processor : Processor
    host : Host
    script : Script
    """

    def __init__(self, processor: Processor, host: Host, script: Script) -> None:
        super().__init__(processor, host, script.long)
        self.script = script
        self.start = 0
        self.ac = False
        self.shut_down = False
        # An exception whose delivery failed waits for the next run.
        self.pending: int | None = None
        self.delivering: int | None = None
        self.out: Outcomes = []
        # Of the operation so far.
        self.exceptions = 0

    # -- one operation

    def run(self, stub: str, *, cpl: int = 0, **registers: int) -> Outcomes:
        """Run a stub to its end."""
        if self.shut_down:
            return [("skipped", {})]
        if cpl != self.cpl:
            self.processor.set_sregs()
            self.cpl = cpl
        self.processor.mode(cpl, self.ac)
        self.registers = dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), 0)
        self.registers["rsp"] = self.script.sysgva + stubs.STACK
        self.registers.update({name: value & self.mask for name, value in registers.items()})
        base = self.script.usrgva if cpl == 3 else self.script.sysgva
        self.start = self.rip = base + stubs.stub_at(stub)
        self.extra = stub in ("rwr", "rwir")
        self.out = []
        self.exceptions = 0
        self.flags = 2
        self.flush()
        try:
            if self.pending is not None:
                vector, self.pending = self.pending, None
                self.fault = {"exc": str(vector), "ip": "stub+0"}
                self.deliver(vector)
            for _ in range(_MAX_STEPS):
                with suppress(_Delivered):
                    self.step()
            self.out.append(("hang", {}))
        except _End:
            pass
        except UnknownInstruction as error:
            self.out.append(("unsupported", {"what": str(error)}))
        return self.out

    def end(self, outcome: str, **fields: str) -> NoReturn:
        """Finish the operation."""
        self.out.append((outcome, fields))
        raise _End

    # -- instructions

    def step(self) -> None:
        """Fetch, decode and execute one instruction."""
        code = self.fetch(self.rip, min(MAX_LENGTH, PAGE - self.rip % PAGE))
        try:
            instruction = self.decode(code)
        except IndexError:
            code += self.fetch(((self.rip | (PAGE - 1)) + 1) & self.mask, MAX_LENGTH - len(code))
            try:
                instruction = self.decode(code)
            except IndexError:
                raise UnknownInstruction(f"code {code.hex(' ')} and nothing behind it") from None
        self.execute(instruction)

    def decode(self, code: bytes) -> Instruction:
        """Decode, or raise #UD."""
        try:
            return decode(code, self.long)
        except UndefinedInstruction:
            self.raise_fault(_UD)

    def fetch(self, rip: int, size: int) -> bytes:
        """Code bytes within a page."""
        page = rip // PAGE
        if page not in self.code:
            done = self.processor.fetch(rip, self.rip)
            if done.exits:
                self.flush()
            self.check(done)
            assert done.gpa is not None
            self.code[page] = done.gpa // PAGE
        return self.host.read(self.code[page] * PAGE + rip % PAGE, size)

    def check(self, done: Done) -> None:
        """Report MMIO, and turn anything but success into its end."""
        for write, gpa, size, data in done.mmio:
            fields = {"gpa": f"{gpa:x}", "len": f"{size:x}"}
            if write:
                fields["data"] = f"{data:x}"
            self.out.append(("mmio-w" if write else "mmio-r", fields))
        if done.exits:
            self.flush()
        if done.outcome == Outcome.OK:
            return
        if done.outcome == Outcome.PF:
            self.raise_fault(_PF, done.error_code, done.gva)
        elif done.outcome == Outcome.GP:
            self.raise_fault(GP, 0)
        elif done.outcome == Outcome.INTERNAL_ERROR:
            # KVM gives up for the kernel; a user program gets #UD.
            if self.cpl == 3 and done.suberror == _EMULATION and self.processor.users_get_ud:
                self.processor.inject(_UD)
                self.raise_fault(_UD)
            self.pending = self.delivering if done.suberror == _DELIVERY else None
            self.end("internal", suberror=str(done.suberror))
        elif done.outcome == Outcome.SHUTDOWN:
            self.shutdown(by_processor=False)
        elif done.outcome == Outcome.HANG:
            self.end("hang")
        self.end("error", why=f"{done.outcome.name} {done.error_code}")

    # -- exceptions

    def raise_fault(self, vector: int, error: int | None = None, gva: int | None = None) -> NoReturn:
        """Deliver an exception; its handler is next."""
        self.exceptions += 1
        if self.exceptions > _MAX_EXCEPTIONS:
            self.end("hang")
        offset = self.rip - self.start
        where = f"stub+{offset:x}" if 0 <= offset < stubs.STUB_SIZE else f"{self.rip:x}"
        self.fault = {"exc": str(vector), "ip": where}
        if error is not None:
            self.fault["err"] = f"{error:x}"
        if gva is not None:
            self.fault["cr2"] = f"{gva:x}"
        self.deliver(vector)
        raise _Delivered

    def deliver(self, vector: int) -> None:
        """The processor's own accesses: IDT, GDT, TSS, and the frame on the stack (SDM vol. 3A section 6.14)."""
        for _ in range(_MAX_DELIVERIES):
            done = self.delivery(vector)
            if done is None:
                self.rip = self.script.sysgva + stubs.HANDLERS + 4 * vector
                return
            if done.outcome not in (Outcome.PF, Outcome.GP):
                self.check(done)
            # What was being delivered is forgotten once KVM emulates something: the fault is a first one again.
            pending = 0 if done.emulated else vector
            if pending == _DF:
                self.shutdown()
            # Of two faults a page fault makes a double fault only of another page fault (SDM vol. 3A table 6-5).
            if pending == _PF or (done.outcome == Outcome.GP and pending == GP):
                vector = _DF
                self.fault = {"exc": str(_DF), "err": "0", "ip": self.fault["ip"]}
            else:
                vector = _PF if done.outcome == Outcome.PF else GP
                self.fault = {"exc": str(vector), "err": f"{done.error_code:x}", "ip": self.fault["ip"]}
                if vector == _PF:
                    self.fault["cr2"] = f"{done.gva:x}"
        self.end("hang")

    def delivery(self, vector: int) -> Done | None:
        """Try once; None when the handler may start."""
        sysgva = self.script.sysgva
        gate = 16 if self.long else 8
        plan = [(sysgva + stubs.IDT + gate * vector, 8, False), (sysgva + stubs.GDT + stubs.CODE_SELECTOR, 8, False)]
        top = self.registers["rsp"] if self.cpl == 0 else sysgva + stubs.STACK
        if self.cpl:
            plan.append((sysgva + stubs.TSS + 4, 8, False))
        word = 8 if self.long else 4
        words = 3 + 2 * (self.long or self.cpl > 0) + (vector in _HAS_ERROR)
        plan.append((top - word * words, word, True))
        position = 0
        self.delivering = vector
        while position < len(plan):
            gva, size, write = plan[position]
            done = self.processor.system(vector, gva & self.mask, size, self.rip, write=write)
            if done.outcome != Outcome.OK:
                return done
            position += 1
            if done.exits:
                # KVM injects the event again, and the processor starts over.
                self.flush()
                if "empty_tlb" in self.processor.artefacts and position > 1:
                    position = 0
        self.cpl = 0
        self.processor.mode(0, False)
        return None

    def shutdown(self, *, by_processor: bool = True) -> NoReturn:
        """A triple fault: the processor's, or one that KVM asked for itself (no root could be loaded)."""
        self.shut_down = True
        if by_processor:
            self.processor.shutdown(self.rip)
        self.end("exit", exit=str(_KVM_EXIT_SHUTDOWN))
