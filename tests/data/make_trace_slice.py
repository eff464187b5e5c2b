"""Cut the first records of a trace into a small one: python make_trace_slice.py TRACE N OUT

TRACE and OUT are both .npz or both .raw.zst; the .npz of the same run, beside OUT, has the page tables and the map of a
raw one.  In an .npz the page tables at the start stay; those at the end are dropped, because they belong to the end of
the whole run.  The machine's map is copied into ``memory-map.json`` beside OUT under OUT's own name.
"""

import json
import sys
from pathlib import Path

import numpy as np
import zstandard

from kvmmmu.traces import open_trace

RAW = ".raw.zst"
PER_RECORD = ("a", "b", "c", "kind", "size", "flags", "cpl")


def main(source: str, count: str, target: str) -> None:
    """Write the slice, and the map of an .npz."""
    keep, out = int(count), Path(target)
    if source.endswith(RAW) and target.endswith(RAW):
        with zstandard.open(source) as packed:
            out.write_bytes(zstandard.ZstdCompressor(level=19).compress(packed.read(32 * keep)))
        return
    trace = open_trace(source)
    if trace.is_raw or out.suffix != ".npz":
        sys.exit("expected TRACE.npz N OUT.npz, or TRACE.raw.zst N OUT.raw.zst")
    first = next(trace.chunks(keep))
    columns = {name: getattr(first, name) for name in PER_RECORD}
    meta = {**trace.meta, "slice_of": trace.path.name, "slice_records": len(first)}
    np.savez_compressed(
        out,
        **columns,
        page_gpa=trace.page_gpa,
        page_t0=trace.page_t0,
        meta=np.array(json.dumps(meta)),
    )
    map_path = out.parent / "memory-map.json"
    document = json.loads(map_path.read_text()) if map_path.exists() else {}
    document[out.stem] = [
        {"start": hex(area.start_gpa), "end": hex(area.end_gpa), "kind": area.kind, "name": area.name}
        for area in trace.memory_map
    ]
    map_path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
