"""Tracepoints: the ring, and the text against lines that real kernels printed."""

import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from kvmmmu.errors import ArgumentError
from kvmmmu.events import EVENT_DTYPE, EVENT_NAMES, render
from kvmmmu.vm import VM

DATA = Path(__file__).parent / "data"
KIND = {name: number for number, name in enumerate(EVENT_NAMES, 1)}


@pytest.fixture
def vm():
    return VM()


# ---- the ring ---------------------------------------------------------------------


def test_nothing_is_recorded_until_it_is_enabled(vm):
    vm.events.emit("kvm_exit", 2, 0x78)
    assert len(vm.events.drain()) == 0
    assert vm.events.enabled == () and vm.events.capacity == 0 and vm.events.dropped == 0


def test_only_the_kinds_enabled_are_recorded(vm):
    vm.events.enable(["kvm_mmio", "kvm_cr"])
    for name in EVENT_NAMES:
        vm.events.emit(name, 1)
    assert [EVENT_NAMES[kind - 1] for kind in vm.events.drain()["kind"]] == ["kvm_mmio", "kvm_cr"]
    vm.events.enable("kvm_msr")
    assert vm.events.enabled == ("kvm_msr",)


def test_records_come_out_oldest_first_with_all_their_words(vm):
    vm.events.enable()
    for n in range(100):
        vm.events.emit("kvm_exit", *(2**64 - 1 - n - i for i in range(7)), vcpu=n)
    records = vm.events.drain()
    assert records.dtype == EVENT_DTYPE
    assert records["vcpu"].tolist() == list(range(100))
    assert records["w"].tolist() == [[2**64 - 1 - n - i for i in range(7)] for n in range(100)]
    assert len(vm.events.drain()) == 0


def test_a_full_ring_drops_and_counts_and_goes_on_after_it_is_read(vm):
    vm.events.enable(capacity=5)
    assert vm.events.capacity == 8
    for n in range(11):
        vm.events.emit("kvm_exit", n)
    assert vm.events.dropped == 3
    assert vm.events.drain()["w"][:, 0].tolist() == list(range(8))
    for n in range(20, 25):
        vm.events.emit("kvm_exit", n)
    assert vm.events.drain()["w"][:, 0].tolist() == list(range(20, 25))
    assert vm.events.dropped == 3


def test_text_leaves_the_records_where_they_are(vm):
    vm.events.enable()
    vm.events.emit("kvm_mmio", 2, 8, 0xFE000000, 1)
    line = "kvm_mmio: mmio write len 8 gpa 0xfe000000 val 0x1\n"
    assert vm.events.text() == vm.events.text() == line
    assert vm.events.text(vm.events.drain()) == line
    assert vm.events.text() == ""


def test_disabling_keeps_what_was_recorded(vm):
    vm.events.enable()
    vm.events.emit("kvm_exit", 1)
    vm.events.disable()
    vm.events.emit("kvm_exit", 2)
    vm.events.enable()
    vm.events.emit("kvm_exit", 3)
    assert vm.events.drain()["w"][:, 0].tolist() == [1, 3]


def test_another_capacity_forgets_what_was_not_read(vm):
    vm.events.enable(capacity=4)
    vm.events.emit("kvm_exit", 1)
    vm.events.enable(capacity=8)
    assert len(vm.events.drain()) == 0


