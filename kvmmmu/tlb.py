"""The processor's caches of translations: how large they are, and what is in them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import ArgumentError

__all__ = ["TLB_ENTRY", "Tlb", "entries_of"]

Geometry = tuple[int, int]

_MAX_SETS = 1 << 16
_MAX_WAYS = 64

#: One cached entry: where it is kept, the address it is for, whose it is.
TLB_ENTRY: Final = np.dtype(
    [
        ("place", "U16"),
        ("address", "<u8"),
        ("hpa", "<u8"),
        ("gpa", "<u8"),
        ("page_shift", "u1"),
        ("pcid", "<i4"),
        ("access", "u1"),
        ("refuses", "u1"),
    ]
)
#: ``pcid`` of entries that belong to every PCID, and of guest-physical mappings.
GLOBAL, GUEST_PHYSICAL = -1, -2

_PCID_OF: Final = MappingProxyType({4096: GLOBAL, 4097: GUEST_PHYSICAL})
_LEVELS: Final = ("pde", "pdpte", "pml4e", "pml5e")
# By number: TLB_IN_* of the engine.
PLACES: Final = MappingProxyType(
    {
        0: "pages_4k",
        1: "pages_2m",
        2: "pages_1g",
        3: "second_level",
        4: "guest_physical",
        **{8 + 2 + i: name for i, name in enumerate(_LEVELS)},
        **{16 + 2 + i: f"nested {name}" for i, name in enumerate(_LEVELS)},
    }
)


@dataclass(frozen=True)
class Tlb:
    """The geometry of one vCPU's TLB and paging-structure caches.

    Each array is (sets, ways), the sets a power of two; None leaves it out.  The least recently used way of a set
    makes room.

    Parameters
    ----------
    pages_4k : (int, int)
        First level: translations by 4 KiB pages.
    pages_2m, pages_1g : (int, int), optional
        First level: by 2 MiB pages (a 4 MiB page takes two entries) and 1 GiB pages.  Without them large pages
        are cached in smaller parts.
    second_level : (int, int), optional
        4 KiB and 2 MiB pages together.
    pde, pdpte, pml4e, pml5e : (int, int), optional
        Paging-structure caches: entries that point to a table, by their level.  Under EPT and NPT there is one of
        each for the guest's tables and one for the second dimension.
    guest_physical : (int, int), optional
        EPT and NPT: mappings of guest-physical pages of every size, used for guest tables and final addresses.
    spurious_faults : bool
        An access that an entry's rights refuse faults at once.  The architecture allows it, and the fault takes the
        entry along; as a rule the tables are read again first, so that a guest that only raised rights sees none.

    Raises
    ------
    ArgumentError
        Sets that are no power of two up to 65,536, ways outside 1 to 64.
    TypeError
        Something that is no pair of integers.

    Notes
    -----
    The defaults are those of a Skylake core as far as Intel's optimization manual gives them (data TLB, second
    level).  Instructions and data share every array.
    """

    pages_4k: Geometry = (16, 4)
    pages_2m: Geometry | None = (8, 4)
    pages_1g: Geometry | None = (1, 4)
    second_level: Geometry | None = (128, 12)
    pde: Geometry | None = (8, 4)
    pdpte: Geometry | None = (1, 4)
    pml4e: Geometry | None = (1, 4)
    pml5e: Geometry | None = (1, 2)
    guest_physical: Geometry | None = (64, 4)
    spurious_faults: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "spurious_faults":
                if not isinstance(value, bool):
                    raise TypeError(f"spurious_faults must be a bool, not {type(value).__name__}")
            elif value is not None or field.name == "pages_4k":
                _check_geometry(field.name, value)

    def geometry(self) -> list[Geometry]:
        """The arrays as the engine orders them; (1, 0) where there is none."""
        first = (self.pages_4k, self.pages_2m, self.pages_1g)
        tables = (self.pde, self.pdpte, self.pml4e, self.pml5e)
        arrays = (*first, self.second_level, self.guest_physical, *tables, *tables)
        return [(1, 0) if array is None else array for array in arrays]


def _check_geometry(name: str, value: Any) -> None:
    if (
        not isinstance(value, tuple)
        or len(value) != 2
        or any(isinstance(n, bool) or not isinstance(n, int) for n in value)
    ):
        optional = "" if name == "pages_4k" else " or None"
        raise TypeError(f"{name} must be a tuple (sets, ways) of integers{optional}, not {value!r}")
    sets, ways = value
    if not 1 <= sets <= _MAX_SETS or sets & (sets - 1):
        raise ArgumentError(f"{name}: {sets} sets; allowed are powers of two from 1 to {_MAX_SETS}")
    if not 1 <= ways <= _MAX_WAYS:
        raise ArgumentError(f"{name}: {ways} ways; allowed are 1 to {_MAX_WAYS}")


def entries_of(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """The engine's words as records of ``TLB_ENTRY``."""
    out = np.zeros(len(words), TLB_ENTRY)
    for row, entry in zip(words.tolist(), out, strict=True):
        place, address, hpa, gpa, shift, whose, access, refuses, _ = row
        entry["place"] = PLACES[place]
        entry["address"], entry["hpa"], entry["gpa"], entry["page_shift"] = address, hpa, gpa, shift
        entry["pcid"] = _PCID_OF.get(whose, whose)
        entry["access"], entry["refuses"] = access, refuses
    return out
