from typing import TypedDict, final

import numpy as np
import numpy.typing as npt

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
    def inspect(self, spte: int, level: int) -> SpteFacts: ...
