"""Decoding the x86 instructions that golden guests execute.

A stub holds a dozen known ones.  A jump may land on any bytes of guest memory and run on through data, page-table
entries and zeros (``00 00`` is an addition), so integer instructions are decoded in general form
(Intel SDM vol. 2D appendix A); everything else is refused by name.
"""

from __future__ import annotations

from typing import Final

from kvmmmu.conform.golden.integer import decode_integer
from kvmmmu.conform.golden.operands import (
    ARITHMETIC,
    MAX_LENGTH,
    NOT_IN_LONG,
    REGISTERS,
    SHIFTS,
    Cursor,
    Instruction,
    Memory,
    Prefixes,
    Register,
    UndefinedInstruction,
    UnknownInstruction,
    extend,
    modrm,
    register,
)

__all__ = ["decode"]

_SEGMENTS: Final = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65})
# What LOCK may stand before, if it stores to memory (SDM vol. 2A, LOCK).
_LOCKABLE: Final = frozenset("add or adc sbb and sub xor inc dec not neg xchg cmpxchg".split())
# Before an integer instruction that is no string they mean nothing.
_REPEAT: Final = frozenset({0xF2, 0xF3})


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
    cursor = Cursor(code[:MAX_LENGTH])
    prefixes = Prefixes()
    opcode = _opcode(cursor, prefixes, long)
    operands = cursor.at
    if long and opcode in NOT_IN_LONG:
        raise UndefinedInstruction
    instruction = _plain(opcode, cursor, prefixes, long) or _arithmetic(opcode, cursor, prefixes, long)
    if instruction is None:
        instruction = _other(opcode, Cursor(code[:MAX_LENGTH], operands), prefixes, long)
    if instruction is None:
        instruction = decode_integer(opcode, Cursor(code[:MAX_LENGTH], operands), prefixes, long)
    if instruction is None:
        raise UnknownInstruction(f"code {code[:MAX_LENGTH].hex(' ')}")
    if prefixes.lock and (instruction.name not in _LOCKABLE or not isinstance(instruction.dest, Memory)):
        raise UndefinedInstruction
    return instruction


def _opcode(cursor: Cursor, prefixes: Prefixes, long: bool) -> int:
    while True:
        byte = cursor.take()
        if byte == 0x66:
            prefixes.operand16 = True
        elif byte == 0xF0:
            prefixes.lock = True
        elif byte in _SEGMENTS:
            # Flat segments: only that nothing can be written through CS makes a difference.
            prefixes.code_segment = byte == 0x2E
        elif byte in _REPEAT:
            prefixes.repeat = True
        else:
            break
    if long and byte & 0xF0 == 0x40:
        prefixes.rex = byte
        byte = cursor.take()
    return 0x0F00 | cursor.take() if byte == 0x0F else byte


def _plain(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """Instructions without a ModRM byte."""
    if opcode == 0xE6:
        port = cursor.take()
        return Instruction("out", cursor.at, 1, number=port)
    if opcode == 0xF4:
        return Instruction("hlt", cursor.at)
    if opcode == 0xA5 and not prefixes.repeat:
        return Instruction("movs", cursor.at, prefixes.size)
    if opcode == 0x0F30:
        return Instruction("wrmsr", cursor.at)
    if opcode == 0x90:
        return Instruction("nop", cursor.at)
    return _block(opcode, cursor, prefixes, long)


def _block(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """Opcodes whose low bits are a register."""
    number = opcode & 7 | (prefixes.rex & 1) << 3
    if opcode & ~0xF == 0x40 and not long:
        name = "dec" if opcode & 8 else "inc"
        return Instruction(name, cursor.at, prefixes.size, Register(REGISTERS[opcode & 7]))
    if opcode & ~7 == 0x50:
        return Instruction("push", cursor.at, prefixes.stack(long), source=Register(REGISTERS[number]))
    if opcode == 0x60:
        return Instruction("pusha", cursor.at, prefixes.size)
    if opcode & ~7 == 0xB0:
        return Instruction("mov", cursor.at + 1, 1, register(number, 1, prefixes.rex), cursor.take())
    if opcode & ~7 == 0xB8:
        return Instruction(
            "mov", cursor.at + prefixes.size, prefixes.size, Register(REGISTERS[number]), cursor.take(prefixes.size)
        )
    if opcode & ~3 == 0xA0:
        width = prefixes.size if opcode & 1 else 1
        place = Memory(None, None, 1, cursor.take(8 if long else 4), False)
        dest, source = (place, Register("rax")) if opcode & 2 else (Register("rax"), place)
        return Instruction("mov", cursor.at, width, dest, source)
    return None


def _arithmetic(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """The eight operations with registers, memory and constants; shifts by one."""
    width = prefixes.size if opcode & 1 else 1
    if opcode < 0x40 and opcode & 7 < 6:
        name = ARITHMETIC[opcode >> 3]
        if opcode & 4:
            value = cursor.take(1 if width == 1 else 2 if width == 2 else 4)
            return Instruction(name, cursor.at, width, Register("rax"), extend(value, min(width, 4)))
        register, operand, _ = modrm(cursor, prefixes, long, width)
        dest, source = (register, operand) if opcode & 2 else (operand, register)
        return Instruction(name, cursor.at, width, dest, source)
    if opcode in (0x80, 0x81, 0x83):
        _, operand, number = modrm(cursor, prefixes, long, width)
        count = 1 if opcode != 0x81 else min(width, 4)
        value = extend(cursor.take(count), count)
        return Instruction(ARITHMETIC[number], cursor.at, width, operand, value)
    if opcode in (0xD0, 0xD1):
        _, operand, number = modrm(cursor, prefixes, long, width)
        return Instruction(SHIFTS[number], cursor.at, width, operand, 1)
    return None


def _other(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    width = prefixes.size if opcode & 1 else 1
    if opcode in (0x88, 0x89, 0x8A, 0x8B):
        register, operand, _ = modrm(cursor, prefixes, long, width)
        dest, source = (register, operand) if opcode & 2 else (operand, register)
        return Instruction("mov", cursor.at, width, dest, source)
    if opcode in (0x0FB6, 0x0FB7):
        count = 1 if opcode == 0x0FB6 else 2
        register, operand, _ = modrm(cursor, prefixes, long, prefixes.size, count)
        return Instruction("movzx", cursor.at, prefixes.size, register, operand, count)
    if opcode == 0x0FB1:
        register, operand, _ = modrm(cursor, prefixes, long, prefixes.size)
        return Instruction("cmpxchg", cursor.at, prefixes.size, operand, register)
    if opcode == 0x0F22:
        byte = cursor.take()
        source = Register(REGISTERS[byte & 7 | (prefixes.rex & 1) << 3])
        return Instruction("cr", cursor.at, source=source, number=byte >> 3 & 7)
    if opcode == 0x0F0B:
        raise UndefinedInstruction
    if opcode in (0xFF, 0x0F01):
        _, operand, number = modrm(cursor, prefixes, long, 8 if long else 4)
        if opcode == 0xFF and number == 4 and isinstance(operand, Register):
            return Instruction("jump", cursor.at, source=operand)
        if opcode == 0x0F01 and number == 7 and isinstance(operand, Memory):
            return Instruction("invlpg", cursor.at, source=operand)
    return None
