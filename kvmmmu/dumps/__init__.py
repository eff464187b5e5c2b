"""Readers of page-table dumps."""

from kvmmmu.dumps.npz import PageTableDump

__all__ = ["PageTableDump"]
