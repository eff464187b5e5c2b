"""The C table, called as a C program would call it: through the pointers that the capsule holds."""

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu import _core
from kvmmmu.constants import TABLE
from kvmmmu.errors import VCpuBusyError, VmBusyError

HEADER = Path(km.get_include()) / "kvmmmu" / "capi.h"
RAM = 0x200000
DEVICE_GVA, DEVICE_GPA = 0x40000000, 0xFE000000
READ, WRITE, FETCH, IMPLICIT, AC, SET_AD = 0, 1, 2, 0x10, 0x20, 0x40
OK, STOPPED, ARGUMENT, BUSY, CLOSED, GP = 0, 1, -1, -2, -3, -4
OWN_CPL = -1


class Access(ctypes.Structure):
    _fields_ = [
        *((name, c_uint64) for name in ("gpa", "error_code", "fault_gva")),
        ("mmio_gpa", c_uint64 * 2),
        ("mmio_size", c_uint8 * 2),
        ("mmio_offset", c_uint8 * 2),
        *((name, c_uint8) for name in ("n_mmio", "outcome", "path", "size")),
        ("exits", c_uint32),
        ("suberror", c_uint8),
        ("unused", c_uint8 * 3),
    ]


class Translation(ctypes.Structure):
    _fields_ = [
        *((name, c_uint64) for name in ("gva", "gpa", "error_code", "fault_gpa", "entry")),
        *((name, c_uint8) for name in ("fault", "page_shift", "access", "level")),
        ("unused", c_uint32),
    ]


class Sregs(ctypes.Structure):
    _fields_ = [
        *((name, c_uint64) for name in ("cr0", "cr3", "cr4", "efer")),
        ("pkru", c_uint32),
        *((name, c_uint8) for name in ("compat", "cpl", "ac", "unused")),
    ]


class Table(ctypes.Structure):
    _from = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object)
    _fields_ = [
        ("version", c_uint32),
        ("size", c_uint32),
        ("vm_from", _from),
        ("vcpu_from", _from),
        ("tables_from", _from),
        ("access", CFUNCTYPE(c_int, c_void_p, c_uint64, c_uint32, c_uint32, c_int, c_void_p, POINTER(Access))),
        (
            "access_many",
            CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t, c_uint32, c_int, POINTER(Access)),
        ),
        (
            "read",
            CFUNCTYPE(c_int, c_void_p, c_uint64, c_void_p, c_size_t, c_int, POINTER(c_size_t), POINTER(Access)),
        ),
        (
            "write",
            CFUNCTYPE(c_int, c_void_p, c_uint64, c_void_p, c_size_t, c_int, POINTER(c_size_t), POINTER(Access)),
        ),
        ("invlpg", CFUNCTYPE(c_int, c_void_p, c_uint64)),
        ("load_cr3", CFUNCTYPE(c_int, c_void_p, c_uint64)),
        ("sync_roots", CFUNCTYPE(c_int, c_void_p)),
        ("get_sregs", CFUNCTYPE(c_int, c_void_p, POINTER(Sregs))),
        ("set_sregs", CFUNCTYPE(c_int, c_void_p, POINTER(Sregs))),
        ("vm_stat_index", CFUNCTYPE(c_int, c_char_p)),
        ("vcpu_stat_index", CFUNCTYPE(c_int, c_char_p)),
        ("vm_stat_name", CFUNCTYPE(c_char_p, c_int)),
        ("vcpu_stat_name", CFUNCTYPE(c_char_p, c_int)),
        ("vm_stat", CFUNCTYPE(c_int, c_void_p, c_int, POINTER(c_uint64))),
        ("vcpu_stat", CFUNCTYPE(c_int, c_void_p, c_int, POINTER(c_uint64))),
        (
            "translate",
            CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_uint32, c_int, POINTER(Translation)),
        ),
        ("status_text", CFUNCTYPE(c_char_p, c_int)),
    ]


@pytest.fixture(scope="module")
def capi() -> Any:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return Table.from_address(get(_core._C_API, b"kvmmmu._core._C_API"))


