"""The guest of a golden run: it executes the instructions that stand in its memory, one operation at a time."""

from __future__ import annotations

from typing import NoReturn

from kvmmmu.conform.golden import stubs
from kvmmmu.conform.golden.arithmetic import compute
from kvmmmu.conform.golden.host import Host
from kvmmmu.conform.golden.instructions import (
    ARITHMETIC,
    MAX_LENGTH,
    SHIFTS,
    Instruction,
    Memory,
    Register,
    UndefinedInstruction,
    UnknownInstruction,
    decode,
)
from kvmmmu.conform.golden.processor import Done, Processor
from kvmmmu.golden import Script
from kvmmmu.outcome import Outcome

__all__ = ["Guest", "Outcomes"]

Outcomes = list[tuple[str, dict[str, str]]]

_PAGE = 4096
_UD, _DF, _GP, _PF = 6, 8, 13, 14
_HAS_ERROR = frozenset({_DF, 10, 11, 12, _GP, _PF, 17})
_KVM_EXIT_HLT, _KVM_EXIT_SHUTDOWN = 5, 8
_EMULATION, _DELIVERY = 1, 3
# An operation is a few instructions; one that runs on through zeros is still finite.
# Beyond a triple fault there is nothing: more deliveries than these make no progress.
_MAX_DELIVERIES = 64
_MAX_STEPS = 1 << 20
_ARITHMETIC = frozenset(ARITHMETIC + SHIFTS)


class _End(Exception):
    """The operation is over."""


