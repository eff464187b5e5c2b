"""Two vCPUs of one VM in two threads, beside the same work with nothing shared, and without locks: what sharing costs.

    python benchmarks/bench_threads.py [--rounds N]

Two controls run in the same process and take turns with the contestant, round after round: two VMs of one vCPU each,
and the same two VMs on an engine that was compiled without mmu_lock, marks and waits (KVMMMU_NO_LOCKS).  Threads begin
together, each on its processor, and the first to end stops the other (``thread_kernels.pyx``).  A round counts only if
both had their processors nearly all the time; what is kept is the median of the ratios within rounds.  Waiting for a
lock is spinning here, so CPU time counts it too.  The memory of tables was touched before: the host's page faults are
no part of this.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

import kvmmmu as km

N = 1 << 17
LEAST_PRESENCE = 0.9  # of the time a thread had a processor; others' work in between would hide that two meet
DEVICES = 1 << 36  # no slot here
NO_LOCKS = "KVMMMU_NO_LOCKS"
#: name: (MMU, what is accessed, least ratio of the control's CPU time to that of two vCPUs of one VM)
WORK = {
    "lockless walks (mmio sptes), ept": ("ept", "walks", 0.9),
    "lockless walks (mmio sptes), npt": ("npt", "walks", 0.9),
    "MMIO from the vCPU's record, ept": ("ept", "record", 0.9),
    "TDP faults, ept": ("ept", "faults", 0.85),
    "TDP faults, npt": ("npt", "faults", 0.85),
}
SHADOW_LEAST = 0.6  # of one thread, both together
WRITER_MOST = 1.1  # a reader's CPU time beside a writer, to that without


@dataclass(frozen=True)
class Sample:
    """One run of all threads: seconds of CPU and of the wall for each access, and of each thread's own."""

    cpu: float
    wall: float
    first: float  # CPU of the first thread's accesses


@dataclass(frozen=True)
class Row:
    """A ratio that has a goal, and the others of the same work: name and value."""

    what: str
    ratio: float
    goal: str
    reached: bool
    others: str = ""


class Guest:
    """A VM whose vCPUs have no paging on: a gva is a gpa."""

    def __init__(self, mmu: str, vcpus: int, ram: npt.NDArray[np.uint8]) -> None:
        self.vm = km.VM(mmu)  # type: ignore[arg-type]
        self.vm.memslots.create(gpa=0, memory=ram, page_size="4K")
        self.vcpus = [self.vm.create_vcpu(km.GuestCpu(maxphyaddr=46)) for _ in range(vcpus)]

    def forget(self) -> None:
        """No table is left, and every vCPU has seen that."""
        self.vm.set_nx_huge_pages(True)
        self.vm.set_nx_huge_pages(False)
        for vcpu in self.vcpus:
            vcpu.access(DEVICES)


def addresses(what: str, n: int, share: int, of: int) -> npt.NDArray[np.uint64]:
    """Of ``of`` vCPUs each has its own part of the pages, all over the tables."""
    step = np.arange(n, dtype=np.uint64)
    if what == "record":
        return np.full(n, DEVICES + share * 4096, np.uint64)
    if what == "walks":
        return np.uint64(DEVICES) + (step % np.uint64(64) * np.uint64(of) + np.uint64(share)) * np.uint64(4096)
    if what == "windows":
        # One fault for each window of eight that KVM fills at once; each vCPU has a stretch of its own.
        return (step + np.uint64(share * n)) * np.uint64(8 * 4096)
    return (step * np.uint64(of) + np.uint64(share)) * np.uint64(4096)


