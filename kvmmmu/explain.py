"""A recorded walk in words.  Nothing is walked here: everything said stands in the record."""

from __future__ import annotations

from collections.abc import Callable

from kvmmmu.walks import Fault, PagingFormat, Rights, WalkEntry, WalkResult

__all__ = ["explain_walk"]

_FORMATS = {
    PagingFormat.NONE: "paging off",
    PagingFormat.PAGING_32: "32-bit paging",
    PagingFormat.PAE: "PAE paging",
    PagingFormat.LONG: "long-mode paging",
    PagingFormat.EPT: "EPT",
}
_VERBS = {"r": "read", "w": "write", "x": "fetch"}
_LEVELS = {1: "PTE", 2: "PDE", 3: "PDPTE", 4: "PML4E", 5: "PML5E"}
_SIZES = {12: "4 KiB", 21: "2 MiB", 22: "4 MiB", 30: "1 GiB"}
_FAULTS = {
    Fault.PF: "#PF",
    Fault.GP: "#GP",
    Fault.PDPTE: "#GP at CR3 load",
    Fault.EPT_VIOLATION: "EPT violation",
    Fault.EPT_MISCONFIG: "EPT misconfiguration",
    Fault.NPF: "#NPF",
}
_PFERR = ("P", "W", "U", "RSVD", "F", "PK")
_QUALIFICATION = ("read", "write", "fetch", "R", "W", "X", "", "linear-address", "translated")


def _rights_text(rights: Rights, paging: PagingFormat) -> str:
    if paging is PagingFormat.EPT:
        letters = ((Rights.U, "r"), (Rights.W, "w"), (Rights.X, "x"))
        return "".join(letter if rights & bit else "-" for bit, letter in letters)
    text = "r" + ("w" if rights & Rights.W else "-") + ("x" if rights & Rights.X else "-")
    return text + (" user" if rights & Rights.U else " supervisor")


def _flags(entry: WalkEntry, paging: PagingFormat) -> str:
    words = [] if entry.level == 3 and paging is PagingFormat.PAE else [_rights_text(entry.rights, paging)]
    accessed, dirty = (8, 9) if paging is PagingFormat.EPT else (5, 6)
    names = [(accessed, "accessed"), (dirty, "dirty")]
    words += [name for bit, name in names if entry.value >> bit & 1]
    return ", ".join(words)


def _present(entry: WalkEntry, paging: PagingFormat) -> bool:
    return bool(entry.value & (7 if paging is PagingFormat.EPT else 1))


def _entry_text(entry: WalkEntry, result: WalkResult, last: bool) -> str:
    name = _LEVELS[entry.level] if result.format is not PagingFormat.EPT else f"EPT level {entry.level}"
    line = f"  {name} at {entry.gpa:#x} = {entry.value:#x}: "
    if not _present(entry, result.format):
        return line + "not present"
    if last and result.reserved:
        return line + f"reserved bits {result.reserved:#x} are set"
    kind = f"{_SIZES[result.page_shift]} page" if last and result.page_shift else "leaf" if last else "table"
    if last and result.pending_gpa is not None:
        kind = "table"  # the walk ended on its way to the next entry
    return line + ", ".join(filter(None, (kind, _flags(entry, result.format))))


def _code_text(result: WalkResult) -> str:
    code = result.error_code
    if result.fault is Fault.GP:
        return "(0)"
    if result.fault is Fault.EPT_MISCONFIG:
        return ""
    if result.fault is Fault.EPT_VIOLATION:
        bits = [name for i, name in enumerate(_QUALIFICATION) if code >> i & 1 and name]
    else:
        bits = [name for i, name in enumerate(_PFERR) if code >> i & 1]
        bits += ["final address"] if code >> 32 & 1 else []
        bits += ["guest table"] if code >> 33 & 1 else []
    return f"({code:#x}: {' '.join(bits) or 'none'})"


def _reason(result: WalkResult) -> str:
    if result.fault is Fault.GP:
        return "the address is not canonical"
    if not result.entries:
        return "no table translates this address"
    last = result.entries[-1]
    if not _present(last, result.format):
        return f"the level {last.level} entry is not present"
    if result.reserved:
        return f"the level {last.level} entry has reserved bits set"
    verb = _VERBS[result.access]
    if result.fault is Fault.PF and result.error_code & 0x20:
        return f"protection key {last.value >> 59 & 15} refuses the {verb}"
    needed = {"r": Rights(0), "w": Rights.W, "x": Rights.X}[result.access]
    if (
        result.format is not PagingFormat.EPT
        and not result.user
        and result.rights & (needed | Rights.U) == (needed | Rights.U)
    ):
        feature = "SMEP" if result.access == "x" else "SMAP"
        return f"{feature} refuses a supervisor {verb} of a user page"
    return f"the entries together permit {_rights_text(result.rights, result.format)}; a {verb} is refused"


def _lines(result: WalkResult, title: str) -> list[str]:
    who = "" if result.format is PagingFormat.EPT else "implicit " if result.implicit else ""
    if result.format is not PagingFormat.EPT:
        who += "user " if result.user else "supervisor "
    lines = [f"{title} {result.gva:#x}, {who}{_VERBS[result.access]}, {_FORMATS[result.format]}"]
    for i, entry in enumerate(result.entries):
        lines.append(_entry_text(entry, result, i == len(result.entries) - 1))
    return lines


def explain_walk(
    result: WalkResult,
    *,
    source: str = "gva",
    target: str = "gpa",
    known: Callable[[int, int], str | None] | None = None,
    ve: bool = False,
) -> str:
    """Say in words what a walk saw, entry by entry, and why it ended.

    Parameters
    ----------
    result : WalkResult
        As ``Paging.walk_result`` returns it.
    source, target : str
        Names of the address spaces that the tables lead from and to.
    known : callable, optional
        Given the value and the level of the entry that ended the walk in a fault, says what its owner
        means by it, or None.
    ve : bool
        The processor turns convertible EPT violations into #VE.

    Returns
    -------
    str
        One line for the question, one per entry, one for the answer; then the same for the
        last walk of the second dimension, where there is one.
    """
    lines = _lines(result, source)
    second = result.second
    if result.pending_gpa is not None:
        lines.append(f"  next entry at {result.pending_gpa:#x} cannot be fetched")
    nested_fault = second is not None and not second.ok
    if result.ok:
        size = "" if result.format is PagingFormat.NONE else f", {_SIZES[result.page_shift]} page"
        lines.append(f"  = {target} {result.gpa:#x}{size}, {_rights_text(result.rights, result.format)}")
    elif not nested_fault:
        meant = known(result.entries[-1].value, result.entries[-1].level) if known and result.entries else None
        lines += [f"  that is {meant}"] if meant else []
        told = ", #VE in the guest" if ve and result.convertible else ""
        lines.append(f"  {_FAULTS[result.fault]}{_code_text(result)}{told}: {_reason(result)}")
    if second is not None and (result.ok or nested_fault):
        lines += _lines(second, "gpa")
        if second.ok:
            lines.append(f"  = host address {second.gpa:#x}, {_SIZES[second.page_shift]} page")
        else:
            lines.append(f"  {_FAULTS[second.fault]}{_code_text(second)}: {_reason(second)}")
    return "\n".join(lines)
