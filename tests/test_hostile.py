"""Bad input at the Python doors: a named error, and the state as it was."""

from types import SimpleNamespace

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError
from kvmmmu.events import render
from kvmmmu.sptes import SpteFormat
from kvmmmu.traces import Kind

RAM = 1 << 20
NUMBERS = [-1, 2**64, -(2**200), 2**200]
NO_INTEGERS = [1.5, "x", b"", [], object()]


@pytest.fixture
def machine():
    vm = km.VM()
    ram = np.full(RAM, 7, np.uint8)
    vm.memslots.create(gpa=0, memory=ram, log_dirty=True)
    return vm, vm.create_vcpu(), ram


def state(vm: km.VM) -> np.ndarray:
    return vm._core.snapshot()


CALLS = {
    "access": lambda vm, vcpu, x: vcpu.access(x),
    "access value": lambda vm, vcpu, x: vcpu.access(0, "w", value=x),
    "access size": lambda vm, vcpu, x: vcpu.access(0, size=x),
    "read": lambda vm, vcpu, x: vcpu.read(x, 4),
    "write": lambda vm, vcpu, x: vcpu.write(x, b"abcd"),
    "access_many": lambda vm, vcpu, x: vcpu.access_many([x, 0]),
    "invlpg": lambda vm, vcpu, x: vcpu.invlpg(x),
    "load_cr3": lambda vm, vcpu, x: vcpu.load_cr3(x),
    "mov_cr0": lambda vm, vcpu, x: vcpu.mov_cr0(x),
    "mov_cr4": lambda vm, vcpu, x: vcpu.mov_cr4(x),
    "write_efer": lambda vm, vcpu, x: vcpu.write_efer(x),
    "set_sregs": lambda vm, vcpu, x: vcpu.set_sregs(pkru=x),
    "explain": lambda vm, vcpu, x: vcpu.explain(x),
    "explain_sptes": lambda vm, vcpu, x: vcpu.explain_sptes(x),
    "execute": lambda vm, vcpu, x: vcpu.execute("store", x),
    "execute value": lambda vm, vcpu, x: vcpu.execute("store", 0, value=x),
    "inject": lambda vm, vcpu, x: vcpu.inject(x),
    "memslots.at": lambda vm, vcpu, x: vm.memslots.at(x),
    "memslots.create": lambda vm, vcpu, x: vm.memslots.create(x, np.zeros(4096, np.uint8)),
    "memslots.create slot": lambda vm, vcpu, x: vm.memslots.create(RAM, np.zeros(4096, np.uint8), x),
    "memslots.move": lambda vm, vcpu, x: vm.memslots.move(0, x),
    "memslots.delete": lambda vm, vcpu, x: vm.memslots.delete(x),
    "set_nr_mmu_pages": lambda vm, vcpu, x: vm.set_nr_mmu_pages(x),
    "get_dirty_log": lambda vm, vcpu, x: vm.get_dirty_log(x),
    "clear_dirty_log": lambda vm, vcpu, x: vm.clear_dirty_log(0, [0] * 4, first_page=x),
    "host_write": lambda vm, vcpu, x: vm.host_write(x, b"a"),
    "host_untouched": lambda vm, vcpu, x: vm.host_untouched(0, first_page=x),
    "mmio.register": lambda vm, vcpu, x: vm.mmio.register(x, 8),
    "events.emit": lambda vm, vcpu, x: vm.events.emit("kvm_cr", x),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_number_that_no_register_holds_is_refused_and_changes_nothing(machine, name: str):
    vm, vcpu, ram = machine
    before = state(vm)
    for bad in NUMBERS:
        with pytest.raises((OverflowError, ArgumentError)):
            CALLS[name](vm, vcpu, bad)
    for bad in NO_INTEGERS:
        with pytest.raises((TypeError, ArgumentError)):
            CALLS[name](vm, vcpu, bad)
    assert np.array_equal(state(vm), before)
    assert (ram == 7).all()
    vm.check()


WHOLE_FLOATS = {
    "size": lambda vm, vcpu: vcpu.execute("load", 0, size=4.0),
    "value": lambda vm, vcpu: vcpu.execute("store", 0, value=4.0),
    "expected": lambda vm, vcpu: vcpu.execute("cmpxchg", 0, expected=4.0),
    "code_size": lambda vm, vcpu: vcpu.execute("load", 0, code_size=4.0),
    "gva": lambda vm, vcpu: vcpu.read(4.0, 4),
    "cpl": lambda vm, vcpu: vcpu.access(0, cpl=3.0),
    "cr4": lambda vm, vcpu: km.Paging(1, 0, 0.0, 0),
    "as_id": lambda vm, vcpu: vm.memslots.create(0, np.zeros(4096, np.uint8), as_id=1.0),
    "slot": lambda vm, vcpu: vm.memslots.delete(0.0),
    "capacity": lambda vm, vcpu: vm.events.enable(capacity=64.0),
    "GuestCpu.maxphyaddr": lambda vm, vcpu: km.GuestCpu(maxphyaddr=40.0),
    "vector": lambda vm, vcpu: vcpu.inject(14.0),
    "ncr3": lambda vm, vcpu: vcpu.enter_guest_mode(0.0),
}


HALVES = [0x1000, 0xFFFF_8000_0000_1000]
COLUMNS = {
    "a list on both sides of 2^63": HALVES,
    "a tuple": tuple(HALVES),
    "objects": np.array(HALVES, object),
    "at an odd address": np.frombuffer(b"xxxx" + np.array(HALVES, np.uint64).tobytes(), np.uint64, offset=4),
    "a field of a record": np.array([(1, gva) for gva in HALVES], [("size", "u4"), ("gva", "u8")])["gva"],
    "big-endian": np.array(HALVES, ">u8"),
    "every second": np.repeat(np.array(HALVES, np.uint64), 2)[::2],
    "two dimensions": np.array([HALVES], np.uint64),
    "one": np.uint64(HALVES[1]),
    "one field of one record": np.zeros(1, [("size", "u4"), ("gva", "u8")])["gva"],
    "none": [],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_addresses_may_be_whatever_numpy_makes_integers_of(machine, name: str):
    _, vcpu, ram = machine
    gvas = COLUMNS[name]
    wanted = np.array(gvas, dtype=object)
    rows = vcpu.access_many(gvas, np.zeros(wanted.shape, np.uint8).tolist())
    translated = km.Paging(0x8000_0001, 0, 0x20, 0x500, memory=ram).translate(gvas)
    assert rows.shape == translated.shape == wanted.shape
    assert translated["gva"].ravel().tolist() == wanted.ravel().tolist()
    assert np.shape(SpteFormat().is_mmio(gvas)) == wanted.shape


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ([1.5], TypeError),
        ([0.0, 2.0], TypeError),
        ([True], TypeError),
        ("abc", TypeError),
        ([object()], TypeError),
        ([[1], [2, 3]], ArgumentError),
        ([-1], OverflowError),
        ([0, 1 << 64], OverflowError),
    ],
)
def test_a_column_of_something_else_is_refused_by_every_door_alike(machine, bad, error):
    _, vcpu, ram = machine
    paging = km.Paging(0x8000_0001, 0, 0x20, 0x500, memory=ram)
    for door, name in ((vcpu.access_many, "gvas"), (paging.translate, "gvas"), (SpteFormat().is_mmio, "spte")):
        with pytest.raises(error, match=name):
            door(bad)


