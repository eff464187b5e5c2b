"""Types of the extension's Python side."""

from typing import Any, TypedDict, final

import numpy as np
import numpy.typing as npt

# ---- sptes and constants

class SpteFacts(TypedDict):
    present: bool
    leaf: bool
    large: bool
    pfn: int
    writable: bool
    executable: bool
    user: bool
    accessed: bool | None
    dirty: bool | None
    host_writable: bool
    mmu_writable: bool
    ad_disabled: bool
    write_protect_only: bool
    access_tracked: bool
    saved_bits: int
    memory_type: int | None
    ignore_pat: bool | None

def constants() -> dict[str, int]: ...
@final
class SpteCodec:
    def __new__(
        cls,
        ept: bool,
        maxphyaddr: int,
        phys_bits: int,
        l1tf: bool,
        cache_bits: int,
        ept_ad: bool,
        ept_exec_only: bool,
        mmio_caching: bool,
        gbpages: bool,
        ept_2m: bool,
        ept_1g: bool,
    ) -> SpteCodec: ...
    @property
    def mmio_caching(self) -> bool: ...
    @property
    def max_gfn(self) -> int: ...
    def fields(self) -> dict[str, int]: ...
    def make(self, gfn: int, access: int, gen: int) -> int: ...
    def split(self, spte: int) -> tuple[int, int, int] | None: ...
    def is_mmio(self, spte: int) -> bool: ...
    def make_many(
        self,
        gfn: npt.NDArray[np.uint64],
        access: npt.NDArray[np.uint32],
        gen: npt.NDArray[np.uint64],
        spte: npt.NDArray[np.uint64],
    ) -> int: ...
    def split_many(
        self,
        spte: npt.NDArray[np.uint64],
        gfn: npt.NDArray[np.uint64],
        access: npt.NDArray[np.uint32],
        gen: npt.NDArray[np.uint64],
    ) -> int: ...
    def is_mmio_many(self, spte: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> None: ...
    def reserved_many(self, spte: npt.NDArray[np.uint64], level: int, out: npt.NDArray[np.uint8]) -> None: ...
    def reserved(self, spte: int, level: int) -> int: ...
    def inspect(self, spte: int, level: int) -> SpteFacts: ...

# ---- walks

class PagingCore:
    def __init__(
        self,
        areas: list[tuple[int, Any]],
        registers: tuple[int, int, int, int, int, bool],
        model: tuple[int, ...],
        dialect: int,
        second: tuple[object, ...],
        pdptes: Any,
    ) -> None: ...
    def walk(
        self,
        gva: int,
        access: str = ...,
        cpl: int = ...,
        ac: bool = ...,
        implicit: bool = ...,
        set_ad: bool = ...,
    ) -> int: ...
    def translate_into(
        self, gvas: Any, out: Any, access: str, cpl: int, ac: bool, implicit: bool, set_ad: bool
    ) -> None: ...
    def mappings_into(self, gva: int, out: Any, walks: int) -> tuple[int, int | None]: ...
    def walk_record(
        self,
        gva: int,
        access: str = ...,
        cpl: int = ...,
        ac: bool = ...,
        implicit: bool = ...,
        set_ad: bool = ...,
    ) -> tuple[dict[str, Any], dict[str, Any] | None]: ...
    def reserved_bits(self, level: int, entry: int, dimension: int = ...) -> int: ...
    def permission_fault(
        self,
        rights: int,
        access: str = ...,
        cpl: int = ...,
        ac: bool = ...,
        implicit: bool = ...,
        pkey: int = ...,
        dimension: int = ...,
    ) -> int: ...
    @property
    def format(self) -> int: ...
    @property
    def levels(self) -> int: ...
    @property
    def root(self) -> int: ...
    @property
    def pdptes(self) -> tuple[int, int, int, int]: ...

def record_layouts() -> dict[str, tuple[list[tuple[str, str, int]], int]]: ...
def walk_cases(
    cases: Any, offsets: Any, words_pa: Any, words: Any, words_after: Any, answers: Any, dialect: int
) -> None: ...
