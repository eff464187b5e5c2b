"""KVM's x86 MMU as a library."""

from pathlib import Path

from kvmmmu._version import __version__

__all__ = ["__version__", "get_include"]


def get_include() -> str:
    """Directory of the C headers, for ``include_dirs`` of whatever compiles against kvmmmu."""
    return str(Path(__file__).parent / "include")
