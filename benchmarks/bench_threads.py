"""Two vCPUs of one VM in two threads, beside two VMs with one vCPU each: what sharing costs.

    python benchmarks/bench_threads.py [--rounds N]

The control does the same work in the same two threads with nothing shared, so that it meets the same machine, however
busy that is.  Contestants take turns, round after round; the best of each counts.  A batch releases the interpreter;
its time is its thread's own CPU time: waiting for a lock is spinning here, so it is counted too.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import kvmmmu as km
from kvmmmu.records import ACCESS

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

N = 1 << 17
LEAST_OVERLAP = 0.7  # of the shorter thread's time; a round whose threads ran one after the other shows nothing
DEVICES = 1 << 36  # no slot here
#: name: (MMU, what is accessed, least ratio to the control)
WORK = {
    "lockless walks (mmio sptes), ept": ("ept", "walks", 0.9),
    "lockless walks (mmio sptes), npt": ("npt", "walks", 0.9),
    "MMIO from the vCPU's record, ept": ("ept", "record", 0.9),
    "TDP faults, ept": ("ept", "faults", 0.85),
    "TDP faults, npt": ("npt", "faults", 0.85),
}
SHADOW_LEAST = 0.6  # of one thread, both together
WRITER_MOST = 1.1  # a reader's CPU time beside a writer, to that without


class Guest:
    """A VM whose vCPUs have no paging on: a gva is a gpa."""

    def __init__(self, mmu: str, vcpus: int, ram: np.ndarray) -> None:  # type: ignore[type-arg]
        self.vm = km.VM(mmu)  # type: ignore[arg-type]
        self.vm.memslots.create(gpa=0, memory=ram, page_size="4K")
        self.vcpus = [self.vm.create_vcpu(km.GuestCpu(maxphyaddr=46)) for _ in range(vcpus)]


def addresses(what: str, n: int, share: int, of: int) -> np.ndarray:  # type: ignore[type-arg]
    """Of ``of`` vCPUs each has its own part of the pages, all over the tables."""
    if what == "record":
        return np.full(n, DEVICES + share * 4096, np.uint64)
    step = np.arange(n, dtype=np.uint64)
    if what == "walks":
        return np.uint64(DEVICES) + (step % np.uint64(64) * np.uint64(of) + np.uint64(share)) * np.uint64(4096)
    if what == "windows":
        # One fault for each window of eight that KVM fills at once; each vCPU has a stretch of its own.
        return (step + np.uint64(share * n)) * np.uint64(8 * 4096)
    return (step * np.uint64(of) + np.uint64(share)) * np.uint64(4096)


def timed(vcpu: km.VCpu, gvas: np.ndarray, out: np.ndarray, write: bool) -> float:  # type: ignore[type-arg]
    """CPU seconds of this thread for one batch."""
    kinds = np.full(len(gvas), 1 if write else 0, np.uint8)
    before = time.thread_time_ns()
    vcpu.access_into(gvas, kinds, out, 0, 4)
    return (time.thread_time_ns() - before) * 1e-9


def in_threads(jobs: list[Callable[[], float]]) -> list[float] | None:
    """Run jobs at the same time; what each returned, None where they hardly met."""
    results = [0.0] * len(jobs)
    begin, end = [0.0] * len(jobs), [0.0] * len(jobs)
    ready = threading.Barrier(len(jobs))

    def run(i: int) -> None:
        ready.wait()
        begin[i] = time.perf_counter()
        results[i] = jobs[i]()
        end[i] = time.perf_counter()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shortest = min(b - a for a, b in zip(begin, end, strict=True))
    return results if min(end) - max(begin) >= LEAST_OVERLAP * shortest else None


def rate(mmu: str, what: str, threads: int, shared: bool, n: int, ram: np.ndarray) -> float:  # type: ignore[type-arg]
    """Accesses per CPU second, the threads' rates added up."""
    guests = [Guest(mmu, threads, ram)] if shared else [Guest(mmu, 1, ram) for _ in range(threads)]
    vcpus = [vcpu for guest in guests for vcpu in guest.vcpus]
    jobs = []
    for i, vcpu in enumerate(vcpus):
        share, of = (i, threads) if shared else (0, 1)
        many = {"faults": n // threads, "windows": n // threads}.get(what, n)
        gvas = addresses(what, many, share, of)
        out = np.zeros(many, ACCESS)
        writes = what in ("faults", "windows")
        if not writes:
            timed(vcpu, gvas, out, False)
        jobs.append(lambda v=vcpu, g=gvas, o=out, w=writes: len(g) / timed(v, g, o, w))
    rates = in_threads(jobs)
    for guest in guests:
        guest.vm.close()
    return sum(rates) if rates else 0.0


def reader_rate(n: int, ram: np.ndarray, writer: bool) -> float:  # type: ignore[type-arg]
    """Lockless walks per CPU second, alone or while another vCPU's faults write sptes of the same tree."""
    guest = Guest("ept", 2, ram)
    gvas, out = addresses("walks", n, 0, 1), np.zeros(n, ACCESS)
    timed(guest.vcpus[0], gvas, out, False)
    jobs = [lambda: timed(guest.vcpus[0], gvas, out, False)]
    if writer:
        faults, theirs = addresses("faults", n, 0, 1), np.zeros(n, ACCESS)
        jobs.append(lambda: timed(guest.vcpus[1], faults, theirs, True))
    seconds = in_threads(jobs)
    guest.vm.close()
    return n / seconds[0] if seconds else 0.0


def measure(rounds: int, n: int) -> list[tuple[str, float, str, bool]]:
    """Rows of (what, ratio, goal, reached)."""
    # Never touched, so only its addresses count.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 8 * n * 4096, flags=flags)
    ram = np.frombuffer(memory, np.uint8)
    best: dict[tuple[str, str], float] = {}

    def ratio_of(name: str, kind: str, to: str) -> float:
        return best[name, kind] / best[name, to] if best[name, kind] and best[name, to] else float("nan")

    def keep(name: str, kind: str, value: float) -> None:
        best[name, kind] = max(best.get((name, kind), 0.0), value)

    for _ in range(rounds):
        for name, (mmu, what, _least) in WORK.items():
            keep(name, "control", rate(mmu, what, 2, False, n, ram))
            keep(name, "shared", rate(mmu, what, 2, True, n, ram))
        keep("shadow faults", "one", rate("shadow", "windows", 1, True, n, ram))
        keep("shadow faults", "shared", rate("shadow", "windows", 2, True, n, ram))
        keep("reader", "alone", reader_rate(n, ram, False))
        keep("reader", "writer", reader_rate(n, ram, True))
    rows = []
    for name, (_mmu, _what, least) in WORK.items():
        ratio = ratio_of(name, "shared", "control")
        rows.append((f"{name}: two threads to the control", ratio, f">= {least}", ratio >= least))
    # Two that took turns at one lock, and spun in between, would have half the rate each: 1 together.
    ratio = ratio_of("shadow faults", "shared", "one")
    rows.append(("shadow faults, both threads to one", ratio, f">= {SHADOW_LEAST}", ratio >= SHADOW_LEAST))
    cost = ratio_of("reader", "alone", "writer")
    rows.append(("a reader's CPU time beside a writer", cost, f"<= {WRITER_MOST}", cost <= WRITER_MOST))
    return rows


def bench_threads() -> None:
    """Once, small, untimed: every contestant runs, and every access ends as it should."""
    assert len(measure(1, 1 << 10)) == len(WORK) + 2


def main() -> int:
    """Print the table; 0 when every goal is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    load = os.getloadavg()[0]
    rows = measure(rounds, N)
    sys.stdout.write(f"best of {rounds} rounds; {os.cpu_count()} CPUs, load {load:.1f} before\n")
    for what, ratio, goal, reached in rows:
        sys.stdout.write(f"{what:55} {ratio:6.2f}  {goal:8} {'yes' if reached else 'NO'}\n")
    return 0 if all(row[3] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
