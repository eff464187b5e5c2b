"""KVM's x86 MMU as a library."""

from pathlib import Path as _Path

from kvmmmu._core import AccessResult
from kvmmmu._version import __version__
from kvmmmu.behaviour import Behaviour
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.memslots import MemSlot, MemSlots
from kvmmmu.outcome import Outcome, Path
from kvmmmu.paging import EptTables, NptTables, Paging
from kvmmmu.tlb import Tlb
from kvmmmu.vcpu import VCpu
from kvmmmu.vm import VM

__all__ = [
    "VM",
    "AccessResult",
    "Behaviour",
    "EptTables",
    "GuestCpu",
    "HostCpu",
    "MemSlot",
    "MemSlots",
    "NptTables",
    "Outcome",
    "Paging",
    "Path",
    "Tlb",
    "VCpu",
    "__version__",
    "get_include",
]


def get_include() -> str:
    """Directory of the C headers, for ``include_dirs`` of whatever compiles against kvmmmu."""
    return str(_Path(__file__).parent / "include")
