"""Make the small copies of the public truth that the tests carry: ``python tests/data/make_slices.py ../shared``.

Rows are drawn at random with a fixed seed, the same number from every kind of answer of a file, so that rare
answers are there too.  A dump is copied whole (the smallest one).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROWS_PER_KIND = 25
HERE = Path(__file__).parent


def slice_vectors(source: Path, target: Path) -> None:
    """Rows of every (kind, error code, KVM differs) of a vectors file, with their words."""
    file = np.load(source)
    rng = np.random.default_rng(2011_06_22)
    columns = {name: file[name] for name in file.files}
    rows = len(columns["exp_kind"])
    key = columns["exp_kind"].astype(np.uint64) << np.uint64(60) | columns["kvm_diff"].astype(np.uint64) << np.uint64(
        59
    )
    key |= columns["exp_err"] & np.uint64((1 << 34) - 1)
    chosen = []
    for value in np.unique(key):
        where = np.flatnonzero(key == value)
        most = ROWS_PER_KIND if value else 4 * ROWS_PER_KIND
        chosen.append(rng.choice(where, min(most, len(where)), replace=False))
    take = np.sort(np.concatenate(chosen))
    offsets = columns["ent_off"]
    words = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in take])
    out = {}
    for name, values in columns.items():
        if name == "ent_off":
            out[name] = np.concatenate([[0], np.cumsum(offsets[take + 1] - offsets[take])])
        elif name in ("ent_pa", "ent_val", "ent_set", "kvm_set_xor"):
            out[name] = values[words]
        else:
            assert len(values) == rows, name
            out[name] = values[take]
    np.savez_compressed(target, **out)


def main(shared: Path) -> None:
    """Write ``vectors/`` and ``dumps/`` beside this file."""
    (HERE / "vectors").mkdir(exist_ok=True)
    (HERE / "dumps").mkdir(exist_ok=True)
    for source in sorted((shared / "vectors").glob("*.npz")):
        slice_vectors(source, HERE / "vectors" / source.name)
    for mode in ("p32", "pae"):
        source = shared / "dumps" / mode / "snap_cpl3_0.npz"
        (HERE / "dumps" / f"{mode}.npz").write_bytes(source.read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
