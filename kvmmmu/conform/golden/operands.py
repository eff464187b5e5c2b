"""Instructions as data: operands, prefixes, and the ModRM byte that names them (Intel SDM vol. 2A chapter 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = [
    "ARITHMETIC",
    "MAX_LENGTH",
    "NOT_IN_LONG",
    "REGISTERS",
    "SHIFTS",
    "Cursor",
    "Instruction",
    "Memory",
    "Prefixes",
    "Register",
    "UndefinedInstruction",
    "UnknownInstruction",
    "extend",
    "modrm",
    "register",
]

MAX_LENGTH: Final = 15
ARITHMETIC: Final = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
SHIFTS: Final = ("rol", "ror", "rcl", "rcr", "shl", "shr", "shl", "sar")
REGISTERS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
# One-byte opcodes of 32-bit code that do not exist in 64-bit mode (SDM vol. 2D table A-2).
NOT_IN_LONG: Final = frozenset({0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F, 0x27, 0x2F, 0x37, 0x3F, 0x60, 0x61, 0x82})


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
    """A memory operand; ``relative``: to the next instruction; ``code``: in the code segment of 32-bit code."""

    base: str | None
    index: str | None
    scale: int
    displacement: int
    relative: bool
    code: bool = False


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    name : str
        mov, movzx, an arithmetic operation or shift, cmpxchg, movs, push, pusha, jump, invlpg, cr, wrmsr, out, hlt,
        nop, and those of ``integer``.
    length : int
        Bytes of code.
    size : int
        Bytes of the operation.
    dest, source : Register, Memory, int or None
        An int is an immediate value.
    number : int
        Control register or port; of ``movzx`` the bytes read; what ``integer`` puts there.
    third : bool
        ``number`` is the third operand.
    """

    name: str
    length: int
    size: int = 0
    dest: Register | Memory | None = None
    source: Register | Memory | int | None = None
    number: int = 0
    third: bool = False


class Cursor:
    """Code being read.

    Parameters
    ----------
    code : bytes
    at : int
        Where to begin.
    """

    def __init__(self, code: bytes, at: int = 0) -> None:
        self.code = code
        self.at = at

    def take(self, count: int = 1) -> int:
        """The next bytes as an integer; IndexError when the code ends before."""
        if self.at + count > len(self.code):
            raise IndexError
        value = int.from_bytes(self.code[self.at : self.at + count], "little")
        self.at += count
        return value

    def signed(self, count: int) -> int:
        """The same, signed."""
        value = self.take(count)
        return value - (1 << 8 * count) if value >> 8 * count - 1 else value


@dataclass
class Prefixes:
    """What stands before an opcode; ``code_segment``: the override that names CS."""

    rex: int = 0
    operand16: bool = False
    lock: bool = False
    repeat: bool = False
    code_segment: bool = False

    @property
    def b(self) -> int:
        """REX.B, where it belongs in a register's number."""
        return (self.rex & 1) << 3

    @property
    def size(self) -> int:
        """Bytes of an operand that is not one byte."""
        return 8 if self.rex & 8 else 2 if self.operand16 else 4

    def stack(self, long: bool) -> int:
        """Bytes pushed or popped."""
        return 2 if self.operand16 else 8 if long else 4


def extend(value: int, count: int) -> int:
    """Sign-extend a constant to 64 bits."""
    return value | ((1 << 64) - (1 << 8 * count) if value >> 8 * count - 1 else 0)


def register(number: int, width: int, rex: int) -> Register:
    """A register by number; without REX the bytes 4 to 7 are the high ones."""
    if width == 1 and not rex and number >= 4:
        return Register(REGISTERS[number - 4], high=True)
    return Register(REGISTERS[number])


def modrm(
    cursor: Cursor, prefixes: Prefixes, long: bool, width: int, source_width: int | None = None
) -> tuple[Register, Register | Memory, int]:
    """The register, the other operand, and the register's bare number."""
    byte = cursor.take()
    rex = prefixes.rex
    number = byte >> 3 & 7
    reg = register(number | (rex & 4) << 1, width, rex)
    if byte >> 6 == 3:
        return reg, register(byte & 7 | (rex & 1) << 3, source_width or width, rex), number
    return reg, _memory(cursor, byte, rex, long, prefixes.code_segment and not long), number


def _memory(cursor: Cursor, byte: int, rex: int, long: bool, code: bool) -> Memory:
    mod, rm = byte >> 6, byte & 7
    base: str | None = REGISTERS[rm | (rex & 1) << 3]
    index: str | None = None
    scale = 1
    relative = False
    wide = mod == 2
    if rm == 4:
        sib = cursor.take()
        number = sib >> 3 & 7 | (rex & 2) << 2
        index = None if number == 4 else REGISTERS[number]
        scale = 1 << (sib >> 6)
        base = REGISTERS[sib & 7 | (rex & 1) << 3]
        if sib & 7 == 5 and mod == 0:
            base, wide = None, True
    elif rm == 5 and mod == 0:
        base, wide, relative = None, True, long
    displacement = cursor.signed(4) if wide else cursor.signed(1) if mod == 1 else 0
    return Memory(base, index, scale, displacement, relative, code)
