"""Random accesses of a small guest through the TLB simulator, by TLB size."""

import numpy as np
import tlbsim

import kvmmmu as km

RAM = 8 << 20
DEVICE = 0xFE000000


def machine() -> km.VCpu:
    """A guest whose first 4 MiB map to themselves in 4 KiB pages, and a device page at 1 GiB."""
    ram = np.zeros(RAM, np.uint8)
    words = ram.view(np.uint64)
    for table, index, entry in (
        (0x1000, 0, 0x2007),
        (0x2000, 0, 0x3007),
        (0x2000, 1, 0x6007),
        (0x3000, 0, 0x4007),
        (0x3000, 1, 0x5007),
        (0x6000, 0, 0x7007),
        (0x7000, 0, DEVICE | 7),
    ):
        words[table // 8 + index] = entry
    words[0x4000 // 8 : 0x6000 // 8] = np.arange(1024, dtype=np.uint64) * 4096 + 7
    vm = km.VM("ept")
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=0x80010001, cr3=0x1000, cr4=0x20, efer=0xD00)
    return vcpu


def main() -> None:
    """Print hits and misses for three sizes, and one mmio spte."""
    rng = np.random.default_rng(1)
    gvas = (rng.zipf(1.3, 200_000) % 1000 * 4096 + 0x8000).astype(np.uint64)
    gvas[::50] = 1 << 30
    writes = (rng.random(len(gvas)) < 0.3).astype(np.uint8)
    writes[gvas < 0x8000] = 0
    vcpu = machine()
    for entries in (16, 64, 256):
        tlb = tlbsim.Tlb(vcpu, entries)
        tlb.run(gvas, writes)
        print(f"{entries:4} entries: {tlb.hits} hits, {tlb.misses} misses, {tlb.mmio} MMIO, {tlb.faults} faults")
    spte = tlbsim.mmio_make(DEVICE >> 12, 5)
    print(f"mmio spte {spte:#x}: {tlbsim.mmio_census(np.array([0, spte, 0x7], np.uint64))}")


if __name__ == "__main__":
    main()
