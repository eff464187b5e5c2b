"""Integer arithmetic of x86: results and the carry flag (Intel SDM vol. 1 chapter 7)."""

from __future__ import annotations

__all__ = ["compute"]


def compute(name: str, dest: int, source: int, size: int, carry: int) -> tuple[int, int]:
    """Result and new carry of ``dest <name> source`` on ``size`` bytes.

    ``cmp`` gives ``dest`` back; shifts and rotations are by one.
    """
    bits = 8 * size
    mask = (1 << bits) - 1
    dest, source = dest & mask, source & mask
    if name in ("add", "adc"):
        total = dest + source + (carry if name == "adc" else 0)
        return total & mask, total >> bits
    if name in ("sub", "sbb", "cmp"):
        total = dest - source - (carry if name == "sbb" else 0)
        return (dest if name == "cmp" else total & mask), int(total < 0)
    if name in ("or", "and", "xor"):
        return {"or": dest | source, "and": dest & source, "xor": dest ^ source}[name], 0
    top, low = dest >> bits - 1, dest & 1
    if name == "rol":
        return (dest << 1 & mask) | top, top
    if name == "ror":
        return dest >> 1 | low << bits - 1, low
    if name == "rcl":
        return (dest << 1 & mask) | carry, top
    if name == "rcr":
        return dest >> 1 | carry << bits - 1, low
    if name == "shl":
        return dest << 1 & mask, top
    return dest >> 1 | (top << bits - 1 if name == "sar" else 0), low
