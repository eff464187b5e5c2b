"""Integer arithmetic of x86: results and flags (Intel SDM vol. 1 chapter 7, appendix A)."""

from __future__ import annotations

from typing import Final

__all__ = ["AF", "CF", "FLAGS", "OF", "PF", "SF", "ZF", "compute", "condition"]

CF, PF, AF, ZF, SF, OF = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
FLAGS: Final = CF | PF | AF | ZF | SF | OF
_ADD: Final = frozenset({"add", "adc", "inc"})
_SUB: Final = frozenset({"sub", "sbb", "cmp", "dec", "neg"})


def compute(name: str, dest: int, source: int, size: int, flags: int) -> tuple[int, int]:
    """Result and new flags of ``dest <name> source`` on ``size`` bytes.

    ``cmp`` and ``test`` give ``dest`` back; ``inc``, ``dec`` and ``not`` have no source; shifts and rotations
    are by ``source`` bits.
    """
    bits = 8 * size
    mask = (1 << bits) - 1
    dest, source = dest & mask, source & mask
    if name == "not":
        return dest ^ mask, flags
    if name in ("inc", "dec"):
        source = 1
    if name == "neg":
        dest, source = 0, dest
    if name in _ADD or name in _SUB:
        borrow = flags & CF if name in ("adc", "sbb") else 0
        total = dest + source + borrow if name in _ADD else dest - source - borrow
        value = total & mask
        kept = flags & CF if name in ("inc", "dec") else int(not 0 <= total <= mask)
        signs = (dest ^ value) & (source ^ value) if name in _ADD else (dest ^ source) & (dest ^ value)
        new = kept | (dest ^ source ^ value) & AF | (OF if signs >> bits - 1 else 0)
        return (dest if name == "cmp" else value), flags & ~FLAGS | new | _looks(value, bits)
    if name in ("or", "and", "xor", "test"):
        value = {"or": dest | source, "xor": dest ^ source}.get(name, dest & source)
        return (dest if name == "test" else value), flags & ~FLAGS | _looks(value, bits)
    return _shift(name, dest, source, bits, flags)


def _looks(value: int, bits: int) -> int:
    """The flags that show a result."""
    parity = PF if (value & 0xFF).bit_count() % 2 == 0 else 0
    return parity | (ZF if value == 0 else 0) | (SF if value >> bits - 1 else 0)


def _shift(name: str, value: int, count: int, bits: int, flags: int) -> tuple[int, int]:
    """One bit after the other, as many as the low bits of the count say."""
    mask = (1 << bits) - 1
    carry = flags & CF
    steps = count & (63 if bits == 64 else 31)
    for _ in range(steps):
        top, low = value >> bits - 1, value & 1
        if name == "rol":
            value, carry = (value << 1 & mask) | top, top
        elif name == "ror":
            value, carry = value >> 1 | low << bits - 1, low
        elif name == "rcl":
            value, carry = (value << 1 & mask) | carry, top
        elif name == "rcr":
            value, carry = value >> 1 | carry << bits - 1, low
        elif name == "shl":
            value, carry = value << 1 & mask, top
        else:
            value, carry = value >> 1 | (top << bits - 1 if name == "sar" else 0), low
    if steps == 0:
        return value, flags
    if name in ("rol", "ror", "rcl", "rcr"):
        return value, flags & ~CF | carry
    return value, flags & ~FLAGS | carry | _looks(value, bits)


def condition(number: int, flags: int) -> bool:
    """One of the sixteen conditions of Jcc, SETcc and CMOVcc."""
    less = bool(flags & SF) != bool(flags & OF)
    true = (
        flags & OF,
        flags & CF,
        flags & ZF,
        flags & (CF | ZF),
        flags & SF,
        flags & PF,
        less,
        less or flags & ZF,
    )[number >> 1]
    return bool(true) != bool(number & 1)
