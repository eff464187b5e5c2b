"""The host of a run, as ``setup.txt`` describes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType

from kvmmmu.errors import FormatError

__all__ = ["Setup", "parse_setup"]


@dataclass(frozen=True)
class Setup:
    """A host.

    Attributes
    ----------
    kernel : tuple of int
        Major and minor version.
    vendor : {"intel", "amd"}
        Of the processor, as the KVM module in use tells.
    cpu : str
        Its name.
    flags : frozenset of str
        Processor features.
    maxphyaddr : int
    parameters : mapping
        Module parameters, ``kvm.tdp_mmu`` and so on.
    """

    kernel: tuple[int, int]
    vendor: str
    cpu: str
    flags: frozenset[str]
    maxphyaddr: int
    parameters: MappingProxyType[str, str]

    def on(self, parameter: str, default: bool) -> bool:
        """A yes/no module parameter."""
        value = self.parameters.get(parameter)
        if value is None:
            return default
        if value not in ("Y", "N", "0", "1"):
            raise FormatError(f"setup.txt: {parameter}={value}: expected Y or N")
        return value in ("Y", "1")


def parse_setup(raw: bytes, where: str) -> Setup:
    """Read a ``setup.txt``.

    Raises
    ------
    FormatError
        The kernel, the processor or its address width is not said, or said twice differently.
    """
    lines = raw.decode("utf-8", "replace").splitlines()
    found: dict[str, str] = {}
    parameters: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon and name.strip() in ("model name", "flags", "address sizes"):
            found[name.strip()] = value.strip()
        elif parameter := re.fullmatch(r"(kvm(?:_intel|_amd)?\.\w+)=(.*)", line):
            parameters[parameter[1]] = parameter[2]
    kernel = re.search(r"^Linux \S+ (\d+)\.(\d+)", "\n".join(lines), re.MULTILINE)
    width = re.match(r"(\d+) bits physical", found.get("address sizes", ""))
    vendors = {name.partition(".")[0] for name in parameters} - {"kvm"}
    if kernel is None or width is None or len(vendors) != 1 or "flags" not in found:
        rest = "address sizes" if width is None else "flags or parameters of one vendor"
        raise FormatError(f"{where}: {'kernel' if kernel is None else rest}: not found")
    return Setup(
        kernel=(int(kernel[1]), int(kernel[2])),
        vendor=vendors.pop().removeprefix("kvm_"),
        cpu=found.get("model name", ""),
        flags=frozenset(found["flags"].split()),
        maxphyaddr=int(width[1]),
        parameters=MappingProxyType(parameters),
    )
