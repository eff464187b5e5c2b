"""Small traces of the tests' own making."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmmmu.traces import Trace, open_trace

AREAS = [
    {"start": "0x0", "end": "0x3fff", "kind": "ram", "name": "low"},
    {"start": "0x8000", "end": "0x8fff", "kind": "rom", "name": "bios"},
    {"start": "0xfee00000", "end": "0xfeefffff", "kind": "i/o", "name": "apic"},
    {"start": "0x100000", "end": "0x107fff", "kind": "ram", "name": "high"},
]
PG, PE, PAE = 1 << 31, 1, 1 << 5


@pytest.fixture
def make_trace(tmp_path: Path) -> Callable[..., Trace]:
    def make(records: list[tuple[int, int, int, int]], pages: dict[int, Any], final: dict[int, Any] | None) -> Trace:
        columns = {
            "kind": np.array([record[0] for record in records], np.uint8),
            "a": np.array([record[1] for record in records], np.uint64),
            "b": np.array([record[2] for record in records], np.uint64),
            "c": np.array([record[3] for record in records], np.uint64),
            "size": np.full(len(records), 3, np.uint8),
            "flags": np.zeros(len(records), np.uint8),
            "cpl": np.zeros(len(records), np.uint8),
            "page_gpa": np.array(list(pages), np.uint64),
            "page_t0": np.array(list(pages.values()), np.uint64),
            "meta": np.array(json.dumps({"mode": "test"})),
        }
        if final is not None:
            columns["page_t1"] = np.array([final[gpa] for gpa in pages], np.uint64)
        np.savez(tmp_path / "made.npz", **columns)  # type: ignore[arg-type]
        (tmp_path / "memory-map.json").write_text(json.dumps({"made": AREAS}))
        return open_trace(tmp_path / "made.npz")

    return make
