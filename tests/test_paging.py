"""Paging over plain memory: what it takes, what it refuses, and that nothing in memory can hurt it."""

import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.paging import EptTables, NptTables, Paging
from kvmmmu.walks import Fault

LONG = (0x8001_0001, 0x1000, 0x20, 0xD00)
WORDS = st.integers(0, 2**64 - 1)


def tables(n=6):
    memory = np.zeros((n, 512), np.uint64)
    for i in (1, 2, 3):
        memory[i, 0] = (i + 1) << 12 | 7
    memory[4, :4] = [0x5007, 0, 0x8000_0000_0000_5005, 0x3 << 59 | 0x5007]
    memory[3, 1] = 0x20_0087
    return memory


class TestMemory:
    def test_comes_as_one_buffer_a_mapping_or_pairs_in_any_order_with_the_same_answers(self):
        memory = tables()
        mapped = mmap.mmap(-1, memory.nbytes)
        mapped.write(memory.tobytes())
        pairs = [(i << 12, memory[i]) for i in (3, 1, 4, 2, 5, 0)]
        for form in (memory, memory.tobytes(), bytearray(memory.tobytes()), mapped, dict(pairs), pairs, iter(pairs)):
            paging = Paging(*LONG, memory=form)
            assert paging.walk(0x123) == 0x5123
            assert paging.walk(0x20_1234) == 0x20_1234
        assert Paging(*LONG).walk(0x123) == -1

    def test_is_seen_live_not_copied(self):
        memory = tables()
        paging = Paging(*LONG, memory=memory)
        memory[4, 0] = 0x7007
        assert paging.walk(0) == 0x7000

    def test_is_kept_alive_while_it_is_bound(self):
        memory = bytearray(tables().tobytes())
        paging = Paging(*LONG, memory=memory)
        with pytest.raises(BufferError):
            memory.append(0)
        del paging
        memory.append(0)

    @pytest.mark.parametrize(
        ("memory", "message"),
        [
            (np.zeros(100, np.uint8), "whole items of 4096"),
            (np.zeros((4, 1024), np.uint64)[:, ::2], "contiguous"),
            (np.zeros(8200, np.uint8)[1:4097], "multiple of 8"),
            ({0x800: bytes(4096)}, "multiple of 4096"),
            ({1 << 52: bytes(4096)}, r"2\*\*52"),
            ({(1 << 52) - 4096: bytes(8192)}, r"2\*\*52"),
            ([(0, bytes(8192)), (4096, bytes(4096))], "overlaps"),
            ([(0, bytes(4096)), (0, bytes(4096))], "overlaps"),
            ([1, 2], "pairs"),
            ({0: "text"}, "buffer"),
        ],
    )
    def test_that_is_not_whole_aligned_disjoint_pages_is_refused(self, memory, message):
        with pytest.raises(ArgumentError, match=message):
            Paging(*LONG, memory=memory)

    @pytest.mark.parametrize("gpa", [-4096, 1 << 64])
    def test_addresses_outside_64_bits_are_an_overflow(self, gpa):
        with pytest.raises(OverflowError, match="gpa"):
            Paging(*LONG, memory={gpa: bytes(4096)})


