"""Invariants of the machine: what must hold of its state whenever no vCPU runs."""

from kvmmmu.check.run import INVARIANTS, check_snapshot, check_vm
from kvmmmu.check.snapshot import Snapshot
from kvmmmu.errors import Violation

__all__ = ["INVARIANTS", "Snapshot", "Violation", "check_snapshot", "check_vm"]
