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
        What the file is: ``"vectors"`` or ``"dump"``.
    agreed, total : int
        Answers compared, and how many of them were the model's too.
    disagreements : list of str
        The first few that were not, one printable text each.
    """

    file: str
    kind: str
    agreed: int
    total: int
    disagreements: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Everything agreed, and something was checked."""
        return self.total > 0 and self.agreed == self.total
