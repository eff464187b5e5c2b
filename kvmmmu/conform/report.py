"""What a check of one file says."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["FileReport"]


@dataclass(frozen=True)
class FileReport:
    """How far the model and a file of known answers agree.

    Attributes
    ----------
    file : str
        The path as it was given.
    kind : str
        What the file is: ``"vectors"``, ``"dump"``, ``"trace"`` or ``"golden"``.
    agreed, total : int
        Answers compared, and how many of them were the model's too.
    disagreements : list of str
        The first few that were not, one printable text each.
    config : str or None
        Golden runs: name of the host's configuration.
    level : int or None
        Golden runs: strictness, 1 to 5; then ``agreed`` and ``total`` are operations.
    part : str
        Golden runs: what of the level was compared.  Vectors: whose answers.
    scripts_agreed, scripts : int
        Golden runs: scripts with every operation agreed, and all.
    switches : tuple of str
        Golden runs: quirks of the emulator that were imitated.
    behaviour : str or None
        Golden runs: the profile they were compared with.
    exempt : int
        Golden runs: operations left out of ``total`` because that kernel's answer depends on uninitialised memory.
    """

    file: str
    kind: str
    agreed: int
    total: int
    disagreements: list[str] = field(default_factory=list)
    config: str | None = None
    level: int | None = None
    part: str = ""
    scripts_agreed: int = 0
    scripts: int = 0
    switches: tuple[str, ...] = ()
    behaviour: str | None = None
    exempt: int = 0

    @property
    def ok(self) -> bool:
        """Everything agreed, and something was checked."""
        return self.total > 0 and self.agreed == self.total
