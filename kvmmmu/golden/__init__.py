"""Readers of golden runs: scripts that real KVM ran, and what came of every operation."""

from kvmmmu.golden.archive import Archive, is_archive
from kvmmmu.golden.eventlog import OpEvents, parse_events
from kvmmmu.golden.results import OpResult, Result, parse_result
from kvmmmu.golden.script import Back, Op, Script, SlotSpec, parse_script
from kvmmmu.golden.setup import Setup, parse_setup

__all__ = [
    "Archive",
    "Back",
    "Op",
    "OpEvents",
    "OpResult",
    "Result",
    "Script",
    "Setup",
    "SlotSpec",
    "is_archive",
    "parse_events",
    "parse_result",
    "parse_script",
    "parse_setup",
]