@pytest.mark.parametrize("name", WHOLE_FLOATS)
def test_a_float_is_no_integer_whatever_its_value_and_the_argument_is_named(machine, name: str):
    vm, vcpu, _ = machine
    before = state(vm)
    with pytest.raises(TypeError, match=rf"^{name} must be an integer, not float$"):
        WHOLE_FLOATS[name](vm, vcpu)
    assert np.array_equal(state(vm), before)


@pytest.mark.parametrize("number", [0, 5, -1, 2**40])
def test_an_integer_is_no_data(machine, number: int):
    vm, vcpu, ram = machine
    for write in (vcpu.write, vm.host_write):
        with pytest.raises(TypeError, match="data must be bytes, not int"):
            write(0, number)
    assert (ram == 7).all()


def test_a_host_write_that_leaves_memory_writes_nothing(machine):
    vm, _, ram = machine
    with pytest.raises(ArgumentError, match="gpa 0x100000 is in no slot"):
        vm.host_write(RAM - 2, b"abcd")
    assert (ram == 7).all()
    data = bytes(i % 251 for i in range(4098))
    vm.host_write(RAM - 4098, data)
    assert bytes(ram[-4098:]) == data


def test_more_pages_than_words_can_count_are_refused(machine):
    vm, vcpu, _ = machine
    vcpu.access(0, "w")
    with pytest.raises(ArgumentError, match="bits has 0 words"):
        vm.clear_dirty_log(0, [], npages=2**64 - 1)
    assert vm.get_dirty_log(0)[0] == 1