def guest_tables(ram: np.ndarray) -> None:  # type: ignore[type-arg]
    """Four levels: the first 2 MiB map to themselves, DEVICE_GVA to DEVICE_GPA."""
    words = ram.view(np.uint64)
    words[0x1000 // 8] = 0x2000 | 7
    words[0x2000 // 8] = 0x3000 | 7
    words[0x3000 // 8] = 0x4000 | 7
    words[0x4000 // 8 : 0x5000 // 8] = (np.arange(512, dtype=np.uint64) << np.uint64(12)) | np.uint64(7)
    words[0x2000 // 8 + (DEVICE_GVA >> 30)] = 0x5000 | 7
    words[0x5000 // 8] = 0x6000 | 7
    words[0x6000 // 8] = DEVICE_GPA | 7


LONG_MODE = {
    "cr0": TABLE["CR0_PG"] | TABLE["CR0_PE"] | TABLE["CR0_WP"],
    "cr3": 0x1000,
    "cr4": TABLE["CR4_PAE"],
    "efer": TABLE["EFER_LME"] | TABLE["EFER_LMA"] | TABLE["EFER_NX"],
}


class Guest:
    def __init__(self, mmu: str, capi: Any) -> None:
        backing = np.zeros(RAM + 4096, np.uint8)
        self.ram = backing[-backing.ctypes.data % 4096 :][:RAM]
        guest_tables(self.ram)
        self.vm = km.VM(mmu)  # type: ignore[arg-type]
        self.vm.memslots.create(gpa=0, memory=self.ram)
        self.vcpu = self.vm.create_vcpu(km.GuestCpu(smap=False))
        self.vcpu.set_sregs(**LONG_MODE)
        self.vm_handle = capi.vm_from(self.vm)
        self.handle = capi.vcpu_from(self.vcpu)


@pytest.fixture(params=["shadow", "ept", "npt"])
def guest(request: pytest.FixtureRequest, capi: Any) -> Iterator[Guest]:
    yield Guest(request.param, capi)


def fields(access: Access) -> tuple[Any, ...]:
    return tuple(
        tuple(value) if isinstance(value := getattr(access, name), ctypes.Array) else value
        for name, _ in Access._fields_  # type: ignore[misc]
    )


# ---- the header


def c_compilers() -> list[tuple[str, list[str]]]:
    return [("gcc", ["-std=c99", "-x", "c"]), ("g++", ["-std=c++11", "-x", "c++"])]


@pytest.mark.parametrize(("compiler", "flags"), c_compilers(), ids=["C99", "C++11"])
@pytest.mark.parametrize("python", [False, True], ids=["alone", "after Python.h"])
def test_the_header_compiles_without_a_warning(compiler: str, flags: list[str], python: bool, tmp_path: Path) -> None:
    if shutil.which(compiler) is None and compiler == "g++":
        compiler, flags = "gcc", ["-std=c99", "-x", "c"]  # a bare machine has no C++: prove the C half again
    import sysconfig

    source = tmp_path / "includes.txt"
    right = "sizeof(struct kvmmmu_access) == 56 && sizeof(struct kvmmmu_translation) == 48"
    sizes = f"typedef char sizes[{right} ? 1 : -1];"
    source.write_text(f"{'#include <Python.h>' if python else ''}\n#include <kvmmmu/capi.h>\n{sizes}\n")
    paths = ["-I", km.get_include(), "-isystem", sysconfig.get_paths()["include"]]
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    subprocess.run([compiler, *flags, *strict, *paths, "-fsyntax-only", str(source)], check=True)


def test_the_table_has_the_members_of_the_header_in_its_order() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    body = re.search(r"struct kvmmmu_capi \{(.*?)\n\};", text, re.S)
    assert body is not None
    members = re.findall(r"uint32_t (\w+);|\(\*(\w+)\)\(", body[1])
    assert [a or b for a, b in members] == [name for name, _ in Table._fields_]  # type: ignore[misc]


def test_version_and_size_are_those_of_the_header(capi: Any) -> None:
    version = re.search(r"#define KVMMMU_CAPI_VERSION (\d+)", HEADER.read_text())
    assert version is not None and capi.version == int(version[1])
    assert capi.size == ctypes.sizeof(Table)


def test_every_status_has_its_own_words(capi: Any) -> None:
    words = [capi.status_text(status) for status in (OK, STOPPED, ARGUMENT, BUSY, CLOSED, GP)]
    assert len(set(words)) == 6
    assert capi.status_text(99) == b"not a status of kvmmmu"


# ---- handles


@pytest.mark.parametrize("name", ["vm_from", "vcpu_from", "tables_from"])
@pytest.mark.parametrize("wrong", [None, 5, "vm"])
def test_a_handle_of_something_else_is_a_type_error(capi: Any, name: str, wrong: object) -> None:
    with pytest.raises(TypeError, match="wanted is a kvmmmu"):
        getattr(capi, name)(wrong)


def test_a_bare_handle_object_has_no_handle(capi: Any) -> None:
    with pytest.raises(TypeError, match="wanted is a kvmmmu"):
        capi.vcpu_from(_core.VcpuHandle())


# ---- accesses


def test_an_access_is_the_one_python_makes(guest: Guest, capi: Any) -> None:
    other = Guest(guest.vm.mmu, capi)
    result = Access()
    steps = [
        (0x10123, READ, "r", 3),
        (0x10123, WRITE, "w", 3),
        (DEVICE_GVA + 0x10, WRITE, "w", 0),
        (DEVICE_GVA + 0x10, WRITE, "w", 0),
        (0xDEAD0000, READ, "r", 0),
        (1 << 63, FETCH, "x", 0),
    ]
    for gva, how, kind, cpl in steps:
        assert capi.access(guest.handle, gva, how, 4, cpl, None, byref(result)) == OK
        same = other.vcpu.access(gva, kind, cpl=cpl, size=4)
        pieces = tuple((result.mmio_gpa[i], result.mmio_size[i]) for i in range(result.n_mmio))
        gpa = None if result.gpa == TABLE["ALL_ONES"] else result.gpa
        assert (result.outcome, result.path, gpa, result.error_code, result.fault_gva, pieces, result.exits) == (
            *(same.outcome, same.path, same.gpa, same.error_code, same.gva, same.mmio, same.exits),
        )
    assert dict(guest.vm.stats) == dict(other.vm.stats)


def test_an_access_moves_its_data(guest: Guest, capi: Any) -> None:
    result, value = Access(), c_uint64(0x1122334455667788)
    assert capi.access(guest.handle, 0x10FFC, WRITE, 8, 0, byref(value), byref(result)) == OK
    assert guest.ram[0x10FFC:0x11004].tobytes() == bytes(value)
    back = c_uint64()
    assert capi.access(guest.handle, 0x10FFC, READ, 8, 0, byref(back), byref(result)) == OK
    assert back.value == value.value


def test_a_batch_gives_the_answers_of_single_accesses(guest: Guest, capi: Any) -> None:
    other = Guest(guest.vm.mmu, capi)
    rng = np.random.default_rng(3)
    gvas = rng.integers(0, RAM + 0x4000, 500, np.uint64)
    gvas[::7] = DEVICE_GVA + 8
    how = rng.integers(0, 3, 500).astype(np.uint8)
    how[how == FETCH] |= IMPLICIT
    out = (Access * 500)()
    arrays = (c_void_p(gvas.ctypes.data), c_void_p(how.ctypes.data))
    assert capi.access_many(guest.handle, *arrays, 500, 1, OWN_CPL, out) == OK
    one = Access()
    for gva, kind, got in zip(gvas.tolist(), how.tolist(), out, strict=True):
        assert capi.access(other.handle, gva, kind, 1, OWN_CPL, None, byref(one)) == OK
        assert bytes(one) == bytes(got)
    assert len({got.outcome for got in out}) > 2


def test_the_privilege_level_of_a_call_does_not_stay(guest: Guest, capi: Any) -> None:
    result = Access()
    guest.ram.view(np.uint64)[0x4000 // 8 + 0x10] = 0x10000 | 3  # supervisor only
    assert capi.access(guest.handle, 0x10000, READ, 1, 3, None, byref(result)) == OK
    assert (result.outcome, result.error_code) == (km.Outcome.PF, 5)
    assert capi.access(guest.handle, 0x10000, READ, 1, OWN_CPL, None, byref(result)) == OK
    assert result.outcome == km.Outcome.OK
    assert guest.vcpu.cpl == 0


@pytest.mark.parametrize(
    ("how", "size", "cpl"),
    [
        *((how, 1, 0) for how in (3, 4, WRITE | AC, SET_AD, 1 << 31)),
        *((READ, size, 0) for size in (0, 65, 2**32 - 1)),
        *((READ, 1, cpl) for cpl in (4, -2, 2**31 - 1)),
    ],
)
def test_an_access_with_a_wrong_argument_changes_nothing(capi: Any, how: int, size: int, cpl: int) -> None:
    guest = Guest("shadow", capi)
    before = dict(guest.vm.stats)
    result = Access(gpa=7)
    gva, code = c_uint64(0x10000), c_uint8(how & 0xFF)
    assert capi.access(guest.handle, 0x10000, how, size, cpl, None, byref(result)) == ARGUMENT
    if how < 256:
        assert capi.access_many(guest.handle, byref(gva), byref(code), 1, size, cpl, byref(result)) == ARGUMENT
    assert dict(guest.vm.stats) == before
    assert result.gpa == 7


def test_null_pointers_are_refused(guest: Guest, capi: Any) -> None:
    result, done, value, regs = Access(), c_size_t(9), c_uint64(), Sregs()
    gva, how, translation = c_uint64(0), c_uint8(0), Translation()
    assert capi.access(None, 0, READ, 1, 0, None, byref(result)) == ARGUMENT
    assert capi.access(guest.handle, 0, READ, 1, 0, None, None) == ARGUMENT
    assert capi.access_many(guest.handle, None, byref(how), 1, 1, 0, byref(result)) == ARGUMENT
    assert capi.access_many(guest.handle, byref(gva), None, 1, 1, 0, byref(result)) == ARGUMENT
    assert capi.access_many(guest.handle, byref(gva), byref(how), 1, 1, 0, None) == ARGUMENT
    assert capi.access_many(guest.handle, None, None, 0, 1, 0, None) == OK
    for copy in (capi.read, capi.write):
        assert copy(None, 0, byref(value), 8, 0, byref(done), byref(result)) == ARGUMENT
        assert copy(guest.handle, 0, None, 8, 0, byref(done), byref(result)) == ARGUMENT
        assert copy(guest.handle, 0, byref(value), 8, 0, None, byref(result)) == ARGUMENT
        assert copy(guest.handle, 0, byref(value), 8, 0, byref(done), None) == ARGUMENT
    assert done.value == 9
    assert capi.invlpg(None, 0) == capi.load_cr3(None, 0) == capi.sync_roots(None) == ARGUMENT
    assert capi.get_sregs(guest.handle, None) == capi.set_sregs(guest.handle, None) == ARGUMENT
    assert capi.get_sregs(None, byref(regs)) == capi.set_sregs(None, byref(regs)) == ARGUMENT
    assert capi.translate(None, byref(gva), 1, READ, 0, byref(translation)) == ARGUMENT
    assert capi.vm_stat(None, 0, byref(value)) == capi.vcpu_stat(None, 0, byref(value)) == ARGUMENT
    assert capi.vm_stat(guest.vm_handle, 0, None) == capi.vcpu_stat(guest.handle, 0, None) == ARGUMENT
    assert capi.vm_stat_index(None) == capi.vcpu_stat_index(None) == -1


# ---- copies


def test_what_is_written_through_the_mmu_is_read_back(guest: Guest, capi: Any) -> None:
    data = np.random.default_rng(5).integers(0, 256, 10_000).astype(np.uint8).tobytes()
    back = ctypes.create_string_buffer(len(data))
    done, last = c_size_t(), Access()
    assert capi.write(guest.handle, 0x20FFF, data, len(data), 0, byref(done), byref(last)) == OK
    assert (done.value, last.outcome) == (len(data), km.Outcome.OK)
    assert guest.ram[0x20FFF:][: len(data)].tobytes() == data
    assert capi.read(guest.handle, 0x20FFF, back, len(data), 0, byref(done), byref(last)) == OK
    assert back.raw == data == guest.vcpu.read(0x20FFF, len(data))


def test_a_copy_stops_where_the_guest_would_fault(guest: Guest, capi: Any) -> None:
    end = RAM - 100
    back = ctypes.create_string_buffer(200)
    done, last = c_size_t(), Access()
    assert capi.read(guest.handle, end, back, 200, 0, byref(done), byref(last)) == STOPPED
    assert (last.outcome, last.error_code, last.fault_gva) == (km.Outcome.PF, 0, RAM)
    assert (done.value, last.size) == (64, 64)


def test_a_copy_into_a_device_names_the_piece_to_complete(guest: Guest, capi: Any) -> None:
    value = c_uint32(0xCAFE)
    done, last = c_size_t(), Access()
    assert capi.write(guest.handle, DEVICE_GVA + 0x10, byref(value), 4, 0, byref(done), byref(last)) == STOPPED
    assert (last.outcome, last.n_mmio, done.value, last.size) == (km.Outcome.MMIO, 1, 0, 4)
    assert (last.mmio_gpa[0], last.mmio_size[0], last.mmio_offset[0]) == (DEVICE_GPA + 0x10, 4, 0)


def test_a_copy_of_nothing_makes_no_access(guest: Guest, capi: Any) -> None:
    done, last = c_size_t(5), Access(exits=5)
    assert capi.read(guest.handle, 0xDEAD0000, None, 0, 0, byref(done), byref(last)) == OK
    assert (done.value, last.exits) == (0, 0)


# ---- registers


def test_registers_go_in_and_come_out(guest: Guest, capi: Any) -> None:
    regs = Sregs(**(LONG_MODE | {"cr3": 0x1018}), pkru=5, compat=1, cpl=3, ac=1)
    back = Sregs()
    assert capi.set_sregs(guest.handle, byref(regs)) == OK
    assert capi.get_sregs(guest.handle, byref(back)) == OK
    assert bytes(regs) == bytes(back)
    seen = guest.vcpu.regs
    assert (seen.cr3, seen.pkru, seen.compat, seen.cpl, seen.ac) == (0x1018, 5, True, 3, True)


def test_in_a_compatibility_segment_addresses_are_32_bits_wide(guest: Guest, capi: Any) -> None:
    wide, result = (1 << 32) + 0x10123, Access()
    assert capi.access(guest.handle, wide, READ, 1, 0, None, byref(result)) == OK
    assert result.outcome == km.Outcome.PF
    assert capi.set_sregs(guest.handle, byref(Sregs(**LONG_MODE, compat=1))) == OK
    assert capi.access(guest.handle, wide, READ, 1, 0, None, byref(result)) == OK
    assert (result.outcome, result.gpa) == (km.Outcome.OK, 0x10123)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"compat": 2}, ARGUMENT),
        ({"cpl": 4}, ARGUMENT),
        ({"ac": 2}, ARGUMENT),
        ({"unused": 1}, ARGUMENT),
        ({"cr4": TABLE["CR4_PAE"] | TABLE["CR4_SMAP"]}, ARGUMENT),  # the guest CPU has none
        ({"cr4": 0}, GP),
        ({"cr3": 1 << 60}, GP),
    ],
)
def test_refused_registers_change_nothing(capi: Any, change: dict[str, int], status: int) -> None:
    guest = Guest("shadow", capi)
    before = guest.vcpu.regs
    assert capi.set_sregs(guest.handle, byref(Sregs(**{**LONG_MODE, **change}))) == status
    assert guest.vcpu.regs == before


def test_loading_cr3_takes_effect_and_a_bad_value_is_gp(guest: Guest, capi: Any) -> None:
    result = Access()
    assert capi.load_cr3(guest.handle, 1 << 52) == GP
    assert guest.vcpu.regs.cr3 == 0x1000
    assert capi.load_cr3(guest.handle, 0x7000) == OK
    assert capi.access(guest.handle, 0x10000, READ, 1, 0, None, byref(result)) == OK
    assert result.outcome == km.Outcome.PF


def test_invlpg_and_sync_roots_follow_the_guest_tables(guest: Guest, capi: Any) -> None:
    result = Access()
    leaf = 0x4000 + 8 * 0x10
    for gpa, flush in (
        (0x30000, lambda: capi.invlpg(guest.handle, 0x10000)),
        (0x40000, lambda: capi.sync_roots(guest.handle)),
    ):
        assert capi.access(guest.handle, 0x10000, READ, 1, 0, None, byref(result)) == OK
        entry = c_uint64(gpa | 7)
        assert capi.access(guest.handle, leaf, WRITE, 8, 0, byref(entry), byref(result)) == OK
        assert flush() == OK
        assert capi.access(guest.handle, 0x10000, READ, 1, 0, None, byref(result)) == OK
        assert (result.outcome, result.gpa) == (km.Outcome.OK, gpa)


# ---- counters


def test_counters_have_the_names_and_values_of_python(guest: Guest, capi: Any) -> None:
    guest.vcpu.access(DEVICE_GVA, "w")
    guest.vcpu.access(DEVICE_GVA, "w")
    for names, index_of, name_of, read, handle in (
        (_core.VM_STATS_ORDER, capi.vm_stat_index, capi.vm_stat_name, capi.vm_stat, guest.vm_handle),
        (_core.VCPU_STATS_ORDER, capi.vcpu_stat_index, capi.vcpu_stat_name, capi.vcpu_stat, guest.handle),
    ):
        value = c_uint64()
        for number, name in enumerate(names):
            assert index_of(name.encode()) == number
            assert name_of(number) == name.encode()
            assert read(handle, number, byref(value)) == OK
            assert value.value == guest.vm.stats[name]
        assert index_of(b"no_such_counter") == -1
        assert name_of(len(names)) is None and name_of(-1) is None
        assert read(handle, len(names), byref(value)) == read(handle, -1, byref(value)) == ARGUMENT
    assert guest.vm.stats["mmio_exits"] == 2


# ---- one thread at a time, and not after the end


def test_a_vcpu_in_use_is_busy(guest: Guest, capi: Any) -> None:
    gvas = np.full(3_000_000, DEVICE_GVA, np.uint64)

    def run() -> None:
        while True:
            try:
                guest.vcpu.access_many(gvas, "w")
                return
            except VCpuBusyError:  # this thread was the second one
                pass

    thread = threading.Thread(target=run)
    result = Access()
    thread.start()
    while (status := capi.access(guest.handle, 0, READ, 1, 0, None, byref(result))) == OK:
        assert thread.is_alive(), "the other thread was never seen"
    assert status == BUSY
    with pytest.raises(VmBusyError):
        guest.vm.close()
    thread.join()
    assert capi.access(guest.handle, 0, READ, 1, 0, None, byref(result)) == OK


def test_nothing_of_a_closed_vm_answers(guest: Guest, capi: Any) -> None:
    guest.vm.close()
    result, regs, done = Access(), Sregs(**LONG_MODE), c_size_t()
    assert capi.access(guest.handle, 0, READ, 1, 0, None, byref(result)) == CLOSED
    assert capi.access_many(guest.handle, None, None, 0, 1, 0, None) == CLOSED
    assert capi.read(guest.handle, 0, byref(result), 8, 0, byref(done), byref(result)) == CLOSED
    assert capi.invlpg(guest.handle, 0) == capi.sync_roots(guest.handle) == CLOSED
    assert capi.load_cr3(guest.handle, 0) == capi.set_sregs(guest.handle, byref(regs)) == CLOSED
    assert capi.get_sregs(guest.handle, byref(regs)) == CLOSED


# ---- tables in plain memory


def test_a_translation_is_the_one_paging_makes(capi: Any) -> None:
    ram = np.zeros(RAM, np.uint8)
    guest_tables(ram)
    paging = km.Paging(cr0=LONG_MODE["cr0"], cr3=0x1000, cr4=LONG_MODE["cr4"], efer=LONG_MODE["efer"], memory=ram)
    handle = capi.tables_from(paging)
    gvas = np.array([0x10123, DEVICE_GVA + 5, 0xDEAD0000, 1 << 63], np.uint64)
    out = (Translation * 4)()
    assert capi.translate(handle, c_void_p(gvas.ctypes.data), 4, WRITE, 3, out) == OK
    same = paging.translate(gvas, "w", cpl=3)
    for one, other in zip(out, same, strict=True):
        for name in ("gva", "gpa", "error_code", "fault", "page_shift", "access", "level", "entry"):
            assert getattr(one, name) == other[name], name
    assert ram.view(np.uint64)[0x1000 // 8] == 0x2000 | 7
    assert capi.translate(handle, c_void_p(gvas.ctypes.data), 1, WRITE | SET_AD, 3, out) == OK
    assert ram.view(np.uint64)[0x1000 // 8] == 0x2000 | 0x27
    for how, cpl in ((3, 0), (8, 0), (READ, 4), (READ, -1)):
        assert capi.translate(handle, c_void_p(gvas.ctypes.data), 1, how, cpl, out) == ARGUMENT
    assert capi.translate(handle, None, 1, READ, 0, out) == ARGUMENT
    assert capi.translate(handle, c_void_p(gvas.ctypes.data), 1, READ, 0, None) == ARGUMENT
