"""One guest walk, slowly, straight from the manual (Intel SDM vol. 3A chapter 4): tables of rules, no bit tricks.

It shares nothing with the kernels: an entry is taken apart by name, and the checks are those of the sections named.
"""

from dataclasses import dataclass, field

PG, WP = 31, 16
PSE, PAE, LA57, SMEP, SMAP, PKE = 4, 5, 12, 20, 21, 22
LMA, NXE = 10, 11
#: Which fault: none, #PF, #GP.
NONE, PF, GP = 0, 1, 2


def bit(word: int, number: int) -> bool:
    return bool(word >> number & 1)


def bits(word: int, high: int, low: int) -> int:
    return word >> low & (1 << high - low + 1) - 1


@dataclass
class Cpu:
    """Registers, and what CPUID says."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int
    maxphyaddr: int
    gbpages: bool
    pdptes: tuple[int, ...] = ()
    compat: bool = False

    @property
    def mode(self) -> str:
        """Section 4.1.1."""
        if not bit(self.cr0, PG):
            return "none"
        if not bit(self.cr4, PAE):
            return "32"
        if not bit(self.efer, LMA):
            return "pae"
        return "5" if bit(self.cr4, LA57) else "4"


@dataclass
class Answer:
    fault: int
    error: int = 0
    gpa: int = 0
    size: int = 12
    #: (gpa of the entry, bits set) after a successful walk
    updates: dict[int, int] = field(default_factory=dict)


def reserved(cpu: Cpu, level: int, entry: int, large: bool) -> bool:
    """Tables 4-4 to 4-20: bits that must be 0 in a present entry."""
    mode, m = cpu.mode, cpu.maxphyaddr
    if mode == "32":
        # Figure 4-4, with PSE-36: bits 21 up to those that hold address bits above 31.
        top = min(40, m)
        return level == 2 and large and bits(entry, 21, 13 + top - 32) != 0 if top > 32 else False
    if bit(entry, 63) and not bit(cpu.efer, NXE):
        return True
    high = 62 if mode == "pae" else 51
    if m <= high and bits(entry, high, m):
        return True
    if level >= 4 and bit(entry, 7):
        return True
    if level == 3 and large:
        return not cpu.gbpages or bits(entry, 29, 13) != 0
    return level == 2 and large and bits(entry, 20, 13) != 0


def walk(cpu: Cpu, read, gva: int, access: str, user: bool, ac: bool, implicit: bool) -> Answer:
    """Translate; ``read(gpa, size)`` gives a word of memory."""
    mode = cpu.mode
    if mode not in ("4", "5") or cpu.compat:
        gva &= 0xFFFFFFFF
    if mode == "none":
        return Answer(NONE, gpa=gva)
    if implicit:
        user = False
    width = {"32": 32, "pae": 32, "4": 48, "5": 57}[mode]
    if mode in ("4", "5"):
        upper = gva >> width - 1
        if upper not in (0, (1 << 64 - width + 1) - 1):
            return Answer(GP)

    def page_fault(present: bool, rsvd: bool = False, key: bool = False) -> Answer:
        """Section 4.7."""
        error = int(present) | (access == "w") << 1 | user << 2 | rsvd << 3 | key << 5
        nx_on = bit(cpu.efer, NXE) and bit(cpu.cr4, PAE)
        error |= (access == "x" and (nx_on or bit(cpu.cr4, SMEP))) << 4
        return Answer(PF, error)

    entry_size, index_bits = (4, 10) if mode == "32" else (8, 9)
    levels = {"32": 2, "pae": 2, "4": 4, "5": 5}[mode]
    table = cpu.cr3 & 0xFFFFF000 if mode == "32" else cpu.cr3 & 0x000FFFFFFFFFF000
    if mode == "pae":
        pdpte = cpu.pdptes[gva >> 30]
        if not bit(pdpte, 0):
            return page_fault(False)
        table = pdpte & 0x000FFFFFFFFFF000
    writable = user_ok = True
    no_execute = False
    path = []
    level = levels
    while True:
        shift = 12 + index_bits * (level - 1)
        where = table + (gva >> shift & (1 << index_bits) - 1) * entry_size
        entry = read(where, entry_size)
        if not bit(entry, 0):
            return page_fault(False)
        may_be_large = level in (2, 3) if mode in ("4", "5") else level == 2 and (mode == "pae" or bit(cpu.cr4, PSE))
        large = may_be_large and bit(entry, 7)
        if reserved(cpu, level, entry, large):
            return page_fault(True, rsvd=True)
        path.append((where, entry))
        writable &= bit(entry, 1)
        user_ok &= bit(entry, 2)
        no_execute |= entry_size == 8 and bit(entry, 63)
        if level == 1 or large:
            break
        table = entry & (0xFFFFF000 if mode == "32" else 0x000FFFFFFFFFF000)
        level -= 1
    # Section 4.6.1: access rights.
    refused = False
    if user:
        refused |= not user_ok
        refused |= access == "w" and not writable
        refused |= access == "x" and no_execute
    else:
        if access == "x":
            refused |= no_execute or (user_ok and bit(cpu.cr4, SMEP))
        else:
            refused |= access == "w" and bit(cpu.cr0, WP) and not writable
            refused |= user_ok and bit(cpu.cr4, SMAP) and (implicit or not ac)
    # Section 4.6.2: protection keys.
    key_refused = False
    if bit(cpu.cr4, PKE) and mode in ("4", "5") and user_ok and access != "x":
        key = bits(entry, 62, 59)
        key_refused = bit(cpu.pkru, 2 * key)
        if access == "w" and bit(cpu.pkru, 2 * key + 1):
            key_refused |= user or bit(cpu.cr0, WP)
    if refused or key_refused:
        return page_fault(True, key=key_refused)
    shift = 12 + index_bits * (level - 1)
    address = entry & 0x000FFFFFFFFFF000 if entry_size == 8 else entry & 0xFFFFF000
    gpa = address >> shift << shift | gva & (1 << shift) - 1
    if mode == "32" and level == 2:
        gpa |= bits(entry, 20, 13) << 32 if cpu.maxphyaddr >= 40 else bits(entry, 13 + cpu.maxphyaddr - 33, 13) << 32
    updates = {}
    for n, (where, _) in enumerate(path):
        wanted = 1 << 5 | (1 << 6 if n == len(path) - 1 and access == "w" else 0)
        updates[where] = updates.get(where, 0) | wanted
    return Answer(NONE, gpa=gpa, size=shift, updates=updates)
