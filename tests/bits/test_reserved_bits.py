"""Reserved bits of every format, bit by bit, against the manuals' tables written out here."""

import pytest

from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.paging import EptTables, NptTables, Paging

PG_PE, PSE, PAE, LA57, LMA, NXE = 0x8000_0001, 1 << 4, 1 << 5, 1 << 12, 0x500, 0x800
WIDTHS = [36, 40, 46, 51, 52]


def bits(*ranges):
    """{"hi-lo", "n"} as a set of bit numbers."""
    found = set()
    for text in ranges:
        high, _, low = text.partition("-")
        found.update(range(int(low or high), int(high) + 1))
    return found


def physical(top, width):
    """Address bits at and above the width, as far as ``top``."""
    return set(range(width, top + 1))


def assert_reserved(paging, level, ps, expected, *, base=1, dimension=1, nbits=64):
    """Each bit alone on top of a legal entry is reported exactly when the manual reserves it."""
    fixed = base | (0x80 if ps else 0)
    assert paging.reserved_bits(level, fixed, dimension) == sum(1 << n for n in expected if fixed >> n & 1)
    for n in range(nbits):
        if n == 7 or fixed >> n & 1:
            continue
        got = paging.reserved_bits(level, fixed | 1 << n, dimension)
        assert bool(got >> n & 1) == (n in expected), f"level {level} ps {ps} bit {n}"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("nxe", [False, True])
@pytest.mark.parametrize("gbpages", [False, True])
@pytest.mark.parametrize("levels", [4, 5])
def test_long_mode_entries(width, nxe, gbpages, levels):
    # SDM vol. 3A tables 4-15 to 4-20: address bits from MAXPHYADDR to 51; bit 63 unless EFER.NXE;
    # PS of the two topmost levels; in 1 GiB leaves 29:13 and in 2 MiB leaves 20:13.
    cr4 = PAE | (LA57 if levels == 5 else 0)
    paging = Paging(PG_PE, 0, cr4, LMA | (NXE if nxe else 0), GuestCpu(maxphyaddr=width, gbpages=gbpages))
    common = physical(51, width) | (set() if nxe else {63})
    for level in (4, 5):
        assert_reserved(paging, level, False, common)
        assert_reserved(paging, level, True, common | {7})
    assert_reserved(paging, 3, False, common)
    assert_reserved(paging, 3, True, common | bits("29-13") | (set() if gbpages else {7}))
    assert_reserved(paging, 2, False, common)
    assert_reserved(paging, 2, True, common | bits("20-13"))
    assert_reserved(paging, 1, False, common)
    assert_reserved(paging, 1, True, common)


def test_kvms_walker_reserves_bit_8_of_the_topmost_entries_of_an_amd_guest():
    amd, intel = GuestCpu(maxphyaddr=52, vendor="amd"), GuestCpu(maxphyaddr=52)
    for cpu, dialect, reserved in ((amd, "kvm", True), (amd, "sdm", False), (intel, "kvm", False)):
        paging = Paging(PG_PE, 0, PAE | LA57, LMA | NXE, cpu, dialect=dialect)
        for level in (4, 5):
            assert bool(paging.reserved_bits(level, 0x101)) == reserved
        for level in (1, 2, 3):
            assert not paging.reserved_bits(level, 0x101)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("nxe", [False, True])
def test_pae_entries(width, nxe):
    # SDM vol. 3A tables 4-8 to 4-11: bits 62 down to MAXPHYADDR at every level; 63 unless NXE; a PDPTE has 63 always.
    cpu = GuestCpu(maxphyaddr=width)
    paging = Paging(PG_PE, 0, PAE, NXE if nxe else 0, cpu, pdptes=(0, 0, 0, 0))
    common = physical(62, width) | (set() if nxe else {63})
    pdpte = physical(63, width) | bits("8-5", "2-1")
    assert_reserved(paging, 3, False, pdpte)
    assert_reserved(paging, 3, True, pdpte)
    assert_reserved(paging, 2, False, common)
    assert_reserved(paging, 2, True, common | bits("20-13"))
    assert_reserved(paging, 1, False, common)
    assert_reserved(paging, 1, True, common)


