"""Every row of the vectors agrees, and a wrong row, a wrong table or a wrong file is told apart."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmmmu.conform import vectors
from kvmmmu.errors import ArgumentError, FormatError, KvmmmuError

SLICES = sorted((Path(__file__).parent.parent / "data" / "vectors").glob("*.npz"))
SHARED = Path(__file__).parents[3] / "shared" / "vectors"
PLAIN = next(path for path in SLICES if path.name == "32bit_bochs.npz")


@pytest.mark.parametrize("dialect", ["sdm", "kvm"])
@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_every_row_of_the_slices_agrees(path, dialect):
    report = vectors.check(path, dialect=dialect)
    assert report.ok and report.kind == "vectors", "\n".join(report.disagreements)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the full vectors are not at {SHARED}: only the slices were checked")
@pytest.mark.parametrize("dialect", ["sdm", "kvm"])
def test_every_row_of_the_shared_files_agrees(dialect):
    paths = sorted(SHARED.glob("*.npz"))
    assert paths
    for path in paths:
        report = vectors.check(path, dialect=dialect)
        assert report.ok, "\n".join([report.file, *report.disagreements])


def rewrite(tmp_path, change, source=PLAIN):
    with np.load(source) as file:
        columns = {name: file[name] for name in file.files}
    change(columns)
    path = tmp_path / "changed.npz"
    np.savez(path, **columns)
    return path


def first(columns, kind, kvm_diff=0):
    return int(np.flatnonzero((columns["exp_kind"] == kind) & (columns["kvm_diff"] == kvm_diff))[0])


@pytest.mark.parametrize(
    ("kind", "column", "flip"), [(0, "exp_pa", 1), (0, "exp_page_bits", 1), (0, "exp_kind", 1), (1, "exp_err", 1)]
)
def test_a_changed_answer_is_one_disagreement_and_is_described(tmp_path, kind, column, flip):
    def change(columns):
        columns[column][first(columns, kind)] ^= flip

    report = vectors.check(rewrite(tmp_path, change))
    assert report.total - report.agreed == 1 and not report.ok
    assert len(report.disagreements) == 1 and "expected" in report.disagreements[0]


def test_a_changed_table_after_the_walk_is_a_disagreement(tmp_path):
    def change(columns):
        columns["ent_set"][columns["ent_off"][first(columns, 0)]] ^= 1 << 61

    report = vectors.check(rewrite(tmp_path, change))
    assert report.total - report.agreed == 1
    assert "after, got" in report.disagreements[0]


def test_the_dialects_differ_where_the_file_says_so(tmp_path):
    def change(columns):
        columns["kvm_diff"][:] = 0

    path = rewrite(tmp_path, change)
    with np.load(PLAIN) as file:
        differ = int(file["kvm_diff"].sum())
    assert differ > 0
    assert vectors.check(path).ok
    report = vectors.check(path, dialect="kvm")
    assert report.total - report.agreed == differ


def test_show_limits_the_descriptions_not_the_count(tmp_path):
    def change(columns):
        columns["exp_err"] ^= np.uint64(1)

    report = vectors.check(rewrite(tmp_path, change), show=2)
    assert len(report.disagreements) == 2 < report.total - report.agreed


def drop(name):
    return lambda columns: columns.pop(name)


def put(name, value):
    return lambda columns: columns.__setitem__(name, value(columns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("surprise", lambda c: c["cr0"]), "unknown column 'surprise'"),
        (drop("exp_kind"), "not a vectors file"),
        (drop("ent_off"), "not a vectors file"),
        (put("cr3", lambda c: c["cr3"][:-1]), "column 'cr3' has shape"),
        (put("cr3", lambda c: c["cr3"].astype(float)), "column 'cr3' has dtype float64"),
        (put("cr3", lambda c: c["cr3"].reshape(1, -1)), "column 'cr3' has shape"),
        (put("access", lambda c: c["access"] + 3), "'access' has the value"),
        (put("maxphyaddr", lambda c: c["maxphyaddr"] * 0 + 53), "'maxphyaddr' has the value 53"),
        (put("maxphyaddr", lambda c: c["maxphyaddr"] * 0), "'maxphyaddr' has the value 0"),
        (put("cpl", lambda c: c["cpl"].astype(np.int64) - 1), "'cpl' has values outside uint8"),
        (put("ent_off", lambda c: c["ent_off"][::-1].copy()), "'ent_off' must rise"),
        (put("ent_pa", lambda c: c["ent_pa"] + np.uint64(1)), "not a multiple of 8"),
        (put("ent_val", lambda c: c["ent_val"][1:]), "column 'ent_val' has shape"),
    ],
)
def test_a_file_that_is_not_as_described_is_a_format_error_naming_the_column(tmp_path, change, message):
    path = rewrite(tmp_path, change)
    with pytest.raises(FormatError, match=message) as info:
        vectors.check(path)
    assert str(path) in str(info.value)


def test_a_row_with_more_words_than_a_case_may_have_is_a_format_error(tmp_path):
    def change(columns):
        columns["ent_off"][1:] = columns["ent_off"][-1]

    with pytest.raises(FormatError, match="'ent_off' gives one row"):
        vectors.check(rewrite(tmp_path, change, next(path for path in SLICES if path.name == "over_ept.npz")))


def test_missing_columns_are_zero(tmp_path):
    def zero(columns):
        columns["pkru"][:] = 0
        columns["ac"][:] = 0

    def remove(columns):
        del columns["pkru"], columns["ac"]

    source = next(path for path in SLICES if path.name == "4level_qemu.npz")
    zeroed = vectors.check(rewrite(tmp_path, zero, source), show=10**6)
    removed = vectors.check(rewrite(tmp_path, remove, source), show=10**6)
    assert 0 < zeroed.agreed < zeroed.total
    assert removed.disagreements == zeroed.disagreements


def test_an_unknown_dialect_is_refused():
    with pytest.raises(ArgumentError, match="dialect"):
        vectors.check(PLAIN, dialect="arm")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        vectors.check("nowhere.npz")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 20000), at=st.integers(0, 20000), byte=st.integers(1, 255), truncate=st.booleans())
def test_truncated_and_corrupted_files_are_a_named_error_or_still_readable(tmp_path, cut, at, byte, truncate):
    source = next(path for path in SLICES if path.name == "4level_kut.npz").read_bytes()
    damaged = bytearray(source)
    if truncate:
        del damaged[min(cut, len(damaged) - 1) :]
    else:
        damaged[at % len(damaged)] ^= byte
    path = tmp_path / "damaged.npz"
    path.write_bytes(damaged)
    try:
        vectors.check(path)
    except KvmmmuError as e:
        assert str(path) in str(e)
