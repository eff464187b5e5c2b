"""Golden files are read whole or refused by name: an unknown word anywhere is an error."""

import copy
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kvmmmu.errors import FormatError
from kvmmmu.golden import Archive, parse_events, parse_result, parse_script, parse_setup

SCRIPT: dict[str, Any] = {
    "name": "made",
    "notes": "",
    "mode": "long",
    "set": {
        "sysgpa": 4096,
        "usrgpa": 8192,
        "dump_every": 1,
        "sysgva": 18446603336221196288,
        "usrgva": 18446603336221200384,
        "cr0": 2147549233,
        "cr4": 32,
        "efer": 3328,
        "cr3": 65536,
    },
    "caps": {},
    "backs": [{"id": 0, "size": 65536, "how": "4k"}],
    "slots": [{"id": 0, "gpa": 0, "size": 65536, "back": 0, "boff": 0, "flags": "0"}],
    "mem": [["0x3000", 8, "0x4027"]],
    "ops": [["r", 8, "0x400000", 0], ["slot", 1, "0x100000", 4096, 0, 4096, "log"]],
}
RESULT: dict[str, Any] = {
    "name": "made",
    "complete": True,
    "backs": [],
    "stats_setup": {},
    "totals": {"pf_taken": 1},
    "ops": [
        {
            "i": 0,
            "op": ["r", "0x8", "0x400000", "0x0"],
            "out": [["mmio-r", {"gpa": "fe000000", "len": "8"}], ["ok", {"rax": "c0"}]],
            "stats": {"pf_taken": 1, "vm.pages_4k": -1},
            "shadow": {
                "level": 4,
                "sps": [
                    {
                        "id": "0",
                        "level": "l4",
                        "gfn": "10",
                        "role": "00003704",
                        "tdp": "0",
                        "unsync": "0",
                        "gen": "0",
                        "nxdis": "0",
                        "root_count": "1",
                        "unsync_children": "0",
                        "wfc": "0",
                        "e": [[0, "0", "827", "table", "1"], [1, "8000000000", "80000fe000017", "mmio"]],
                    },
                    {"id": "1", "level": "l3", "nosp": "", "e": []},
                ],
            },
        }
    ],
}
EVENTS = b"## op 0 r 0x8\nkvm_exit: io rip 0\nrole_get_page: gfn=0x10 role=0x3704\n## op 1 ac 0x1\n"
SETUP = b"""Linux (none) 6.1.0-56-amd64 #1 SMP
model name	: AMD EPYC Processor
flags		: fpu nx smep pdpe1gb
address sizes	: 40 bits physical, 48 bits virtual
kvm.tdp_mmu=N
kvm_amd.npt=Y
"""


def changed(base: dict[str, Any], path: tuple[Any, ...], value: Any) -> bytes:
    """``base`` as JSON with one place set, or removed where ``value`` is ``...``."""
    data = copy.deepcopy(base)
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(data).encode()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as out:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


