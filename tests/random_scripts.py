"""Random scripts in the format of golden runs: guests with random tables, and operations that use and change them.

Seeded, so that a number names a script for ever.  A narrow script asks for what recorded random ones ask for; a wide
one may change any table, delete and move any slot, take any memory away, and jump anywhere.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODES = ("long", "pae", "p32", "flat")
SYS, USR, DATA = 0x1000, 0x2000, 0x100000
ROOTS = (0x10000, 0x11000, 0x12000)
TABLES = 0x13000
#: Tables a guest may have, by gfn: below the data pages.
LAST_TABLE = 0x26
MMIO = 0xFE000000
RW, LOGGED, HUGE = 0x8000000, 0xA000000, 0x10000000
PG_WP, PG, WP = 0x80010031, 0x80000031, 0x10031


@dataclass(frozen=True)
class Shape:
    """What a mode's tables look like."""

    levels: int
    entry: int
    sysgva: int
    window: int

    def bits(self, level: int) -> int:
        return 12 + (10 if self.entry == 4 else 9) * (level - 1)

    def entries(self, level: int) -> int:
        return 4 if self.levels == 3 and level == 3 else 4096 // self.entry


SHAPES = {
    "long": Shape(4, 8, 0xFFFF800000000000, 0xFFFF800000200000),
    "pae": Shape(3, 8, 0xC0000000, 0xC0200000),
    "p32": Shape(2, 4, 0xC0000000, 0xC0400000),
    "flat": Shape(0, 4, 0x1000, 0),
}


