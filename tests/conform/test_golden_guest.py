"""The guest's few instructions: decoded as the manual says, arithmetic against Python's integers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmmmu.conform.golden import stubs
from kvmmmu.conform.golden.arithmetic import CF, OF, SF, ZF, compute, condition
from kvmmmu.conform.golden.exits import Exits
from kvmmmu.conform.golden.instructions import decode
from kvmmmu.conform.golden.operands import (
    ARITHMETIC,
    Memory,
    Register,
    UndefinedInstruction,
    UnknownInstruction,
)


@pytest.mark.parametrize(
    ("code", "long", "name", "length", "size"),
    [
        ("0fb607", True, "movzx", 3, 4),
        ("488b07", True, "mov", 3, 8),
        ("408837", True, "mov", 3, 1),
        ("668937", False, "mov", 3, 2),
        ("480137", True, "add", 3, 8),
        ("f0480fb137", True, "cmpxchg", 5, 8),
        ("ffe7", True, "jump", 2, 0),
        ("a5", False, "movs", 1, 4),
        ("0f013f", True, "invlpg", 3, 0),
        ("0f22df", True, "cr", 3, 0),
        ("0f30", True, "wrmsr", 2, 0),
        ("e610", True, "out", 2, 1),
        ("f4", True, "hlt", 1, 0),
        ("0000", True, "add", 2, 1),
        ("0a00", False, "or", 2, 1),
        ("d0d0", False, "rcl", 2, 1),
        ("0c10", True, "or", 2, 1),
        ("80000a", False, "add", 3, 1),
    ],
)
def test_an_instruction_is_known_by_its_bytes(code: str, long: bool, name: str, length: int, size: int) -> None:
    instruction = decode(bytes.fromhex(code) + bytes(8), long)
    assert (instruction.name, instruction.length, instruction.size) == (name, length, size)


def test_zeros_add_al_to_where_rax_points() -> None:
    instruction = decode(bytes(2), True)
    assert instruction.dest == Memory("rax", None, 1, 0, False)
    assert instruction.source == Register("rax")


def test_a_displacement_of_one_byte_is_signed() -> None:
    assert decode(bytes.fromhex("0040f0"), True).dest == Memory("rax", None, 1, -16, False)


def test_without_rex_the_upper_byte_registers_can_be_named() -> None:
    assert decode(bytes.fromhex("8837"), False).source == Register("rdx", high=True)
    assert decode(bytes.fromhex("408837"), True).source == Register("rsi")


@pytest.mark.parametrize("opcode", [0x06, 0x27, 0x60])
def test_some_32_bit_instructions_do_not_exist_in_64_bit_code(opcode: int) -> None:
    with pytest.raises(UndefinedInstruction):
        decode(bytes([opcode]) + bytes(8), True)


def test_unknown_bytes_are_refused_and_short_ones_ask_for_more() -> None:
    with pytest.raises(UnknownInstruction, match="0f a2"):
        decode(bytes.fromhex("0fa2"), True)
    with pytest.raises(IndexError):
        decode(bytes.fromhex("48"), True)


@pytest.mark.parametrize("long", [False, True])
def test_every_stub_decodes_to_its_end(long: bool) -> None:
    page = stubs.usr_page(long)
    for name in stubs.STUBS:
        at = stubs.stub_at(name)
        for _ in range(8):
            instruction = decode(page[at : at + 15], long)
            at += instruction.length
            if instruction.name in ("out", "jump"):
                break
        assert at <= stubs.stub_at(name) + stubs.STUB_SIZE
        assert instruction.name in ("out", "jump")


def test_the_stubs_are_those_of_the_recordings(shared: object) -> None:
    for long, name in ((True, "stub64.bin"), (False, "stub32.bin")):
        recorded = (shared / "golden" / name).read_bytes()  # type: ignore[operator]
        assert stubs.usr_page(long)[: len(recorded)] == recorded


@given(
    name=st.sampled_from(ARITHMETIC),
    size=st.sampled_from((1, 2, 4, 8)),
    dest=st.integers(0, 2**64 - 1),
    source=st.integers(0, 2**64 - 1),
    carry=st.integers(0, 1),
)
def test_arithmetic_wraps_and_carries(name: str, size: int, dest: int, source: int, carry: int) -> None:
    modulus = 1 << 8 * size
    a, b = dest % modulus, source % modulus
    exact = {
        "add": a + b,
        "adc": a + b + carry,
        "sub": a - b,
        "cmp": a - b,
        "sbb": a - b - carry,
        "or": a | b,
        "and": a & b,
        "xor": a ^ b,
    }[name]
    value, flags = compute(name, dest, source, size, carry)
    assert value == (a if name == "cmp" else exact % modulus)
    assert flags & CF == (exact != exact % modulus)
    assert bool(flags & ZF) == (exact % modulus == 0)
    assert bool(flags & SF) == (exact % modulus >= modulus // 2)
    if name in ("add", "adc", "sub", "sbb", "cmp"):
        half = modulus // 2
        signed = [(n + half) % modulus - half for n in (a, b)]
        true = signed[0] + signed[1] + (exact - a - b) if name[0] == "a" else signed[0] - signed[1] + (exact - a + b)
        assert bool(flags & OF) == (not -half <= true < half)


@given(value=st.integers(0, 255), carry=st.integers(0, 1))
def test_nine_rotations_through_carry_give_a_byte_back(value: int, carry: int) -> None:
    now, flags = value, carry
    for _ in range(9):
        now, flags = compute("rcl", now, 1, 1, flags)
    assert (now, flags & CF) == (value, carry)
    assert compute("rcl", value, 9, 1, carry) == (value, carry)


@pytest.mark.parametrize(
    ("number", "flags", "true"), [(4, ZF, True), (5, ZF, False), (12, SF, True), (12, SF | OF, False), (6, CF, True)]
)
def test_conditions_follow_the_flags(number: int, flags: int, true: bool) -> None:
    assert condition(number, flags) is true


@pytest.mark.parametrize(
    ("code", "long", "name", "length", "size"),
    [
        ("06", False, "push_segment", 1, 4),
        ("63e0", False, "arpl", 2, 2),
        ("63e0", True, "movsx", 2, 4),
        ("f60001", False, "test", 3, 1),
        ("f7d8", True, "neg", 2, 4),
        ("26a810", False, "test", 3, 1),
        ("66541a", True, "push", 2, 2),
        ("0f85ffffffff", True, "branch", 6, 0),
        ("c705000000000100000a", False, "mov", 10, 4),
        ("6bc3f0", False, "imul2", 3, 4),
        ("f0ff00", False, "inc", 3, 4),
    ],
)
def test_integer_instructions_beyond_the_stubs_decode_to_their_end(
    code: str, long: bool, name: str, length: int, size: int
) -> None:
    found = decode(bytes.fromhex(code) + bytes(8), long)
    assert (found.name, found.length, found.size) == (name, length, size)


@pytest.mark.parametrize("code", ["f08bc0", "f08900", "8dc0", "0f0b", "c6c800"])
def test_what_is_no_instruction_is_refused_as_such(code: str) -> None:
    with pytest.raises(UndefinedInstruction):
        decode(bytes.fromhex(code) + bytes(8), False)


def test_amd_intercepts_every_cr0_write_while_the_guest_runs_with_another_cr0() -> None:
    paging, no_wp = 0x80010031, 0x80000031
    shadow = Exits(amd=True, tdp=False)
    assert shadow.register_line("cr0", 0, paging).startswith("kvm_exit: cr0_sel_write")
    assert shadow.register_line("cr0", 0, no_wp).startswith("kvm_exit: write_cr0")
    assert not shadow.register("cr0", paging, paging | 0b1010)
    assert shadow.register("cr0", no_wp, no_wp)


def test_intel_guests_own_wp_and_pge_under_ept_only() -> None:
    for tdp in (False, True):
        exits = Exits(amd=False, tdp=tdp)
        assert exits.register("cr0", 0x80010031, 0x80000031) is not tdp
        assert exits.register("cr4", 0x20, 0xA0) is not tdp
        assert exits.register("cr4", 0x20, 0x100020)
        assert exits.register("cr3", 0, 0x1000) is not tdp