def test_threads_lose_and_mix_up_nothing(vm):
    vm.events.enable(capacity=1 << 14)

    def write(thread):
        for n in range(2000):
            vm.events.emit("kvm_exit", *[thread << 32 | n] * 7, vcpu=thread)

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    taken = [vm.events.drain() for _ in range(200)]
    for thread in threads:
        thread.join()
    records = np.concatenate([*taken, vm.events.drain()])
    assert vm.events.dropped == 0 and len(records) == 8000
    for thread in range(4):
        words = records["w"][records["vcpu"] == thread]
        assert (words == (thread << 32) + np.arange(2000)[:, None]).all()


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda e: e.enable("kvm_nothing"), ArgumentError, "kvm_nothing"),
        (lambda e: e.enable(["kvm_exit", "x"]), ArgumentError, "'x'"),
        (lambda e: e.enable(capacity=0), ArgumentError, "capacity = 0"),
        (lambda e: e.enable(capacity=-1), ArgumentError, "capacity = -1"),
        (lambda e: e.enable(capacity=1 << 29), ArgumentError, "2\\^28"),
        (lambda e: e.enable(capacity=1.5), TypeError, "float"),
        (lambda e: e.emit("kvm_exit", -1), OverflowError, "word 0"),
        (lambda e: e.emit("kvm_exit", 0, 1 << 64), OverflowError, "word 1"),
        (lambda e: e.emit("kvm_exit", *range(8)), ArgumentError, "8 words"),
        (lambda e: e.emit("kvm_exit", vcpu=1 << 32), OverflowError, "vcpu"),
        (lambda e: e.emit("no_such"), ArgumentError, "no_such"),
    ],
)
def test_a_bad_argument_is_named_and_changes_nothing(vm, use, error, words):
    vm.events.enable("kvm_exit", capacity=4)
    vm.events.emit("kvm_exit", 7)
    with pytest.raises(error, match=words):
        use(vm.events)
    assert vm.events.enabled == ("kvm_exit",) and vm.events.capacity == 4
    assert vm.events.drain()["w"][:, 0].tolist() == [7]


def test_a_record_of_no_kind_is_an_error():
    with pytest.raises(ArgumentError, match="kind = 0"):
        list(render(np.zeros(1, EVENT_DTYPE)))


# ---- the text: lines of real kernels, taken apart here and put together there ---------

ACCESS = {"-": 0, "w": 2, "u": 4, "x": 1}
PFERR = {"P": 1, "W": 2, "U": 4, "RSVD": 8, "F": 16}
VECTORS = {"#UD": 6, "#DF": 8, "#GP": 13, "#PF": 14}
SVM_EXITS = {"PF excp": 0x4E, "UD excp": 0x46, "write_cr0": 0x10, "write_cr3": 0x13, "write_cr4": 0x14} | {
    "cr0_sel_write": 0x65,
    "hlt": 0x78,
    "invlpg": 0x79,
    "io": 0x7B,
    "msr": 0x7C,
    "shutdown": 0x7F,
    "npf": 0x400,
}
VMX_EXITS = {"TRIPLE_FAULT": 2, "HLT": 12, "CR_ACCESS": 28, "IO_INSTRUCTION": 30, "MSR_WRITE": 32} | {
    "EPT_VIOLATION": 48,
    "EPT_MISCONFIG": 49,
}
H = "([0-9a-f]+)"
SP = rf"sp gen {H} gfn {H} l(\d) (\d)-byte q(\d)( direct)? ([wux-]{{3}})( invalid)? (!?)nxe (!?)ad root (\d+) (un)?sync"


def h(text):
    return int(text, 16)


def page_words(gen, gfn, level, size, quadrant, direct, access, invalid, no_nx, no_ad, root, unsync, created=None):
    role = int(level) | (size == "4") << 4 | int(quadrant) << 5 | bool(direct) << 7
    role |= sum(ACCESS[letter] for letter in access) << 8 | bool(invalid) << 11
    role |= (not no_nx) << 12 | bool(no_ad) << 16
    return h(gfn), role | int(root) << 32, bool(unsync) | (created == "new") << 1 | h(gen) << 8


def walk_words(addr, pferr, flags):
    assert sum(PFERR[flag] for flag in flags.split("|") if flag) == h(pferr)
    return h(addr), h(pferr)


def spte_words(gfn, spte, letters, level, index):
    assert ("w" in letters) == (h(spte) >> 1 & 1)
    rights = ("r" in letters) | ("x" in letters) << 1 | ("u" in letters) << 2 | (len(letters) == 4) << 3
    return h(gfn), h(spte), int(index), int(level), rights


def insn_words(base, rip, code, mode, failed):
    raw = bytes.fromhex(code)
    padded = raw.ljust(16, b"\0")
    low, high = (int.from_bytes(padded[i : i + 8], "little") for i in (0, 8))
    return h(base), h(rip), low, high, len(raw), int(mode), bool(failed)


def exit_words(name, rip, info1, info2):
    isa, code = (2, SVM_EXITS[name]) if name in SVM_EXITS else (1, VMX_EXITS[name])
    return isa, code, h(rip), h(info1), h(info2)


def hex_words(*groups):
    return tuple(h(group) for group in groups)


