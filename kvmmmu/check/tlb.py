"""What the processor caches must still be true of KVM's tables once no flush is owed."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import Violation

__all__ = ["tlb_entries"]

# By number: the engine's verdicts, TLB_*.
_WRONG: Final = MappingProxyType(
    {
        1: "is cached and no leaf of KVM's tables maps it",
        2: "is cached with another frame than KVM's tables give it",
        3: "may be written through the cache and not through KVM's tables",
        4: "is cached with a table of KVM's that is not in use at that level",
    }
)


def tlb_entries(vcpu: int, words: npt.NDArray[np.uint64]) -> Iterator[Violation]:
    """TLB: a subset of the translations valid since its last required flush."""
    for place, address, hpa, gpa, *_, verdict in words[words[:, -1] != 0].tolist():
        where = f"vCPU {vcpu}, array {place}: {address:#x} (gpa {gpa:#x}, hpa {hpa:#x})"
        yield Violation("TLB", where, _WRONG[verdict])
