"""mmio sptes against a slow twin that places one bit at a time."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmmu.errors import ArgumentError
from kvmmmu.sptes import SpteFormat

GENERATIONS = 1 << 19
W, U, X = 2, 4, 1


@dataclass(frozen=True)
class Host:
    """A host, and the twin: where its mmio sptes keep what, worked out bit by bit."""

    mmu: str
    maxphyaddr: int
    phys_bits: int
    l1tf: bool = False
    cache_bits: int = 46

    @property
    def format(self) -> SpteFormat:
        return SpteFormat(
            self.mmu,  # type: ignore[arg-type]
            maxphyaddr=self.maxphyaddr,
            phys_bits=self.phys_bits,
            l1tf=self.l1tf,
            cache_bits=self.cache_bits,
        )

    @property
    def always_set(self) -> set[int]:
        """Bits of every mmio spte: W and X without R under EPT, else P and the reserved address bit 51."""
        return ({1, 2} if self.mmu == "ept" else {0, 51}) | self.hidden

    @property
    def hidden(self) -> set[int]:
        """The five address bits a flawed L1 cache would look at: all ones, so that it finds no memory there."""
        c = self.cache_bits
        return {c - 5, c - 4, c - 3, c - 2, c - 1} if self.l1tf and c < 47 else set()

    @property
    def address_bits(self) -> list[int]:
        """Guest-physical address bits an mmio spte can carry."""
        return list(range(12, self.cache_bits if self.hidden else self.phys_bits))

    def address_place(self, bit: int) -> int:
        return bit + 5 if bit in self.hidden else bit

    @property
    def kept_access(self) -> int:
        return 0 if self.mmu == "ept" else W | U

    def encode(self, gfn: int, access: int, gen: int) -> int:
        spte = sum(1 << bit for bit in self.always_set)
        for bit in self.address_bits:
            if gfn << 12 >> bit & 1:
                spte |= 1 << self.address_place(bit)
        for bit in range(19):
            if gen >> bit & 1:
                spte |= 1 << (bit + 3 if bit < 8 else bit + 44)
        return spte | (access & self.kept_access)

    @property
    def max_gfn(self) -> int:
        return sum(1 << bit for bit in self.address_bits) >> 12

    def edge_gfns(self) -> list[int]:
        top = self.max_gfn
        powers = [1 << n for n in range(top.bit_length())]
        near = [value + step for value in powers for step in (-1, 0, 1)]
        holes = [top ^ value for value in powers]
        return sorted({0, top, 0xFEE00, *holes, *(value for value in near if 0 <= value <= top)})


HOSTS = [
    Host("shadow", 36, 36),
    Host("shadow", 46, 46),
    Host("shadow", 46, 41),
    Host("shadow", 51, 51),
    Host("npt", 48, 48),
    Host("npt", 48, 43),
    Host("ept", 39, 39),
    Host("ept", 46, 46),
    Host("ept", 52, 52),
    Host("shadow", 46, 46, l1tf=True, cache_bits=44),
    Host("shadow", 36, 36, l1tf=True, cache_bits=44),
    Host("ept", 46, 46, l1tf=True, cache_bits=44),
    Host("ept", 39, 39, l1tf=True, cache_bits=46),
    Host("ept", 46, 46, l1tf=True, cache_bits=47),
]
each_host = pytest.mark.parametrize("host", HOSTS, ids=str)


@each_host
def test_every_generation_is_stored_where_the_twin_puts_it_and_comes_back(host: Host) -> None:
    # Each number is one with a bit less, and that bit's place: 2^19 sums instead of 19 times as many.
    spread = [0] * GENERATIONS
    for gen in range(1, GENERATIONS):
        low = gen & -gen
        bit = low.bit_length() - 1
        spread[gen] = spread[gen ^ low] | 1 << (bit + 3 if bit < 8 else bit + 44)
    gens = np.arange(GENERATIONS, dtype=np.uint64)
    base = host.encode(0xFEE00, W | U, 0)
    sptes = host.format.mmio_encode(0xFEE00, W | U, gens)
    assert np.array_equal(sptes, np.array(spread, np.uint64) | np.uint64(base))
    back = host.format.mmio_decode(sptes)
    assert np.array_equal(back.gen, gens)
    assert np.all(back.gfn == 0xFEE00)
    assert np.all(back.access == host.kept_access)


@each_host
def test_edge_gfns_with_every_access_agree_with_the_twin_and_come_back(host: Host) -> None:
    form = host.format
    assert form.max_gfn == host.max_gfn
    for gfn in host.edge_gfns():
        for access in range(8):
            for gen in (0, 1, 255, 256, 511, 512, GENERATIONS - 1):
                spte = form.mmio_encode(gfn, access, gen)
                assert spte == host.encode(gfn, access, gen), (gfn, access, gen)
                assert form.mmio_decode(spte) == (gfn, access & host.kept_access, gen)


@each_host
def test_an_mmio_spte_never_looks_present_to_kvm(host: Host) -> None:
    for gfn in (0, host.max_gfn):
        spte = host.format.mmio_encode(gfn, 7, GENERATIONS - 1)
        assert not spte >> 11 & 1
        assert not spte >> 63
        assert host.format.is_mmio(spte)


@each_host
def test_a_gfn_above_the_largest_storable_is_refused(host: Host) -> None:
    with pytest.raises(ArgumentError, match="gfn"):
        host.format.mmio_encode(host.max_gfn + 1, 0, 0)
    with pytest.raises(ArgumentError, match=r"gfn\[1\]"):
        host.format.mmio_encode([0, host.max_gfn + 1, 0], 0, 0)


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
def test_a_host_with_52_address_bits_has_no_mmio_sptes_without_ept(mmu: str) -> None:
    form = SpteFormat(mmu, maxphyaddr=52)  # type: ignore[arg-type]
    assert not form.mmio_caching
    assert not form.is_mmio(0)
    assert not form.is_mmio((1 << 51) | 1)
    with pytest.raises(ArgumentError, match="MAXPHYADDR 52"):
        form.mmio_encode(1, 0, 0)


def test_with_caching_off_nothing_is_an_mmio_spte() -> None:
    for mmu in ("shadow", "ept", "npt"):
        form = SpteFormat(mmu, mmio_caching=False)  # type: ignore[arg-type]
        assert not form.is_mmio(SpteFormat(mmu).mmio_encode(1, 0, 0))  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="mmio_caching"):
            form.mmio_encode(1, 0, 0)


@each_host
@given(data=st.data())
def test_columns_say_what_single_entries_say(host: Host, data: st.DataObject) -> None:
    gfns = data.draw(st.lists(st.integers(0, host.max_gfn), max_size=20))
    accesses = data.draw(st.lists(st.integers(0, 7), min_size=len(gfns), max_size=len(gfns)))
    gens = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(gfns), max_size=len(gfns)))
    form = host.format
    singles = [form.mmio_encode(*row) for row in zip(gfns, accesses, gens, strict=True)]
    many = form.mmio_encode(gfns, np.array(accesses, np.uint8), np.array(gens, np.uint64))
    assert many.tolist() == singles
    rows = zip(gfns, accesses, gens, strict=True)
    assert singles == [host.encode(gfn, access, gen % GENERATIONS) for gfn, access, gen in rows]
    columns = form.mmio_decode(many)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == [form.mmio_decode(s) for s in singles]
    assert form.is_mmio(many).all()


@each_host
@given(spte=st.integers(0, 2**64 - 1))
def test_any_word_is_an_mmio_spte_exactly_when_the_hosts_mask_says_so(host: Host, spte: int) -> None:
    decisive = {0, 1, 2, 63} if host.mmu == "ept" else {0, 51}
    want = {1, 2} if host.mmu == "ept" else {0, 51}
    expected = all((spte >> bit & 1) == (bit in want) for bit in decisive)
    assert host.format.is_mmio(spte) == expected
    assert host.format.is_mmio(np.array([spte], np.uint64)).tolist() == [expected]
    if not expected:
        with pytest.raises(ArgumentError, match="not an mmio spte"):
            host.format.mmio_decode(spte)
        with pytest.raises(ArgumentError, match=r"spte\[0\]"):
            host.format.mmio_decode([spte])