LINES = {
    "kvm_mmu_pagetable_walk": (rf"addr {H} pferr {H} (\S*)", walk_words),
    "kvm_mmu_walker_error": (rf"pferr {H} (\S*)", lambda pferr, flags: walk_words("0", pferr, flags)[1:]),
    "kvm_mmu_paging_element": (rf"pte {H} level (\d)", hex_words),
    "kvm_mmu_set_accessed_bit": (rf"gpa {H}", hex_words),
    "kvm_mmu_set_dirty_bit": (rf"gpa {H}", hex_words),
    "kvm_mmu_get_page": (SP + " (new|existing)", page_words),
    "kvm_mmu_sync_page": (SP, page_words),
    "kvm_mmu_unsync_page": (SP, page_words),
    "kvm_mmu_prepare_zap_page": (SP, page_words),
    "mark_mmio_spte": (rf"gfn {H} access {H} gen {H}", lambda *g: (0, *hex_words(*g))),
    "handle_mmio_page_fault": (rf"addr:{H} gfn {H} access {H}", hex_words),
    "check_mmio_spte": (rf"spte {H} kvm_gen {H} spte-gen {H} valid [01]", hex_words),
    "fast_page_fault": (
        rf"vcpu 0 gva {H} error_code (\S+) old {H} new {H} spurious (\d) fixed (\d)",
        lambda gva, flags, old, new, spurious, fixed: (
            h(gva),
            sum(PFERR[f] for f in flags.split("|")),
            0,
            h(old),
            h(new),
            int(spurious),
            int(fixed),
        ),
    ),
    "kvm_mmu_zap_all_fast": (rf"kvm-mmu-valid-gen (\d+) used_pages {H}", hex_words),
    "kvm_mmu_set_spte": (rf"gfn {H} spte {H} \(([rwxu-]+)\) level (\d) idx (\d+)", spte_words),
    "kvm_mmu_spte_requested": (
        rf"gfn {H} pfn (ok|{H[1:-1]}) level (\d)",
        lambda gfn, pfn, level: (h(gfn), 0x12345 if pfn == "ok" else h(pfn), int(level)),
    ),
    "kvm_tdp_mmu_spte_changed": (
        rf"as id (\d) gfn {H} level (\d) old_spte {H} new_spte {H}",
        lambda as_id, gfn, level, old, new: (h(gfn), h(old), h(new), int(level), int(as_id)),
    ),
    "kvm_mmu_split_huge_page": (rf"gfn {H} spte {H} level (\d) errno (\d+)", hex_words),
    "kvm_page_fault": (rf"vcpu 0 rip 0x{H} address 0x{H} error_code 0x{H}", hex_words),
    "vcpu_match_mmio": (
        rf"gva 0x{H} gpa 0x{H} (Read|Write) (GPA|GVA)",
        lambda gva, gpa, how, which: (h(gva), h(gpa), how == "Write", which == "GPA"),
    ),
    "kvm_mmio": (
        rf"mmio (unsatisfied-read|read|write) len (\d+) gpa 0x{H} val 0x{H}",
        lambda how, length, gpa, value: (
            ["unsatisfied-read", "read", "write"].index(how),
            int(length),
            h(gpa),
            h(value),
        ),
    ),
    "kvm_inj_exception": (
        rf"(#\w\w)(?: \(0x{H}\))?( \[reinjected\])?",
        lambda name, code, again: (VECTORS[name], code is not None, h(code or "0"), bool(again)),
    ),
    "kvm_emulate_insn": (rf"{H}:{H}:([0-9a-f ]*?) \(prot(\d\d)\)( failed)?", insn_words),
    "kvm_exit": (rf"(.+) rip {H} info1 {H} info2 {H}", exit_words),
    "kvm_cr": (rf"cr_(read|write) (\d) = 0x{H}", lambda how, cr, value: (how == "write", int(cr), h(value))),
    "kvm_msr": (
        rf"msr_(read|write) {H} = 0x{H}( \(#GP\))?",
        lambda how, index, value, refused: (how == "write", h(index), h(value), bool(refused)),
    ),
}
# sptes of these kinds were printed without their frame; give them one that the text must leave out.
FRAME = 0x0000_00AB_CDEF_0000
SPTE_WORDS = {
    "fast_page_fault": (3, 4),
    "kvm_mmu_set_spte": (1,),
    "kvm_tdp_mmu_spte_changed": (1, 2),
    "kvm_mmu_split_huge_page": (1,),
}


