"""Types of the extension's Python side."""

from collections.abc import Callable
from typing import Any, Self, SupportsIndex, TypedDict, final

import numpy as np
import numpy.typing as npt
from typing_extensions import disjoint_base

from kvmmmu.outcome import Outcome, Path

# ---- C table

_C_API: object

@disjoint_base
class VmHandle: ...

@disjoint_base
class VcpuHandle: ...

@disjoint_base
class TablesHandle: ...

# ---- sptes and constants

class _SpteFacts(TypedDict):
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
    def inspect(self, spte: int, level: int) -> _SpteFacts: ...

# ---- walks

@disjoint_base
class WalkColumn: ...

@disjoint_base
class PagingCore(TablesHandle):
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

def area_start(area: tuple[int, Any]) -> int: ...
def record_layouts() -> dict[str, tuple[list[tuple[str, str, int]], int]]: ...
def walk_cases(
    cases: Any, offsets: Any, words_pa: Any, words: Any, words_after: Any, answers: Any, dialect: int
) -> None: ...

# ---- memory, memslots, events, counters

VM_STATS_ORDER: tuple[str, ...]
VCPU_STATS_ORDER: tuple[str, ...]
EVENT_KINDS: tuple[str | None, ...]
EVENT_DTYPE: np.dtype[np.void]
REGION_REASONS: tuple[str | None, ...]

@disjoint_base
class Export:
    def __new__(cls, memory: Any) -> Export: ...
    @property
    def obj(self) -> Any: ...

@disjoint_base
class VmCore(VmHandle):
    def __new__(
        cls,
        mmu: int,
        host: tuple[int, ...],
        mmio_scheme: int,
        tdp_mmu: bool,
        nx_huge_pages: bool,
        eager_split: bool = True,
        era: int = 0,
    ) -> VmCore: ...
    def close(self) -> None: ...
    @property
    def is_closed(self) -> bool: ...
    def set_region(
        self, slot: int, flags: int, gpa: int, size: int | None, memory: Any, max_level: int, pfn_offset: int
    ) -> tuple[int, str, int, int]: ...
    def slots(self, as_id: int) -> list[tuple[int, int, int, int, Any]]: ...
    def slot(self, slot: int) -> tuple[int, int, int, int, Any] | None: ...
    def slot_count(self, as_id: int) -> int: ...
    def free_slot_id(self, as_id: int) -> int: ...
    def generation(self, as_id: int) -> int: ...
    def find_gfn(self, gfn: int, as_id: int) -> tuple[int, int, int, int, int] | None: ...
    def host_ranges(self) -> list[tuple[int, int, int, int, int, bool]]: ...
    def frame_areas(self) -> list[tuple[int, int, int, bool]]: ...
    @property
    def total_pages(self) -> int: ...
    @property
    def max_mmu_pages(self) -> int: ...
    def set_nr_mmu_pages(self, pages: int) -> bool: ...
    def set_manual_protect(self, bits: int) -> None: ...
    def dirty_get(self, slot: int, out: npt.NDArray[np.uint64]) -> int: ...
    def dirty_clear(self, slot: int, first_page: int, npages: int, bits: npt.NDArray[np.uint64]) -> int: ...
    def host_pages(self, slot: int, first_page: int, npages: int, untouched: bool) -> None: ...
    def host_store(self, gpa: int, data: bytes, as_id: int) -> None: ...
    def snapshot(self) -> npt.NDArray[np.uint64]: ...
    @property
    def mmu_valid_gen(self) -> int: ...
    def vm_stats(self) -> list[int]: ...
    def vcpu_stats(self, vcpu_id: int) -> list[int]: ...
    def events_enable(self, mask: int, capacity: int) -> None: ...
    def events_disable(self) -> None: ...
    def events_emit(self, kind: int, vcpu_id: int, words: tuple[int, ...]) -> None: ...
    def events_take(self, consume: bool) -> npt.NDArray[np.void]: ...
    @property
    def events_mask(self) -> int: ...
    @property
    def events_capacity(self) -> int: ...
    @property
    def events_dropped(self) -> int: ...

# ---- vCPUs

OUTCOMES: tuple[Outcome, ...]
PATHS: tuple[Path, ...]

@final
class AccessResult:
    @property
    def outcome(self) -> Outcome: ...
    @property
    def path(self) -> Path: ...
    @property
    def gpa(self) -> int | None: ...
    @property
    def error_code(self) -> int: ...
    @property
    def gva(self) -> int: ...
    @property
    def exits(self) -> int: ...
    @property
    def ok(self) -> bool: ...
    @property
    def mmio(self) -> tuple[tuple[int, int], ...]: ...

@disjoint_base
class VcpuCore(VcpuHandle):
    def __new__(cls, owner: VmCore, model: tuple[int, ...], *args: Any) -> Self: ...
    @property
    def id(self) -> int: ...
    @property
    def core(self) -> VmCore: ...
    def registers(
        self,
    ) -> tuple[int, int, int, int, int, int, bool, bool, tuple[int, int, int, int]]: ...
    def set_mode(self, cpl: int, ac: bool) -> None: ...
    def load_sregs(self, cr0: int, cr3: int, cr4: int, efer: int, pkru: int, compat: bool) -> bool: ...
    def load_register(self, n: int, value: int) -> bool: ...
    def invlpg(self, gva: SupportsIndex) -> None: ...
    def init(self) -> None: ...
    def sync_roots(self) -> None: ...
    def access(
        self,
        gva: SupportsIndex,
        kind: str | int = ...,
        cpl: SupportsIndex | None = ...,
        size: SupportsIndex = ...,
        value: SupportsIndex | None = ...,
        implicit: bool = ...,
    ) -> AccessResult: ...
    def move(
        self, gva: int, size: int, data: bytes | None, cpl: int, write: bool
    ) -> tuple[AccessResult, bytes]: ...
    def mmio_offsets(self, result: AccessResult) -> list[int]: ...
    def run_insn(
        self,
        op: int,
        gva: SupportsIndex,
        size: int,
        value: SupportsIndex,
        expected: SupportsIndex,
        src: SupportsIndex,
        code_gva: SupportsIndex,
        code_size: int,
        cpl: int,
        split_rmw: bool,
        refetch: bool,
        vectoring: int,
        mmio_read: Callable[[int, int], bytes],
    ) -> tuple[AccessResult, int, list[tuple[bool, int, int, int]], int]: ...
    def fetch_software(self, code_gva: int, code_size: int) -> tuple[AccessResult, int]: ...
    def trace_injection(self, vector: int, has_error: bool, error_code: int) -> None: ...
    def access_into(
        self,
        gvas: npt.NDArray[np.uint64],
        kinds: npt.NDArray[np.uint8] | None,
        out: npt.NDArray[np.void],
        cpl: int,
        size: int,
    ) -> None: ...
    def walk_records(
        self, gva: SupportsIndex, kind: str, cpl: int
    ) -> tuple[dict[str, Any], dict[str, Any] | None]: ...
    def replay_into(
        self, a: Any, b: Any, c: Any, kind: Any, size: Any, flags: Any, cpl: Any, values: bool, stop_after: int
    ) -> dict[str, Any]: ...

TREE_PAGE_DTYPE: np.dtype[np.void]

def tree_copy_of(
    core: VcpuCore, everything: bool, previous: int
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.uint64]]: ...
