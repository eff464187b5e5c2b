"""Several vCPUs in Python threads, and slots that change under them."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu import Outcome
from kvmmmu.errors import MemslotError, VCpuBusyError, VmBusyError
from machine import DATA, LONG, MMIO, USER, Machine

VCPUS = 3
PAGES = 32
EXTRA = 0x2000_0000  # a slot that comes and goes
GVA, EXTRA_GVA, MMIO_GVA = 0x1000_0000, 0x1020_0000, 0x1040_0000


class Crowd(Machine):
    """A machine with several vCPUs and the same three ranges for each: RAM, a slot that comes and goes, a device."""

    def __init__(self, mmu: str, vcpus: int = VCPUS, reader_protocol: str = "exchange") -> None:
        super().__init__(mmu, LONG, start=False, reader_protocol=reader_protocol)
        for n in range(PAGES):
            self.map(GVA + n * 4096, DATA + n * 4096, USER)
            self.map(EXTRA_GVA + n * 4096, EXTRA + n * 4096, USER)
            self.map(MMIO_GVA + n * 4096, MMIO + n * 4096, USER)
        self.vcpus = [self.vcpu] + [self.vm.create_vcpu() for _ in range(vcpus - 1)]
        for vcpu in self.vcpus:
            vcpu.set_sregs(cr0=LONG.cr0, cr3=self.cr3, cr4=LONG.cr4, efer=LONG.efer)


def together(*jobs: Callable[[], None]) -> None:
    """Run jobs in threads of their own; the first exception of any is raised here."""
    wrong: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    if wrong:
        raise wrong[0]


def beside(crowd: Crowd, guest: Callable[[km.VCpu, int], None], host: Callable[[], None]) -> None:
    """``guest`` once for every vCPU, each in its thread, and ``host`` again and again until they are done."""
    done = threading.Event()

    def guests() -> None:
        try:
            together(*(lambda vcpu=vcpu, n=n: guest(vcpu, n) for n, vcpu in enumerate(crowd.vcpus)))
        finally:
            done.set()

    def hosts() -> None:
        while not done.is_set():
            host()

    together(guests, hosts)


@pytest.fixture(params=["shadow", "ept", "npt", "shadow membarrier", "ept membarrier"])
def crowd(request: pytest.FixtureRequest) -> Iterator[Crowd]:
    mmu, *protocol = request.param.split()
    machine = Crowd(mmu, reader_protocol=protocol[0] if protocol else "exchange")
    yield machine
    machine.vm.check()


def legal(gva: int, outcome: int, gpa: int) -> bool:
    """No order of events allows anything else."""
    if gva < EXTRA_GVA:
        return outcome == Outcome.OK and gpa == gva - GVA + DATA
    if gva < MMIO_GVA:
        return outcome in (Outcome.OK, Outcome.MMIO) and gpa == gva - EXTRA_GVA + EXTRA
    return outcome == Outcome.MMIO and gpa == gva - MMIO_GVA + MMIO


def test_single_accesses_beside_slots_that_come_and_go(crowd: Crowd) -> None:
    memory = np.zeros(PAGES * 4096, np.uint8)

    def guest(vcpu: km.VCpu, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for where, page, kind in rng.integers(0, (3, PAGES, 2), (1500, 3)).tolist():
            gva = (GVA, EXTRA_GVA, MMIO_GVA)[where] + page * 4096
            result = vcpu.access(gva, "rw"[kind])
            assert legal(gva, result.outcome, result.gpa), (hex(gva), result)

    def host() -> None:
        slot = crowd.vm.memslots.create(gpa=EXTRA, memory=memory)
        crowd.vm.memslots.delete(slot)

    beside(crowd, guest, host)


def test_batches_beside_slots_that_move_and_logs_that_are_collected(crowd: Crowd) -> None:
    memory = np.zeros(PAGES * 4096, np.uint8)
    slot = crowd.vm.memslots.create(gpa=EXTRA, memory=memory)

    def guest(vcpu: km.VCpu, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            draw = rng.integers(0, (3, PAGES, 2), (400, 3))
            gvas = np.array([GVA, EXTRA_GVA, MMIO_GVA])[draw[:, 0]] + draw[:, 1] * 4096
            table = vcpu.access_many(gvas.astype(np.uint64), draw[:, 2].astype(np.uint8))
            for gva, outcome, gpa in zip(gvas.tolist(), table["outcome"].tolist(), table["gpa"].tolist(), strict=True):
                assert legal(gva, outcome, gpa), (hex(gva), outcome, hex(gpa))

    def host() -> None:
        crowd.vm.memslots.move(slot, EXTRA + 0x100_0000)
        crowd.vm.memslots.move(slot, EXTRA)
        crowd.vm.memslots.set_flags(slot, log_dirty=True)
        crowd.vm.get_dirty_log(slot)
        crowd.vm.memslots.set_flags(slot, log_dirty=False)

    beside(crowd, guest, host)


def test_vcpus_enter_and_leave_smm_while_slots_of_both_address_spaces_change(crowd: Crowd) -> None:
    memory = np.zeros(PAGES * 4096, np.uint8)
    slots = crowd.vm.memslots
    both = [crowd.slot, slots.create(gpa=0, memory=crowd.ram, as_id=1)]

    def guest(vcpu: km.VCpu, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(60):
            vcpu.smm = bool((turn + seed) & 1)
            for where, page, kind in rng.integers(0, (3, PAGES, 2), (20, 3)).tolist():
                gva = (GVA, EXTRA_GVA, MMIO_GVA)[where] + page * 4096
                result = vcpu.access(gva, "rw"[kind])
                assert legal(gva, result.outcome, result.gpa), (hex(gva), result)

    def host() -> None:
        extra = [slots.create(gpa=EXTRA, memory=memory, as_id=as_id) for as_id in (0, 1)]
        for on in (True, False):
            for slot in both:
                slots.set_flags(slot, log_dirty=on)
        for slot in extra:
            slots.delete(slot)

    beside(crowd, guest, host)


def test_what_is_looked_at_beside_running_vcpus_is_whole_or_refused(crowd: Crowd) -> None:
    crowd.vcpus[0].use_tlb(km.Tlb())
    gvas = (GVA + np.arange(PAGES) * 4096).astype(np.uint64)
    rng = np.random.default_rng(1)
    done = threading.Event()
    taken: list[Any] = []
    refused: list[str] = []

    def guest(vcpu: km.VCpu) -> None:
        while not done.is_set():
            vcpu.access_many(gvas, np.zeros(PAGES, np.uint8))
            vcpu.invlpg(GVA + int(rng.integers(PAGES)) * 4096)

    def look() -> None:
        for at in (crowd.vm.check, crowd.vcpus[0].tlb_entries):
            try:
                taken.append(at())
            except VmBusyError as error:
                refused.append(str(error))

    def host() -> None:
        try:
            # Idle when it began, no more when it was done: some of many.
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not any("meanwhile" in why for why in refused):
                look()
        finally:
            done.set()

    together(host, *(lambda vcpu=vcpu: guest(vcpu) for vcpu in crowd.vcpus))
    assert any("meanwhile" in why for why in refused)
    look()
    for entries in taken:
        assert entries is None or set(entries["page_shift"].tolist()) <= {0, 12, 21, 30}
    assert taken


def test_each_vcpu_reads_back_what_it_stored_while_others_fault(crowd: Crowd) -> None:
    def guest(vcpu: km.VCpu, n: int) -> None:
        for value in range(300):
            gva = GVA + n * 4096 + value % 500 * 8
            vcpu.write(gva, value.to_bytes(8, "little"))
            assert vcpu.read(gva, 8) == value.to_bytes(8, "little")
            vcpu.access(GVA + (n + value) % PAGES * 4096, "w")

    together(*(lambda vcpu=vcpu, n=n: guest(vcpu, n) for n, vcpu in enumerate(crowd.vcpus)))


def refused_while_running() -> set[type[Exception]]:
    """What a second thread gets that uses the vCPU, then closes the VM; the batch may end in between."""
    crowd = Crowd("shadow", 1)
    gvas = np.full(400_000, GVA, np.uint64)
    seen: set[type[Exception]] = set()

    def batch() -> None:
        # Until the other's own single access is over.
        while True:
            try:
                crowd.vcpu.access_many(gvas, "r")
                return
            except VCpuBusyError:
                pass

    thread = threading.Thread(target=batch)
    thread.start()
    while thread.is_alive() and not seen:
        try:
            crowd.vcpu.access(GVA)
        except VCpuBusyError as error:
            seen.add(type(error))
            try:
                crowd.vm.close()
            except VmBusyError as why:
                seen.add(type(why))
    thread.join()
    if not crowd.vm.closed:
        assert crowd.vcpu.access(GVA).outcome is Outcome.OK
    return seen


def test_a_vcpu_is_one_threads_at_a_time_and_a_vm_with_a_running_one_is_not_closed() -> None:
    assert any(refused_while_running() == {VCpuBusyError, VmBusyError} for _ in range(20))


def test_a_vm_may_be_used_by_any_thread_and_closed_only_once() -> None:
    crowd = Crowd("ept", 1)
    together(*(lambda: crowd.vm.close() for _ in range(4)))
    assert crowd.vm.closed


def test_a_handler_may_change_slots_while_the_instruction_waits_for_it() -> None:
    crowd = Crowd("shadow", 1)
    made = []

    def device(gpa: int, size: int) -> bytes:
        made.append(crowd.vm.memslots.create(gpa=EXTRA, memory=np.zeros(4096, np.uint8)))
        return bytes(size)

    crowd.vcpu.execute("load", MMIO_GVA, code_gva=GVA, code_size=3, mmio_read=device)
    assert len(made) == 1


def test_slots_stand_on_arrays_mapped_files_and_read_only_buffers(tmp_path: Path) -> None:
    vm = km.VM("ept")
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * 4096))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
    frozen = np.arange(4096, dtype=np.uint8)
    frozen.flags.writeable = False
    vm.memslots.create(gpa=0, memory=np.zeros(4 * 4096, np.uint8))
    vm.memslots.create(gpa=0x10_0000, memory=mapped)
    rom = vm.memslots.create(gpa=0x20_0000, memory=frozen)
    vcpu = vm.create_vcpu()
    vcpu.write(0x10_0008, b"kvmmmu")
    assert mapped[8:14] == b"kvmmmu"
    assert vcpu.read(0x20_0010, 4) == bytes(range(16, 20))
    assert vcpu.access(0x20_0010, "w").outcome is Outcome.MMIO
    assert rom.readonly
    vm.check()
    vm.close()
    mapped.close()


def test_a_full_table_of_slots_is_searched_while_it_changes() -> None:
    vm = km.VM("ept")
    page = np.zeros(4096, np.uint8)
    vcpu = vm.create_vcpu()
    for n in range(32_764):
        vm.memslots.create(gpa=n << 13, memory=page)
    with pytest.raises(MemslotError):
        vm.memslots.create(gpa=1 << 40, memory=page)
    gvas = (np.arange(256, dtype=np.uint64) * np.uint64(101) % np.uint64(32_764)) << np.uint64(13)
    last = vm.memslots.at(32_763 << 13)
    assert last is not None
    done = threading.Event()

    def guest() -> None:
        try:
            for _ in range(10):
                table = vcpu.access_many(np.concatenate([gvas, gvas + np.uint64(4096)]), "r")
                assert (table["outcome"][:256] == Outcome.OK).all()
                assert (table["outcome"][256:] == Outcome.MMIO).all()
        finally:
            done.set()

    def host() -> None:
        slot = last
        while not done.is_set():
            vm.memslots.delete(slot)
            slot = vm.memslots.create(gpa=32_763 << 13, memory=page)

    together(guest, host)