def together(kernels: ModuleType, jobs: Sequence[tuple[km.VCpu, npt.NDArray[np.uint64], bool]]) -> Sample | None:
    """Run (vCPU, addresses, are they stores) in a thread each; None where a thread had to wait for a processor.

    One that waited long enough made no access at all: the others had ended before it began.
    """
    gate = np.zeros(2, np.uint32)
    results: list[tuple[int, float, float]] = [(0, 0.0, 0.0)] * len(jobs)
    places = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []

    def run(i: int) -> None:
        if len(places) >= len(jobs):
            os.sched_setaffinity(0, {places[i]})
        vcpu, gvas, write = jobs[i]
        results[i] = kernels.run(vcpu, gvas, write, gate, len(jobs))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(n == 0 or cpu / wall < LEAST_PRESENCE for n, cpu, wall in results):
        return None
    done = sum(n for n, _, _ in results)
    return Sample(
        sum(cpu for _, cpu, _ in results) / done,
        max(wall for _, _, wall in results) / done,
        results[0][1] / results[0][0],
    )


class Contest:
    """Contestants of one kind of work: who runs where, and the samples of all rounds."""

    def __init__(self, contestants: dict[str, Callable[[], Sample | None]]) -> None:
        self.contestants = contestants
        self.rounds: list[dict[str, Sample]] = []

    def round(self) -> None:
        """Everybody once; a round counts if all had their processors."""
        samples = {name: run() for name, run in self.contestants.items()}
        present = {name: sample for name, sample in samples.items() if sample is not None}
        if len(present) == len(samples):
            self.rounds.append(present)

    def ratio(self, over: str, under: str, what: str = "cpu") -> float:
        """Median over the rounds."""
        if not self.rounds:
            return float("nan")
        return statistics.median(getattr(r[over], what) / getattr(r[under], what) for r in self.rounds)


class Bench:
    """The machines, kept over all rounds, and both builds of the kernel."""

    def __init__(self, build: Callable[..., ModuleType], n: int) -> None:
        self.kernels, self.without = build("thread_kernels"), build("thread_kernels", NO_LOCKS)
        self.n = n
        # Never touched, so only its addresses count.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.ram = np.frombuffer(mmap.mmap(-1, 16 * n * 4096, flags=flags), np.uint8)
        self.machines: dict[str, tuple[Guest, list[Guest]]] = {}

    def machine(self, mmu: str) -> tuple[Guest, list[Guest]]:
        """One VM of two vCPUs, two of one each."""
        if mmu not in self.machines:
            self.machines[mmu] = Guest(mmu, 2, self.ram), [Guest(mmu, 1, self.ram) for _ in range(2)]
        return self.machines[mmu]

    def contestant(
        self, kernels: ModuleType, guests: Iterable[Guest], parts: Sequence[tuple[km.VCpu, str, int, int]]
    ) -> Callable[[], Sample | None]:
        """``parts``: vCPU, what it does, its share, of how many."""
        jobs = [
            (vcpu, addresses(what, self.n, share, of), what in ("faults", "windows")) for vcpu, what, share, of in parts
        ]

        def run() -> Sample | None:
            if any(write for _, _, write in jobs):
                for guest in guests:
                    guest.forget()
            return together(kernels, jobs)

        return run

    def contest(self, mmu: str, what: str) -> Contest:
        """Two vCPUs of one VM and the two controls; one vCPU alone."""
        shared, apart = self.machine(mmu)
        both = [(vcpu, what, i, 2) for i, vcpu in enumerate(shared.vcpus)]
        each = [(guest.vcpus[0], what, 0, 1) for guest in apart]
        return Contest(
            {
                "shared": self.contestant(self.kernels, [shared], both),
                "apart": self.contestant(self.kernels, apart, each),
                "no locks": self.contestant(self.without, apart, each),
                "one": self.contestant(self.kernels, [shared], both[:1]),
            }
        )

    def reader(self) -> Contest:
        """Lockless walks alone, beside faults that write sptes of the same tree, and beside another VM's."""
        shared, apart = self.machine("ept")
        walks = (shared.vcpus[0], "walks", 0, 1)
        return Contest(
            {
                "alone": self.contestant(self.kernels, [], [walks]),
                "writer": self.contestant(self.kernels, [shared], [walks, (shared.vcpus[1], "faults", 0, 1)]),
                "other VM": self.contestant(self.kernels, apart, [walks, (apart[0].vcpus[0], "faults", 0, 1)]),
            }
        )


