"""Who waits in the engine does not keep the interpreter: whoever is waited for may need it to go on.

A vCPU that is in the guest until its call returns, and needs the interpreter to return, is waited for by a flush; if
the thread with the interpreter then waits for a lock that the flushing thread holds, nobody goes on.
"""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "kvmmmu"
#: What is waited for; every engine function from which one of these is called may wait.
WAITS = {"slots_lock", "vm_drain", "readers_drain", "mmu_write_lock", "mmu_read_lock", "vm_read_lock"}
#: (function of the door, what it calls): nobody else is in the engine, by a check or because nobody holds the VM.
ALONE = {("__dealloc__", "vm_bury")}

CALL = re.compile(r"(?<![\w.])(\w+)\(")
FUNCTION = re.compile(r"\s*(?:def|cdef|cpdef)\s[^=]*?(\w+)\(")


def calls_of_the_engine() -> dict[str, set[str]]:
    """What each engine function calls."""
    calls: dict[str, set[str]] = {}
    for path in sorted((PACKAGE / "engine").glob("*.pxd")):
        body: set[str] = set()
        for line in path.read_text().splitlines():
            if line.startswith("cdef") and (found := FUNCTION.match(line)):
                body = calls.setdefault(found[1], set())
            elif line.startswith(" "):
                body |= set(CALL.findall(line.partition("#")[0]))
    return calls


def may_wait(calls: dict[str, set[str]]) -> set[str]:
    """The functions from which a wait is reached."""
    waiting = set(WAITS)
    while more := {name for name, called in calls.items() if name not in waiting and called & waiting}:
        waiting |= more
    return waiting


def kept(door: str, waiting: set[str]) -> list[tuple[int, str, str]]:
    """(line, function, what it calls) where something that may wait is called with the interpreter held."""
    found, free, function, at = [], list[int](), "", 0
    for number, line in enumerate(door.splitlines(), 1):
        indent = len(line) - len(line.lstrip())
        if not line.strip() or line.lstrip().startswith(("from ", "import ")):
            continue
        while free and free[-1] >= indent:
            free.pop()
        header = FUNCTION.match(line)
        if header:
            function, at = header[1], indent
        if line.rstrip().endswith(" nogil:"):
            # Of a block, or of a function whose head may have begun lines before.
            free.append(indent if line.lstrip().startswith("with") else at)
        elif line.lstrip().startswith("if self.alone:"):
            free.append(indent)
        elif not free and not header:
            found += [(number, function, name) for name in CALL.findall(line.partition("#")[0]) if name in waiting]
    return found


def test_no_call_that_may_wait_is_made_with_the_interpreter_held() -> None:
    waiting = may_wait(calls_of_the_engine())
    assert {"vcpu_access", "vm_set_region", "vcpu_set_smm", "nx_recover", "roots_sync"} <= waiting
    assert "walk_memory" not in waiting
    found = kept((PACKAGE / "_core.pyx").read_text(), waiting)
    assert {(function, name) for _, function, name in found} == ALONE, found


def test_such_a_call_is_found() -> None:
    door = """
def smm(self, on):
    self.claim()
    with nogil:
        vcpu_access(self.vcpu)
    vcpu_set_smm(self.vcpu, on)

cdef void embedded(vcpu,
                   on) noexcept nogil:
    vcpu_set_smm(vcpu, on)
"""
    assert kept(door, {"vcpu_access", "vcpu_set_smm"}) == [(6, "smm", "vcpu_set_smm")]
