"""The constants of ``kvmmmu/bits.h`` by name, as Python integers.

``kvmmmu.constants.PFERR_RSVD`` is ``KVMMMU_PFERR_RSVD`` of the header; the values stand there and nowhere else.
``names()`` lists them, ``TABLE`` is the whole mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvmmmu import _core

TABLE: Mapping[str, int] = MappingProxyType(_core.constants())


def names() -> list[str]:
    """Return every constant's name, in the order of the header."""
    return list(TABLE)


def __getattr__(name: str) -> int:
    try:
        return TABLE[name]
    except KeyError:
        raise AttributeError(f"kvmmmu.constants has no {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *TABLE])
