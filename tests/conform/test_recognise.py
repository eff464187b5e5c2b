"""Which files are truth: what looks like it and is not recognised is an error, never skipped."""

from pathlib import Path

import numpy as np
import pytest

from kvmmmu.conform.recognise import find, recognise
from kvmmmu.errors import FormatError


def npz(path: Path, *names: str) -> Path:
    np.savez(path, **{name: np.zeros(1) for name in names})  # type: ignore[arg-type]
    return path


def test_a_file_is_known_by_its_columns_not_by_its_name(tmp_path: Path) -> None:
    assert recognise(npz(tmp_path / "x.npz", "ent_off", "gva")) == "vectors"
    assert recognise(npz(tmp_path / "y.npz", "page_data", "page_gpa", "gva")) == "dump"
    assert recognise(npz(tmp_path / "z.npz", "page_t0", "page_gpa", "kind")) == "trace"
    assert recognise(tmp_path / "run.raw.zst") == "trace"


@pytest.mark.parametrize("columns", [(), ("gva",), ("page_t0", "page_data")])
def test_columns_of_no_kind_or_of_two_are_an_error(tmp_path: Path, columns: tuple[str, ...]) -> None:
    with pytest.raises(FormatError, match="exactly one of"):
        recognise(npz(tmp_path / "x.npz", *columns))


def test_an_archive_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError, match=r"x\.npz: file: not an \.npz archive"):
        recognise(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["a.npy", "golden.xz", "run.zst"])
def test_a_stranger_that_looks_like_data_stops_the_search(tmp_path: Path, name: str) -> None:
    npz(tmp_path / "x.npz", "ent_off")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError, match=name):
        list(find([tmp_path]))


def test_a_directory_is_searched_in_order_and_notes_beside_the_data_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "memory-map.json").write_text("{}")
    npz(tmp_path / "b" / "two.npz", "ent_off")
    npz(tmp_path / "b" / "one.npz", "page_data")
    npz(tmp_path / "z.npz", "page_t0")
    assert [(path.name, kind) for path, kind in find([tmp_path])] == [
        ("z.npz", "trace"),
        ("one.npz", "dump"),
        ("two.npz", "vectors"),
    ]


def test_a_file_that_is_named_must_be_truth(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("notes")
    with pytest.raises(FormatError, match=r"README\.md"):
        list(find([tmp_path / "README.md"]))
    with pytest.raises(FormatError, match="no such file"):
        list(find([tmp_path / "absent"]))


def test_every_shared_file_of_the_known_kinds_is_recognised(shared: Path) -> None:
    kinds = {folder: {kind for _, kind in find([shared / folder])} for folder in ("vectors", "dumps", "traces")}
    assert kinds == {"vectors": {"vectors"}, "dumps": {"dump"}, "traces": {"trace"}}