class TestArguments:
    @pytest.mark.parametrize("position", range(4))
    @pytest.mark.parametrize("value", [-1, 1 << 64])
    def test_registers_outside_64_bits_are_named(self, position, value):
        registers = list(LONG)
        registers[position] = value
        with pytest.raises(OverflowError, match=("cr0", "cr3", "cr4", "efer")[position]):
            Paging(*registers)

    def test_registers_that_are_no_integers_are_named(self):
        with pytest.raises(TypeError, match="cr3"):
            Paging(0, 1.5, 0, 0)
        with pytest.raises(OverflowError, match="pkru"):
            Paging(*LONG, pkru=1 << 32)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda p: p.walk_for(0, "rw"), "access is 'rw'"),
            (lambda p: p.walk_for(0, 1), "access is 1"),
            (lambda p: p.walk_for(0, "r", 4), "cpl is 4"),
            (lambda p: p.walk_for(0, "r", -1), "cpl is -1"),
            (lambda p: p.walk_for(0, "r", 1 << 70), "cpl is 11"),
            (lambda p: p.translate([0], "q"), "access is 'q'"),
            (lambda p: p.reserved_bits(0, 1), "level is 0"),
            (lambda p: p.reserved_bits(6, 1), "level is 6"),
            (lambda p: p.reserved_bits(1, 1, 2), "dimension is 2"),
            (lambda p: p.reserved_bits(1, 1, 3), "dimension is 3"),
            (lambda p: p.permission_fault(8), "rights is 8"),
            (lambda p: p.permission_fault(0, pkey=16), "pkey is 16"),
            (lambda p: p.__init__(*LONG), "in use"),
        ],
    )
    def test_outside_their_range_are_named_with_their_value(self, call, message):
        with pytest.raises(ArgumentError, match=message):
            call(Paging(*LONG, memory=tables()))

    @pytest.mark.parametrize(
        ("gvas", "error"),
        [
            ([-1], OverflowError),
            ([1 << 64], OverflowError),
            ([1.0], TypeError),
            (["a"], TypeError),
            ([None], TypeError),
            ([0, 1 << 64], OverflowError),
        ],
    )
    def test_addresses_that_are_no_64_bit_numbers_are_refused(self, gvas, error):
        with pytest.raises(error, match="gvas"):
            Paging(*LONG).translate(gvas)
        with pytest.raises(error):
            Paging(*LONG).walk(gvas[-1])

    def test_unknown_dialects_and_wrong_numbers_of_pdptes_and_levels_are_refused(self):
        with pytest.raises(ArgumentError, match="dialect"):
            Paging(*LONG, dialect="amd")
        with pytest.raises(ArgumentError, match="pdptes"):
            Paging(*LONG, pdptes=(0, 0))
        with pytest.raises(ArgumentError, match="PDPTE 1 = 0x7 .*reserved"):
            Paging(0x8000_0001, 0, 0x20, 0, pdptes=(0, 7, 0, 0))
        with pytest.raises(ArgumentError, match="levels"):
            NptTables(0, levels=3)

    @pytest.mark.parametrize("eptp", [0x1F, 0x16, 0x26, 0x9E, 0x1E | 1 << 46, 0])
    def test_an_eptp_that_vm_entry_refuses_is_refused(self, eptp):
        # Memory type 7; 3 levels; 5:3 = 4 is five levels, legal below; a reserved bit; an address too wide.
        if eptp == 0x26:
            assert Paging(*LONG, nested=EptTables(eptp)).levels == 4
            return
        with pytest.raises(ArgumentError, match="eptp"):
            Paging(*LONG, nested=EptTables(eptp))

    def test_control_bits_of_features_the_cpu_lacks_are_refused(self):
        for feature, cr4, efer in (
            ("nx", 0x20, 0xD00),
            ("smep", 1 << 20, 0),
            ("smap", 1 << 21, 0),
            ("pku", 1 << 22, 0),
        ):
            cpu = GuestCpu(**{feature: False})
            Paging(1, 0, 0, 0, cpu)
            with pytest.raises(ArgumentError, match=feature):
                Paging(1, 0, cr4, efer, cpu)