@pytest.mark.parametrize(
    ("width", "expected"), [(32, "21-13"), (33, "21-14"), (36, "21-17"), (39, "21-20"), (40, "21"), (52, "21")]
)
def test_a_4_mib_page_reserves_what_lies_between_its_last_address_bit_and_bit_22(width, expected):
    # SDM vol. 3A table 4-4: bits (M-20):13 are address bits M-1:32, M = min(40, MAXPHYADDR); 21:(M-19) are reserved.
    paging = Paging(PG_PE, 0, PSE, 0, GuestCpu(maxphyaddr=width))
    assert_reserved(paging, 2, True, bits(expected), nbits=32)
    assert_reserved(paging, 2, False, set(), nbits=32)
    assert_reserved(paging, 1, True, set(), nbits=32)
    assert_reserved(paging, 1, False, set(), nbits=32)


def test_without_pse_36_a_4_mib_page_reserves_21_to_13_and_without_pse_nothing():
    assert_reserved(Paging(PG_PE, 0, PSE, 0, GuestCpu(pse36=False)), 2, True, bits("21-13"), nbits=32)
    assert_reserved(Paging(PG_PE, 0, 0, 0), 2, True, set(), nbits=32)


@pytest.mark.parametrize("width", [36, 40, 52])
def test_kvms_walker_takes_pse_36_with_36_bits_for_granted(width):
    for pse36 in (False, True):
        paging = Paging(PG_PE, 0, PSE, 0, GuestCpu(maxphyaddr=width, pse36=pse36), dialect="kvm")
        assert_reserved(paging, 2, True, bits("21-17"), nbits=32)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("leaf_2m", "leaf_1g"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("levels", [4, 5])
def test_ept_entries(width, leaf_2m, leaf_1g, levels):
    # SDM vol. 3C tables 29-1 to 29-7.
    host = HostCpu(maxphyaddr=width, ept_2m=leaf_2m, ept_1g=leaf_1g)
    paging = Paging(PG_PE, 0, PAE, LMA, nested=EptTables((levels - 1) << 3 | 6, host))
    high = physical(51, width)
    rwx = {"base": 7, "dimension": 2}
    for level in (4, 5):
        assert_reserved(paging, level, False, high | bits("6-3"), **rwx)
        assert_reserved(paging, level, True, high | bits("7-3"), **rwx)
    assert_reserved(paging, 3, False, high | bits("6-3"), **rwx)
    assert_reserved(paging, 2, False, high | bits("6-3"), **rwx)
    # Leaves: write-back, so that no lone memory-type bit makes an illegal type; 4 + 8 and 16 + ... are looked at below.
    leaf = {"base": 7 | 6 << 3, "dimension": 2}
    for level, low, allowed in ((3, "29-12", leaf_1g), (2, "20-12", leaf_2m)):
        expected = high | bits(low) | (set() if allowed else {7})
        fixed = leaf["base"] | 0x80
        assert bool(paging.reserved_bits(level, fixed, 2)) == (not allowed)
        for n in set(range(64)) - bits("7-0"):
            assert bool(paging.reserved_bits(level, fixed | 1 << n, 2) >> n & 1) == (n in expected)
    for n in set(range(64)) - bits("7-0"):
        assert bool(paging.reserved_bits(1, leaf["base"] | 1 << n, 2) >> n & 1) == (n in high)


@pytest.mark.parametrize("exec_only", [False, True])
def test_an_ept_leaf_is_misconfigured_by_illegal_memory_types_and_rights(exec_only):
    # SDM vol. 3C section 29.3.3.1: memory types are 0, 1, 4, 5, 6; W without R never; X alone by capability.
    paging = Paging(PG_PE, 0, PAE, LMA, nested=EptTables(0x1E, HostCpu(ept_exec_only=exec_only)))
    for low in range(64):
        readable, writable, executable = (bool(low >> n & 1) for n in range(3))
        if not (readable or writable or executable):
            continue  # not present
        legal = low >> 3 in (0, 1, 4, 5, 6)
        if writable and not readable:
            legal = False
        if executable and not readable and not writable and not exec_only:
            legal = False
        assert (paging.reserved_bits(1, low, 2) == 0) == legal, f"{low:06b}"


def test_nested_page_tables_are_long_mode_tables_of_a_host_with_nx():
    host = HostCpu(maxphyaddr=44, vendor="amd", gbpages=False)
    paging = Paging(PG_PE, 0, PAE, LMA, nested=NptTables(0, cpu=host))
    high = physical(51, 44)
    assert_reserved(paging, 4, True, high | {7}, dimension=2)
    assert_reserved(paging, 3, True, high | bits("29-13") | {7}, dimension=2)
    assert_reserved(paging, 2, True, high | bits("20-13"), dimension=2)
    assert_reserved(paging, 1, False, high, dimension=2)
