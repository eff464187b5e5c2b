"""mmio spte encode, decode and test: kvmmmu, a plain C -O3 loop and NumPy, on the same million entries."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from kvmmmu import _core
from kvmmmu.sptes import SpteFormat

N = 1 << 20
FORMATS = {
    "shadow": SpteFormat("shadow"),
    "ept": SpteFormat("ept"),
    "l1tf": SpteFormat("shadow", l1tf=True, cache_bits=44),
}


class Layout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("value", "mask", "access", "low_gpa", "moved", "max_gfn")]


def layout(form: SpteFormat) -> Layout:
    masks = form.masks
    names = ("mmio_value", "mmio_mask", "mmio_access", "nonpresent_low_gfn", "nonpresent_or_rsvd")
    return Layout(*(masks[name] for name in names), form.max_gfn)


class Columns:
    """Inputs, and outputs that every contestant writes into."""

    def __init__(self, form: SpteFormat) -> None:
        random = np.random.default_rng(7)
        self.gfn = random.integers(0, form.max_gfn, N, np.uint64)
        self.access = random.integers(0, 8, N, np.uint32)
        self.gen = random.integers(0, 1 << 19, N, np.uint64)
        self.spte = form.mmio_encode(self.gfn, self.access, self.gen)
        self.out_spte = np.zeros(N, np.uint64)
        self.out_gfn = np.zeros(N, np.uint64)
        self.out_access = np.zeros(N, np.uint32)
        self.out_gen = np.zeros(N, np.uint64)
        self.out_mark = np.zeros(N, np.uint8)


def pointer(array: np.ndarray) -> ctypes.c_void_p:  # type: ignore[type-arg]
    return ctypes.c_void_p(array.ctypes.data)


def numpy_encode(form: SpteFormat, c: Columns) -> np.ndarray:  # type: ignore[type-arg]
    m = {name: np.uint64(value) for name, value in form.masks.items()}
    u = np.uint64
    gpa = c.gfn << u(12)
    spte = gpa | m["mmio_value"] | m["nonpresent_or_rsvd"] | ((gpa & m["nonpresent_or_rsvd"]) << u(5))
    return spte | (c.access & m["mmio_access"]) | ((c.gen & u(0xFF)) << u(3)) | ((c.gen >> u(8) & u(0x7FF)) << u(52))


def numpy_decode(form: SpteFormat, c: Columns) -> tuple[np.ndarray, ...]:  # type: ignore[type-arg]
    m = {name: np.uint64(value) for name, value in form.masks.items()}
    u, s = np.uint64, c.spte
    gfn = ((s & m["nonpresent_low_gfn"]) | (s >> u(5) & m["nonpresent_or_rsvd"])) >> u(12)
    return gfn, s & m["mmio_access"], (s >> u(3) & u(0xFF)) | (s >> u(52) & u(0x7FF)) << u(8)


each_format = pytest.mark.parametrize("name", FORMATS)


@each_format
@pytest.mark.benchmark(group="mmio spte encode, 2^20")
def bench_encode(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], name: str) -> None:
    form, c = FORMATS[name], Columns(FORMATS[name])
    library, k = compile_c("ref_codec.c"), layout(FORMATS[name])
    # The loop under test is the core's; the face adds checks of the arguments, once per array.
    core = form._core
    assert isinstance(core, _core.SpteCodec)

    def reference() -> None:
        arguments = (pointer(c.gfn), pointer(c.access), pointer(c.gen), pointer(c.out_spte))
        library.ref_encode(ctypes.byref(k), *arguments, ctypes.c_size_t(N))

    reference()
    assert np.array_equal(c.out_spte, c.spte)
    assert np.array_equal(numpy_encode(form, c), c.spte)
    against(
        lambda: core.make_many(c.gfn, c.access, c.gen, c.out_spte),
        items=N,
        c=reference,
        numpy=lambda: numpy_encode(form, c),
        face=lambda: form.mmio_encode(c.gfn, c.access, c.gen),
    )


@each_format
@pytest.mark.benchmark(group="mmio spte decode, 2^20")
def bench_decode(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], name: str) -> None:
    form, c = FORMATS[name], Columns(FORMATS[name])
    library, k = compile_c("ref_codec.c"), layout(FORMATS[name])
    core = form._core

    def reference() -> None:
        arguments = (pointer(c.spte), pointer(c.out_gfn), pointer(c.out_access), pointer(c.out_gen))
        library.ref_decode(ctypes.byref(k), *arguments, ctypes.c_size_t(N))

    reference()
    assert np.array_equal(c.out_gfn, c.gfn)
    assert np.array_equal(c.out_gen, c.gen)
    assert np.array_equal(numpy_decode(form, c)[0], c.gfn)
    against(
        lambda: core.split_many(c.spte, c.out_gfn, c.out_access, c.out_gen),
        items=N,
        c=reference,
        numpy=lambda: numpy_decode(form, c),
        face=lambda: form.mmio_decode(c.spte),
    )


@each_format
@pytest.mark.benchmark(group="is it an mmio spte, 2^20")
def bench_is_mmio(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], name: str) -> None:
    form, c = FORMATS[name], Columns(FORMATS[name])
    library, k = compile_c("ref_codec.c"), layout(FORMATS[name])
    core = form._core
    mask, value = (np.uint64(form.masks[field]) for field in ("mmio_mask", "mmio_value"))
    c.spte[::2] = 0x827

    def reference() -> None:
        library.ref_is_mmio(ctypes.byref(k), pointer(c.spte), pointer(c.out_mark), ctypes.c_size_t(N))

    reference()
    assert c.out_mark.sum() == N // 2
    against(
        lambda: core.is_mmio_many(c.spte, c.out_mark),
        items=N,
        c=reference,
        numpy=lambda: (c.spte & mask) == value,
    )


class Format(ctypes.Structure):
    _fields_ = [("present", ctypes.c_uint64), ("reserved", ctypes.c_uint64 * 2), ("bad_low", ctypes.c_uint64)]


def ones(high: int, low: int) -> int:
    return (1 << high + 1) - (1 << low)


# Level 2 of a host with 46 address bits, by the manuals' tables.
RESERVED = {
    "shadow": Format(1, (ones(51, 46), ones(51, 46) | ones(20, 13)), 0),
    "ept": Format(
        7,
        (ones(51, 46) | ones(6, 3), ones(51, 46) | ones(20, 12)),
        sum(1 << n for n in range(64) if n & 7 in (2, 6) or (n & 7 and n >> 3 in (2, 3, 7))),
    ),
}


@pytest.mark.parametrize("name", RESERVED)
@pytest.mark.benchmark(group="reserved bits, 2^20")
def bench_reserved(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], name: str) -> None:
    form = FORMATS[name]
    library, k = compile_c("ref_codec.c"), RESERVED[name]
    core = form._core
    entries = np.random.default_rng(7).integers(0, 1 << 46, N, np.uint64)
    # Legal and illegal ones in equal parts, so that nothing is decided by a lucky branch.
    entries[::2] &= np.uint64(ones(45, 21) | 0xF87 | (0 if name == "ept" else 0x78))
    own, reference_out = np.zeros(N, np.uint8), np.zeros(N, np.uint8)

    def reference() -> None:
        library.ref_reserved(ctypes.byref(k), pointer(entries), pointer(reference_out), ctypes.c_size_t(N))

    def in_numpy() -> np.ndarray:  # type: ignore[type-arg]
        large = (entries >> np.uint64(7) & np.uint64(1)).astype(bool)
        wrong = entries & np.where(large, np.uint64(k.reserved[1]), np.uint64(k.reserved[0]))
        wrong |= np.uint64(k.bad_low) >> (entries & np.uint64(63)) & np.uint64(1)
        return (entries & np.uint64(k.present) != 0) & (wrong != 0)

    reference()
    core.reserved_many(entries, 2, own)
    assert np.array_equal(own, reference_out)
    assert np.array_equal(own, in_numpy())
    assert 0.1 < own.mean() < 0.9
    against(lambda: core.reserved_many(entries, 2, own), items=N, c=reference, numpy=in_numpy)


@pytest.mark.benchmark(group="one mmio spte from Python")
def bench_encode_one(against: Callable[..., None]) -> None:
    form = FORMATS["ept"]
    core = form._core
    against(lambda: form.mmio_encode(0xFEE00, 6, 7), items=1, core=lambda: core.make(0xFEE00, 6, 7))


@pytest.mark.benchmark(group="one mmio spte from Python")
def bench_decode_one(against: Callable[..., None]) -> None:
    form = FORMATS["ept"]
    core = form._core
    spte = form.mmio_encode(0xFEE00, 6, 7)
    against(lambda: form.mmio_decode(spte), items=1, core=lambda: core.split(spte))
