"""One operation of a script: a stub of the guest, or something its host does."""

from __future__ import annotations

from kvmmmu.conform.golden.guest import Guest, Outcomes
from kvmmmu.conform.golden.host import Host
from kvmmmu.golden import Op, Script

__all__ = ["run"]

_EFER_MSR = 0xC0000080


def run(op: Op, script: Script, guest: Guest, host: Host) -> Outcomes:
    """Run it; what came of it, as recordings put it."""
    name = op.name
    if name in _GUEST:
        return _GUEST[name](op, script, guest)
    if name == "ac":
        guest.ac = bool(op["value"])
        return []
    if name == "poke":
        host.write(op["gpa"], op["value"].to_bytes(8, "little")[: op["size"]])
        return []
    if name in ("dirty", "dirtyclear"):
        return [("rc", host.dirty(op["id"], name == "dirtyclear"))]
    if name == "slot":
        rc = host.set_slot(op["id"], op["gpa"], op["size"], op["back"], op["boff"], op["flags"])
    elif name == "delslot":
        rc = host.delete_slot(op["id"])
    elif name == "dontneed":
        rc = host.dontneed(op["back"], op["off"], op["len"])
    else:
        rc = host.limit_pages(op["n"])
    return [("rc", {"rc": str(rc)})]


def _read(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run(f"r{op['size']}", cpl=op["cpl"], rdi=op["gva"])


def _write(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run(f"w{op['size']}", cpl=op["cpl"], rdi=op["gva"], rsi=op["value"])


def _jump(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run("exec", cpl=op["cpl"], rdi=op["gva"])


def _add(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run("add", cpl=op["cpl"], rdi=op["gva"], rsi=op["value"])


def _cas(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run("cas", cpl=op["cpl"], rdi=op["gva"], rsi=op["new"], rax=op["old"])


def _movs(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run("movs", cpl=op["cpl"], rdi=op["dst"], rsi=op["src"])


def _read_write_read(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run(op.name, rdx=op["read"], rdi=op["gva"], rsi=op["value"])


def _register(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run(op.name, rdi=op["value"] if op.name != "invlpg" else op["gva"])


def _efer(op: Op, _: Script, guest: Guest) -> Outcomes:
    return guest.run("wrmsr", rax=op["value"], rdx=op["value"] >> 32, rcx=_EFER_MSR)


_GUEST = {
    "r": _read,
    "w": _write,
    "x": _jump,
    "add": _add,
    "cas": _cas,
    "movs": _movs,
    "rwr": _read_write_read,
    "rwir": _read_write_read,
    "invlpg": _register,
    "cr0": _register,
    "cr3": _register,
    "cr4": _register,
    "efer": _efer,
}
