"""The ``.tar.xz`` archives that golden runs come in, read whole."""

from __future__ import annotations

import lzma
import tarfile
from pathlib import Path

from kvmmmu.errors import FormatError

__all__ = ["Archive", "is_archive"]

SUFFIX = ".tar.xz"
_RESULT = ".result.json"
_EVENTS = ".events.txt"
_SETUP = "setup.txt"


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive of golden scripts or runs."""
    return path.name.endswith(SUFFIX)


class Archive:
    """One archive in memory: scripts (``NAME.json``), or the results and events of one configuration.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
    name : str
        The file name without ``.tar.xz``.
    scripts : tuple of str
        Names of the scripts whose results (or texts) it holds, sorted.
    is_run : bool
        It holds results; otherwise scripts.

    Raises
    ------
    FormatError
        Not such an archive, a member of an unknown kind, or a result without its events.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name.removesuffix(SUFFIX)
        self._members = _read(path)
        names = set(self._members) - {_SETUP}
        results = {name.removesuffix(_RESULT) for name in names if name.endswith(_RESULT)}
        events = {name.removesuffix(_EVENTS) for name in names if name.endswith(_EVENTS)}
        texts = {name for name in names if name.endswith(".json") and not name.endswith(_RESULT)}
        strangers = names - texts - {n + _RESULT for n in results} - {n + _EVENTS for n in events}
        if strangers:
            raise FormatError(
                f"{path}: member {min(strangers)!r}: expected NAME.json, NAME.result.json, NAME.events.txt"
            )
        if results != events:
            raise FormatError(f"{path}: {min(results ^ events)!r} has results or events, not both")
        if bool(results) == bool(texts):
            raise FormatError(f"{path}: members: expected either scripts or results, of one script at least")
        self.is_run = bool(results)
        self.scripts = tuple(sorted(results or {name.removesuffix(".json") for name in texts}))

    def script(self, name: str) -> bytes:
        """The text of a script; FormatError if it is not here."""
        return self._member(f"{name}.json")

    def result(self, name: str) -> bytes:
        """What came of a script, as JSON."""
        return self._member(name + _RESULT)

    def events(self, name: str) -> bytes:
        """The tracepoints of a script."""
        return self._member(name + _EVENTS)

    def setup(self) -> bytes:
        """The description of the host it ran on."""
        return self._member(_SETUP)

    def _member(self, name: str) -> bytes:
        if name not in self._members:
            raise FormatError(f"{self.path}: member {name!r} is missing")
        return self._members[name]


def _read(path: Path) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                if member.isdir():
                    continue
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is None:
                    raise FormatError(f"{path}: member {member.name!r} is no plain file")
                members[member.name.rsplit("/", 1)[-1]] = stream.read()
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
        raise FormatError(f"{path}: file: not a .tar.xz archive, truncated or corrupt ({error})") from None
    return members
