"""Decoding the x86 instructions that golden guests execute.

A stub holds a dozen known ones.  A jump may land on any bytes of guest memory and run on through data, page-table
entries and zeros (``00 00`` is an addition), so the arithmetic block is decoded in general form
(Intel SDM vol. 2D appendix A); everything else is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["ARITHMETIC", "SHIFTS", "Instruction", "UndefinedInstruction", "UnknownInstruction", "decode"]

MAX_LENGTH: Final = 15
ARITHMETIC: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
SHIFTS: Final = ("rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar")
_REGISTERS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
# One-byte opcodes of 32-bit code that do not exist in 64-bit mode (SDM vol. 2D table A-2).
_NOT_IN_LONG: Final = frozenset({0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82})


class UnknownInstruction(Exception):
    """Bytes that this decoder does not know."""


class UndefinedInstruction(Exception):
    """Bytes that are no instruction: the processor raises #UD."""


@dataclass(frozen=True)
class Register:
    """A register operand; ``high``: bits 15:8 of it (AH, CH, DH, BH)."""

    name: str
    high: bool = False


@dataclass(frozen=True)
class Memory:
    """A memory operand; ``relative``: to the next instruction."""

    base: str | None
    index: str | None
    scale: int
    displacement: int
    relative: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    name : str
        mov, movzx, an arithmetic operation or shift, cmpxchg, movs, push, pusha, jump, invlpg, cr, wrmsr, out, hlt,
        nop.
    length : int
        Bytes of code.
    size : int
        Bytes of the operation.
    dest, source : Register, Memory, int or None
        An int is an immediate value.
    number : int
        Control register or port; of ``movzx`` the bytes read.
    """

    name: str
    length: int
    size: int = 0
    dest: Register | Memory | None = None
    source: Register | Memory | int | None = None
    number: int = 0


class _Cursor:
    def __init__(self, code: bytes) -> None:
        self.code = code
        self.at = 0

    def take(self, count: int = 1) -> int:
        """The next bytes as an integer; IndexError when the code ends before."""
        if self.at + count > len(self.code):
            raise IndexError
        value = int.from_bytes(self.code[self.at : self.at + count], "little")
        self.at += count
        return value

    def signed(self, count: int) -> int:
        value = self.take(count)
        return value - (1 << 8 * count) if value >> 8 * count - 1 else value


@dataclass
class _Prefixes:
    rex: int = 0
    operand16: bool = False
    lock: bool = False

    @property
    def size(self) -> int:
        return 8 if self.rex & 8 else 2 if self.operand16 else 4


def decode(code: bytes, long: bool) -> Instruction:
    """Decode the first instruction.

    Parameters
    ----------
    code : bytes
        At least the instruction, up to 15 bytes.
    long : bool
        64-bit mode; otherwise 32-bit.

    Raises
    ------
    UnknownInstruction
        It is none of those known.
    UndefinedInstruction
        It is none at all.
    IndexError
        The code ends within it.
    """
    cursor = _Cursor(code[:MAX_LENGTH])
    prefixes = _Prefixes()
    opcode = _opcode(cursor, prefixes, long)
    if long and opcode in _NOT_IN_LONG:
        raise UndefinedInstruction
    instruction = _plain(opcode, cursor, prefixes, long) or _arithmetic(opcode, cursor, prefixes, long)
    if instruction is None:
        instruction = _other(opcode, cursor, prefixes, long)
    if instruction is None:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    return instruction


def _opcode(cursor: _Cursor, prefixes: _Prefixes, long: bool) -> int:
    while True:
        byte = cursor.take()
        if byte == 0x66:
            prefixes.operand16 = True
        elif byte == 0xF0:
            prefixes.lock = True
        else:
            break
    if long and byte & 0xF0 == 0x40:
        prefixes.rex = byte
        byte = cursor.take()
    return 0x0F00 | cursor.take() if byte == 0x0F else byte


def _plain(opcode: int, cursor: _Cursor, prefixes: _Prefixes, long: bool) -> Instruction | None:
    """Instructions without a ModRM byte."""
    if opcode == 0xE6:
        port = cursor.take()
        return Instruction("out", cursor.at, 1, number=port)
    if opcode == 0xF4:
        return Instruction("hlt", cursor.at)
    if opcode == 0xA5:
        return Instruction("movs", cursor.at, prefixes.size)
    if opcode == 0x0F30:
        return Instruction("wrmsr", cursor.at)
    if opcode == 0x90:
        return Instruction("nop", cursor.at)
    if opcode & ~0xF == 0x70:
        distance = cursor.signed(1)
        # Flags are not kept; a branch to the next instruction needs none.
        return Instruction("nop", cursor.at) if distance == 0 else None
    return _block(opcode, cursor, prefixes, long)


def _block(opcode: int, cursor: _Cursor, prefixes: _Prefixes, long: bool) -> Instruction | None:
    """Opcodes whose low bits are a register."""
    number = opcode & 7 | (prefixes.rex & 1) << 3
    if opcode & ~0xF == 0x40 and not long:
        name = "sub" if opcode & 8 else "add"
        return Instruction(name, cursor.at, prefixes.size, Register(_REGISTERS[opcode & 7]), 1)
    if opcode & ~7 == 0x50:
        return Instruction("push", cursor.at, 8 if long else prefixes.size, source=Register(_REGISTERS[number]))
    if opcode == 0x60:
        return Instruction("pusha", cursor.at, prefixes.size)
    if opcode & ~7 == 0xB0:
        return Instruction("mov", cursor.at + 1, 1, _register(number, 1, prefixes.rex), cursor.take())
    if opcode & ~7 == 0xB8:
        return Instruction(
            "mov", cursor.at + prefixes.size, prefixes.size, Register(_REGISTERS[number]), cursor.take(prefixes.size)
        )
    if opcode & ~3 == 0xA0:
        width = prefixes.size if opcode & 1 else 1
        place = Memory(None, None, 1, cursor.take(8 if long else 4), False)
        dest, source = (place, Register("rax")) if opcode & 2 else (Register("rax"), place)
        return Instruction("mov", cursor.at, width, dest, source)
    return None


def _arithmetic(opcode: int, cursor: _Cursor, prefixes: _Prefixes, long: bool) -> Instruction | None:
    """The eight operations with registers, memory and constants; shifts by one."""
    width = prefixes.size if opcode & 1 else 1
    if opcode < 0x40 and opcode & 7 < 6:
        name = ARITHMETIC[opcode >> 3]
        if opcode & 4:
            value = cursor.take(1 if width == 1 else 2 if width == 2 else 4)
            return Instruction(name, cursor.at, width, Register("rax"), _extend(value, min(width, 4)))
        register, operand, _ = _modrm(cursor, prefixes, long, width)
        dest, source = (register, operand) if opcode & 2 else (operand, register)
        return Instruction(name, cursor.at, width, dest, source)
    if opcode in (0x80, 0x81, 0x83):
        _, operand, number = _modrm(cursor, prefixes, long, width)
        count = 1 if opcode != 0x81 else min(width, 4)
        value = _extend(cursor.take(count), count)
        return Instruction(ARITHMETIC[number], cursor.at, width, operand, value)
    if opcode in (0xD0, 0xD1):
        _, operand, number = _modrm(cursor, prefixes, long, width)
        return Instruction(SHIFTS[number], cursor.at, width, operand, 1)
    return None


def _other(opcode: int, cursor: _Cursor, prefixes: _Prefixes, long: bool) -> Instruction | None:
    width = prefixes.size if opcode & 1 else 1
    if opcode in (0x88, 0x89, 0x8A, 0x8B):
        register, operand, _ = _modrm(cursor, prefixes, long, width)
        dest, source = (register, operand) if opcode & 2 else (operand, register)
        return Instruction("mov", cursor.at, width, dest, source)
    if opcode in (0x0FB6, 0x0FB7):
        count = 1 if opcode == 0x0FB6 else 2
        register, operand, _ = _modrm(cursor, prefixes, long, prefixes.size, count)
        return Instruction("movzx", cursor.at, prefixes.size, register, operand, count)
    if opcode == 0x0FB1:
        register, operand, _ = _modrm(cursor, prefixes, long, prefixes.size)
        return Instruction("cmpxchg", cursor.at, prefixes.size, operand, register)
    if opcode == 0x0F22:
        modrm = cursor.take()
        source = Register(_REGISTERS[modrm & 7 | (prefixes.rex & 1) << 3])
        return Instruction("cr", cursor.at, source=source, number=modrm >> 3 & 7)
    if opcode in (0xFF, 0x0F01):
        _, operand, number = _modrm(cursor, prefixes, long, 8 if long else 4)
        if opcode == 0xFF and number == 4 and isinstance(operand, Register):
            return Instruction("jump", cursor.at, source=operand)
        if opcode == 0x0F01 and number == 7 and isinstance(operand, Memory):
            return Instruction("invlpg", cursor.at, source=operand)
    return None


def _extend(value: int, count: int) -> int:
    """Sign-extend a constant to 64 bits."""
    return value | ((1 << 64) - (1 << 8 * count) if value >> 8 * count - 1 else 0)


def _register(number: int, width: int, rex: int) -> Register:
    if width == 1 and not rex and number >= 4:
        return Register(_REGISTERS[number - 4], high=True)
    return Register(_REGISTERS[number])


def _modrm(
    cursor: _Cursor, prefixes: _Prefixes, long: bool, width: int, source_width: int | None = None
) -> tuple[Register, Register | Memory, int]:
    """The register, the other operand, and the register's bare number."""
    modrm = cursor.take()
    rex = prefixes.rex
    number = modrm >> 3 & 7
    register = _register(number | (rex & 4) << 1, width, rex)
    if modrm >> 6 == 3:
        return register, _register(modrm & 7 | (rex & 1) << 3, source_width or width, rex), number
    return register, _memory(cursor, modrm, rex, long), number


def _memory(cursor: _Cursor, modrm: int, rex: int, long: bool) -> Memory:
    mod, rm = modrm >> 6, modrm & 7
    base: str | None = _REGISTERS[rm | (rex & 1) << 3]
    index: str | None = None
    scale = 1
    relative = False
    wide = mod == 2
    if rm == 4:
        sib = cursor.take()
        number = sib >> 3 & 7 | (rex & 2) << 2
        index = None if number == 4 else _REGISTERS[number]
        scale = 1 << (sib >> 6)
        base = _REGISTERS[sib & 7 | (rex & 1) << 3]
        if sib & 7 == 5 and mod == 0:
            base, wide = None, True
    elif rm == 5 and mod == 0:
        base, wide, relative = None, True, long
    displacement = cursor.signed(4) if wide else cursor.signed(1) if mod == 1 else 0
    return Memory(base, index, scale, displacement, relative)
