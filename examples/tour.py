"""A guest with four-level tables meets KVM's shadow MMU: faults, an MMIO spte, a slot that comes later."""

import numpy as np

import kvmmmu as km

PAGE = 4096
TABLES, DATA, DEVICE = 0x1000, 0x10000, 0xFE000000
PRESENT_WRITABLE_USER = 7


def build_tables(ram: np.ndarray) -> None:  # type: ignore[type-arg]
    """Map the first 2 MiB to themselves, and two pages at 1 GiB to a device."""
    words = ram.view(np.uint64)
    for table, index, target in (
        (0x1000, 0, 0x2000),  # PML4
        (0x2000, 0, 0x3000),  # PDPT: the first GiB
        (0x3000, 0, 0x4000),  # PD: the first 2 MiB
        (0x2000, 1, 0x5000),  # PDPT: the second GiB
        (0x5000, 0, 0x6000),
        (0x6000, 0, DEVICE),
        (0x6000, 1, DEVICE + PAGE),
    ):
        words[table // 8 + index] = target | PRESENT_WRITABLE_USER
    words[0x4000 // 8 : 0x5000 // 8] = np.arange(512, dtype=np.uint64) * PAGE + PRESENT_WRITABLE_USER


def main() -> None:
    """Walk through it, step by step."""
    ram = np.zeros(2 << 20, np.uint8)
    build_tables(ram)

    with km.VM("shadow", host=km.HostCpu(maxphyaddr=46)) as vm:
        vm.memslots.create(gpa=0, memory=ram)
        vcpu = vm.create_vcpu()
        vcpu.set_sregs(cr0=0x80010001, cr3=TABLES, cr4=0x20, efer=0xD00)

        print("the first touch faults, the second is the processor's own:")
        print("  ", vcpu.access(DATA, "w"))
        print("  ", vcpu.access(DATA, "w"))

        print("what the guest stores, memory holds:")
        vcpu.write(DATA, b"hello")
        print("  ", bytes(ram[DATA : DATA + 5]))

        print("no memory behind an address: MMIO; the page is remembered in an spte, and by the vCPU:")
        for address in (0x40000010, 0x40000010, 0x40001010, 0x40000010):
            print("  ", vcpu.access(address, "w", size=4))
        print("  ", {name: vm.stats[name] for name in ("mmio_slow", "mmio_spte_hit", "mmio_cache_hit")})

        print("a device that Python answers for:")
        device = vm.mmio.register(DEVICE, 2 * PAGE, read=lambda gpa, size: gpa & 0xFF)
        print("  ", vcpu.read(0x40000010, 4).hex())
        vm.mmio.unregister(device)

        print("a slot created there makes every mmio spte stale, by its generation:")
        vm.memslots.create(gpa=DEVICE, memory=np.zeros(PAGE, np.uint8))
        print("  ", vcpu.access(0x40000010, "w", size=4))

        print("why an address does not translate:")
        print("  ", vcpu.explain(0x400000, "r").splitlines()[-1].strip())


if __name__ == "__main__":
    main()
