"""Decoding the few x86 instructions that golden guests execute.

A stub holds known ones; a jump may land on any bytes of guest memory, page-table entries included, so the
decoder reads memory operands in general form (Intel SDM vol. 2A chapter 2) and refuses the rest by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["Instruction", "UnknownInstruction", "decode"]

MAX_LENGTH: Final = 15
_REGISTERS: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi") + tuple(f"r{n}" for n in range(8, 16))


class UnknownInstruction(Exception):
    """Bytes that this decoder does not know."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes
    ----------
    name : str
        load (zero-extending), store, add, cas, movs, jump, invlpg, cr, wrmsr, out, hlt, move.
    length : int
        Bytes of code.
    size : int
        Bytes of the operand.
    base, index, scale, displacement : the memory operand; ``relative``: to the next instruction.
    register : str
        The other operand.
    number : int
        Control register or port.
    high : bool
        The register operand is bits 15:8 (AH, CH, DH, BH).
    """

    name: str
    length: int
    size: int = 0
    base: str | None = None
    index: str | None = None
    scale: int = 1
    displacement: int = 0
    relative: bool = False
    register: str = ""
    number: int = 0
    high: bool = False


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
    IndexError
        The code ends within it.
    """
    cursor = _Cursor(code[:MAX_LENGTH])
    operand16 = lock = False
    while True:
        byte = cursor.take()
        if byte == 0x66:
            operand16 = True
        elif byte == 0xF0:
            lock = True
        else:
            break
    rex = 0
    if long and byte & 0xF0 == 0x40:
        rex = byte
        byte = cursor.take()
    size = 8 if rex & 8 else 2 if operand16 else 4
    opcode = byte
    if byte == 0x0F:
        opcode = 0x0F00 | cursor.take()
    if opcode in _PLAIN:
        return _plain(opcode, cursor, size, long)
    if opcode not in _MODRM:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    name, width = _MODRM[opcode]
    modrm = cursor.take()
    reg = modrm >> 3 & 7
    if opcode == 0xFF and reg != 4 or opcode == 0x0F01 and reg != 7:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    register = _REGISTERS[reg | (rex & 4) << 1]
    high = False
    if (width == 1 and name != "load") and not rex and reg >= 4:
        register, high = _REGISTERS[reg - 4], True
    if name == "cr":
        return Instruction("cr", cursor.at, number=reg, register=_REGISTERS[modrm & 7 | (rex & 1) << 3])
    if modrm >> 6 == 3:
        rm = _REGISTERS[modrm & 7 | (rex & 1) << 3]
        if opcode == 0xFF:
            return Instruction("jump", cursor.at, register=rm)
        if opcode == 0x89:
            return Instruction("move", cursor.at, size=size, base=rm, register=register)
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    if opcode == 0xFF:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    operand = _memory(cursor, modrm, rex, long)
    if name == "cas" and not lock:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    return Instruction(name, cursor.at, width or size, *operand, register=register, high=high)


# opcode: (name, operand bytes; 0: by prefixes)
_MODRM: Final = {
    0x00: ("add", 1),
    0x01: ("add", 0),
    0x88: ("store", 1),
    0x89: ("store", 0),
    0x8B: ("load", 0),
    0xFF: ("jump", 0),
    0x0F01: ("invlpg", 1),
    0x0F22: ("cr", 0),
    0x0FB1: ("cas", 0),
    0x0FB6: ("load", 1),
    0x0FB7: ("load", 2),
}
_PLAIN: Final = frozenset({0xA5, 0xE6, 0xF4, 0x0F30})


def _plain(opcode: int, cursor: _Cursor, size: int, long: bool) -> Instruction:
    if opcode == 0xE6:
        port = cursor.take()
        return Instruction("out", cursor.at, 1, number=port)
    name = {0xA5: "movs", 0xF4: "hlt", 0x0F30: "wrmsr"}[opcode]
    return Instruction(name, cursor.at, size)


def _memory(cursor: _Cursor, modrm: int, rex: int, long: bool) -> tuple[str | None, str | None, int, int, bool]:
    """base, index, scale, displacement, relative."""
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
    return base, index, scale, displacement, relative
