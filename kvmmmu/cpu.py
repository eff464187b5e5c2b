"""What processors can do: the guest's as CPUID shows it, and the host's below it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvmmmu._arguments import index_of
from kvmmmu.errors import ArgumentError

__all__ = ["GuestCpu", "HostCpu"]

_VENDORS = ("intel", "amd")

# Control bits that exist only with a feature: (register, bit, feature).
_FEATURE_BITS = (
    ("efer", 11, "nx"),
    ("cr4", 12, "la57"),
    ("cr4", 20, "smep"),
    ("cr4", 21, "smap"),
    ("cr4", 22, "pku"),
)


def _check_bits(owner: str, name: str, value: object, low: int, high: int) -> None:
    bits = index_of(f"{owner}.{name}", value)
    if not low <= bits <= high:
        raise ArgumentError(f"{owner}.{name} is {bits}; allowed are {low} .. {high}")


def _check_flags(cpu: GuestCpu | HostCpu) -> None:
    """Flags are truth values of type bool; the vendor is one of two."""
    for field in fields(cpu):
        value = getattr(cpu, field.name)
        if field.type == "bool" and not isinstance(value, bool):
            raise TypeError(f"{type(cpu).__name__}.{field.name} must be True or False, not {value!r}")
    if cpu.vendor not in _VENDORS:
        raise ArgumentError(f"{type(cpu).__name__}.vendor is {cpu.vendor!r}; allowed are 'intel' and 'amd'")


@dataclass(frozen=True)
class GuestCpu:
    """A guest processor, as its CPUID describes it.

    Parameters
    ----------
    maxphyaddr : int
        Physical address width in bits, 32 to 52; entries with higher address bits have reserved bits set.
    gbpages : bool
        1 GiB pages.
    nx, smep, smap, pku, la57 : bool
        Features whose control bits may be set.
    pse36 : bool
        4 MiB pages above 4 GiB (KVM's own walker takes it for granted).
    vendor : {"intel", "amd"}
        Decides one rule of KVM's walker: for AMD, bit 8 of PML4 and PML5 entries is reserved.

    Raises
    ------
    ArgumentError
        ``maxphyaddr`` or ``vendor`` out of range.
    TypeError
        A value of the wrong type.
    """

    maxphyaddr: int = 40
    gbpages: bool = True
    nx: bool = True
    smep: bool = True
    smap: bool = True
    pku: bool = True
    la57: bool = True
    pse36: bool = True
    vendor: str = "intel"

    def __post_init__(self) -> None:
        _check_bits("GuestCpu", "maxphyaddr", self.maxphyaddr, 32, 52)
        _check_flags(self)

    def check_registers(self, cr4: int, efer: int) -> None:
        """Refuse control bits of features that this processor lacks (it would raise #GP(0)).

        Raises
        ------
        ArgumentError
            Naming the register, the bit and the feature.
        """
        values = {"cr4": cr4, "efer": efer}
        for register, bit, feature in _FEATURE_BITS:
            if values[register] >> bit & 1 and not getattr(self, feature):
                raise ArgumentError(
                    f"{register} is {values[register]:#x}: bit {bit} is set and the guest CPU has no {feature}"
                )

    def absent_bits(self) -> tuple[int, int]:
        """Control bits of features that this processor lacks, of CR4 and of EFER."""
        absent = {"cr4": 0, "efer": 0}
        for register, bit, feature in _FEATURE_BITS:
            if not getattr(self, feature):
                absent[register] |= 1 << bit
        return absent["cr4"], absent["efer"]

    def model(self) -> tuple[int, ...]:
        """The fields that a page walk asks for, as the engine orders them."""
        return (self.maxphyaddr, self.gbpages, self.vendor == "amd", 0, 0, 0, not self.pse36)


@dataclass(frozen=True)
class HostCpu:
    """The processor that runs the hypervisor.

    Parameters
    ----------
    maxphyaddr : int
        Physical address width as CPUID says it, 36 to 52.
    phys_bits : int, optional
        Width left after memory-encryption key bits are taken away; ``maxphyaddr`` by default.
    gbpages : bool
        1 GiB pages in ordinary and nested (NPT) tables.
    l1tf : bool
        Vulnerable to L1TF: addresses of non-present entries are kept off the cache's reach.
    cache_bits : int, optional
        Address width of the L1 cache, for ``l1tf``; ``phys_bits`` by default.
    ept_ad, ept_exec_only, ept_1g, ept_2m : bool
        EPT capabilities: A/D bits, execute-only entries, large pages.
    ept_checks_updates : bool
        With EPT A/D off, setting A or D in a guest table needs W in EPT, as the SDM has it; some emulators
        do not ask.
    vendor : {"intel", "amd"}
    la57 : bool
        Five-level tables.
    ad_first : bool
        Under EPT and NPT the guest's accessed and dirty bits are set before the address itself is translated, so
        that they stay set when that faults; manuals leave the order open.
    rsvd_alone : bool
        Reserved-bit page faults lack P in their error code (some emulators; SDM vol. 3A section 4.7 says otherwise).
    c_bit : int, optional
        The address bit that marks encrypted memory (SME, SEV), 32 to 51, on a host of AMD where that is switched on:
        address bits from ``phys_bits`` up, but not this one, are reserved and make ordinary and NPT mmio sptes.
    sme : bool
        Where there is a ``c_bit``: the host's kernel encrypts its memory (``mem_encrypt=on``), so that every mapping
        and link in KVM's ordinary and NPT tables carries that bit.
    mmio_masks : (int, int, int), optional
        Value, mask and access mask of mmio sptes, set by hand instead of what the host would choose.  Masks that
        break KVM's rules (see ``SpteFormat``) leave the host without mmio sptes.

    Raises
    ------
    ArgumentError
        A width, a bit or the vendor out of range; a ``c_bit`` on a host of Intel; masks that are not three words.
    TypeError
        A value of the wrong type.
    """

    maxphyaddr: int = 46
    phys_bits: int | None = None
    gbpages: bool = True
    l1tf: bool = False
    cache_bits: int | None = None
    ept_ad: bool = True
    ept_exec_only: bool = True
    ept_1g: bool = True
    ept_2m: bool = True
    ept_checks_updates: bool = True
    vendor: str = "intel"
    la57: bool = False
    ad_first: bool = False
    rsvd_alone: bool = False
    c_bit: int | None = None
    sme: bool = True
    mmio_masks: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        _check_bits("HostCpu", "maxphyaddr", self.maxphyaddr, 36, 52)
        if self.phys_bits is not None:
            _check_bits("HostCpu", "phys_bits", self.phys_bits, 32, self.maxphyaddr)
        if self.cache_bits is not None:
            _check_bits("HostCpu", "cache_bits", self.cache_bits, 36, 52)
        if self.c_bit is not None:
            _check_bits("HostCpu", "c_bit", self.c_bit, 32, 51)
            if self.vendor != "amd":
                raise ArgumentError(f"HostCpu.c_bit is {self.c_bit}; vendor 'intel' has none, allowed is None")
        if self.mmio_masks is not None:
            if len(self.mmio_masks) != 3:
                raise ArgumentError(f"HostCpu.mmio_masks has {len(self.mmio_masks)} words; allowed are 3")
            for word in self.mmio_masks:
                _check_bits("HostCpu", "mmio_masks", word, 0, (1 << 64) - 1)
        _check_flags(self)

    def model(self) -> tuple[int, ...]:
        """The fields that a walk of EPT or nested tables asks for, as the engine orders them."""
        amd = self.vendor == "amd"
        return (self.maxphyaddr, self.gbpages, amd, self.ept_exec_only, self.ept_2m, self.ept_1g, 0)
