"""Types of the extension's Python side."""

from typing import Any

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
