"""The page tables of running kernels agree with the emulator, and a changed account is noticed."""

from pathlib import Path

import numpy as np
import pytest

from kvmmmu.conform import dumps
from kvmmmu.dumps import PageTableDump
from kvmmmu.errors import FormatError

SLICES = sorted((Path(__file__).parent.parent / "data" / "dumps").glob("*.npz"))
SHARED = Path(__file__).parents[3] / "shared" / "dumps"


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_every_account_of_the_slices_agrees(path):
    report = dumps.check(path)
    assert report.ok and report.kind == "dump", "\n".join(report.disagreements)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the full dumps are not at {SHARED}: only the slices were checked")
def test_every_account_of_the_shared_dumps_agrees():
    paths = sorted(SHARED.glob("*/*.npz"))
    assert paths
    for path in paths:
        report = dumps.check(path)
        assert report.ok, "\n".join([report.file, *report.disagreements])


def rewrite(tmp_path, change, source):
    with np.load(source) as file:
        columns = {name: file[name] for name in file.files}
    change(columns)
    path = tmp_path / "changed.npz"
    np.savez(path, **columns)
    return path


def flip(column, bit, row=7):
    def change(columns):
        columns[column][row] ^= columns[column].dtype.type(bit)

    return change


def without_row(columns):
    for name in ("tlb_gva", "tlb_gpa", "tlb_flags"):
        columns[name] = np.delete(columns[name], 5)
    for name in ("gva", "gpa", "size", "pte", "leaf_flags", "eff", "in_ram"):
        columns[name] = np.delete(columns[name], 5)


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "change",
    [
        flip("tlb_gpa", 0x1000),
        flip("tlb_flags", 2),
        flip("tlb_flags", 64),
        flip("gpa", 0x1000),
        flip("size", 0x3000),
        flip("pte", 1 << 9),
        flip("leaf_flags", 128),
        flip("eff", 1),
        flip("eff", 4),
        flip("mem_prot", 2),
        flip("mem_end", 0x1000),
        without_row,  # then a page stands in a hole
    ],
)
def test_a_changed_account_is_a_disagreement(tmp_path, path, change):
    report = dumps.check(rewrite(tmp_path, change, path))
    assert not report.ok and report.disagreements


def test_a_page_mapped_behind_the_emulators_back_is_found(tmp_path):
    def change(columns):
        tables = PageTableDump.load(SLICES[0])
        leaf = tables.paging().walk_result(int(tables.columns["tlb_gva"][3])).entries[-1]
        page = int(np.flatnonzero(columns["page_gpa"] == leaf.gpa & ~0xFFF)[0])
        words = columns["page_data"][page].view(np.uint32)
        words[np.flatnonzero(words == 0)[0]] = 0x5007

    assert not dumps.check(rewrite(tmp_path, change, SLICES[0])).ok


def test_tables_that_map_nothing_agree_with_nothing(tmp_path):
    def change(columns):
        columns["page_data"] = np.zeros_like(columns["page_data"])

    report = dumps.check(rewrite(tmp_path, change, SLICES[0]))
    assert not report.ok and report.agreed < report.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("page_data"), "not a page-table dump"),
        (lambda c: c.update(more=c["gva"]), "unknown column 'more'"),
        (lambda c: c.update(page_data=c["page_data"][:, :500]), "'page_data' has shape"),
        (lambda c: c.update(page_gpa=c["page_gpa"] + np.uint64(8)), "multiple of 4096"),
        (lambda c: c["page_gpa"].__setitem__(1, c["page_gpa"][0]), "overlaps"),
        (lambda c: c.update(tlb_gpa=c["tlb_gpa"][1:]), "'tlb_gpa' has shape"),
        (lambda c: c.pop("gva"), "'gva' is missing"),
        (lambda c: c.pop("tlb_gva"), "'tlb_gva' is missing"),
        (lambda c: c.update(meta=np.array("{")), "'meta' is not JSON"),
        (lambda c: c.update(meta=np.array("[]")), "'meta' holds list"),
        (lambda c: c.update(meta=np.array('{"cr0": 1}')), "meta.cr3 is None"),
    ],
)
def test_a_file_that_is_not_as_described_is_a_format_error(tmp_path, change, message):
    path = rewrite(tmp_path, change, SLICES[0])
    with pytest.raises(FormatError, match=message):
        dumps.check(path)
