"""The guest of a golden run: it executes the instructions that stand in its memory, one operation at a time."""

from __future__ import annotations

from kvmmmu.conform.golden import stubs
from kvmmmu.conform.golden.host import Host
from kvmmmu.conform.golden.instructions import MAX_LENGTH, Instruction, UnknownInstruction, decode
from kvmmmu.conform.golden.processor import Done, Processor
from kvmmmu.golden import Script
from kvmmmu.outcome import Outcome

__all__ = ["Guest", "Outcomes"]

Outcomes = list[tuple[str, dict[str, str]]]

_PAGE = 4096
_UD, _DF, _GP, _PF = 6, 8, 13, 14
_HAS_ERROR = frozenset({_DF, 10, 11, 12, _GP, _PF, 17})
_KVM_EXIT_HLT, _KVM_EXIT_SHUTDOWN = 5, 8
_EMULATION = 1
# An operation is a few instructions; one that runs on through zeros is still finite.
_MAX_STEPS = 20000


class _End(Exception):
    """The operation is over."""


class Guest:
    """The one vCPU of a script.

    Parameters
    ----------
    processor : Processor
    host : Host
    script : Script
    """

    def __init__(self, processor: Processor, host: Host, script: Script) -> None:
        self.processor = processor
        self.host = host
        self.script = script
        self.long = script.long
        self.mask = (1 << 64) - 1 if script.long else (1 << 32) - 1
        self.cpl = 0
        self.ac = False
        self.shut_down = False
        self.io_exits = 0
        self.registers: dict[str, int] = {}
        self.rip = 0
        # Translations the processor still holds: emptied by every exit.  (page -> guest frame)
        self.code: dict[int, int] = {}
        self.data: dict[int, int] = {}
        self.out: Outcomes = []

    # -- one operation

    def run(self, stub: str, *, cpl: int = 0, **registers: int) -> Outcomes:
        """Run a stub to its end."""
        if self.shut_down:
            return [("skipped", {})]
        if cpl != self.cpl:
            self.processor.set_sregs()
            self.cpl = cpl
        self.processor.mode(cpl, self.ac)
        self.registers = dict.fromkeys(("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"), 0)
        self.registers["rsp"] = self.script.sysgva + stubs.STACK
        self.registers.update({name: value & self.mask for name, value in registers.items()})
        base = self.script.usrgva if cpl == 3 else self.script.sysgva
        self.start = self.rip = base + stubs.stub_at(stub)
        self.extra = stub in ("rwr", "rwir")
        self.out = []
        self.flush()
        try:
            for _ in range(_MAX_STEPS):
                self.step()
            self.out.append(("hang", {}))
        except _End:
            pass
        except UnknownInstruction as error:
            self.out.append(("unsupported", {"what": str(error)}))
        return self.out

    def flush(self) -> None:
        """Nothing is cached by the processor any more."""
        self.code.clear()
        self.data.clear()

    def end(self, what: str, **fields: str) -> None:
        """Finish the operation."""
        self.out.append((what, fields))
        raise _End

    # -- instructions

    def step(self) -> None:
        """Fetch, decode and execute one instruction."""
        if self.long or self.rip <= self.mask:
            code = self.fetch(self.rip, min(MAX_LENGTH, _PAGE - self.rip % _PAGE))
        try:
            instruction = decode(code, self.long)
        except IndexError:
            code += self.fetch((self.rip | (_PAGE - 1)) + 1 & self.mask, MAX_LENGTH - len(code))
            instruction = decode(code, self.long)
        getattr(self, "_" + instruction.name)(instruction)

    def fetch(self, rip: int, size: int) -> bytes:
        """Code bytes within a page."""
        page = rip // _PAGE
        if page not in self.code:
            done = self.processor.fetch(rip)
            if done.exits:
                self.flush()
            self.check(done)
            assert done.gpa is not None
            self.code[page] = done.gpa // _PAGE
        return self.host.read(self.code[page] * _PAGE + rip % _PAGE, size)

    def check(self, done: Done) -> None:
        """Report MMIO, and turn anything but success into its end."""
        for write, gpa, size, data in done.mmio:
            fields = {"gpa": f"{gpa:x}", "len": f"{size:x}"}
            if write:
                fields["data"] = f"{data:x}"
            self.out.append(("mmio-w" if write else "mmio-r", fields))
        if done.exits:
            self.flush()
        if done.outcome == Outcome.OK:
            return
        if done.outcome == Outcome.PF:
            self.raise_fault(_PF, self.visible(done), done.gva)
        elif done.outcome == Outcome.GP:
            self.raise_fault(_GP, 0)
        elif done.outcome == Outcome.INTERNAL_ERROR:
            # KVM gives up for the kernel; a user program gets #UD.
            if self.cpl == 3 and done.suberror == _EMULATION:
                self.raise_fault(_UD)
            self.end("internal", suberror=str(done.suberror))
        elif done.outcome == Outcome.SHUTDOWN:
            self.shutdown()
        elif done.outcome == Outcome.HANG:
            self.end("hang")
        self.end("error", what=f"{done.outcome.name} {done.error_code}")

    def visible(self, done: Done) -> int:
        """A page fault's error code as the guest sees it."""
        if done.by_processor and done.error_code & 8 and "rsvd_without_present" in self.processor.artefacts:
            return done.error_code & ~1
        return done.error_code

    def address(self, instruction: Instruction) -> int:
        """The effective address of the memory operand."""
        at = instruction.displacement
        if instruction.relative:
            at += self.rip + instruction.length
        if instruction.base is not None:
            at += self.registers[instruction.base]
        if instruction.index is not None:
            at += self.registers[instruction.index] * instruction.scale
        return at & self.mask

    def operand(self, instruction: Instruction) -> int:
        """The register operand, as wide as the instruction."""
        value = self.registers.get(instruction.register, 0) >> (8 if instruction.high else 0)
        return int(value & (1 << 8 * instruction.size) - 1)

    def next(self, instruction: Instruction) -> None:
        """Go on behind the instruction."""
        self.rip = self.rip + instruction.length & self.mask

    def access(self, kind: str, instruction: Instruction, **how: int) -> Done:
        """Make the instruction's access."""
        gva = self.address(instruction)
        done = self.processor.memory(kind, gva, instruction.size, self.rip, instruction.length, **how)
        self.check(done)
        return done

    def _load(self, instruction: Instruction) -> None:
        gva = self.address(instruction)
        page = gva // _PAGE
        if page in self.data and gva % _PAGE + instruction.size <= _PAGE:
            value = int.from_bytes(self.host.read(self.data[page] * _PAGE + gva % _PAGE, instruction.size), "little")
        else:
            done = self.access("r", instruction)
            value = done.value
            if not done.mmio and done.gpa is not None:
                self.data[page] = done.gpa // _PAGE
        self.registers[instruction.register] = value
        self.next(instruction)

    def _store(self, instruction: Instruction) -> None:
        self.access("w", instruction, value=self.operand(instruction))
        self.next(instruction)

    def _add(self, instruction: Instruction) -> None:
        self.access("add", instruction, value=self.operand(instruction))
        self.next(instruction)

    def _cas(self, instruction: Instruction) -> None:
        old = self.registers["rax"] & (1 << 8 * instruction.size) - 1
        done = self.access("cas", instruction, value=self.operand(instruction), old=old)
        if done.value != old:
            self.registers["rax"] = done.value
        self.next(instruction)

    def _movs(self, instruction: Instruction) -> None:
        src, dst = self.registers["rsi"], self.registers["rdi"]
        done = self.processor.memory("movs", dst, instruction.size, self.rip, instruction.length, src=src)
        self.check(done)
        self.next(instruction)

    def _move(self, instruction: Instruction) -> None:
        assert instruction.base is not None
        self.registers[instruction.base] = self.operand(instruction)
        self.next(instruction)

    def _jump(self, instruction: Instruction) -> None:
        self.rip = self.registers[instruction.register]

    def _invlpg(self, instruction: Instruction) -> None:
        if self.cpl:
            self.raise_fault(_GP, 0)
        gva = self.address(instruction)
        if self.processor.invlpg(gva, self.rip):
            self.flush()
        self.code.pop(gva // _PAGE, None)
        self.data.pop(gva // _PAGE, None)
        self.next(instruction)

    def _cr(self, instruction: Instruction) -> None:
        self.register(f"cr{instruction.number}", self.registers[instruction.register], instruction)

    def _wrmsr(self, instruction: Instruction) -> None:
        value = self.registers["rax"] & 0xFFFFFFFF | (self.registers["rdx"] & 0xFFFFFFFF) << 32
        self.register("efer", value, instruction)

    def register(self, name: str, value: int, instruction: Instruction) -> None:
        """Load a control register or EFER."""
        if self.cpl:
            self.raise_fault(_GP, 0)
        done = self.processor.load_register(name, value, self.rip)
        self.flush()
        self.check(done)
        self.next(instruction)

    def _hlt(self, _: Instruction) -> None:
        if self.cpl:
            self.raise_fault(_GP, 0)
        self.end("exit", exit=str(_KVM_EXIT_HLT))

    def _out(self, instruction: Instruction) -> None:
        self.io_exits += 1
        if instruction.number == stubs.DONE_PORT:
            fields = {"rax": f"{self.registers['rax']:x}"}
            if self.extra:
                fields["rbx"] = f"{self.registers['rbx']:x}"
            self.end("ok", **fields)
        if stubs.FAULT_PORT <= instruction.number:
            self.end("exc", **self.fault)
        raise UnknownInstruction(f"out to port {instruction.number:#x}")

    # -- exceptions

    def raise_fault(self, vector: int, error: int | None = None, gva: int | None = None) -> None:
        """Deliver an exception and run its handler to the end."""
        offset = self.rip - self.start
        where = f"stub+{offset:x}" if 0 <= offset < stubs.STUB_SIZE else f"{self.rip:x}"
        self.fault = {"exc": str(vector), "ip": where}
        if error is not None:
            self.fault["err"] = f"{error:x}"
        if gva is not None:
            self.fault["cr2"] = f"{gva:x}"
        self.deliver(vector)
        self.rip = self.script.sysgva + stubs.HANDLERS + 4 * vector
        for _ in range(_MAX_STEPS):
            self.step()
        self.end("hang")

    def deliver(self, vector: int) -> None:
        """The processor's own accesses: IDT, GDT, TSS, and the frame on the stack (SDM vol. 3A section 6.14)."""
        second = vector == _DF
        while True:
            done = self.delivery(vector)
            if done is None:
                return
            if done.outcome not in (Outcome.PF, Outcome.GP) or second:
                self.check(done) if done.outcome not in (Outcome.PF, Outcome.GP) else self.shutdown()
            vector, second = _DF, True

    def delivery(self, vector: int) -> Done | None:
        """Try once; None when the handler may start."""
        sysgva = self.script.sysgva
        gate = 16 if self.long else 8
        plan = [(sysgva + stubs.IDT + gate * vector, 8, False), (sysgva + stubs.GDT + stubs.CODE_SELECTOR, 8, False)]
        top = self.registers["rsp"] if self.cpl == 0 else sysgva + stubs.STACK
        if self.cpl:
            plan.append((sysgva + stubs.TSS + 4, 8, False))
        word = 8 if self.long else 4
        words = 3 + 2 * (self.long or self.cpl > 0) + (vector in _HAS_ERROR)
        plan.append((top - word * words, word, True))
        for gva, size, write in plan:
            done = self.processor.system(gva & self.mask, size, self.rip, write=write)
            if done.exits:
                self.flush()
            if done.outcome != Outcome.OK:
                return done
        self.cpl = 0
        self.processor.mode(0, False)
        return None

    def shutdown(self) -> None:
        """A triple fault."""
        self.shut_down = True
        self.end("exit", exit=str(_KVM_EXIT_SHUTDOWN))