class TestCpu:
    @pytest.mark.parametrize("bits", [31, 53, -1])
    def test_address_widths_outside_the_architecture_are_refused(self, bits):
        with pytest.raises(ArgumentError, match="GuestCpu.maxphyaddr"):
            GuestCpu(maxphyaddr=bits)
        with pytest.raises(ArgumentError, match="HostCpu.maxphyaddr"):
            HostCpu(maxphyaddr=bits)

    def test_flags_must_be_truth_values_and_vendors_known(self):
        with pytest.raises(TypeError, match="GuestCpu.gbpages"):
            GuestCpu(gbpages=2)
        with pytest.raises(TypeError, match="HostCpu.maxphyaddr"):
            HostCpu(maxphyaddr=46.0)
        with pytest.raises(ArgumentError, match="vendor"):
            GuestCpu(vendor="via")
        with pytest.raises(ArgumentError, match="phys_bits"):
            HostCpu(maxphyaddr=46, phys_bits=47)


class TestBatch:
    def test_shape_is_kept_and_every_form_of_integers_taken(self):
        paging = Paging(*LONG, memory=tables())
        for gvas in (np.zeros((2, 3), np.int64), [[0, 0, 0]], np.uint8(0), [2**64 - 1, 0], np.array([], np.int32)):
            assert paging.translate(gvas).shape == np.shape(gvas)

    @given(st.lists(st.integers(0, 0x40_0000) | WORDS, max_size=20), st.sampled_from("rwx"), st.sampled_from([0, 3]))
    def test_equals_single_walks(self, gvas, access, cpl):
        paging = Paging(0x8001_0001, 0x1000, 0x30_0020, 0xD00, memory=tables())
        for gva, row in zip(gvas, paging.translate(gvas, access, cpl), strict=True):
            result = paging.walk_result(gva, access, cpl)
            assert paging.walk_for(gva, access, cpl) == (result.gpa if result.ok else -1)
            last = result.entries[-1] if result.entries else None
            assert (row["fault"], row["error_code"], row["gpa"], row["page_shift"]) == (
                result.fault, result.error_code, result.gpa, result.page_shift,
            )  # fmt: skip
            assert (row["entry"], row["level"]) == ((last.value, last.level) if last else (0, 0))


class TestMappings:
    def test_list_every_leaf_in_order_whatever_it_permits(self):
        paging = Paging(0x8001_0001, 0x1000, 0x70_0020, 0xD00, memory=tables(), pkru=0xFFFF_FFFF)
        found = paging.mappings()
        assert found["gva"].tolist() == [0, 0x2000, 0x3000, 0x20_0000]
        assert found["page_shift"].tolist() == [12, 12, 12, 21]
        assert found["access"].tolist() == [7, 4, 7, 7]

    def test_go_on_where_the_last_call_ended(self):
        paging = Paging(*LONG, memory=tables())
        whole = paging.mappings()
        first = paging.mappings(limit=2)
        start = int(first[-1]["gva"]) + (1 << int(first[-1]["page_shift"]))
        rest = paging.mappings(start)
        assert np.array_equal(np.concatenate([first, rest]), whole)

    def test_reach_the_last_page_of_the_address_space_and_end(self):
        memory = np.zeros((5, 512), np.uint64)
        for i in (1, 2, 3):
            memory[i, 511] = (i + 1) << 12 | 7
        memory[4, 511] = 0x5007
        assert Paging(*LONG, memory=memory).mappings()["gva"].tolist() == [2**64 - 4096]

    def test_stop_with_an_error_when_a_table_describes_endless_holes(self):
        memory = np.zeros((5, 512), np.uint64)
        memory[1], memory[2], memory[3] = 0x2007, 0x3007, 0x4007  # 2**27 times the same empty table
        with pytest.raises(ArgumentError, match="max_walks"):
            Paging(*LONG, memory=memory).mappings(max_walks=1 << 20)

    def test_are_not_for_two_dimensions(self):
        with pytest.raises(ArgumentError, match="nested"):
            Paging(*LONG, memory=tables(), nested=NptTables(0)).mappings()


