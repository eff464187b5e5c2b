"""Decoding integer instructions that no stub holds, but that data may look like (Intel SDM vol. 2D appendix A)."""

from __future__ import annotations

from collections.abc import Callable

from kvmmmu.conform.golden.operands import (
    REGISTERS,
    SHIFTS,
    Cursor,
    Instruction,
    Prefixes,
    Register,
    UndefinedInstruction,
    extend,
    modrm,
    register,
)

__all__ = ["decode_integer"]

_PUSH_SEGMENT = {0x06: 0, 0x0E: 1, 0x16: 2, 0x1E: 3}
_POP_SEGMENT = {0x07: 0, 0x17: 2, 0x1F: 3}
_FLAGS = {0xF5: "cmc", 0xF8: "clc", 0xF9: "stc"}
# CLI and STI need IOPL, which is 3; the direction flag matters to strings only.
_NOTHING = frozenset({0x9B, 0xFA, 0xFB, 0xFC})
_UNARY = ("test", "test", "not", "neg", "mul", "imul", "div", "idiv")


def decode_integer(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """One of those instructions, or None."""
    for decoder in _DECODERS:
        found = decoder(opcode, cursor, prefixes, long)
        if found is not None:
            return found
    return None


def _single(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """One byte, and perhaps a constant."""
    size = prefixes.size
    if opcode in _PUSH_SEGMENT:
        return Instruction("push_segment", cursor.at, size, number=_PUSH_SEGMENT[opcode])
    if opcode in _POP_SEGMENT:
        return Instruction("pop_segment", cursor.at, size, number=_POP_SEGMENT[opcode])
    if opcode in _FLAGS:
        return Instruction("carry", cursor.at, number=tuple(_FLAGS).index(opcode))
    if opcode in _NOTHING:
        return Instruction("nop", cursor.at)
    if opcode & ~7 == 0x58:
        return Instruction("pop", cursor.at, prefixes.stack(long), Register(REGISTERS[opcode & 7 | prefixes.b]))
    if opcode in (0x68, 0x6A):
        count = 1 if opcode == 0x6A else min(size, 4)
        value = extend(cursor.take(count), count)
        return Instruction("push", cursor.at, prefixes.stack(long), source=value)
    if opcode & ~7 == 0x90:
        other = Register(REGISTERS[opcode & 7 | prefixes.b])
        return Instruction("xchg", cursor.at, size, Register("rax"), other)
    if opcode in (0x98, 0x99):
        return Instruction("widen", cursor.at, size, number=opcode & 1)
    if opcode in (0xA8, 0xA9):
        width = size if opcode & 1 else 1
        value = extend(cursor.take(min(width, 4)), min(width, 4))
        return Instruction("test", cursor.at, width, Register("rax"), value)
    if opcode in (0x9E, 0x9F):
        return Instruction("flags", cursor.at, number=opcode & 1)
    if opcode in (0xAA, 0xAB, 0xAC, 0xAD) and not prefixes.repeat:
        return Instruction("lods" if opcode & 4 else "stos", cursor.at, size if opcode & 1 else 1)
    if opcode == 0xC9 and not prefixes.operand16:
        return Instruction("leave", cursor.at, 8 if long else 4)
    if opcode in (0xCC, 0xF1):
        return Instruction("trap", cursor.at, number=3 if opcode == 0xCC else 1)
    if opcode == 0xCD:
        vector = cursor.take()
        return Instruction("interrupt", cursor.at, number=vector)
    if opcode == 0xD6 and not long:
        return Instruction("salc", cursor.at)
    return None


def _branch(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """Jumps, calls and returns; ``source`` is the distance."""
    if prefixes.operand16:
        return None  # vendors differ
    if opcode & ~0xF in (0x70, 0x0F80):
        distance = cursor.signed(1 if opcode < 0x100 else 4)
        return Instruction("branch", cursor.at, source=distance, number=opcode & 0xF)
    if opcode in (0xE8, 0xE9, 0xEB):
        distance = cursor.signed(1 if opcode == 0xEB else 4)
        return Instruction("call" if opcode == 0xE8 else "go", cursor.at, 8 if long else 4, source=distance)
    if opcode in (0xE0, 0xE1, 0xE2, 0xE3):
        distance = cursor.signed(1)
        return Instruction("loop", cursor.at, 8 if long else 4, source=distance, number=opcode & 3)
    if opcode in (0xC2, 0xC3):
        freed = cursor.take(2) if opcode == 0xC2 else 0
        return Instruction("return", cursor.at, 8 if long else 4, number=freed)
    return None


def _groups(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """Opcodes that the ModRM byte completes."""
    width = prefixes.size if opcode & 1 else 1
    if opcode in (0xFE, 0xFF):
        _, operand, number = modrm(cursor, prefixes, long, width)
        if number < 2:
            return Instruction(("inc", "dec")[number], cursor.at, width, operand)
        if opcode == 0xFF and number == 6:
            return Instruction("push", cursor.at, prefixes.stack(long), source=operand)
        return None
    if opcode in (0xF6, 0xF7):
        _, operand, number = modrm(cursor, prefixes, long, width)
        if number > 1:
            return Instruction(_UNARY[number], cursor.at, width, operand)
        value = extend(cursor.take(min(width, 4)), min(width, 4))
        return Instruction("test", cursor.at, width, operand, value)
    if opcode in (0xC0, 0xC1, 0xD2, 0xD3):
        _, operand, number = modrm(cursor, prefixes, long, width)
        count: Register | int = cursor.take() if opcode < 0xD0 else Register("rcx")
        return Instruction(SHIFTS[number], cursor.at, width, operand, count)
    if opcode in (0xC6, 0xC7):
        _, operand, number = modrm(cursor, prefixes, long, width)
        value = extend(cursor.take(min(width, 4)), min(width, 4))
        if number:
            raise UndefinedInstruction
        return Instruction("mov", cursor.at, width, operand, value)
    return None


def _two(opcode: int, cursor: Cursor, prefixes: Prefixes, long: bool) -> Instruction | None:
    """A register and a register or memory."""
    size = prefixes.size
    width = size if opcode & 1 else 1
    if opcode in (0x84, 0x85, 0x86, 0x87):
        left, right, _ = modrm(cursor, prefixes, long, width)
        return Instruction("test" if opcode < 0x86 else "xchg", cursor.at, width, right, left)
    if opcode == 0x8D:
        left, right, _ = modrm(cursor, prefixes, long, size)
        if isinstance(right, Register):
            raise UndefinedInstruction
        return Instruction("lea", cursor.at, size, left, right)
    if opcode == 0x63:
        left, right, _ = modrm(cursor, prefixes, long, size if long else 2, 4 if long else 2)
        if long:
            return Instruction("movsx", cursor.at, size, left, right, 4)
        return Instruction("arpl", cursor.at, 2, right, left)
    if opcode in (0x0FBE, 0x0FBF):
        count = 1 if opcode == 0x0FBE else 2
        left, right, _ = modrm(cursor, prefixes, long, size, count)
        return Instruction("movsx", cursor.at, size, left, right, count)
    if opcode in (0x69, 0x6B, 0x0FAF):
        left, right, _ = modrm(cursor, prefixes, long, size)
        if opcode == 0x0FAF:
            return Instruction("imul2", cursor.at, size, left, right)
        count = 1 if opcode == 0x6B else min(size, 4)
        value = extend(cursor.take(count), count)
        return Instruction("imul2", cursor.at, size, left, right, value, third=True)
    if opcode & ~0xF in (0x0F40, 0x0F90):
        left, right, _ = modrm(cursor, prefixes, long, size if opcode < 0x0F90 else 1)
        if opcode < 0x0F90:
            return Instruction("cmov", cursor.at, size, left, right, opcode & 0xF)
        return Instruction("set", cursor.at, 1, right, number=opcode & 0xF)
    if opcode in (0x0F1F, 0x0F0D):
        modrm(cursor, prefixes, long, size)
        return Instruction("nop", cursor.at)
    if opcode == 0x0FC8 | opcode & 7:
        return Instruction("bswap", cursor.at, size, register(opcode & 7 | prefixes.b, size, prefixes.rex))
    return None


_Decoder = Callable[[int, Cursor, Prefixes, bool], Instruction | None]
_DECODERS: tuple[_Decoder, ...] = (_single, _branch, _groups, _two)
