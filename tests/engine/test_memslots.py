"""The slot machine under the face: errno rules row by row, generations, frames, columns."""

import mmap
import os
import resource
import subprocess
import sys
import weakref
from errno import EEXIST, EINVAL, ENOMEM
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvmmmu import _core
from kvmmmu.cpu import HostCpu
from kvmmmu.vm import VM

PAGE = 4096
LOG, RO = 1, 2
MAP_NORESERVE = 0x4000  # Linux; Python has no name for it before 3.13
NONE, CREATE, DELETE, MOVE, FLAGS = range(5)
GIB_PAGES = 1 << 18
ARENA_PAGES = 1 << 20


_generation_seen = weakref.WeakKeyDictionary()


def zapped_all(core):
    """Whether all shadow pages were made obsolete (an odd number of times) since the last call."""
    before = _generation_seen.get(core, 0)
    _generation_seen[core] = core.mmu_valid_gen
    return core.mmu_valid_gen != before


def make(mmu="ept", *, maxphyaddr=46, scheme="generation"):
    return VM(mmu, host=HostCpu(maxphyaddr=maxphyaddr), mmio_scheme=scheme)._core


def pages(n):
    return np.zeros(n * PAGE, np.uint8)


def call(core, slot, *, flags=0, gpa=0, size=None, memory=None, level=0, offset=0):
    return core.set_region(slot, flags, gpa, size, memory, level, offset)


def state(core):
    return (
        [core.slots(as_id) for as_id in (0, 1)],
        [core.generation(as_id) for as_id in (0, 1)],
        core.host_ranges(),
        core.frame_areas(),
        core.total_pages,
        core.max_mmu_pages,
    )


@pytest.fixture
def core():
    """Slot 0 at 0, slot 1 at 16 MiB read-only, slot 2 of address space 1 at 0."""
    core = make()
    assert call(core, 0, memory=pages(16))[:2] == (0, None)
    assert call(core, 1, memory=pages(16), gpa=16 << 20, flags=RO)[:2] == (0, None)
    assert call(core, 1 << 16 | 2, memory=pages(16))[:2] == (0, None)
    zapped_all(core)
    return core


# One row per condition of KVM_SET_USER_MEMORY_REGION (api.rst section 4.35), in KVM's order.
REFUSED = [
    ("an id of 32764 or more", {"slot": 32764, "memory": 4}, EINVAL, "id"),
    ("an id of 65535", {"slot": 65535, "memory": 4}, EINVAL, "id"),
    ("an unknown flag", {"slot": 5, "memory": 4, "gpa": 1 << 30, "flags": 4}, EINVAL, "flags"),
    ("the internal INVALID flag", {"slot": 5, "memory": 4, "gpa": 1 << 30, "flags": 1 << 16}, EINVAL, "flags"),
    (
        "a size that is no whole number of pages",
        {"slot": 5, "memory": 4, "gpa": 1 << 30, "size": 5000},
        EINVAL,
        "size_align",
    ),
    ("an unaligned gpa", {"slot": 5, "memory": 4, "gpa": (1 << 30) + 8}, EINVAL, "gpa_align"),
    ("a host address that is no multiple of 8", {"slot": 5, "memory": "odd", "gpa": 1 << 30}, EINVAL, "hva_align"),
    ("address space 2", {"slot": 2 << 16, "memory": 4, "gpa": 1 << 30}, EINVAL, "as_id"),
    ("a slot that wraps round 2^64", {"slot": 5, "memory": 4, "gpa": (1 << 64) - PAGE}, EINVAL, "wrap"),
    ("deleting a slot that is not there", {"slot": 5, "size": 0}, EINVAL, "no_slot"),
    ("deleting a slot of the other address space", {"slot": 2, "size": 0}, EINVAL, "no_slot"),
    ("other memory for a slot", {"slot": 0, "memory": 16}, EINVAL, "hva_changed"),
    ("another size of a slot", {"slot": 0, "memory": "same", "size": 8 * PAGE}, EINVAL, "size_changed"),
    ("making a slot read-only", {"slot": 0, "flags": RO}, EINVAL, "readonly_changed"),
    ("making a slot writable", {"slot": 1, "gpa": 16 << 20}, EINVAL, "readonly_changed"),
    ("a slot over another", {"slot": 5, "memory": 4, "gpa": 15 * PAGE}, EEXIST, "overlap"),
    ("a slot round another", {"slot": 5, "memory": 64, "gpa": (16 << 20) - 8 * PAGE}, EEXIST, "overlap"),
    ("a move over another slot", {"slot": 0, "gpa": (16 << 20) + 15 * PAGE}, EEXIST, "overlap"),
    ("a slot beyond the last gfn", {"slot": 5, "memory": 4, "gpa": (1 << 46) - PAGE}, EINVAL, "max_gfn"),
    ("the first row that applies decides", {"slot": 5, "memory": 4, "gpa": 8, "flags": 4, "size": 1}, EINVAL, "flags"),
]