class TestWords:
    def test_explain_names_each_entry_the_answer_and_the_reason(self):
        paging = Paging(0x8001_0001, 0x1000, 0x70_0020, 0xD00, memory=tables(), pkru=0x40)
        text = paging.explain(0x5, cpl=3)
        assert "PML4E at 0x1000 = 0x2007: table" in text
        assert text.endswith("= gpa 0x5005, 4 KiB page, rwx user")
        assert paging.explain(0x1000).endswith("#PF(0x0: none): the level 1 entry is not present")
        assert "protection key 3 refuses the read" in paging.explain(0x3000, cpl=3)
        assert "SMAP refuses a supervisor read" in paging.explain(0x0)
        assert "SMEP refuses a supervisor fetch" in paging.explain(0x0, "x")
        assert "permit r-- user; a write is refused" in paging.explain(0x2000, "w", 3)
        assert "not canonical" in paging.explain(1 << 63)

    def test_explain_shows_reserved_bits(self):
        memory = tables()
        memory[4, 0] = 1 << 50 | 0x5007
        assert "reserved bits 0x4000000000000 are set" in Paging(*LONG, memory=memory).explain(0)


REGISTERS = st.tuples(
    WORDS | st.sampled_from([0x8000_0001, 0x8001_0001, 1]),
    WORDS | st.sampled_from([0, 0x1000, 0x20, 0x1FE0]),
    WORDS | st.sampled_from([0, 0x10, 0x20, 0x30, 0x1020, 0x70_0020]),
    WORDS | st.sampled_from([0, 0x800, 0x500, 0xD00]),
)
# Entries that point back into the small memory make deep walks likely; any word at all is possible, too.
ENTRIES = WORDS | st.builds(
    lambda page, low, high: page << 12 | low | high << 59, st.integers(0, 7), st.integers(0, 0xFFF), st.integers(0, 31)
)
NESTED = (
    st.none()
    | st.builds(EptTables, st.sampled_from([0x1E, 0x5E, 0x26, 0x66, 0x301E]), st.just(HostCpu()))
    | st.builds(NptTables, WORDS, st.sampled_from([4, 5]))
)


@settings(max_examples=300)
@given(
    registers=REGISTERS,
    entries=st.lists(ENTRIES, min_size=1, max_size=40),
    where=st.randoms(use_true_random=False),
    nested=NESTED,
    gvas=st.lists(WORDS | st.integers(0, 0x3F_FFFF), min_size=1, max_size=8),
    access=st.sampled_from("rwx"),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    dialect=st.sampled_from(["sdm", "kvm"]),
)
def test_arbitrary_tables_and_registers_give_an_answer_and_touch_only_a_and_d_bits(
    registers, entries, where, nested, gvas, access, flags, dialect
):
    fenced = np.zeros((10, 512), np.uint64)  # a page before and after, which no walk may touch
    fenced[1:9, :8] = np.array([where.choice(entries) for _ in range(64)], np.uint64).reshape(8, 8)
    fenced[1:9, 256:] = np.uint64(where.choice(entries))
    memory = fenced[1:9]
    before = fenced.copy()
    try:
        paging = Paging(*registers, memory=memory, nested=nested, dialect=dialect, pkru=registers[1] & 0xFFFF_FFFF)
    except ArgumentError as e:
        assert "PDPTE" in str(e)
        return
    cpl, ac, implicit = 3 * flags[0], flags[1], flags[2]
    rows = paging.translate(gvas, access, cpl, ac=ac, implicit=implicit, set_ad=True)
    for gva, row in zip(gvas, rows, strict=True):
        assert row["fault"] in list(Fault)
        assert row["fault"] == Fault.NONE or row["gpa"] == 0
        assert paging.explain(gva, access, cpl, ac=ac, implicit=implicit)
    changed = before ^ fenced
    assert not np.any(changed & ~np.uint64(0x360 | 0x60 << 32))
    assert not changed[0].any() and not changed[9].any()
    assert np.all((fenced & before) == before)  # bits are only ever set
    if nested is None:
        try:
            paging.mappings(limit=1000, max_walks=1 << 17)
        except ArgumentError as e:
            assert "max_walks" in str(e)