class Guest:
    """The one vCPU of a script.

    Parameters
    ----------
    processor : Processor
    host : Host
    script : Script
    """

    def __init__(self, processor: Processor, host: Host, script: Script) -> None:
        self.processor = processor
        self.host = host
        self.script = script
        self.long = script.long
        self.mask = (1 << 64) - 1 if script.long else (1 << 32) - 1
        self.cpl = 0
        self.ac = False
        self.shut_down = False
        # An exception whose delivery failed waits for the next run.
        self.pending: int | None = None
        self.delivering: int | None = None
        self.registers: dict[str, int] = {}
        self.rip = 0
        # Translations the processor still holds: emptied by every exit.  (page -> guest frame)
        self.code: dict[int, int] = {}
        self.data: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.out: Outcomes = []
        self.carry = 0

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
        self.carry = 0
        self.flush()
        try:
            if self.pending is not None:
                vector, self.pending = self.pending, None
                self.fault = {"exc": str(vector), "ip": "stub+0"}
                self.deliver(vector)
            for _ in range(_MAX_STEPS):
                self.step()
            self.out.append(("hang", {}))
        except _End:
            pass
        except UnknownInstruction as error:
            self.out.append(("unsupported", {"what": str(error)}))
        return self.out

    def flush(self) -> None:
        """Nothing is cached by the processor any more."""
        self.code.clear()
        self.data.clear()
        self.written.clear()

    def end(self, what: str, **fields: str) -> NoReturn:
        """Finish the operation."""
        self.out.append((what, fields))
        raise _End

    # -- instructions

    def step(self) -> None:
        """Fetch, decode and execute one instruction."""
        code = self.fetch(self.rip, min(MAX_LENGTH, _PAGE - self.rip % _PAGE))
        try:
            instruction = self.decode(code)
        except IndexError:
            code += self.fetch((self.rip | (_PAGE - 1)) + 1 & self.mask, MAX_LENGTH - len(code))
            try:
                instruction = self.decode(code)
            except IndexError:
                raise UnknownInstruction(f"code {code.hex(' ')} and nothing behind it") from None
        if instruction.name in _ARITHMETIC:
            self.arithmetic(instruction)
        else:
            getattr(self, "_" + instruction.name)(instruction)

    def decode(self, code: bytes) -> Instruction:
        """Decode, or raise #UD."""
        try:
            return decode(code, self.long)
        except UndefinedInstruction:
            self.raise_fault(_UD)

    def fetch(self, rip: int, size: int) -> bytes:
        """Code bytes within a page."""
        page = rip // _PAGE
        if page not in self.code:
            done = self.processor.fetch(rip, self.rip)
            if done.exits:
                self.flush()
            self.check(done)
            assert done.gpa is not None
            self.code[page] = done.gpa // _PAGE
        return self.host.read(self.code[page] * _PAGE + rip % _PAGE, size)

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
            self.raise_fault(_GP, 0)
        elif done.outcome == Outcome.INTERNAL_ERROR:
            # KVM gives up for the kernel; a user program gets #UD.
            if self.cpl == 3 and done.suberror == _EMULATION:
                self.processor.inject(_UD)
                self.raise_fault(_UD)
            self.pending = self.delivering if done.suberror == _DELIVERY else None
            self.end("internal", suberror=str(done.suberror))
        elif done.outcome == Outcome.SHUTDOWN:
            self.shutdown(by_processor=False)
        elif done.outcome == Outcome.HANG:
            self.end("hang")
        self.end("error", what=f"{done.outcome.name} {done.error_code}")

    def address(self, operand: Memory, instruction: Instruction) -> int:
        """The effective address of a memory operand."""
        at = operand.displacement
        if operand.relative:
            at += self.rip + instruction.length
        if operand.base is not None:
            at += self.registers[operand.base]
        if operand.index is not None:
            at += self.registers[operand.index] * operand.scale
        return at & self.mask

    def get(self, operand: Register | int, size: int) -> int:
        """A register or constant, ``size`` bytes of it."""
        value = operand if isinstance(operand, int) else self.registers[operand.name] >> (8 if operand.high else 0)
        return int(value & (1 << 8 * size) - 1)

    def put(self, operand: Register, size: int, value: int) -> None:
        """Write a register: 32 bits clear the upper half, fewer leave the rest alone (SDM vol. 1 section 3.4.1.1)."""
        if size < 4:
            shift = 8 if operand.high else 0
            mask = (1 << 8 * size) - 1 << shift
            value = self.registers[operand.name] & ~mask | value << shift & mask
        self.registers[operand.name] = value

    def next(self, instruction: Instruction) -> None:
        """Go on behind the instruction."""
        self.rip = self.rip + instruction.length & self.mask

    def access(self, kind: str, gva: int, size: int, instruction: Instruction, **how: int) -> Done:
        """Make the instruction's access."""
        done = self.processor.memory(kind, gva, size, self.rip, instruction.length, **how)
        self.check(done)
        if not done.emulated and done.gpa is not None and gva % _PAGE + size <= _PAGE:
            self.data[gva // _PAGE] = done.gpa // _PAGE
            if kind != "r":
                self.written[gva // _PAGE] = done.gpa // _PAGE
        return done

    def cached(self, table: dict[int, int], gva: int, size: int) -> int | None:
        """Where an address is by a translation the processor still holds."""
        frame = table.get(gva // _PAGE)
        return None if frame is None or gva % _PAGE + size > _PAGE else frame * _PAGE + gva % _PAGE

    def load(self, operand: Register | Memory | int | None, size: int, instruction: Instruction) -> int:
        """The value of an operand that is only read."""
        if not isinstance(operand, Memory):
            assert operand is not None
            return self.get(operand, size)
        gva = self.address(operand, instruction)
        gpa = self.cached(self.data, gva, size)
        if gpa is not None:
            return int.from_bytes(self.host.read(gpa, size), "little")
        return self.access("r", gva, size, instruction).value

    def _mov(self, instruction: Instruction) -> None:
        value = self.load(instruction.source, instruction.size, instruction)
        if isinstance(instruction.dest, Memory):
            gva = self.address(instruction.dest, instruction)
            self.access("w", gva, instruction.size, instruction, value=value)
        else:
            assert instruction.dest is not None
            self.put(instruction.dest, instruction.size, value)
        self.next(instruction)

    def _movzx(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        self.put(instruction.dest, instruction.size, self.load(instruction.source, instruction.number, instruction))
        self.next(instruction)

    def arithmetic(self, instruction: Instruction) -> None:
        """One of the eight operations, or a shift."""
        name, size, dest = instruction.name, instruction.size, instruction.dest
        source = self.load(instruction.source, size, instruction)
        if name == "cmp" or not isinstance(dest, Memory):
            value, self.carry = compute(name, self.load(dest, size, instruction), source, size, self.carry)
            if isinstance(dest, Register):
                self.put(dest, size, value)
            self.next(instruction)
            return
        gva = self.address(dest, instruction)
        gpa = self.cached(self.written, gva, size)
        if gpa is not None:
            old = int.from_bytes(self.host.read(gpa, size), "little")
            value, self.carry = compute(name, old, source, size, self.carry)
            if value != old:
                self.host.store(gpa, value.to_bytes(size, "little"))
        elif name == "add":
            self.access("add", gva, size, instruction, value=source)
        else:
            # The model knows additions: add nothing for what the access causes, then store the result.
            done = self.access("add", gva, size, instruction)
            if done.mmio or done.gpa is None:
                raise UnknownInstruction(f"{name} of a device register")
            old = int.from_bytes(self.host.read(done.gpa, size), "little")
            value, self.carry = compute(name, old, source, size, self.carry)
            if value != old:
                self.access("w", gva, size, instruction, value=value)
        self.next(instruction)

    def _cmpxchg(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Memory)
        assert isinstance(instruction.source, Register)
        size = instruction.size
        old = self.get(Register("rax"), size)
        gva = self.address(instruction.dest, instruction)
        done = self.access("cas", gva, size, instruction, value=self.get(instruction.source, size), old=old)
        if done.value != old:
            self.put(Register("rax"), size, done.value)
        self.next(instruction)

    def _movs(self, instruction: Instruction) -> None:
        src, dst = self.registers["rsi"], self.registers["rdi"]
        done = self.processor.memory("movs", dst, instruction.size, self.rip, instruction.length, src=src)
        self.check(done)
        self.next(instruction)

    def _nop(self, instruction: Instruction) -> None:
        self.next(instruction)

    def _push(self, instruction: Instruction) -> None:
        self.push(self.load(instruction.source, instruction.size, instruction), instruction)
        self.next(instruction)

    def _pusha(self, instruction: Instruction) -> None:
        stack = self.registers["rsp"]
        for name in ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"):
            value = stack if name == "rsp" else self.registers[name]
            self.push(value & (1 << 8 * instruction.size) - 1, instruction)
        self.next(instruction)

    def push(self, value: int, instruction: Instruction) -> None:
        """Put a value on the stack."""
        gva = self.registers["rsp"] - instruction.size & self.mask
        self.access("w", gva, instruction.size, instruction, value=value)
        self.registers["rsp"] = gva

    def _jump(self, instruction: Instruction) -> None:
        assert isinstance(instruction.source, Register)
        self.rip = self.registers[instruction.source.name]

    def _invlpg(self, instruction: Instruction) -> None:
        if self.cpl:
            self.raise_fault(_GP, 0)
        assert isinstance(instruction.source, Memory)
        gva = self.address(instruction.source, instruction)
        self.check(self.processor.invlpg(gva, self.rip, instruction.length))
        for table in (self.code, self.data, self.written):
            table.pop(gva // _PAGE, None)
        self.next(instruction)

    def _cr(self, instruction: Instruction) -> None:
        assert isinstance(instruction.source, Register)
        self.register(f"cr{instruction.number}", self.registers[instruction.source.name], instruction)

    def _wrmsr(self, instruction: Instruction) -> None:
        value = self.registers["rax"] & 0xFFFFFFFF | (self.registers["rdx"] & 0xFFFFFFFF) << 32
        self.register("efer", value, instruction)

    def register(self, name: str, value: int, instruction: Instruction) -> None:
        """Load a control register or EFER."""
        if self.cpl:
            self.raise_fault(_GP, 0)
        done = self.processor.load_register(name, value, self.rip, instruction.length)
        self.flush()
        self.check(done)
        self.next(instruction)

    def _hlt(self, instruction: Instruction) -> None:
        if self.cpl:
            self.raise_fault(_GP, 0)
        self.processor.halt(self.rip, instruction.length)
        self.end("exit", exit=str(_KVM_EXIT_HLT))

    def _out(self, instruction: Instruction) -> None:
        self.processor.out(self.rip, instruction.number)
        if instruction.number == stubs.DONE_PORT:
            fields = {"rax": f"{self.registers['rax']:x}"}
            if self.extra:
                fields["rbx"] = f"{self.registers['rbx']:x}"
            self.end("ok", **fields)
        if stubs.FAULT_PORT <= instruction.number:
            self.end("exc", **self.fault)
        raise UnknownInstruction(f"out to port {instruction.number:#x}")

    # -- exceptions

    def raise_fault(self, vector: int, error: int | None = None, gva: int | None = None) -> NoReturn:
        """Deliver an exception and run its handler to the end."""
        offset = self.rip - self.start
        where = f"stub+{offset:x}" if 0 <= offset < stubs.STUB_SIZE else f"{self.rip:x}"
        self.fault = {"exc": str(vector), "ip": where}
        if error is not None:
            self.fault["err"] = f"{error:x}"
        if gva is not None:
            self.fault["cr2"] = f"{gva:x}"
        self.deliver(vector)
        for _ in range(_MAX_STEPS):
            self.step()
        self.end("hang")

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
            if pending == _PF or done.outcome == Outcome.GP and pending == _GP:
                vector = _DF
                self.fault = {"exc": str(_DF), "err": "0", "ip": self.fault["ip"]}
            else:
                vector = _PF if done.outcome == Outcome.PF else _GP
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
