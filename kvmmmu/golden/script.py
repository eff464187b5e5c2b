"""A script: the machine it wants and the operations that the guest and its host carry out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from kvmmmu.errors import FormatError
from kvmmmu.golden.fields import fields, load, number, rows, text

__all__ = ["BACKINGS", "MODES", "OPERATIONS", "Back", "Op", "Script", "SlotSpec", "parse_script"]

MODES: Final = ("long", "pae", "p32", "flat")
BACKINGS: Final = ("4k", "thp", "lazy")
SLOT_FLAGS: Final = MappingProxyType({"0": 0, "log": 1, "ro": 2})

#: The arguments of every operation, in order.
OPERATIONS: Final = MappingProxyType(
    {
        "r": ("size", "gva", "cpl"),
        "w": ("size", "gva", "value", "cpl"),
        "x": ("gva", "cpl"),
        "add": ("gva", "value", "cpl"),
        "cas": ("gva", "old", "new", "cpl"),
        "movs": ("dst", "src", "cpl"),
        "rwr": ("read", "gva", "value"),
        "rwir": ("read", "gva", "value"),
        "invlpg": ("gva",),
        "cr3": ("value",),
        "cr0": ("value",),
        "cr4": ("value",),
        "efer": ("value",),
        "ac": ("value",),
        "poke": ("size", "gpa", "value"),
        "slot": ("id", "gpa", "size", "back", "boff", "flags"),
        "delslot": ("id",),
        "dirty": ("id",),
        "dirtyclear": ("id",),
        "dontneed": ("back", "off", "len"),
        "nrmmu": ("n",),
    }
)


@dataclass(frozen=True)
class Back:
    """A block of host memory: ``how`` it is backed is one of ``BACKINGS``."""

    id: int
    size: int
    how: str


@dataclass(frozen=True)
class SlotSpec:
    """A memslot: KVM_SET_USER_MEMORY_REGION with ``flags`` 1 (log) and 2 (read-only)."""

    id: int
    gpa: int
    size: int
    back: int
    boff: int
    flags: int


@dataclass(frozen=True)
class Op:
    """One operation; ``args`` by the names of ``OPERATIONS``."""

    index: int
    name: str
    args: MappingProxyType[str, int]
    raw: tuple[str, ...]

    def __getitem__(self, name: str) -> int:
        return self.args[name]

    def __str__(self) -> str:
        return " ".join(self.raw)


@dataclass(frozen=True)
class Script:
    """A script of one guest.

    Attributes
    ----------
    name : str
    mode : {"long", "pae", "p32", "flat"}
    cr0, cr3, cr4, efer : int
        Registers before the first operation.
    sysgpa, sysgva, usrgpa, usrgva : int
        Where the supervisor's page (stubs, handlers, tables of the processor) and the user's page (stubs) stand.
    dump_every : int
    dirty_manual : int
        Manual dirty-log protection: 0, 1, or 3 with everything dirty at first.
    backs : dict of int to Back
    slots : tuple of SlotSpec
        Created in this order before anything else.
    memory : tuple of (gpa, size, value)
        What guest memory holds at first; the rest is zero.
    ops : tuple of Op
    """

    name: str
    mode: str
    cr0: int
    cr3: int
    cr4: int
    efer: int
    sysgpa: int
    sysgva: int
    usrgpa: int
    usrgva: int
    dump_every: int
    dirty_manual: int
    backs: dict[int, Back]
    slots: tuple[SlotSpec, ...]
    memory: tuple[tuple[int, int, int], ...]
    ops: tuple[Op, ...]

    @property
    def long(self) -> bool:
        """64-bit code."""
        return self.mode == "long"


def parse_script(raw: bytes, where: str) -> Script:
    """Read a script.

    Raises
    ------
    FormatError
        A field or an operation is unknown, missing or out of range; the message starts with ``where``.
    """
    top = fields(load(raw, where), where, {"name", "notes", "mode", "set", "caps", "backs", "slots", "mem", "ops"})
    if top["mode"] not in MODES:
        raise FormatError(f"{where}: mode {top['mode']!r}: expected one of {', '.join(MODES)}")
    names = ("sysgpa", "usrgpa", "dump_every", "sysgva", "usrgva", "cr0", "cr4", "efer", "cr3")
    setting = fields(top["set"], f"{where}: set", set(names))
    values = {name: number(setting[name], f"{where}: set.{name}") for name in names}
    caps = fields(top["caps"], f"{where}: caps", set(), {"dirty_manual"})
    manual = number(caps.get("dirty_manual", 0), f"{where}: caps.dirty_manual")
    if manual not in (0, 1, 3):
        raise FormatError(f"{where}: caps.dirty_manual {manual}: expected 1 or 3")
    backs = [_back(row, f"{where}: backs[{i}]") for i, row in enumerate(rows(top["backs"], f"{where}: backs"))]
    script = Script(
        name=text(top["name"], f"{where}: name"),
        mode=top["mode"],
        dirty_manual=manual,
        backs={back.id: back for back in backs},
        slots=tuple(_slot(row, f"{where}: slots[{i}]") for i, row in enumerate(rows(top["slots"], f"{where}: slots"))),
        memory=tuple(_store(row, f"{where}: mem[{i}]") for i, row in enumerate(rows(top["mem"], f"{where}: mem"))),
        ops=tuple(_op(i, row, f"{where}: ops[{i}]") for i, row in enumerate(rows(top["ops"], f"{where}: ops"))),
        **values,
    )
    if len(script.backs) != len(backs):
        raise FormatError(f"{where}: backs: an id occurs twice")
    for i, slot in enumerate(script.slots):
        _check_back(script, slot.back, slot.boff, slot.size, f"{where}: slots[{i}]")
    for op in script.ops:
        if op.name in ("slot", "dontneed"):
            offset, size = (op["boff"], op["size"]) if op.name == "slot" else (op["off"], op["len"])
            _check_back(script, op["back"], offset, size, f"{where}: ops[{op.index}]")
    return script


def _check_back(script: Script, back: int, offset: int, size: int, where: str) -> None:
    if back not in script.backs:
        raise FormatError(f"{where}: back {back}: expected one of {sorted(script.backs)}")
    if offset + size > script.backs[back].size:
        raise FormatError(f"{where}: bytes {offset:#x} to {offset + size:#x} are beyond back {back}")


def _back(row: Any, where: str) -> Back:
    row = fields(row, where, {"id", "size", "how"})
    if row["how"] not in BACKINGS:
        raise FormatError(f"{where}: how {row['how']!r}: expected one of {', '.join(BACKINGS)}")
    size = number(row["size"], f"{where}: size")
    if size == 0 or size % 4096 or size > 1 << 32:
        raise FormatError(f"{where}: size {size:#x}: expected whole pages, 4 GiB at most")
    return Back(number(row["id"], f"{where}: id"), size, row["how"])


def _flags(value: Any, where: str) -> int:
    words = re.split(r"[ ,+|]+", text(value, where))
    unknown = [word for word in words if word not in SLOT_FLAGS]
    if unknown:
        raise FormatError(f"{where}: flags {value!r}: expected words from {', '.join(SLOT_FLAGS)}")
    return sum(SLOT_FLAGS[word] for word in set(words))


def _slot(row: Any, where: str) -> SlotSpec:
    names = ("id", "gpa", "size", "back", "boff")
    row = fields(row, where, {*names, "flags"})
    values = {name: number(row[name], f"{where}: {name}") for name in names}
    return SlotSpec(**values, flags=_flags(row["flags"], where))


def _store(row: Any, where: str) -> tuple[int, int, int]:
    row = rows(row, where)
    if len(row) != 3:
        raise FormatError(f"{where}: {row!r}: expected gpa, bytes, value")
    gpa, size, value = (number(part, where) for part in row)
    if not 1 <= size <= 8 or value >> 8 * size:
        raise FormatError(f"{where}: {row!r}: expected 1 to 8 bytes and a value that fits")
    return gpa, size, value


def _op(index: int, row: Any, where: str) -> Op:
    row = rows(row, where)
    if not row or row[0] not in OPERATIONS:
        raise FormatError(f"{where}: {row!r}: expected an operation: {', '.join(OPERATIONS)}")
    names = OPERATIONS[row[0]]
    if len(row) != len(names) + 1:
        raise FormatError(f"{where}: {row!r}: expected {row[0]} {' '.join(names)}")
    args = {
        name: _flags(value, where) if name == "flags" else number(value, f"{where}: {name}")
        for name, value in zip(names, row[1:], strict=True)
    }
    if not 0 <= args.get("cpl", 0) <= 3:
        raise FormatError(f"{where}: cpl {args['cpl']}: expected 0 to 3")
    if args.get("size", 1) not in (1, 2, 4, 8) and row[0] in ("r", "w", "poke"):
        raise FormatError(f"{where}: size {args['size']}: expected 1, 2, 4 or 8")
    # Position 6 of a slot operation holds its flags as words.
    raw = tuple(
        value if isinstance(value, str) and i in (0, 6) else f"{number(value, where):#x}" for i, value in enumerate(row)
    )
    return Op(index, row[0], MappingProxyType(args), raw)
