"""The columns of the codec are its scalar answers, one by one."""

import numpy as np
import pytest

from kvmmmu._core import SpteCodec
from kvmmmu.sptes import SpteFormat


@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_a_column_of_reserved_bits_is_the_scalar_check_of_each(mmu: str, level: int) -> None:
    core = SpteFormat(mmu)._core  # type: ignore[arg-type]
    assert isinstance(core, SpteCodec)
    random = np.random.default_rng(level)
    entries = random.integers(0, 1 << 64, 4096, np.uint64)
    entries[::2] &= np.uint64((1 << 46) - 1)  # half of them without the high bits that decide most
    entries[::4] &= ~np.uint64((1 << 30) - (1 << 8))
    out = np.zeros(len(entries), np.uint8)
    core.reserved_many(entries, level, out)
    scalar = [core.reserved(entry, level) != 0 for entry in entries.tolist()]
    assert out.tolist() == scalar
    assert 0 < sum(scalar) < len(scalar)
