"""Make the small copies of golden runs that the tests carry: ``python tests/data/make_golden_slice.py ../shared``.

The same scripts out of every archive: one or two per behaviour, and random ones of every mode.  What an archive does
not hold is left out of its copy.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "cr3_switch dirty_long dirty_pt flat flood_long large2m_thp lazy_backing mmio_basic mmio_remap mmio_slot "
    "p32_quadrant pae_pdpte paging_toggle_pae prefetch pt_in_ro "
    "unsync_long wp0 rand002_long rand007_pae rand008_p32 rand029_flat"
).split()


# Of the runs of Linux 3.1, where the eras differ: one script per point of the review of 2011, and what else changed.
OLD = (
    "seed_a_create_flat seed_b_recreate_p32 seed_c_gfn0_long seed_d_remap_long seed_d_emulated seed_e_remap_p32 "
    "seed_e_switch_long seed_f_stalegfn_long seed_g_delbase mmio_basic mmio_slot pae_pdpte nx_toggle two_levels "
    "dirty_pt unsync_p32 cr3_bad flood_long r31_006_pae r31_019_flat"
).split()


def slice_archive(source: Path, target: Path, chosen: list[str]) -> None:
    """Members of the chosen scripts, and ``setup.txt``."""
    with tarfile.open(source, "r:xz") as archive, tarfile.open(target, "w:xz", preset=9) as out:
        for member in archive:
            name = member.name.rsplit("/", 1)[-1]
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None or not (name == "setup.txt" or name.split(".")[0] in chosen):
                continue
            data = stream.read()
            # Nothing of the machine that makes the copy stands in it.
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))


def main(shared: Path) -> None:
    """Write ``golden/``, ``golden-intel/`` and ``golden-3.1/`` beside this file."""
    for folder, chosen in {"golden": SCRIPTS, "golden-intel": SCRIPTS, "golden-3.1": OLD}.items():
        (HERE / folder).mkdir(exist_ok=True)
        for source in sorted((shared / folder).glob("*.tar.xz")):
            slice_archive(source, HERE / folder / source.name, chosen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