def test_a_script_gives_its_machine_and_its_operations() -> None:
    script = parse_script(json.dumps(SCRIPT).encode(), "made")
    assert (script.mode, script.long, script.cr3) == ("long", True, 65536)
    assert script.memory == ((0x3000, 8, 0x4027),)
    read, slot = script.ops
    assert (read.name, dict(read.args), str(read)) == (
        "r",
        {"size": 8, "gva": 0x400000, "cpl": 0},
        "r 0x8 0x400000 0x0",
    )
    assert slot["flags"] == 1
    assert str(slot) == "slot 0x1 0x100000 0x1000 0x0 0x1000 log"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("mode",), "real", "mode 'real': expected one of long"),
        (("extra",), 1, "field 'extra' is unknown"),
        (("mem",), ..., "field 'mem' is missing"),
        (("set", "cr3"), -1, r"set\.cr3: -1: expected a number"),
        (("caps",), {"dirty_manual": 2}, "dirty_manual 2"),
        (("caps",), {"x": 1}, "field 'x' is unknown"),
        (("backs", 0, "how"), "1g", "how '1g'"),
        (("backs", 0, "size"), 5000, "expected whole pages"),
        (("slots", 0, "back"), 7, "back 7: expected one of"),
        (("slots", 0, "flags"), "wo", "flags 'wo'"),
        (("slots", 0, "size"), 1 << 20, "are beyond back 0"),
        (("mem", 0), ["0x3000", 9, "0x0"], "1 to 8 bytes"),
        (("mem", 0), ["0x3000", 1, "0x100"], "a value that fits"),
        (("ops", 0), ["fly", 1], "expected an operation"),
        (("ops", 0), ["r", 8, "0x400000"], "expected r size gva cpl"),
        (("ops", 0), ["r", 3, "0x400000", 0], "size 3: expected 1, 2, 4 or 8"),
        (("ops", 0), ["r", 8, "zero", 0], "expected a number"),
        (("ops", 0), ["x", "0x0", 4], "cpl 4"),
    ],
)
def test_a_script_with_anything_unknown_is_refused_by_name(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_script(changed(SCRIPT, path, value), "made")


def test_a_result_gives_outcomes_counters_and_trees() -> None:
    result = parse_result(json.dumps(RESULT).encode(), "made")
    op = result.ops[0]
    assert op.out == (("mmio-r", {"gpa": "fe000000", "len": "8"}), ("ok", {"rax": "c0"}))
    assert op.stats == {"pf_taken": 1, "vm.pages_4k": -1}
    assert op.tree is not None
    root, roots = op.tree
    assert root.fields is not None
    assert (root.level, root.fields["role"], root.entries[1].kind) == (4, 0x3704, "mmio")
    assert roots.fields is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("complete",), False, "the run was cut short"),
        (("ops", 0, "i"), 1, "expected 0"),
        (("ops", 0, "out"), [["fine", {}]], "expected one of mmio-r"),
        (("ops", 0, "out"), [["ok", {}]], "field 'rax' is missing"),
        (("ops", 0, "out"), [["ok", {"rax": 0}]], "expected text"),
        (("ops", 0, "stats"), {"pf_lost": 1}, "counter 'pf_lost' is unknown"),
        (("ops", 0, "stats"), {"pf_taken": "1"}, "expected an integer"),
        (("totals",), {"vm.what": 1}, "counter 'vm.what' is unknown"),
        (("ops", 0, "shadow", "sps", 0, "e", 0), [0, "0", "827", "tree", "1"], "expected index"),
        (("ops", 0, "shadow", "sps", 0, "e", 0), [0, "0", "827", "table"], "tables and leaves name"),
        (("ops", 0, "shadow", "sps", 0, "gfn"), ..., "field 'gfn' is missing"),
        (("ops", 0, "shadow", "sps", 0, "role"), "xyz", "expected a number"),
    ],
)
def test_a_result_with_anything_unknown_is_refused_by_name(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_result(changed(RESULT, path, value), "made")


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(FormatError, match="made: not JSON"):
        parse_script(b"{", "made")


def test_events_are_split_at_their_operations() -> None:
    first, second = parse_events(EVENTS, "made")
    assert first.op == "r 0x8"
    assert first.lines == ("kvm_exit: io rip 0", "role_get_page: gfn=0x10 role=0x3704")
    assert second == ("ac 0x1", (), False)


def test_a_livelock_is_marked() -> None:
    assert parse_events(b"## op 0 cr3\n## livelock, cut here\n", "made")[0].livelock


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"## op 1 r\n", "expected operation 0"),
        (b"## op 0 r\nkvm_magic: x\n", "line 2: 'kvm_magic: x' is no known event"),
        (b"", "no operation in it"),
        (b"## op 0 \xff\n", "not ASCII"),
    ],
)
def test_events_with_anything_unknown_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse_events(raw, "made")


def test_a_setup_names_vendor_kernel_and_parameters() -> None:
    setup = parse_setup(SETUP, "setup.txt")
    assert (setup.kernel, setup.vendor, setup.maxphyaddr) == ((6, 1), "amd", 40)
    assert not setup.on("kvm.tdp_mmu", True)
    assert setup.on("kvm_amd.npt", False)
    assert setup.on("kvm.mmio_caching", True)


@pytest.mark.parametrize("line", [b"Linux", b"address sizes", b"flags", b"kvm_amd"])
def test_a_setup_without_what_matters_is_refused(line: bytes) -> None:
    raw = b"\n".join(row for row in SETUP.splitlines() if not row.startswith(line))
    with pytest.raises(FormatError, match="not found"):
        parse_setup(raw, "setup.txt")


def test_a_parameter_that_is_neither_yes_nor_no_is_refused() -> None:
    with pytest.raises(FormatError, match="expected Y or N"):
        parse_setup(SETUP.replace(b"npt=Y", b"npt=maybe"), "setup.txt").on("kvm_amd.npt", True)


def test_an_archive_holds_scripts_or_runs(tmp_path: Path) -> None:
    scripts = Archive(archive(tmp_path / "scripts.tar.xz", {"./made.json": b"1"}))
    runs = Archive(
        archive(tmp_path / "x.tar.xz", {"made.result.json": b"2", "made.events.txt": b"3", "setup.txt": b"4"})
    )
    assert (scripts.is_run, scripts.scripts, scripts.script("made")) == (False, ("made",), b"1")
    assert (runs.is_run, runs.name, runs.result("made"), runs.events("made"), runs.setup()) == (
        True,
        "x",
        b"2",
        b"3",
        b"4",
    )
    with pytest.raises(FormatError, match=r"member 'other\.json' is missing"):
        scripts.script("other")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "expected either scripts or results"),
        ({"made.json": b"", "made.result.json": b"", "made.events.txt": b""}, "expected either scripts or results"),
        ({"made.result.json": b""}, "'made' has results or events, not both"),
        ({"made.json": b"", "notes.md": b""}, "member 'notes.md'"),
    ],
)
def test_an_archive_with_strangers_is_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Archive(archive(tmp_path / "x.tar.xz", members))


@pytest.mark.parametrize("keep", [0, 40, 200])
def test_a_truncated_archive_is_refused(tmp_path: Path, keep: int) -> None:
    whole = archive(tmp_path / "x.tar.xz", {"made.json": json.dumps(SCRIPT).encode() * 50}).read_bytes()
    (tmp_path / "x.tar.xz").write_bytes(whole[:keep])
    with pytest.raises(FormatError, match="truncated or corrupt"):
        Archive(tmp_path / "x.tar.xz")
