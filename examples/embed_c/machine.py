"""The machine of the C example, made where its options are documented: in Python."""

import numpy as np

import kvmmmu as km

RAM = 4 << 20
UART = 0xFE000000


def make(mmu: str = "ept") -> km.VCpu:
    """A guest in 64-bit mode: gva = gpa below 4 MiB, a page of a UART at gva 1 GiB."""
    ram = np.zeros(RAM, np.uint8)
    words = ram.view(np.uint64)
    for table, index, entry in (
        (0x1000, 0, 0x2007),
        (0x2000, 0, 0x3007),
        (0x2000, 1, 0x5007),
        (0x3000, 0, 0x000087),  # 2 MiB pages
        (0x3000, 1, 0x200087),
        (0x5000, 0, 0x6007),
        (0x6000, 0, UART | 7),
    ):
        words[table // 8 + index] = entry
    vm = km.VM(mmu)
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    return vcpu