def test_something_else_than_what_is_asked_for_is_named(machine):
    vm, vcpu, _ = machine
    calls = {
        "vcpu must be a VCpu": lambda: vm.page_tables(5),
        "device must be an MmioRange": lambda: vm.mmio.unregister(5),
        "cpu must be a GuestCpu": lambda: km.Paging(0, 0, 0, 0, 5),
        "nested must be EptTables or NptTables": lambda: km.Paging(0, 0, 0, 0, nested=5),
        "columns must have the columns of a trace": lambda: vcpu.replay(5),
    }
    for text, call in calls.items():
        with pytest.raises(TypeError, match=text):
            call()


def test_a_record_with_a_privilege_level_that_does_not_exist_is_refused(machine):
    vm, vcpu, _ = machine
    words, octets = np.zeros(2, np.uint64), np.zeros(2, np.uint8)
    columns = SimpleNamespace(a=words, b=words, c=words, kind=octets, size=octets, flags=octets, cpl=octets)
    assert vcpu.replay(columns).disagreements == 0
    before = state(vm)
    columns.cpl = np.array([0, 4], np.uint8)
    columns.kind = np.full(2, Kind.MEM, np.uint8)
    with pytest.raises(ArgumentError, match=r"cpl\[1\] is 4"):
        vcpu.replay(columns)
    assert np.array_equal(state(vm), before)


@pytest.mark.parametrize("records", [5, np.zeros(3), np.zeros(3, np.uint64), np.zeros((1, 1), km.events.EVENT_DTYPE)])
def test_a_column_that_holds_no_events_is_not_rendered(records):
    with pytest.raises(ArgumentError, match="records"):
        list(render(records))


def test_an_emitted_record_with_odd_words_is_rendered_all_the_same(machine):
    vm, _, _ = machine
    vm.events.enable()
    for name in km.events.EVENT_NAMES:
        vm.events.emit(name, *[2**64 - 1] * 7)
    lines = [line for line in vm.events.text(roles=True, frames=True).splitlines() if not line.startswith("role_")]
    assert [line.partition(":")[0] for line in lines] == list(km.events.EVENT_NAMES)


@pytest.mark.parametrize("size", [0, 65, 4096, 2**31 - 1])
def test_an_access_with_data_is_1_to_64_bytes_whoever_asks(size):
    vcpu = km.VM().create_vcpu()
    with pytest.raises(ArgumentError, match="size"):
        vcpu.move(0, size, b"", 0, False)
    with pytest.raises(ArgumentError, match=r"len\(data\)"):
        vcpu.move(0, 8, b"1234", 0, True)
    with pytest.raises(ArgumentError, match="cpl"):
        vcpu.set_mode(4, False)


def test_an_instruction_at_the_end_of_memory_is_traced_to_the_end_of_memory_only():
    vm = km.VM(mmu="npt")
    memory = np.zeros(8192, np.uint8)
    vm.memslots.create(gpa=0, memory=memory[:4096])
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=1, cr3=0, cr4=0, efer=0)
    vm.events.enable()
    vcpu.execute("load", 0x10000000, size=4, code_gva=0xFF8, code_size=15, mmio_read=lambda _, n: bytes(n))
    (line,) = [line for line in vm.events.text().splitlines() if line.startswith("kvm_emulate_insn")]
    assert "00 00 00 00 00 00 00 00" in line


def test_an_object_that_was_never_given_tables_reads_none() -> None:
    """``__init__`` did not run, or failed after it had looked at the memory."""
    page = np.zeros(4096, np.uint8)
    paging = km.Paging.__new__(km.Paging)
    for _ in range(2):
        for gva in (0, 0x123, 1 << 40):
            assert paging.walk(gva) == paging.translate_one(gva).gpa == paging.walk_result(gva).gpa
        with pytest.raises(ArgumentError, match="overlap|in use already"):
            paging.__init__(0, 0, 0, 0, memory=[(0, page), (0, page)])  # type: ignore[misc]