def check_lines(lines):
    """Take each line apart into words, record them, and compare the text: number of lines that were looked at."""
    vm = VM()
    vm.events.enable(capacity=1 << 12)
    expected = []
    for line in lines:
        name, _, body = line.partition(": ")
        if name.startswith("role_"):
            words = re.fullmatch(rf"gfn=0x{H} role=0x{H}", body)
            # The raw role of the page named in the line before.
            assert expected[-1][0] == "kvm_mmu_" + name[5:]
            expected[-1] = (expected[-1][0], (h(words[1]), expected[-1][1][1] >> 32 << 32 | h(words[2])), line)
            continue
        if name not in LINES:
            assert name in ("kvm_unmap_hva_range", "kvm_set_spte_hva"), line
            continue
        pattern, words_of = LINES[name]
        match = re.fullmatch(pattern, body)
        assert match, line
        words = [int(word) for word in words_of(*match.groups())]
        for i in SPTE_WORDS.get(name, ()):
            words[i] |= FRAME if words[i] >> 11 & 1 else 0
        vm.events.emit(name, *words)
        expected.append((name, tuple(words), line))
        records = vm.events.drain()
        assert vm.events.text(records) == line + "\n"
    return len(expected)


def read_lines(text):
    return [line for line in text.splitlines() if not line.startswith("##")]


def test_text_is_what_real_kernels_printed():
    lines = [line for line in read_lines((DATA / "event-lines.txt").read_text()) if not line.startswith("role_")]
    names = {line.partition(":")[0] for line in lines}
    assert check_lines(lines) == len(lines) > 300
    assert names == set(LINES)


@pytest.mark.parametrize(
    "archive", ["golden/shadow", "golden/tdp0", "golden-intel/ept1-tdp0", "golden-intel/ept1", "golden/tdp1"]
)
def test_text_is_what_real_kernels_printed_in_every_run(shared, archive):
    seen, total = set(), 0
    with tarfile.open(shared / f"{archive}.tar.xz") as runs:
        for member in runs:
            if not member.name.endswith(".events.txt"):
                continue
            text = runs.extractfile(member).read().decode()
            fresh = [line for line in dict.fromkeys(read_lines(text)) if line not in seen]
            fresh = [line for line in fresh if not line.startswith("role_")]
            seen.update(fresh)
            total += check_lines(fresh)
    assert total > 1000


def test_a_page_event_can_be_followed_by_its_role_word():
    lines = [
        "kvm_mmu_get_page: sp gen 0 gfn 10 l4 8-byte q0 wux nxe ad root 0 sync new",
        "role_get_page: gfn=0x10 role=0x3704",
    ]
    records = np.zeros(1, EVENT_DTYPE)
    records["kind"], records["w"][0, :3] = KIND["kvm_mmu_get_page"], (0x10, 0x3704, 2)
    assert list(render(records, roles=True)) == lines
    assert list(render(records)) == lines[:1]


def test_frames_are_shown_on_demand():
    records = np.zeros(3, EVENT_DTYPE)
    records["kind"] = [KIND[name] for name in ("kvm_mmu_set_spte", "kvm_mmu_spte_requested", "mark_mmio_spte")]
    records["w"][0, :5] = (0x10, 0x1234E67, 0x203, 1, 15)
    records["w"][1, :3] = (0x10, 0x1234, 1)
    records["w"][2, :4] = (0x203, 0xFE000, 7, 2)
    assert list(render(records, frames=True)) == [
        "kvm_mmu_set_spte: gfn 10 spte 1234e67 (rwxu) level 1 sptep 0x203",
        "kvm_mmu_spte_requested: gfn 10 pfn 1234 level 1",
        "mark_mmio_spte: sptep:0x203 gfn fe000 access 7 gen 2",
    ]


def test_host_addresses_can_be_named_by_the_caller():
    records = np.zeros(2, EVENT_DTYPE)
    records["kind"] = [KIND["kvm_unmap_hva_range"], KIND["kvm_set_spte_hva"]]
    records["w"][:, 0] = (0x7F0000001000, 0x7F0000003000)
    records["w"][0, 1] = 0x7F0000003000
    lines = list(render(records, hva_name=lambda hva: f"B2+{hva - 0x7F0000000000:#x}"))
    assert lines == ["kvm_unmap_hva_range: B2+0x1000 len 0x2000", "kvm_set_spte_hva: B2+0x3000"]
