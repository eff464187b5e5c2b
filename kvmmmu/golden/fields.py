"""Taking JSON apart: every field named, typed, and none left over."""

from __future__ import annotations

import json
from typing import Any

from kvmmmu.errors import FormatError

__all__ = ["fields", "flag", "integer", "load", "number", "rows", "text"]

_WORD = 1 << 64


def load(raw: bytes, where: str) -> Any:
    """Parse JSON; FormatError says where it is broken."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error})") from None


def fields(value: Any, where: str, required: set[str], optional: set[str] | None = None) -> dict[str, Any]:
    """An object with exactly these fields."""
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {value!r}: expected an object")
    unknown = set(value) - required - (optional or set())
    missing = required - set(value)
    if unknown or missing:
        name = min(unknown or missing)
        raise FormatError(f"{where}: field {name!r} is {'unknown' if unknown else 'missing'}")
    return value


def rows(value: Any, where: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise FormatError(f"{where}: {value!r}: expected a list")
    return value


def text(value: Any, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise FormatError(f"{where}: {value!r}: expected text")
    return value


def integer(value: Any, where: str) -> int:
    """A JSON integer, negative ones included."""
    if not isinstance(value, int) or isinstance(value, bool) or not -_WORD < value < _WORD:
        raise FormatError(f"{where}: {value!r}: expected an integer of 64 bits")
    return value


def number(value: Any, where: str, *, base: int = 0) -> int:
    """A non-negative integer of 64 bits: a JSON integer, or text (``base`` 0: ``0x`` marks hexadecimal)."""
    parsed = value
    if isinstance(value, str):
        try:
            parsed = int(value, base)
        except ValueError:
            raise FormatError(f"{where}: {value!r}: expected a number") from None
    if not isinstance(parsed, int) or isinstance(parsed, bool) or not 0 <= parsed < _WORD:
        raise FormatError(f"{where}: {value!r}: expected a number in 0 ... 2^64-1")
    return parsed


def flag(value: Any, where: str) -> bool:
    """A JSON truth value."""
    if not isinstance(value, bool):
        raise FormatError(f"{where}: {value!r}: expected true or false")
    return value
