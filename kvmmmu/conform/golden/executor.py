"""What the instructions of a golden guest do: registers, memory operands, arithmetic, control registers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final, NoReturn

from kvmmmu.conform.golden import stubs
from kvmmmu.conform.golden.arithmetic import compute
from kvmmmu.conform.golden.host import Host
from kvmmmu.conform.golden.operands import (
    ARITHMETIC,
    SHIFTS,
    Instruction,
    Memory,
    Register,
    UnknownInstruction,
)
from kvmmmu.conform.golden.processor import Done, Processor

__all__ = ["PAGE", "Executor"]

PAGE: Final = 4096
GP: Final = 13
_KVM_EXIT_HLT: Final = 5
_ARITHMETIC: Final = frozenset((*ARITHMETIC, *SHIFTS, "inc", "dec", "not", "neg", "test"))
_READS: Final = frozenset({"cmp", "test"})


class Executor(ABC):
    """Registers and translations of the processor, and one method per instruction.

    Parameters
    ----------
    processor : Processor
    host : Host
    long : bool
        64-bit code.
    """

    def __init__(self, processor: Processor, host: Host, long: bool) -> None:
        self.processor = processor
        self.host = host
        self.long = long
        self.mask = (1 << 64) - 1 if long else (1 << 32) - 1
        self.cpl = 0
        self.registers: dict[str, int] = {}
        self.rip = 0
        self.flags = 2
        # The stub reports what its first load gave, too.
        self.extra = False
        self.fault: dict[str, str] = {}
        # Translations the processor still holds: emptied by every exit.  (page -> guest frame)
        self.code: dict[int, int] = {}
        self.data: dict[int, int] = {}
        self.written: dict[int, int] = {}

    @abstractmethod
    def check(self, done: Done) -> None:
        """Turn anything but success into its end."""

    def code_written(self) -> None:
        """An instruction stores through CS, which the processor refuses (SDM vol. 3A section 6.15, #GP)."""
        if "segments_unchecked" not in self.processor.artefacts:
            self.raise_fault(GP, 0)

    @abstractmethod
    def raise_fault(self, vector: int, error: int | None = None, gva: int | None = None) -> NoReturn:
        """Deliver an exception; its handler is next."""

    @abstractmethod
    def end(self, outcome: str, **fields: str) -> NoReturn:
        """Finish the operation."""

    def flush(self) -> None:
        """Nothing is cached by the processor any more."""
        self.code.clear()
        self.data.clear()
        self.written.clear()

    def execute(self, instruction: Instruction) -> None:
        """Carry an instruction out and go on to the next."""
        if instruction.name in _ARITHMETIC:
            self.arithmetic(instruction)
        else:
            getattr(self, "_" + instruction.name)(instruction)

    # -- operands

    def address(self, operand: Memory, instruction: Instruction) -> int:
        """The effective address of a memory operand."""
        if operand.code and instruction.dest is operand and instruction.name not in _READS:
            self.code_written()
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
        if not done.emulated and done.gpa is not None and gva % PAGE + size <= PAGE:
            self.data[gva // PAGE] = done.gpa // PAGE
            if kind != "r":
                self.written[gva // PAGE] = done.gpa // PAGE
        return done

    def cached(self, table: dict[int, int], gva: int, size: int) -> int | None:
        """Where an address is by a translation the processor still holds."""
        frame = table.get(gva // PAGE)
        return None if frame is None or gva % PAGE + size > PAGE else frame * PAGE + gva % PAGE

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

    # -- instructions

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
        source = 0 if instruction.source is None else self.load(instruction.source, size, instruction)
        if name in _READS or not isinstance(dest, Memory):
            value, self.flags = compute(name, self.load(dest, size, instruction), source, size, self.flags)
            if isinstance(dest, Register) and name not in _READS:
                self.put(dest, size, value)
            self.next(instruction)
            return
        gva = self.address(dest, instruction)
        gpa = self.cached(self.written, gva, size)
        if gpa is not None:
            old = int.from_bytes(self.host.read(gpa, size), "little")
            value, self.flags = compute(name, old, source, size, self.flags)
            if value != old:
                self.host.store(gpa, value.to_bytes(size, "little"))
        elif name == "add":
            done = self.access("add", gva, size, instruction, value=source)
            if done.gpa is not None and gva % PAGE + size <= PAGE:
                left = int.from_bytes(self.host.read(done.gpa, size), "little")
                _, self.flags = compute(name, left - source, source, size, self.flags)
        else:
            old = self.modify(gva, size, instruction)
            value, self.flags = compute(name, old, source, size, self.flags)
            if value != old:
                self.access("w", gva, size, instruction, value=value)
        self.next(instruction)

    def modify(self, gva: int, size: int, instruction: Instruction) -> int:
        """The value of a memory operand that is about to be stored to.

        The model knows additions: nothing is added, for what the access causes.
        """
        done = self.access("add", gva, size, instruction)
        if done.mmio or done.gpa is None or gva % PAGE + size > PAGE:
            raise UnknownInstruction(f"{instruction.name} of a device register or across pages")
        return int.from_bytes(self.host.read(done.gpa, size), "little")

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
            self.raise_fault(GP, 0)
        assert isinstance(instruction.source, Memory)
        gva = self.address(instruction.source, instruction)
        self.check(self.processor.invlpg(gva, self.rip, instruction.length))
        for table in (self.code, self.data, self.written):
            table.pop(gva // PAGE, None)
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
            self.raise_fault(GP, 0)
        done = self.processor.load_register(name, value, self.rip, instruction.length)
        self.flush()
        self.check(done)
        self.next(instruction)

    def _hlt(self, instruction: Instruction) -> None:
        if self.cpl:
            self.raise_fault(GP, 0)
        self.processor.halt(self.rip, instruction.length)
        self.end("exit", exit=str(_KVM_EXIT_HLT))

    def _out(self, instruction: Instruction) -> None:
        self.processor.out(self.rip, instruction.number)
        if instruction.number == stubs.DONE_PORT:
            fields = {"rax": f"{self.registers['rax']:x}"}
            if self.extra:
                fields["rbx"] = f"{self.registers['rbx']:x}"
            self.end("ok", **fields)
        if instruction.number >= stubs.FAULT_PORT:
            self.end("exc", **self.fault)
        raise UnknownInstruction(f"out to port {instruction.number:#x}")