class Author:
    """Writes one script."""

    def __init__(self, seed: int, mode: str, *, wide: bool) -> None:
        self.random = random.Random(f"{seed} {mode} {wide}")
        self.mode = mode
        self.wide = wide
        self.shape = SHAPES[mode]
        self.memory: list[tuple[int, int, int]] = []
        self.next_table = TABLES
        self.leaf_tables: list[int] = []
        self.tables: list[int] = []
        self.pages: list[int] = []
        self.ops: list[list[Any]] = []
        self.nx = mode in ("long", "pae") and self.random.random() < 0.85

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    # -- tables

    def put(self, table: int, index: int, entry: int) -> None:
        self.memory.append((table + index * self.shape.entry, self.shape.entry, entry))

    def table(self) -> int:
        self.next_table += 0x1000
        return self.next_table - 0x1000

    def frame(self) -> int:
        """Where a page may point: plain memory, each kind of slot, or nothing."""
        pick = self.random.random
        if pick() < 0.5:
            return DATA + (self.random.randrange(24) << 12)
        return self.random.choice(
            (
                MMIO + (self.random.randrange(4) << 12),
                RW + (self.random.randrange(4) << 12),
                LOGGED + (self.random.randrange(6) << 12),
                HUGE + (self.random.randrange(0x400) << 12),
                *((self.random.randrange(0x10, LAST_TABLE) << 12,) if self.wide else ()),
            )
        )

    def leaf(self) -> int:
        entry = self.frame() | 0x67
        for bit, p in ((1, 0.06), (2, 0.12), (4, 0.2), (0x20, 0.1), (0x40, 0.5)):
            if self.chance(p):
                entry &= ~bit
        if self.chance(0.04):
            entry |= 0x100
        if self.shape.entry == 8:
            if self.chance(0.12):
                entry |= 1 << 63
            if self.chance(0.01):
                entry |= 1 << self.random.choice((40, 45, 51))
        return entry

    def large(self) -> int:
        frame = self.random.choice((HUGE, HUGE, 0, MMIO)) & -(1 << self.shape.bits(2))
        return frame | self.random.choice((0xE7, 0xA7, 0xE5, 0xA3, 0x87, 0xC7, 0xA5, 0xE1))

    def link(self, table: int, level: int) -> int:
        if level == 3 and self.shape.levels == 3:
            return table | 1
        return table | self.random.choice((0x27, 0x27, 0x67, 0x07, 0x25, 0x23, 0x65))

    def region(self, root: int, gva: int, leaf: int | None = None) -> int:
        """Make a leaf table reachable at a gva, or share one that is; returns it."""
        here, level = root, self.shape.levels
        known = {at: entry for at, _, entry in self.memory}
        while level > 1:
            index = gva >> self.shape.bits(level) & self.shape.entries(level) - 1
            at = here + index * self.shape.entry
            if at in known:
                below = known[at] & 0xFFFFF000
            else:
                below = leaf if level == 2 and leaf else self.table()
                self.put(here, index, self.link(below, level))
                known[at] = below
                if level > 2:
                    self.tables.append(below)
            here, level = below, level - 1
        if here not in self.leaf_tables:
            self.leaf_tables.append(here)
        return here

    def window(self) -> None:
        """The supervisor's page, the user's, and all tables for ordinary stores; the same in every root."""
        top = self.shape.levels
        chain = [0x3000 + (n << 12) for n in range(top)]
        share = self.shape.bits(top)
        for root in ROOTS:
            link = chain[0] | (1 if self.mode == "pae" else 0x27)
            self.put(root, self.shape.sysgva >> share & self.shape.entries(top) - 1, link)
            if top == 2:
                self.put(root, (self.shape.sysgva >> share) + 1 & 1023, chain[1] | 0x27)
        for n in range(top - 2):
            self.put(chain[n], 0, chain[n + 1] | 0x27)
        low = chain[max(top - 2, 0)]
        self.put(low, 0, SYS | 0x63)
        self.put(low, 1, USR | 0x65)
        tables = chain[top - 1]
        if top > 2:
            self.put(chain[top - 3], 1, tables | 0x27)
        for n in range(4096 // self.shape.entry):
            self.put(tables, n, n << 12 | 0x63)

    def build_tables(self) -> None:
        self.window()
        second = self.shape.levels - 1
        bases = [0x400000, 0x600000, 0x40000000]
        if self.mode == "long":
            bases.append(0x28000000000)
        if self.mode == "p32":
            bases = [0x400000, 0x800000, 0x40000000]
        for number, root in enumerate(ROOTS):
            for base in bases[: len(bases) if number == 0 else self.random.randrange(1, len(bases) + 1)]:
                shared = self.random.choice(self.leaf_tables) if self.leaf_tables and self.chance(0.25) else None
                leaves = self.region(root, base, shared)
                for _ in range(self.random.randrange(2, 12)):
                    index = self.random.randrange(1, 0x14)
                    self.put(leaves, index, self.leaf())
                    self.pages.append(base + (index << 12))
        known = {at: entry for at, _, entry in self.memory}
        top = ROOTS[0]
        if self.shape.levels > 2:
            for _ in range(self.shape.levels, 2, -1):
                top = known[top] & 0xFFFFF000
        for n in range(4, 8):
            gva = n << self.shape.bits(2)
            self.put(top, gva >> self.shape.bits(2), self.large())
            self.pages += [gva, gva + 0x5000, gva + 0x20000, gva + (1 << self.shape.bits(2)) - 0x1000]
        alias = 0x3400000
        self.put(top, alias >> self.shape.bits(2), self.random.choice(self.leaf_tables) | 0x25)
        self.pages += [alias + (n << 12) for n in range(1, 8)]
        self.tables += [table for table in ROOTS if second]
        self.tables.append(top)

    # -- operations

    def number(self, size: int) -> int:
        return self.random.getrandbits(8 * size)

    def gva(self) -> int:
        page = self.random.choice(self.pages)
        offset = self.random.choice((0, 0, 0, 8, 0x10, 0x28, 0xFFE))
        if self.wide and self.chance(0.1):
            offset = self.random.randrange(4096)
        return page + offset

    def size(self) -> int:
        sizes = (1, 2, 4, 8, 8, 8) if self.mode == "long" else (1, 2, 4, 4, 4)
        return self.random.choice(sizes)

    def cpl(self) -> int:
        return 3 if self.chance(0.3) else 0

    def entry_address(self) -> tuple[int, int, int]:
        """Through the window: gva of a table's entry, its gpa, and a new value."""
        upper = self.chance(0.5 if self.wide else 0.25)
        table = self.random.choice(self.tables if upper and self.tables else self.leaf_tables)
        index = self.random.randrange(0, 0x14)
        value = self.leaf()
        if upper:
            index = self.random.randrange(0, 0x1B)
            value = self.random.choice(
                (0, self.large(), self.link(self.random.choice(self.leaf_tables), 2), self.link(self.table_of(), 3))
            )
            if self.mode == "pae" and table in ROOTS:
                index &= 3
                value = value & ~0x1E6 if self.chance(0.7) else value
        elif self.chance(0.15):
            value = 0
        gpa = table + index * self.shape.entry
        return self.shape.window + gpa, gpa, value

    def table_of(self) -> int:
        return self.random.choice(self.tables)

    def op_read(self) -> list[Any]:
        return ["r", self.size(), self.gva(), self.cpl()]

    def op_write(self) -> list[Any]:
        size = self.size()
        return ["w", size, self.gva(), self.number(size), self.cpl()]

    def op_entry(self) -> list[Any]:
        gva, _, value = self.entry_address()
        if self.wide and self.chance(0.2):
            size = self.size()
            return ["w", size, gva + self.random.randrange(8), value & (1 << 8 * size) - 1, 0]
        return ["w", self.shape.entry, gva, value, 0]

    def op_jump(self) -> list[Any]:
        offset = self.random.randrange(4096) if self.wide and self.chance(0.2) else 0xFF0
        return ["x", (self.gva() & ~0xFFF) + offset, self.cpl()]

    def op_add(self) -> list[Any]:
        if self.wide and self.chance(0.4) and self.mode != "flat":
            return ["add", self.entry_address()[0], self.random.choice((1, 8, 0x1000)), 0]
        return ["add", self.gva() & ~0xFFF | 8, 1, self.cpl()]

    def op_cas(self) -> list[Any]:
        if self.mode == "flat" or (self.wide and self.chance(0.5)):
            return ["cas", self.gva(), 0, self.number(4), self.cpl()]
        gva, gpa, value = self.entry_address()
        old = {at: entry for at, _, entry in self.memory}.get(gpa, 0)
        return ["cas", gva, old, value, 0]

    def op_movs(self) -> list[Any]:
        return ["movs", self.gva() & ~0xFFF | 0x40, self.gva() & ~0xFFF, self.cpl() if self.wide else 0]

    def op_read_write_read(self) -> list[Any]:
        gva, _, value = self.entry_address()
        return [self.random.choice(("rwr", "rwir")), self.gva() & ~0xFFF, gva, value]

    def op_invlpg(self) -> list[Any]:
        return ["invlpg", self.gva() & ~0xFFF]

    def op_cr0(self) -> list[Any]:
        if self.mode == "flat":
            return ["cr0", self.random.choice((0x31, WP))]
        values = (PG, PG_WP, *((WP, 0x80050033, 0xE0010031) if self.wide else ()))
        return ["cr0", self.random.choice(values)]

    def op_cr3(self) -> list[Any]:
        extra = (0x13000, MMIO, DATA, 0x10018) if self.wide and self.chance(0.1) else ()
        return ["cr3", self.random.choice(extra or ROOTS)]

    def op_cr4(self) -> list[Any]:
        base = 0x10 if self.mode == "p32" else 0x20
        bits = [0x80, 0x100000, *((0x200000,) if self.mode == "long" else ())]
        if self.wide:
            bits += [0x10, 0x20000, 0x20]
        return ["cr4", base | sum(bit for bit in bits if self.chance(0.3))]

    def op_efer(self) -> list[Any]:
        base = 0x500 if self.mode == "long" else 0
        return ["efer", base | self.random.choice((0, 0x800))]

    def op_ac(self) -> list[Any]:
        return ["ac", self.random.randrange(2)]

    def op_poke(self) -> list[Any]:
        if self.mode == "flat":
            return ["poke", 8, DATA + (self.random.randrange(24) << 12), self.number(8)]
        _, gpa, value = self.entry_address()
        return ["poke", self.shape.entry, gpa, value]

    def op_slot(self) -> list[Any]:
        kind = self.random.choice(("log", "0"))
        pick = self.random.randrange(8 if self.wide else 5)
        if pick == 0:
            return ["slot", 2, LOGGED, 0x10000, 2, 0, kind]
        if pick == 1:
            return ["slot", 4, HUGE, 0x400000, 4, 0, kind]
        if pick == 5:
            return ["slot", 4, HUGE + (self.random.randrange(-2, 3) << 20), 0x400000, 4, 0, kind]
        if pick == 6:
            return ["slot", 5, 0x20000000 + (self.random.randrange(4) << 12), 0x200000, 0, 0x200000, kind]
        if pick == 7:
            return ["slot", 0, 0, 0x400000, 0, 0, kind]
        base, pages, offset = (self.random.randrange(3), self.random.randrange(1, 4), self.random.randrange(3))
        flags = self.random.choice(("0", "0", "log", "ro"))
        return ["slot", 3, MMIO + (base << 12), pages << 12, 3, offset << 12, flags]

    def op_delslot(self) -> list[Any]:
        return ["delslot", self.random.choice((3, 3, 2, 4, 5) if self.wide else (3,))]

    def op_dirty(self) -> list[Any]:
        name = "dirtyclear" if self.wide and self.chance(0.4) else "dirty"
        return [name, self.random.choice((2, 2, 4, 3) if self.wide else (2,))]

    def op_dontneed(self) -> list[Any]:
        if self.wide and self.chance(0.4):
            back = self.random.choice((0, 4))
            first, pages = self.random.randrange(0x100, 0x400), self.random.choice((1, 3, 0x80, 0x200))
            if back == 0 and self.chance(0.5):
                first, pages = self.random.randrange(0x13, LAST_TABLE), 1
            return ["dontneed", back, min(first, 0x400 - pages) << 12, pages << 12]
        return ["dontneed", 2, self.random.randrange(6) << 12, self.random.randrange(1, 4) << 12]

    def op_nrmmu(self) -> list[Any]:
        return ["nrmmu", self.random.choice((63, 64, 70, 100, 1000))]

    def weights(self) -> list[tuple[float, Callable[[], list[Any]]]]:
        """How often each operation is asked for."""
        paging = self.mode != "flat"
        all_ = [
            (32, self.op_read, True),
            (18, self.op_write, True),
            (18, self.op_entry, paging),
            (12, self.op_invlpg, True),
            (3 if paging else 30, self.op_cr0, True),
            (5, self.op_cr3, paging),
            (4.5, self.op_jump, True),
            (4, self.op_slot, True),
            (2.2, self.op_ac, True),
            (1.6, self.op_dontneed, True),
            (1.4, self.op_delslot, True),
            (1.4, self.op_cr4, paging),
            (1.3, self.op_poke, paging),
            (1, self.op_add, True),
            (1, self.op_movs, True),
            (0.9, self.op_cas, paging or self.wide),
            (0.8, self.op_dirty, True),
            (1, self.op_read_write_read, paging),
            (0.4, self.op_efer, self.mode in ("long", "pae")),
            (0.3, self.op_nrmmu, self.wide),
        ]
        return [(weight, op) for weight, op, usable in all_ if usable]

    def script(self, name: str) -> dict[str, Any]:
        if self.mode == "flat":
            self.pages = [self.frame() for _ in range(24)]
            if self.wide:
                self.pages.append(0)
        else:
            self.build_tables()
        self.fill()
        weights, makers = zip(*self.weights(), strict=True)
        for maker in self.random.choices(makers, weights, k=self.random.randrange(50, 170)):
            self.ops.append(maker())
        sysgva = self.shape.sysgva
        huge = [self.random.choice(("4k", "thp")), self.random.choice(("4k", "thp"))]
        small = self.random.choice(("4k", "lazy")) if self.wide else "4k"
        settings = {
            "sysgpa": SYS,
            "usrgpa": USR,
            "dump_every": 10,
            "sysgva": sysgva,
            "usrgva": sysgva + 0x1000,
            "cr0": {"flat": WP}.get(self.mode, PG_WP if self.chance(0.9) else PG),
            "cr3": 0 if self.mode == "flat" else ROOTS[0],
            "cr4": {"long": 0x20, "pae": 0x20, "p32": 0x10, "flat": 0}[self.mode],
            "efer": (0x500 if self.mode == "long" else 0) | (0x800 if self.nx else 0),
        }
        slots = [
            (0, 0, 0x400000, 0, 0, "0"),
            (1, RW, 0x10000, 1, 0, "ro"),
            (2, LOGGED, 0x10000, 2, 0, self.random.choice(("0", "log"))),
            (4, HUGE, 0x400000, 4, 0, "0"),
        ]
        manual = self.random.choice((0, 1, 3)) if self.wide else 0
        return {
            "name": name,
            "notes": "",
            "mode": self.mode,
            "set": settings,
            "caps": {"dirty_manual": manual} if manual else {},
            "backs": [
                {"id": 0, "size": 0x400000, "how": huge[0]},
                {"id": 1, "size": 0x10000, "how": "4k"},
                {"id": 2, "size": 0x20000, "how": small},
                {"id": 3, "size": 0x10000, "how": "4k"},
                {"id": 4, "size": 0x400000, "how": huge[1]},
            ],
            "slots": [dict(zip(("id", "gpa", "size", "back", "boff", "flags"), slot, strict=True)) for slot in slots],
            "mem": [list(item) for item in self.memory],
            "ops": self.ops,
        }

    def fill(self) -> None:
        """Every page of data says where it is, and ends in the ``out`` that a jump looks for."""
        pages = [DATA + (n << 12) for n in range(0x40)]
        pages += [base + (n << 12) for base in (RW, LOGGED) for n in range(16)]
        pages += [HUGE + (n << 17) for n in range(32)]
        for gpa in pages:
            self.memory += [(gpa, 8, 0xD0D0 << 48 | gpa), (gpa + 0xFF0, 8, 0x10E6)]


def write_script(seed: int, mode: str, *, wide: bool = False) -> bytes:
    """Script number ``seed`` of a mode, as its file would be."""
    name = f"{'wide' if wide else 'made'}{seed:03d}_{mode}"
    return json.dumps(Author(seed, mode, wide=wide).script(name)).encode()
