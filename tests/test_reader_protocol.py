"""How a vCPU says that it reads: the default, the choice, and what is said where the system has no membarrier(2)."""

import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
SYSCALL = {"x86_64": 324, "aarch64": 283}.get(platform.machine()) if sys.platform == "linux" else None
needs_linux = pytest.mark.skipif(SYSCALL is None, reason="membarrier(2) is Linux's")

# Runs ``body`` in a process of its own: a filter of system calls stays for good.
REFUSED = """
import ctypes, platform, struct
libc = ctypes.CDLL(None, use_errno=True)
allow, refuse = 0x7FFF0000, 0x00050000 | 38
code = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, {number}, 0x06, 0, 0, refuse, 0x06, 0, 0, allow)
class Program(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("code", ctypes.c_char_p)]
program = Program(4, code)
assert libc.prctl(38, 1, 0, 0, 0) == 0
if libc.prctl(22, 2, ctypes.byref(program), 0, 0) != 0:
    raise SystemExit(77)
import kvmmmu as km
vm = km.VM("ept", reader_protocol="membarrier")
vcpu = vm.create_vcpu()
print(vm.reader_protocol, vcpu.access(0x1000).outcome.name)
"""


def registers() -> bool:
    """The system lets a process use membarrier (in a process of its own, which then is registered)."""
    asked = f"import ctypes; raise SystemExit(ctypes.CDLL(None).syscall({SYSCALL}, 16, 0) != 0)"
    return subprocess.run([sys.executable, "-c", asked], check=False).returncode == 0


def test_a_vm_announces_its_readers_by_exchange_unless_asked_otherwise() -> None:
    # Also: this build has its locks, which a benchmark's control has not ("none").
    assert km.VM("shadow").reader_protocol == "exchange"


@needs_linux
def test_membarrier_is_used_where_the_system_has_it() -> None:
    expected = "membarrier" if registers() else "exchange"
    assert km.VM("shadow", reader_protocol="membarrier").reader_protocol == expected


@needs_linux
def test_where_membarrier_is_refused_the_exchange_is_used_and_named() -> None:
    # -P: the package that is installed, not sources in the working directory.
    command = [sys.executable, "-P", "-c", REFUSED.replace("{number}", str(SYSCALL))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this system takes no filter of system calls")
    assert done.stdout.split() == ["exchange", "MMIO"], done.stderr


def test_another_protocol_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match="'rcu': allowed are 'exchange', 'membarrier'"):
        km.VM("shadow", reader_protocol="rcu")  # type: ignore[arg-type]


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_both_protocols_give_the_same_answers_and_counters(mmu: str) -> None:
    seen = []
    for protocol in ("exchange", "membarrier"):
        with km.VM(mmu, reader_protocol=protocol) as vm:  # type: ignore[arg-type]
            slot = vm.memslots.create(gpa=0, memory=mmap.mmap(-1, 1 << 20))
            vcpu = vm.create_vcpu()
            gvas = [page << 12 for page in range(512)]
            answers = [[(r.outcome, r.path, r.gpa, r.exits) for r in map(vcpu.access, gvas)]]
            vm.memslots.delete(slot)
            answers.append([(r.outcome, r.path, r.gpa, r.exits) for r in map(vcpu.access, gvas)])
            seen.append((answers, dict(vm.stats)))
    assert seen[0] == seen[1]


def test_only_the_benchmark_compiles_the_engine_without_locks() -> None:
    sources = [
        path
        for pattern in ("*.toml", "*.py", "*.pyx", "*.pxd", "*.h", "*.c", "*.yml", ".ci/*")
        for path in ROOT.rglob(pattern)
        if path.is_file() and not {".venv", "build", ".git"} & set(path.relative_to(ROOT).parts)
    ]
    naming = {str(path.relative_to(ROOT)) for path in sources if re.search(r"NO_LOCKS", path.read_text())}
    assert naming - {"tests/test_reader_protocol.py", "kvmmmu/_core.c"} == {
        "benchmarks/bench_mmio_slots.py",
        "benchmarks/bench_threads.py",
        "benchmarks/thread_kernels.pyx",
        "kvmmmu/engine/locks.pxd",  # asks for it: nobody is waited for then
        "kvmmmu/include/kvmmmu/lock.h",
    }
