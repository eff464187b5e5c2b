"""Cut a few scripts out of the golden archives: ``make_golden_slice.py SHARED`` writes beside itself.

Each slice keeps the archive's form, so that the suite checks it as it would check the whole.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

SLICES = {
    "golden": {
        "shadow": (
            *("mmio_slot", "mmio_remap", "unsync_long", "p32_quadrant", "pae_pdpte", "wp0", "prefetch"),
            "lazy_backing",
        ),
        "tdp1": ("mmio_slot", "dirty_long"),
        "tdp0": ("large2m_thp",),
    },
    "golden-intel": {"ept1": ("mmio_basic", "dirty_pt"), "eptad0": ("dirty_pt",), "ept0": ("flood_long",)},
}


def cut(source: Path, target: Path, wanted: set[str]) -> None:
    """Copy the members of the wanted scripts (and the set-up) into a new archive, stripped of owners and dates."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as whole, tarfile.open(target, "w:xz", preset=9) as part:
        for member in sorted(whole.getmembers(), key=lambda member: member.name):
            if not member.isfile() or not ({Path(member.name).name.split(".")[0]} & (wanted | {"setup"})):
                continue
            stream = whole.extractfile(member)
            assert stream is not None
            data = stream.read()
            entry = tarfile.TarInfo(member.name)
            entry.size = len(data)
            part.addfile(entry, io.BytesIO(data))


def main(shared: Path) -> None:
    """Write every slice."""
    here = Path(__file__).parent
    for folder, archives in SLICES.items():
        for name, scripts in archives.items():
            cut(shared / folder / f"{name}.tar.xz", here / folder / f"{name}.tar.xz", set(scripts))
        every = {script for scripts in archives.values() for script in scripts}
        cut(shared / folder / "scripts.tar.xz", here / folder / "scripts.tar.xz", every)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
