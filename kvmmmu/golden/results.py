"""What came of a script: per operation KVM's outcome, counters and page-table tree."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from kvmmmu.errors import FormatError
from kvmmmu.golden.fields import fields, flag, integer, load, number, rows, text

__all__ = ["OUTCOMES", "OpResult", "Result", "TableEntry", "TablePage", "parse_result"]

#: The fields of every outcome; those after the bar may be absent.
OUTCOMES: Final = MappingProxyType(
    {
        "mmio-r": (("gpa", "len"), ()),
        "mmio-w": (("gpa", "len", "data"), ()),
        "ok": (("rax",), ("rbx",)),
        "exc": (("exc", "ip"), ("err", "cr2")),
        "internal": (("suberror",), ()),
        "exit": (("exit",), ()),
        "rc": (("rc",), ("pages", "clear")),
        "hang": ((), ()),
        "skipped": ((), ()),
    }
)
#: Counters of a vCPU, and of the VM with ``vm.`` before the name.
VCPU_COUNTERS: Final = frozenset(
    "pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created pf_guest tlb_flush invlpg io_exits "
    "mmio_exits insn_emulation insn_emulation_fail exits halt_exits signal_exits irq_exits irq_window_exits "
    "request_irq_exits nmi_window_exits fpu_reload host_state_reload hypercalls irq_injections nmi_injections "
    "req_event l1d_flush preemption_reported preemption_other nested_run directed_yield_attempted "
    "directed_yield_successful".split()
)
VM_COUNTERS: Final = frozenset(
    # The first two are Linux 3.1's alone.
    "mmu_pte_updated largepages "
    "mmu_shadow_zapped mmu_pte_write mmu_pde_zapped mmu_flooded mmu_recycled mmu_cache_miss mmu_unsync pages_4k "
    "pages_2m pages_1g nx_lpage_splits max_mmu_rmap_size max_mmu_page_hash_collisions remote_tlb_flush "
    "remote_tlb_flush_requests".split()
)
KINDS: Final = ("table", "leaf", "mmio", "np")
_PAGE = ("gfn", "role", "unsync", "root_count", "unsync_children")
# Linux 3.1 has none of these.
_LATER = ("tdp", "gen", "wfc", "nxdis")


@dataclass(frozen=True)
class TableEntry:
    """An spte that is not empty.

    Attributes
    ----------
    index : int
    address : int
        The gva it translates (gpa under EPT and NPT).
    spte : int
        Without the frame, except for an mmio spte.
    kind : {"table", "leaf", "mmio", "np"}
    ref : str
        Table: id of the child; leaf: ``B<back>+<offset>`` or ``zero``; else empty.
    """

    index: int
    address: int
    spte: int
    kind: str
    ref: str


@dataclass(frozen=True)
class TablePage:
    """A shadow page; ``fields`` is None for a table that is none (the four roots of PAE paging)."""

    id: str
    level: int
    fields: MappingProxyType[str, int] | None
    entries: tuple[TableEntry, ...]


@dataclass(frozen=True)
class OpResult:
    """What one operation did.

    Attributes
    ----------
    op : tuple of str
        The operation as it was run.
    out : tuple of (str, dict)
        Outcomes in order, fields as text.
    stats : dict or None
        Changes of counters; None where they were not taken (a hang).
    tree : tuple of TablePage or None
        Pages under the current root, or None where no dump was made.
    """

    op: tuple[str, ...]
    out: tuple[tuple[str, dict[str, str]], ...]
    stats: dict[str, int] | None
    tree: tuple[TablePage, ...] | None


@dataclass(frozen=True)
class Result:
    """What came of one script."""

    name: str
    totals: dict[str, int]
    ops: tuple[OpResult, ...]


def parse_result(raw: bytes, where: str) -> Result:
    """Read a result.

    Raises
    ------
    FormatError
        A field, outcome or counter is unknown or broken, or the run is not complete.
    """
    top = fields(load(raw, where), where, {"name", "complete", "backs", "stats_setup", "totals", "ops"})
    if not flag(top["complete"], f"{where}: complete"):
        raise FormatError(f"{where}: complete is false: the run was cut short")
    ops = [_op(row, i, f"{where}: ops[{i}]") for i, row in enumerate(rows(top["ops"], f"{where}: ops"))]
    totals = top["totals"]
    if isinstance(totals, dict):
        # Not a counter: some operation went round for ever, so the rest says less.
        totals = {name: value for name, value in totals.items() if name != "livelock"}
    return Result(text(top["name"], f"{where}: name"), _stats(totals, f"{where}: totals"), tuple(ops))


def _op(row: Any, index: int, where: str) -> OpResult:
    row = fields(row, where, {"i", "op", "out"}, {"stats", "shadow"})
    if row["i"] != index:
        raise FormatError(f"{where}: i {row['i']!r}: expected {index}")
    return OpResult(
        tuple(text(part, f"{where}: op") for part in rows(row["op"], f"{where}: op")),
        tuple(_outcome(part, f"{where}: out") for part in rows(row["out"], f"{where}: out")),
        _stats(row["stats"], f"{where}: stats") if "stats" in row else None,
        _tree(row["shadow"], f"{where}: shadow") if "shadow" in row else None,
    )


def _outcome(row: Any, where: str) -> tuple[str, dict[str, str]]:
    row = rows(row, where)
    if len(row) != 2 or row[0] not in OUTCOMES:
        raise FormatError(f"{where}: {row!r}: expected one of {', '.join(OUTCOMES)} and its fields")
    required, optional = OUTCOMES[row[0]]
    values = fields(row[1], f"{where}: {row[0]}", set(required), set(optional))
    return row[0], {name: text(value, f"{where}: {row[0]}.{name}") for name, value in values.items()}


def _stats(row: Any, where: str) -> dict[str, int]:
    if not isinstance(row, dict):
        raise FormatError(f"{where}: {row!r}: expected counters")
    for name in row:
        known = name[3:] in VM_COUNTERS if name.startswith("vm.") else name in VCPU_COUNTERS
        if not known:
            raise FormatError(f"{where}: counter {name!r} is unknown")
    return {name: integer(value, f"{where}: {name}") for name, value in row.items()}


def _tree(row: Any, where: str) -> tuple[TablePage, ...]:
    row = fields(row, where, {"level", "sps"})
    integer(row["level"], f"{where}: level")
    return tuple(_page(page, f"{where}: sps[{i}]") for i, page in enumerate(rows(row["sps"], f"{where}: sps")))


def _page(row: Any, where: str) -> TablePage:
    special = isinstance(row, dict) and "nosp" in row
    later = set(_LATER) if isinstance(row, dict) and set(_LATER) & set(row) else set()
    row = fields(row, where, {"id", "level", "e"} | ({"nosp"} if special else set(_PAGE) | later))
    level = text(row["level"], f"{where}: level")
    if not level.startswith("l"):
        raise FormatError(f"{where}: level {level!r}: expected l1 to l5")
    values = None
    if not special:
        values = MappingProxyType({name: _hexadecimal(row, name, where) for name in row if name in (*_PAGE, *_LATER)})
    entries = tuple(_entry(entry, f"{where}: e[{i}]") for i, entry in enumerate(rows(row["e"], f"{where}: e")))
    return TablePage(text(row["id"], f"{where}: id"), number(level[1:], where), values, entries)


def _hexadecimal(row: dict[str, Any], name: str, where: str) -> int:
    return number(text(row[name], f"{where}: {name}"), f"{where}: {name}", base=16)


def _entry(row: Any, where: str) -> TableEntry:
    row = rows(row, where)
    if len(row) not in (4, 5) or row[3] not in KINDS:
        raise FormatError(f"{where}: {row!r}: expected index, address, spte, one of {', '.join(KINDS)}, reference")
    ref = text(row[4], where) if len(row) == 5 else ""
    if bool(ref) != (row[3] in ("table", "leaf")):
        raise FormatError(f"{where}: {row!r}: tables and leaves name what they refer to, others do not")
    return TableEntry(
        integer(row[0], where), number(row[1], where, base=16), number(row[2], where, base=16), row[3], ref
    )
