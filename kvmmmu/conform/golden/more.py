"""What integer instructions do that only data look like: the rest of ``integer``."""

from __future__ import annotations

from kvmmmu.conform.golden.arithmetic import CF, FLAGS, OF, PF, SF, ZF, condition
from kvmmmu.conform.golden.executor import GP, Executor
from kvmmmu.conform.golden.operands import Instruction, Memory, Register

__all__ = ["IntegerExecutor"]

_DE = 0
_VECTORS = 32
# Selectors of the guest's descriptors, by privilege: code, data.
_SELECTORS = {0: (0x08, 0x10), 3: (0x1B, 0x23)}


class IntegerExecutor(Executor):
    """Integer instructions."""

    def _store(self, operand: Register | Memory | None, size: int, value: int, instruction: Instruction) -> None:
        if isinstance(operand, Memory):
            self.access("w", self.address(operand, instruction), size, instruction, value=value)
        else:
            assert operand is not None
            self.put(operand, size, value)

    def _signed(self, value: int, size: int) -> int:
        return value - (1 << 8 * size) if value >> 8 * size - 1 else value

    # -- the stack

    def pop(self, size: int, instruction: Instruction) -> int:
        """Take a value from the stack."""
        value = self.access("r", self.registers["rsp"], size, instruction).value
        self.registers["rsp"] = self.registers["rsp"] + size & self.mask
        return value

    def _pop(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        value = self.pop(instruction.size, instruction)
        self.put(instruction.dest, instruction.size, value)
        self.next(instruction)

    def _push_segment(self, instruction: Instruction) -> None:
        selector = _SELECTORS[3 if self.cpl == 3 else 0][instruction.number != 1]
        self.push(selector, instruction)
        self.next(instruction)

    def _pop_segment(self, instruction: Instruction) -> None:
        selector = self.access("r", self.registers["rsp"], instruction.size, instruction).value & 0xFFFF
        known = {s & ~7 for pair in _SELECTORS.values() for s in pair}
        null = selector & ~3 == 0
        if instruction.number == 2 if null else selector & ~3 not in known:
            self.raise_fault(GP, selector & ~3)
        self.registers["rsp"] = self.registers["rsp"] + instruction.size & self.mask
        self.next(instruction)

    def _leave(self, instruction: Instruction) -> None:
        value = self.access("r", self.registers["rbp"], instruction.size, instruction).value
        self.registers["rsp"] = self.registers["rbp"] + instruction.size & self.mask
        self.registers["rbp"] = value
        self.next(instruction)

    # -- branches

    def _to(self, instruction: Instruction, taken: bool) -> None:
        self.next(instruction)
        if taken:
            assert isinstance(instruction.source, int)
            self.rip = self.rip + instruction.source & self.mask

    def _branch(self, instruction: Instruction) -> None:
        self._to(instruction, condition(instruction.number, self.flags))

    def _go(self, instruction: Instruction) -> None:
        self._to(instruction, True)

    def _loop(self, instruction: Instruction) -> None:
        if instruction.number == 3:
            self._to(instruction, self.registers["rcx"] == 0)
            return
        left = self.registers["rcx"] - 1 & self.mask
        self.registers["rcx"] = left
        zero = bool(self.flags & ZF)
        self._to(instruction, left != 0 and (instruction.number == 2 or zero == (instruction.number == 1)))

    def _call(self, instruction: Instruction) -> None:
        self.push(self.rip + instruction.length & self.mask, instruction)
        self._to(instruction, True)

    def _return(self, instruction: Instruction) -> None:
        self.rip = self.pop(instruction.size, instruction)
        self.registers["rsp"] = self.registers["rsp"] + instruction.number & self.mask

    # -- flags

    def _carry(self, instruction: Instruction) -> None:
        carry = (self.flags & CF ^ CF, 0, CF)[instruction.number]
        self.flags = self.flags & ~CF | carry
        self.next(instruction)

    def _flags(self, instruction: Instruction) -> None:
        """SAHF and LAHF: all but OF, by AH."""
        high, some = Register("rax", high=True), FLAGS & 0xFF
        if instruction.number:
            self.put(high, 1, self.flags & some | 2)
        else:
            self.flags = self.flags & ~some | self.get(high, 1) & some
        self.next(instruction)

    def _salc(self, instruction: Instruction) -> None:
        self.put(Register("rax"), 1, 0xFF if self.flags & CF else 0)
        self.next(instruction)

    def _set(self, instruction: Instruction) -> None:
        assert not isinstance(instruction.dest, int)
        self._store(instruction.dest, 1, int(condition(instruction.number, self.flags)), instruction)
        self.next(instruction)

    def _cmov(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        value = self.load(instruction.source, instruction.size, instruction)
        if condition(instruction.number, self.flags):
            self.put(instruction.dest, instruction.size, value)
        elif instruction.size == 4:
            self.put(instruction.dest, 4, self.get(instruction.dest, 4))
        self.next(instruction)

    # -- moves

    def _stos(self, instruction: Instruction) -> None:
        value = self.get(Register("rax"), instruction.size)
        self.access("w", self.registers["rdi"], instruction.size, instruction, value=value)
        self.registers["rdi"] = self.registers["rdi"] + instruction.size & self.mask
        self.next(instruction)

    def _lods(self, instruction: Instruction) -> None:
        value = self.access("r", self.registers["rsi"], instruction.size, instruction).value
        self.put(Register("rax"), instruction.size, value)
        self.registers["rsi"] = self.registers["rsi"] + instruction.size & self.mask
        self.next(instruction)

    def _lea(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        assert isinstance(instruction.source, Memory)
        address = self.address(instruction.source, instruction)
        self.put(instruction.dest, instruction.size, self.get(address, instruction.size))
        self.next(instruction)

    def _movsx(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        count, size = instruction.number, instruction.size
        value = self._signed(self.load(instruction.source, count, instruction), count)
        self.put(instruction.dest, size, value & (1 << 8 * size) - 1)
        self.next(instruction)

    def _xchg(self, instruction: Instruction) -> None:
        assert isinstance(instruction.source, Register)
        size, dest = instruction.size, instruction.dest
        mine = self.get(instruction.source, size)
        if isinstance(dest, Memory):
            gva = self.address(dest, instruction)
            theirs = self.modify(gva, size, instruction)
            if mine != theirs:
                self.access("w", gva, size, instruction, value=mine)
        else:
            assert dest is not None
            theirs = self.get(dest, size)
            self.put(dest, size, mine)
        self.put(instruction.source, size, theirs)
        self.next(instruction)

    def _widen(self, instruction: Instruction) -> None:
        size = instruction.size
        accumulator = Register("rax")
        if instruction.number:
            top = self.get(accumulator, size) >> 8 * size - 1
            self.put(Register("rdx"), size, (1 << 8 * size) - 1 if top else 0)
        else:
            value = self._signed(self.get(accumulator, size // 2), size // 2)
            self.put(accumulator, size, value & (1 << 8 * size) - 1)
        self.next(instruction)

    def _bswap(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        value = self.get(instruction.dest, instruction.size).to_bytes(instruction.size, "little")
        self.put(instruction.dest, instruction.size, int.from_bytes(value, "big"))
        self.next(instruction)

    def _arpl(self, instruction: Instruction) -> None:
        dest = instruction.dest
        assert isinstance(instruction.source, Register)
        wanted = self.get(instruction.source, 2) & 3
        value = self.load(dest, 2, instruction)
        self.flags = self.flags & ~ZF | (ZF if value & 3 < wanted else 0)
        if value & 3 < wanted:
            assert not isinstance(dest, int)
            self._store(dest, 2, value & ~3 | wanted, instruction)
        self.next(instruction)

    # -- products and quotients

    def _product(self, size: int, value: int, low: int, signed: bool) -> None:
        """Flags of a product: CF and OF say that it does not fit; the others are what a processor leaves there."""
        fits = value == self._signed(low, size) if signed else value == low
        self.flags = self.flags & ~FLAGS | (0 if fits else CF | OF) | self.flags & (PF | ZF | SF)

    def _wide(self, instruction: Instruction, signed: bool) -> None:
        size = instruction.size
        left, right = self.get(Register("rax"), size), self.load(instruction.dest, size, instruction)
        if signed:
            left, right = self._signed(left, size), self._signed(right, size)
        low = left * right & (1 << 8 * size) - 1
        high = left * right >> 8 * size & (1 << 8 * size) - 1
        if size == 1:
            self.put(Register("rax"), 2, high << 8 | low)
        else:
            self.put(Register("rax"), size, low)
            self.put(Register("rdx"), size, high)
        self._product(size, left * right, low, signed)
        self.next(instruction)

    def _mul(self, instruction: Instruction) -> None:
        self._wide(instruction, False)

    def _imul(self, instruction: Instruction) -> None:
        self._wide(instruction, True)

    def _imul2(self, instruction: Instruction) -> None:
        assert isinstance(instruction.dest, Register)
        size = instruction.size
        left = self._signed(self.load(instruction.source, size, instruction), size)
        other = instruction.number & (1 << 8 * size) - 1 if instruction.third else self.get(instruction.dest, size)
        value = left * self._signed(other, size)
        low = value & (1 << 8 * size) - 1
        self.put(instruction.dest, size, low)
        self._product(size, value, low, True)
        self.next(instruction)

    def _divide(self, instruction: Instruction, signed: bool) -> None:
        size = instruction.size
        divisor = self.load(instruction.dest, size, instruction)
        if size == 1:
            dividend = self.get(Register("rax"), 2)
        else:
            dividend = self.get(Register("rdx"), size) << 8 * size | self.get(Register("rax"), size)
        if signed:
            divisor, dividend = self._signed(divisor, size), self._signed(dividend, 2 * size)
        if divisor == 0:
            self.raise_fault(_DE)
        quotient = abs(dividend) // abs(divisor)
        if (dividend < 0) != (divisor < 0):
            quotient = -quotient
        remainder = dividend - quotient * divisor
        low, high = (-(1 << 8 * size - 1), 1 << 8 * size - 1) if signed else (0, 1 << 8 * size)
        if not low <= quotient < high:
            self.raise_fault(_DE)
        mask = (1 << 8 * size) - 1
        if size == 1:
            self.put(Register("rax"), 2, (remainder & mask) << 8 | quotient & mask)
        else:
            self.put(Register("rax"), size, quotient & mask)
            self.put(Register("rdx"), size, remainder & mask)
        self.next(instruction)

    def _div(self, instruction: Instruction) -> None:
        self._divide(instruction, False)

    def _idiv(self, instruction: Instruction) -> None:
        self._divide(instruction, True)

    # -- exceptions

    def _trap(self, instruction: Instruction) -> None:
        """INT3 and INT1: the handler returns to what follows."""
        self.next(instruction)
        self.raise_fault(instruction.number)

    def _interrupt(self, instruction: Instruction) -> None:
        """INT n: gates of privilege 0, so user code may not; beyond the table nobody may."""
        if self.cpl or instruction.number >= _VECTORS:
            self.raise_fault(GP, instruction.number << 3 | 2)
        self.next(instruction)
        self.raise_fault(instruction.number)
