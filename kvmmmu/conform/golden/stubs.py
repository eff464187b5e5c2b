"""The code and tables that a golden guest runs on: one page for the supervisor, one for the user.

Every operation is a few instructions at its own place in a page (a *stub*), ended by an ``out``; a fault
ends in a handler whose ``out`` names the vector.  The offsets are those of the golden runs' test program.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

__all__ = [
    "CODE_SELECTOR",
    "DONE_PORT",
    "FAULT_PORT",
    "GDT",
    "HANDLERS",
    "IDT",
    "STACK",
    "STUBS",
    "STUB_SIZE",
    "TSS",
    "stub_at",
    "sys_page",
    "usr_page",
]

STUB_SIZE: Final = 32
HANDLERS: Final = 0x400
IDT: Final = 0x600
GDT: Final = 0x800
TSS: Final = 0x880
STACK: Final = 0xFF0
CODE_SELECTOR: Final = 8
DONE_PORT: Final = 0x10
FAULT_PORT: Final = 0x80
_PAGE: Final = 4096
_HLT: Final = 0xF4
_VECTORS: Final = 32

# Machine code before the final ``out``: (64-bit, 32-bit).
_CODE: Final = (
    ("r1", "0fb607", "0fb607"),
    ("r2", "0fb707", "0fb707"),
    ("r4", "8b07", "8b07"),
    ("r8", "488b07", "8b07"),
    ("w1", "408837", "89f08807"),
    ("w2", "668937", "668937"),
    ("w4", "8937", "8937"),
    ("w8", "488937", "8937"),
    ("add", "480137", "0137"),
    ("cas", "f0480fb137", "f00fb137"),
    ("exec", "ffe7", "ffe7"),
    ("movs", "48a5", "a5"),
    ("invlpg", "0f013f", "0f013f"),
    ("cr3", "0f22df", "0f22df"),
    ("cr0", "0f22c7", "0f22c7"),
    ("cr4", "0f22e7", "0f22e7"),
    ("wrmsr", "0f30", "0f30"),
    ("rwr", "488b1a488937488b02", "8b1a89378b02"),
    ("rwir", "488b1a4889370f013a488b02", "8b1a89370f013a8b02"),
)
#: Stubs in the order of their places.
STUBS: Final = MappingProxyType({name: index for index, (name, _, _) in enumerate(_CODE)})


def stub_at(name: str) -> int:
    """Offset of a stub in its page."""
    return STUBS[name] * STUB_SIZE


def usr_page(long: bool) -> bytes:
    """The user's page: the stubs, and ``hlt`` everywhere else."""
    page = bytearray([_HLT]) * _PAGE
    for index, (_, code64, code32) in enumerate(_CODE):
        code = bytes.fromhex(code64 if long else code32) + bytes([0xE6, DONE_PORT])
        page[index * STUB_SIZE : index * STUB_SIZE + len(code)] = code
    return bytes(page)


def sys_page(long: bool, sysgva: int) -> bytes:
    """The supervisor's page: stubs, handlers, IDT, GDT and TSS."""
    page = bytearray(usr_page(long))
    for vector in range(_VECTORS):
        handler = HANDLERS + 4 * vector
        page[handler : handler + 2] = bytes([0xE6, FAULT_PORT + vector])
        gate = _gate(long, sysgva + handler)
        page[IDT + len(gate) * vector : IDT + len(gate) * (vector + 1)] = gate
    # Flat segments: code (64-bit: L), data, user code, user data.
    code = 0x00AF9B000000FFFF if long else 0x00CF9B000000FFFF
    data = 0x00CF93000000FFFF
    ring3 = 3 << 45
    tss = sysgva + TSS
    low = 0x68 - 1 | (tss & 0xFFFFFF) << 16 | 0x89 << 40 | (tss >> 24 & 0xFF) << 56
    for n, descriptor in enumerate((0, code, data, code | ring3, data | ring3, low, tss >> 32)):
        page[GDT + 8 * n : GDT + 8 * n + 8] = descriptor.to_bytes(8, "little")
    page[TSS : TSS + 0x68] = bytes(0x68)
    stack = sysgva + STACK
    if long:
        page[TSS + 4 : TSS + 12] = stack.to_bytes(8, "little")
    else:
        page[TSS + 4 : TSS + 8] = stack.to_bytes(4, "little")
        page[TSS + 8 : TSS + 12] = (2 * CODE_SELECTOR).to_bytes(4, "little")
    return bytes(page)


def _gate(long: bool, handler: int) -> bytes:
    """An interrupt gate of ring 0 to the code segment."""
    word = handler & 0xFFFF | CODE_SELECTOR << 16 | 0x8E << 40 | (handler >> 16 & 0xFFFF) << 48
    return word.to_bytes(8, "little") + ((handler >> 32).to_bytes(8, "little") if long else b"")
