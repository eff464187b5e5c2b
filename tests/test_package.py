"""What an installed kvmmmu carries."""

import re
from pathlib import Path

import kvmmmu
from kvmmmu import _core


def test_the_headers_are_where_get_include_says() -> None:
    assert (Path(kvmmmu.get_include()) / "kvmmmu" / "bits.h").is_file()


def test_the_citation_names_this_version(root: Path) -> None:
    versions = re.findall(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.M)
    assert versions == [kvmmmu.__version__]


def test_the_extension_stands_beside_the_package_it_belongs_to() -> None:
    assert Path(_core.__file__).parent == Path(kvmmmu.__file__).parent


def test_kernels_are_installed_and_engine_structs_are_not_promised(root: Path) -> None:
    assert (Path(kvmmmu.__file__).parent / "bits" / "mmio.pxd").is_file()
    metadata = (root / "pyproject.toml").read_text()
    assert '"kvmmmu.bits" = ["*.pxd"]' in metadata
    assert '"kvmmmu.engine"' not in metadata
