"""Other people's walkers over the same tables: each gives a function from gva to gpa, or says why it cannot."""

import ctypes
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Translate = Callable[[int], int | None]
MAPPED = 128 << 20  # how much memory the peers are told of


class AbsentError(Exception):
    """A peer that is not installed, or does not start here."""


def _found(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise AbsentError("not installed")


class Tables:
    """Four-level tables at ``root`` in ``memory``, which begins at address 0."""

    def __init__(self, memory: Any, root: int, compile_c: Callable[[str], ctypes.CDLL]) -> None:
        self.memory = memory
        self.root = root
        self.compile_c = compile_c
        self.kept: list[object] = []  # what must live as long as a peer works

    # -- single calls

    def python(self) -> Translate:
        """Written by hand for a supervisor read, with every check of ``ref_walk.c``."""
        words = self.memory.view("u8").tolist()
        tables = {at: words[at >> 3 : (at >> 3) + 512] for at in range(0, len(self.memory), 4096)}
        root, address, high = self.root, 0x000FFFFFFFFFF000, 0x000FC00000000000
        below = {level: (1 << 12 + 9 * (level - 1)) - (1 << 13) if level in (2, 3) else 0 for level in (1, 2, 3, 4)}
        reserved = {(level, 0): high for level in below} | {(level, 1): high | below[level] for level in below}
        reserved[4, 1] |= 0x80
        smap = False

        def translate(gva: int) -> int | None:
            if gva >> 47 and gva >> 47 != 0x1FFFF:
                return None
            table, writable, user, executable = root, True, True, True
            for level in (4, 3, 2, 1):
                page = tables.get(table)
                entry = 0 if page is None else page[gva >> 12 + 9 * (level - 1) & 511]
                if not entry & 1:
                    return None
                if entry & reserved[level, entry >> 7 & 1]:
                    return None
                writable = writable and entry & 2 != 0
                user = user and entry & 4 != 0
                executable = executable and not entry >> 63
                if level == 1 or entry & 0x80:
                    break
                table = entry & address
            if user and smap:
                return None
            offset = (1 << 12 + 9 * (level - 1)) - 1
            return (entry & address & ~offset) | (gva & offset)

        return translate

    def bochscpu(self) -> Translate:
        """Bochs' CPU core.  The wheel asks for symbols of glibc 2.38; they are lent to it where they are missing."""
        _found("bochscpu")
        path = self.compile_c("glibc_2_38.c")._name
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        try:
            from bochscpu import memory as bochs
        except ImportError as error:
            raise AbsentError(f"does not load: {error}") from None
        for at in range(0, len(self.memory), 4096):
            bochs.page_insert(at, self.memory.ctypes.data + at)
        root, call = self.root, bochs.virt_translate
        return lambda gva: call(root, gva)

    def bochscpu_call(self) -> tuple[Callable[..., int], tuple[int, ...]]:
        """The bare function and what stands before the address."""
        self.bochscpu()
        from bochscpu import memory as bochs

        return bochs.virt_translate, (self.root,)

    def memprocfs(self) -> Translate:
        """MemProcFS over a raw dump."""
        _found("memprocfs")
        _found("leechcorepyc")
        spec = importlib.util.find_spec("leechcorepyc")
        assert spec is not None and spec.origin is not None
        try:
            # Its own libraries do not say where they stand.
            ctypes.CDLL(str(Path(spec.origin).with_name("leechcore.so")), ctypes.RTLD_GLOBAL)
            import memprocfs
        except (ImportError, OSError) as error:
            raise AbsentError(f"does not load: {error}") from None
        dump = tempfile.NamedTemporaryFile(suffix=".raw")  # noqa: SIM115
        dump.write(self.memory.tobytes())
        dump.truncate(MAPPED)
        dump.flush()
        try:
            vmm = memprocfs.Vmm(["-device", dump.name, "-cr3", hex(self.root), "-norefresh"])
            process = vmm.process_list()[0]
        except Exception as error:
            raise AbsentError(f"does not start: {error}") from None
        self.kept += [dump, vmm, process]
        return process.memory.virt2phys  # type: ignore[no-any-return]

    def volatility3(self) -> Translate:
        """Volatility 3's Intel layer over the bytes."""
        _found("volatility3")
        from volatility3.framework import contexts
        from volatility3.framework.layers import intel, physical

        context = contexts.Context()
        context.add_layer(physical.BufferDataLayer(context, "config.mem", "mem", self.memory.tobytes()))
        context.config["config.page_map_offset"] = self.root
        context.config["config.memory_layer"] = "mem"
        layer = intel.Intel32e(context, "config", "intel")
        return lambda gva: layer._translate(gva)[0]

    def unicorn(self) -> Translate:
        """``uc_vmem_translate``, which only the C library has."""
        library, handle, _ = self._unicorn_machine()
        call, out = library.uc_vmem_translate, ctypes.c_uint64()
        call.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint64))

        def translate(gva: int) -> int | None:
            return None if call(handle, gva, 1, ctypes.byref(out)) else out.value

        return translate

    # -- batches

    def _unicorn_machine(self) -> tuple[Any, Any, Any]:
        _found("unicorn")
        import unicorn
        from unicorn import unicorn_const, x86_const

        machine = unicorn.Uc(unicorn_const.UC_ARCH_X86, unicorn_const.UC_MODE_64)
        machine.ctl_set_tlb_mode(unicorn_const.UC_TLB_CPU)
        machine.mem_map(0, MAPPED)
        machine.mem_write(0, self.memory.tobytes())
        machine.reg_write(x86_const.UC_X86_REG_CR4, 0x20)
        machine.msr_write(0xC0000080, 0xD00)
        machine.reg_write(x86_const.UC_X86_REG_CR3, self.root)
        machine.reg_write(x86_const.UC_X86_REG_CR0, 0x80010001)
        self.kept.append(machine)
        # The library that the Python class calls; its own module has moved between releases.
        library = next(
            (module.uclib for name, module in sys.modules.items() if "unicorn" in name and hasattr(module, "uclib")),
            None,
        )
        if library is None:
            raise AbsentError("its C library is not where it was")
        return library, machine._uch, machine

    def unicorn_loads(self, gvas: Any, code: int, data: int, where: tuple[int, int]) -> Callable[[], None]:
        """Guest code that loads from each address; ``where``: the frames of the pages ``code`` and ``data``."""
        _found("unicorn")
        from unicorn import x86_const

        _, _, machine = self._unicorn_machine()
        # again: mov rax,[rsi]; mov rbx,[rax]; add rsi,8; dec rcx; jnz again
        loop = bytes.fromhex("488b06 488b18 4883c608 48ffc9 75f1")
        machine.mem_write(where[0], loop)
        machine.mem_write(where[1], gvas.tobytes())

        def run() -> None:
            machine.reg_write(x86_const.UC_X86_REG_RSI, data)
            machine.reg_write(x86_const.UC_X86_REG_RCX, len(gvas))
            machine.emu_start(code, code + len(loop))

        run()
        if machine.reg_read(x86_const.UC_X86_REG_RCX) != 0:
            raise AbsentError("the guest code did not come to its end")
        return run