def measure(build: Callable[..., ModuleType], rounds: int, n: int) -> tuple[list[Row], int]:
    """The rows, and the fewest rounds that counted for one of them."""
    bench = Bench(build, n)
    contests = {name: bench.contest(mmu, what) for name, (mmu, what, _least) in WORK.items()}
    shadow, reader = bench.contest("shadow", "windows"), bench.reader()
    everything = [*contests.values(), shadow, reader]
    for done in range(rounds + 1):
        for contest in everything:
            contest.round()
            if done == 0:
                # The first time the host gives the memory.
                contest.rounds.clear()
    rows = []
    for name, contest in contests.items():
        least = WORK[name][2]
        ratio = contest.ratio("no locks", "shared")
        rows.append(Row(f"{name}: no locks to shared", ratio, f">= {least}", ratio >= least, others(contest)))
    # Two that took turns at one lock, and spun in between, would have half the rate each: 1 together.
    ratio = 2 * shadow.ratio("one", "shared")
    rows.append(
        Row("shadow faults, both threads to one", ratio, f">= {SHADOW_LEAST}", ratio >= SHADOW_LEAST, others(shadow))
    )
    ratio = reader.ratio("writer", "alone", "first")
    beside = f"beside another VM's {reader.ratio('other VM', 'alone', 'first'):.2f}"
    rows.append(Row("a reader's CPU time beside a writer", ratio, f"<= {WRITER_MOST}", ratio <= WRITER_MOST, beside))
    return rows, min(len(contest.rounds) for contest in everything)


def others(contest: Contest) -> str:
    """The ratios of a work that no goal asks for."""
    return (
        f"wall {contest.ratio('no locks', 'shared', 'wall'):.2f}; two VMs to shared: CPU "
        f"{contest.ratio('apart', 'shared'):.2f} wall {contest.ratio('apart', 'shared', 'wall'):.2f}; "
        f"both to one: wall {contest.ratio('one', 'shared', 'wall'):.2f}"
    )


def bench_threads(build_pyx: Callable[..., ModuleType]) -> None:
    """Once, small, untimed: every contestant runs."""
    rows, _counted = measure(build_pyx, 1, 1 << 10)
    assert len(rows) == len(WORK) + 2


def bench_threads_leaves_out_a_run_in_which_one_thread_never_came() -> None:
    """The first to end stops the rest, also one that has not begun."""
    results = iter([(0, 1e-6, 1e-6), (1024, 1e-4, 1e-4)])
    kernels: Any = SimpleNamespace(run=lambda *_: next(results))
    job: Any = (None, np.zeros(0, np.uint64), False)
    assert together(kernels, [job, job]) is None


def main() -> int:
    """Print the table; 0 when every goal is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    spec = importlib.util.spec_from_file_location("conftest", Path(__file__).with_name("conftest.py"))
    assert spec is not None and spec.loader is not None
    conftest: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    with tempfile.TemporaryDirectory() as folder:

        def build(name: str, *macros: str) -> ModuleType:
            return conftest.build_pyx_in(Path(tempfile.mkdtemp(dir=folder)), name, *macros)  # type: ignore[no-any-return]

        load = os.getloadavg()[0]
        rows, counted = measure(build, rounds, N)
    sys.stdout.write(
        f"medians of {counted} and more of {rounds} rounds; {os.cpu_count()} CPUs, load {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after\n"
    )
    for row in rows:
        verdict = "yes" if row.reached else "NO"
        sys.stdout.write(f"{row.what:52} {row.ratio:6.2f}  {row.goal:8} {verdict:4} {row.others}\n")
    return 0 if all(row.reached for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