@pytest.mark.parametrize(("why", "arguments", "errno", "reason"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_refused_change_gives_kvms_errno_and_changes_nothing(core, why, arguments, errno, reason):
    arguments = dict(arguments)
    slot = arguments.pop("slot")
    memory = arguments.pop("memory", None)
    if memory == "odd":
        memory = pages(2)[4 : 4 + PAGE]
    elif memory == "same":
        memory = core.slot(slot)[4]
    elif memory is not None:
        memory = pages(memory)
    before = state(core)
    assert call(core, slot, memory=memory, **arguments)[:2] == (errno, reason)
    assert state(core) == before
    assert not zapped_all(core)


def test_a_slot_of_2_to_the_31_pages_is_too_large():
    core = make(maxphyaddr=52)
    before = state(core)
    # Address space only: nothing is touched, for the slot is refused.
    memory = mmap.mmap(-1, (1 << 31) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    assert call(core, 0, memory=memory)[:2] == (EINVAL, "too_many_pages")
    assert state(core) == before
    memory.close()


def test_a_change_of_nothing_is_no_change(core):
    before = state(core)
    assert call(core, 0) == (0, None, 0, NONE)
    assert call(core, 0, memory=core.slot(0)[4]) == (0, None, 0, NONE)
    assert state(core) == before


def test_a_move_that_changes_flags_too_is_a_move(core):
    assert call(core, 0, gpa=1 << 30, flags=LOG)[3] == MOVE
    assert core.slot(0)[1:4] == (1 << 30, 16 * PAGE, LOG)


def test_the_generation_starts_at_the_address_space_and_grows_by_two_per_swap():
    core = make()
    assert [core.generation(0), core.generation(1)] == [0, 1]
    for as_id in (0, 1):
        slot = as_id << 16 | 7
        expected = as_id
        for change, swaps, arguments in [
            (CREATE, 1, {"memory": pages(4)}),
            (FLAGS, 1, {"flags": LOG}),
            (FLAGS, 1, {"flags": 0}),
            (MOVE, 2, {"gpa": 1 << 30}),
            (DELETE, 2, {"size": 0}),
        ]:
            assert call(core, slot, **arguments) == (0, None, 0, change)
            expected += 2 * swaps
            assert core.generation(as_id) == expected
    assert core.generation(0) == 14 and core.generation(1) == 15


@pytest.mark.parametrize(
    ("arguments", "zaps"),
    [({"flags": LOG}, False), ({"gpa": 1 << 30}, True), ({"size": 0}, True)],
    ids=["flags", "move", "delete"],
)
def test_only_a_slot_that_leaves_a_place_asks_for_all_shadow_pages_to_go(core, arguments, zaps):
    assert call(core, 0, **arguments)[0] == 0
    assert zapped_all(core) is zaps
    assert not zapped_all(core)


def test_creating_a_slot_zaps_nothing_while_generations_guard_mmio_sptes(core):
    assert call(core, 5, memory=pages(1), gpa=1 << 30)[0] == 0
    assert not zapped_all(core)


def test_a_move_beyond_the_last_gfn_costs_two_swaps_and_all_shadow_pages(core):
    slots, generation = core.slots(0), core.generation(0)
    assert call(core, 0, gpa=(1 << 46) - PAGE)[:2] == (EINVAL, "max_gfn")
    assert core.slots(0) == slots
    assert core.generation(0) == generation + 4
    assert zapped_all(core)
    assert core.find_gfn(3, 0)[0] == 0


def test_shadow_paging_knows_gfns_of_40_bits_whatever_the_host_width():
    core = make("shadow", maxphyaddr=40)
    assert call(core, 0, memory=pages(1), gpa=(1 << 52) - PAGE)[0] == 0
    assert call(core, 1, memory=pages(1), gpa=1 << 52)[:2] == (EINVAL, "max_gfn")


def test_a_wrap_of_the_stored_generation_asks_for_a_zap():
    """19 bits are stored, the lowest of which names the address space: 2^18 swaps come round once."""
    core = make()
    memory = pages(1)
    assert call(core, 0, memory=memory)[0] == 0
    zaps = 0
    for n in range((1 << 18) + 8):
        assert call(core, 0, flags=LOG * (n & 1 ^ 1))[3] == FLAGS
        if zapped_all(core):
            zaps += 1
            assert core.generation(0) == 1 << 19
    assert zaps == 1
    assert core.generation(0) == 2 + 2 * ((1 << 18) + 8)


def test_no_wrap_is_looked_for_where_nothing_is_cached():
    core = make(scheme="off")
    assert call(core, 0, memory=pages(1))[0] == 0
    for n in range((1 << 18) + 8):
        call(core, 0, flags=LOG * (n & 1 ^ 1))
    assert not zapped_all(core)


def test_linux_3_1_zaps_when_an_id_comes_to_stand_elsewhere_than_its_last_change_said():
    core = make(scheme="zap_all")
    memory = pages(1)

    def zaps(**arguments):
        assert call(core, 3, **arguments)[0] == 0
        return zapped_all(core)

    assert not zaps(memory=memory, gpa=0)  # an id never used counts as base 0
    assert zaps(size=0)
    assert zaps(memory=memory, gpa=1 << 20)
    assert zaps(size=0, gpa=1 << 20)
    assert not zaps(memory=memory, gpa=1 << 20)
    assert zaps(size=0, gpa=1 << 21)  # the address the deleting call named counts
    assert not zaps(memory=memory, gpa=1 << 21)


def test_the_mail_of_2011_zaps_nothing_when_a_slot_is_created():
    core = make(scheme="unguarded")
    assert call(core, 3, memory=pages(1), gpa=1 << 20)[0] == 0
    assert not zapped_all(core)


def test_the_quota_of_shadow_pages_is_a_fiftieth_of_the_slots_but_64_at_least():
    core = make()
    assert core.max_mmu_pages == 64
    call(core, 0, memory=pages(64 * 50 + 49))
    assert core.max_mmu_pages == 64
    call(core, 1 << 16, memory=pages(500))
    assert core.total_pages == 64 * 50 + 549
    assert core.max_mmu_pages == 74
    call(core, 0, size=0)
    assert core.max_mmu_pages == 64


# ---- frames -----------------------------------------------------------------------


def pfn(core, gfn, as_id=0):
    return core.find_gfn(gfn, as_id)[1]


def test_each_buffer_begins_at_a_gib_of_frames_after_the_arena():
    core = make()
    for n in range(3):
        call(core, n, memory=pages(2), gpa=n << 20)
    assert [pfn(core, n << 8) for n in range(3)] == [ARENA_PAGES + n * GIB_PAGES for n in range(3)]


def test_an_offset_moves_the_first_frame_inside_its_gib():
    core = make()
    call(core, 0, memory=pages(2), offset=5)
    call(core, 1, memory=pages(2), gpa=1 << 20, offset=GIB_PAGES - 1)
    assert pfn(core, 0) == ARENA_PAGES + 5
    assert pfn(core, 256) == ARENA_PAGES + 2 * GIB_PAGES - 1
    assert pfn(core, 257) == ARENA_PAGES + 2 * GIB_PAGES


def test_the_same_bytes_are_the_same_frames_in_every_slot():
    core = make()
    memory = pages(8)
    call(core, 0, memory=memory)
    call(core, 1, memory=memory[2 * PAGE : 5 * PAGE], gpa=1 << 20)
    call(core, 1 << 16, memory=memory)
    assert [pfn(core, 256 + n) for n in range(3)] == [pfn(core, 2 + n) for n in range(3)]
    assert pfn(core, 7, 1) == pfn(core, 7)
    assert len(core.frame_areas()) == 1


def test_only_the_gaps_of_a_partly_known_buffer_get_new_frames():
    core = make()
    memory = pages(12)
    base = memory.ctypes.data
    call(core, 0, memory=memory[2 * PAGE : 4 * PAGE])
    call(core, 1, memory=memory[8 * PAGE : 9 * PAGE], gpa=1 << 20)
    call(core, 2, memory=memory, gpa=2 << 20)
    a, b = ARENA_PAGES, ARENA_PAGES + GIB_PAGES
    new = [ARENA_PAGES + n * GIB_PAGES for n in (2, 3, 4)]
    expected = [new[0], new[0] + 1, a, a + 1, *(new[1] + n for n in range(4)), b, *(new[2] + n for n in range(3))]
    assert [pfn(core, 512 + n) for n in range(12)] == expected
    assert [(host - base) // PAGE for host, *_ in core.host_ranges()] == [0, 2, 4, 8, 9]


def test_frames_go_with_the_last_slot_that_binds_their_bytes():
    core = make()
    memory = pages(8)
    call(core, 0, memory=memory)
    call(core, 1, memory=memory[2 * PAGE : 4 * PAGE], gpa=1 << 20)
    kept = pfn(core, 256)
    call(core, 0, size=0)
    assert core.frame_areas() == [(kept, 2, memory.ctypes.data + 2 * PAGE, True)]
    assert pfn(core, 256) == kept
    call(core, 1, size=0)
    assert core.frame_areas() == [] and core.host_ranges() == []


def test_buffers_that_overlap_off_page_are_refused():
    core = make()
    memory = pages(4)
    call(core, 0, memory=memory)
    before = state(core)
    assert call(core, 1, memory=memory[8 : 8 + PAGE], gpa=1 << 20)[:3] == (EINVAL, "incongruent", 8)
    assert state(core) == before


def test_frames_are_bounded_by_the_hosts_address_width():
    core = make(maxphyaddr=36)
    free = (1 << 24) - ARENA_PAGES
    n = free // GIB_PAGES
    for i in range(n):
        assert call(core, i, memory=pages(1), gpa=i << 12)[0] == 0
    # No GiB is left: the next run takes a free 2 MiB block behind the first.
    assert call(core, n, memory=pages(1), gpa=n << 12)[0] == 0
    assert pfn(core, n) == ARENA_PAGES + 512
    host = VM("shadow", host=HostCpu(maxphyaddr=36, phys_bits=32))._core
    assert call(host, 0, memory=pages(1))[:2] == (ENOMEM, "no_frames")
    assert host.slots(0) == []


# ---- huge pages -------------------------------------------------------------------


def levels(core, gfn):
    return core.find_gfn(gfn, 0)[2:]


def test_the_hosts_backing_bounds_the_level():
    core = make()
    for slot, level in enumerate((0, 1, 2, 3)):
        call(core, slot, memory=pages(1024), gpa=slot << 30, level=level)
        assert levels(core, (slot << 18) + 600)[0] == (1, 1, 2, 2)[slot]


def test_one_backing_per_byte():
    core = make()
    memory = pages(1024)
    call(core, 0, memory=memory, level=2)
    assert call(core, 1, memory=memory, gpa=1 << 30, level=1)[:3] == (EINVAL, "backing", 2)
    assert call(core, 1, memory=memory, gpa=1 << 30)[0] == 0
    assert levels(core, 1 << 18)[0] == 2


def test_borders_of_a_slot_forbid_the_large_pages_they_cut():
    core = make()
    call(core, 0, memory=pages(512 * 3), gpa=256 * PAGE, level=2, offset=256)
    assert [levels(core, g)[1] for g in (256, 511, 512, 1024, 1535, 1536, 1791)] == [1, 1, 0, 0, 0, 1, 1]
    assert [levels(core, g)[0] for g in (256, 512, 1535, 1536)] == [1, 2, 2, 1]


def test_frames_out_of_step_with_gfns_forbid_every_large_page():
    core = make()
    call(core, 0, memory=pages(2048), level=2, offset=1)
    assert [levels(core, g)[:2] for g in (0, 512, 1024)] == [(1, 1)] * 3


def test_a_large_page_never_spans_two_runs_of_frames():
    core = make()
    memory = pages(1024)
    call(core, 0, memory=memory[: 700 * PAGE], gpa=1 << 30, level=2)
    call(core, 1, memory=memory, level=2)
    assert pfn(core, 699) + 1 != pfn(core, 700)
    assert [levels(core, g)[0] for g in (0, 511, 512, 699, 700, 1023)] == [2, 2, 1, 1, 1, 1]


# ---- a naive twin -----------------------------------------------------------------

BUFFER_PAGES = 24
IDS = [0, 1, 2, 3, 0x10000, 0x10001]


class Slots(RuleBasedStateMachine):
    """Random changes, each checked against a dictionary that applies the rules one gfn at a time."""

    def __init__(self):
        super().__init__()
        self.core = make(maxphyaddr=40)
        self.buffers = [pages(BUFFER_PAGES) for _ in range(2)]
        self.model = {}
        self.generation = [0, 1]

    def gfns(self, as_id, besides=None):
        return {
            gfn: number
            for number, (base, n, *_) in self.model.items()
            if number >> 16 == as_id and number != besides
            for gfn in range(base, base + n)
        }

    @rule(
        number=st.sampled_from(IDS),
        base=st.integers(0, 40),
        buffer=st.integers(0, 1),
        first=st.integers(0, BUFFER_PAGES - 1),
        n=st.integers(1, BUFFER_PAGES),
        flags=st.sampled_from([0, LOG, RO, LOG | RO, 4]),
    )
    def set_region(self, number, base, buffer, first, n, flags):
        n = min(n, BUFFER_PAGES - first)
        memory = self.buffers[buffer][first * PAGE : (first + n) * PAGE]
        old = self.model.get(number)
        new = (base, n, flags, buffer, first)
        if flags & 4:
            expected = (EINVAL, NONE)
        elif old is None:
            busy = self.gfns(number >> 16)
            expected = (EEXIST, CREATE) if any(base + i in busy for i in range(n)) else (0, CREATE)
        elif (old[1], old[3], old[4]) != (n, buffer, first) or (old[2] ^ flags) & RO:
            expected = (EINVAL, NONE)
        elif old[0] != base:
            busy = self.gfns(number >> 16, besides=number)
            expected = (EEXIST, MOVE) if any(base + i in busy for i in range(n)) else (0, MOVE)
        else:
            expected = (0, FLAGS if old[2] != flags else NONE)
        before = state(self.core)
        got = call(self.core, number, memory=memory, gpa=base * PAGE, flags=flags)
        assert (got[0], got[3]) == expected
        if expected[0]:
            assert state(self.core) == before
        else:
            self.model[number] = new
            self.generation[number >> 16] += {NONE: 0, CREATE: 2, FLAGS: 2, MOVE: 4}[expected[1]]

    @rule(data=st.data(), base=st.integers(0, 40), flags=st.sampled_from([0, LOG]))
    @precondition(lambda self: self.model)
    def change(self, data, base, flags):
        """A change of a slot that is there, so that moves and flags are met often."""
        number = data.draw(st.sampled_from(sorted(self.model)))
        _, n, old_flags, buffer, first = self.model[number]
        self.set_region(number, base, buffer, first, n, flags | old_flags & RO)

    @rule(number=st.sampled_from(IDS))
    def delete(self, number):
        before = state(self.core)
        got = call(self.core, number, size=0)
        if number in self.model:
            assert got == (0, None, 0, DELETE)
            del self.model[number]
            self.generation[number >> 16] += 4
        else:
            assert got[:2] == (EINVAL, "no_slot")
            assert state(self.core) == before

    @invariant()
    def slots_are_the_models(self):
        for as_id in (0, 1):
            expected = sorted(
                (number, base * PAGE, n * PAGE, flags)
                for number, (base, n, flags, *_) in self.model.items()
                if number >> 16 == as_id
            )
            got = [entry[:4] for entry in self.core.slots(as_id)]
            assert sorted(got) == expected
            assert got == sorted(got, key=lambda entry: entry[1])
        assert [self.core.generation(0), self.core.generation(1)] == self.generation
        assert self.core.total_pages == sum(entry[1] for entry in self.model.values())

    @invariant()
    def frames_follow_bytes(self):
        frame_of, byte_of = {}, {}
        for as_id in (0, 1):
            gfns = self.gfns(as_id)
            for gfn in range(0, 66):
                found = self.core.find_gfn(gfn, as_id)
                if gfn not in gfns:
                    assert found is None
                    continue
                base, _, _, buffer, first = self.model[gfns[gfn]]
                byte = (buffer, first + gfn - base)
                assert found[0] == gfns[gfn]
                assert found[1] >= ARENA_PAGES
                assert frame_of.setdefault(byte, found[1]) == found[1]
                assert byte_of.setdefault(found[1], byte) == byte
        self.frame_of = frame_of
        hosts = {}
        for first, n, host, _ in self.core.frame_areas():
            hosts.update({first + i: host + i * PAGE for i in range(n)})
        expected = {pfn: self.buffers[buffer].ctypes.data + page * PAGE for (buffer, page), pfn in frame_of.items()}
        assert hosts == expected

    @invariant()
    def runs_count_the_slots_of_each_page(self):
        users = {}
        for _, n, _, buffer, first in self.model.values():
            for page in range(first, first + n):
                host = self.buffers[buffer].ctypes.data + page * PAGE
                users[host] = users.get(host, 0) + 1
        got = {}
        for host, n, _, count, *_ in self.core.host_ranges():
            got.update({host + i * PAGE: count for i in range(n)})
        assert got == users


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=150, stateful_step_count=40)


def test_the_tables_of_names_are_as_long_as_the_engines_enums():
    assert len(_core.VM_STATS_ORDER) == len(set(_core.VM_STATS_ORDER)) == 16
    assert len(_core.VCPU_STATS_ORDER) == len(set(_core.VCPU_STATS_ORDER)) == 33


@pytest.mark.parametrize(
    "arguments",
    [
        {"slot": 1, "memory": "big", "gpa": 1 << 40},
        {"slot": 0, "gpa": 1 << 41},
        {"slot": 0, "flags": LOG},
    ],
    ids=["create", "move", "flags"],
)
def test_a_change_the_host_has_no_memory_for_changes_nothing(arguments, request):
    if "KVMMMU_FRESH_PROCESS" not in os.environ:
        # Here malloc may still hold what earlier tests gave back, and would need nothing from the host.
        home = str(Path(_core.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid],
            cwd=request.config.rootpath,
            env={**os.environ, "KVMMMU_FRESH_PROCESS": "1", "PYTHONPATH": home},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        assert "1 passed" in done.stdout
        return
    core = make()
    size = 512 << 30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    first, second = (mmap.mmap(-1, size, flags=flags) for _ in range(2))
    assert call(core, 0, memory=first)[0] == 0
    arguments = {name: second if value == "big" else value for name, value in arguments.items()}
    slot = arguments.pop("slot")
    before = state(core)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
    try:
        answer = call(core, slot, **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert answer[:2] == (ENOMEM, "no_memory")
    assert state(core) == before
    assert not zapped_all(core)
    assert call(core, slot, **arguments)[0] == 0
    core.close()
