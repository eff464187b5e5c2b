"""The trace reader: both forms stream the same records, and nothing corrupt gets through."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kvmmmu.errors import FormatError
from kvmmmu.traces import Chunk, Kind, Trace, bundled_trace, open_trace
from kvmmmu.traces.raw import RECORD

RAM_PAGES = 16
AREAS = [
    {"start": "0x0", "end": hex(RAM_PAGES * 4096 - 1), "kind": "ram", "name": "ram"},
    {"start": "0xfee00000", "end": "0xfeefffff", "kind": "i/o", "name": "apic"},
]
Columns = dict[str, npt.NDArray[Any]]


def small_columns(count: int = 300) -> Columns:
    """A trace of this test's own making; its records need not be a run that could happen."""
    random = np.random.default_rng(1)
    kinds = np.array([0, 1, 2, 3, 4, 5, 10], np.uint8)
    return {
        "a": random.integers(0, 2**63, count, np.uint64),
        "b": random.integers(0, RAM_PAGES * 4096, count, np.uint64),
        "c": random.integers(0, 2**63, count, np.uint64),
        "kind": kinds[random.integers(0, len(kinds), count)],
        "size": random.integers(0, 4, count, np.uint8),
        "flags": random.integers(0, 4, count, np.uint8),
        "cpl": random.choice(np.array([0, 3], np.uint8), count),
        "tb_delta": np.zeros(count, np.uint32),
        "page_gpa": np.array([0x1000, 0x5000], np.uint64),
        "page_t0": random.integers(0, 2**63, (2, 512), np.uint64),
        "page_t1": random.integers(0, 2**63, (2, 512), np.uint64),
        "meta": np.array(json.dumps({"mode": "la48", "nrec": count})),
        "full_replay": np.array("{}"),
    }


def write_npz(folder: Path, columns: Columns, name: str = "small") -> Path:
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **columns)  # type: ignore[arg-type]
    write_map(folder, {"small": AREAS})
    return path


def write_map(folder: Path, document: object) -> None:
    (folder / "memory-map.json").write_text(json.dumps(document))


def raw_bytes(columns: Columns) -> bytes:
    records = np.zeros(len(columns["kind"]), RECORD)
    for name in ("a", "b", "c", "kind", "size", "flags", "cpl"):
        records[name] = columns[name]
    return records.tobytes()


def read_all(trace: Trace, size: int = 64) -> Columns:
    chunks = list(trace.chunks(size))
    starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])[:-1]
    assert [chunk.start for chunk in chunks] == starts.tolist()
    return {
        name: np.concatenate([getattr(chunk, name) for chunk in chunks])
        for name in ("kind", "a", "b", "c", "size", "flags", "cpl")
    }


def same_records(one: Columns, other: Columns) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in ("kind", "a", "b", "c", "size", "flags", "cpl"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.mark.parametrize("size", [1, 7, 299, 300, 1000])
def test_chunks_of_any_size_give_every_record_in_order(tmp_path: Path, size: int) -> None:
    columns = small_columns()
    trace = open_trace(write_npz(tmp_path, columns))
    assert trace.n_records == 300
    assert same_records(read_all(trace, size), columns)


def test_columns_of_a_chunk_are_contiguous_and_of_the_recorded_types(tmp_path: Path) -> None:
    columns = small_columns()
    npz = write_npz(tmp_path, columns)
    (tmp_path / "small-piece.raw").write_bytes(raw_bytes(columns))
    for path in (npz, tmp_path / "small-piece.raw"):
        for chunk in open_trace(path).chunks(100):
            for name in ("a", "b", "c"):
                assert getattr(chunk, name).dtype == np.uint64
            for name in ("kind", "size", "flags", "cpl"):
                assert getattr(chunk, name).dtype == np.uint8
            for name in Chunk.__slots__[1:]:
                assert getattr(chunk, name).flags.c_contiguous
                assert getattr(chunk, name).flags.aligned


def test_a_trace_can_be_read_twice(tmp_path: Path) -> None:
    trace = open_trace(write_npz(tmp_path, small_columns()))
    assert same_records(read_all(trace), read_all(trace))


def test_page_tables_meta_and_map_come_with_the_trace(tmp_path: Path) -> None:
    columns = small_columns()
    trace = open_trace(write_npz(tmp_path, columns))
    assert np.array_equal(trace.page_gpa, columns["page_gpa"])
    assert np.array_equal(trace.page_t0, columns["page_t0"])
    assert trace.page_t1 is not None
    assert np.array_equal(trace.page_t1, columns["page_t1"])
    assert trace.meta["mode"] == "la48"
    assert [(area.start_gpa, area.end_gpa, area.is_memory) for area in trace.memory_map] == [
        (0, RAM_PAGES * 4096 - 1, True),
        (0xFEE00000, 0xFEEFFFFF, False),
    ]


def test_the_bundled_sample_is_a_whole_run_with_its_answer() -> None:
    trace = open_trace(bundled_trace())
    assert trace.page_t1 is not None
    assert sum(len(chunk) for chunk in trace.chunks()) == trace.n_records == 564847
    mmio = sum(int(np.count_nonzero((chunk.kind == Kind.MEM) & (chunk.flags & 2 != 0))) for chunk in trace.chunks())
    assert mmio == trace.meta["nio"]


# ---- the raw form


@pytest.mark.parametrize("packed", [True, False])
def test_a_raw_file_takes_its_pages_and_map_from_the_longest_name_it_begins_with(tmp_path: Path, packed: bool) -> None:
    columns = small_columns()
    write_npz(tmp_path, {**columns, "page_t0": columns["page_t0"] + 1}, "sm")
    write_npz(tmp_path, columns)
    write_map(tmp_path, {"s": [], "small": AREAS, "smaller": []})
    name = "small-first.raw.zst" if packed else "small-first.raw"
    raw = raw_bytes(columns)
    (tmp_path / name).write_bytes(zstandard.compress(raw) if packed else raw)
    trace = open_trace(tmp_path / name)
    assert np.array_equal(trace.page_t0, columns["page_t0"])
    assert trace.n_records == 300


def test_a_store_into_a_table_frame_is_named_so_in_the_raw_form(tmp_path: Path) -> None:
    columns = small_columns(6)
    columns["kind"][:] = [0, 0, 0, 0, 8, 0]
    columns["flags"][:] = [1, 0, 3, 1, 1, 1]
    columns["size"][:] = [3, 3, 3, 4, 3, 2]
    columns["b"][:] = [0x1008, 0x1008, 0x1008, 0x5010, 0x5018, 0x3000]
    write_npz(tmp_path, columns)
    (tmp_path / "small.raw").write_bytes(raw_bytes(columns))
    read = read_all(open_trace(tmp_path / "small.raw"))
    # A load, an MMIO store and a store elsewhere stay what they are; a 16-byte store is two of 8.
    assert read["kind"].tolist() == [10, 0, 0, 10, 10, 0]
    assert read["size"].tolist() == [3, 3, 3, 3, 3, 2]


def test_a_piece_of_a_run_has_no_final_page_tables_and_the_whole_run_has(tmp_path: Path) -> None:
    columns = small_columns()
    write_npz(tmp_path, columns)
    raw = raw_bytes(columns)
    (tmp_path / "small-whole.raw").write_bytes(raw)
    (tmp_path / "small-piece.raw").write_bytes(raw[: 32 * 100])
    assert open_trace(tmp_path / "small-whole.raw").page_t1 is not None
    assert open_trace(tmp_path / "small-piece.raw").page_t1 is None


def test_frames_of_a_packed_file_follow_each_other(tmp_path: Path) -> None:
    columns = small_columns()
    write_npz(
        tmp_path,
        {**columns, "page_gpa": columns["page_gpa"][:1], "page_t0": columns["page_t0"][:1]}
        | {"page_t1": columns["page_t1"][:1]},
    )
    raw = raw_bytes(columns)
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(raw[32 * 150 :]) + stream.flush()
    (tmp_path / "small.raw.zst").write_bytes(zstandard.compress(raw[: 32 * 150]) + unsized)
    assert sum(len(chunk) for chunk in open_trace(tmp_path / "small.raw.zst").chunks(64)) == 300


def test_pages_and_map_can_be_given(tmp_path: Path) -> None:
    columns = small_columns()
    pages = write_npz(tmp_path, columns)
    other = tmp_path / "elsewhere"
    other.mkdir()
    raw = other / "run.raw"
    raw.write_bytes(raw_bytes(columns))
    with pytest.raises(FormatError, match=r"memory-map\.json"):
        open_trace(raw, pages=pages)
    with pytest.raises(FormatError, match="page tables"):
        open_trace(raw, memory_map=AREAS)
    assert open_trace(raw, pages=pages, memory_map=AREAS).n_records == 300
    renamed = other / "map.json"
    renamed.write_text(json.dumps({"run": AREAS}))
    assert open_trace(raw, pages=pages, memory_map=renamed).n_records == 300
    with pytest.raises(FormatError, match="pages"):
        open_trace(pages, pages=pages)


# ---- what is corrupt


def broken(columns: Columns, **change: Any) -> Columns:
    return {name: value for name, value in {**columns, **change}.items() if value is not None}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"kind": None}, "kind"),
    ({"page_t0": None}, "page_t0"),
    ({"meta": None}, "meta"),
    ({"surprise": np.zeros(3)}, "surprise"),
    ({"a": np.zeros(300, np.int64)}, "a"),
    ({"c": np.zeros(299, np.uint64)}, "c"),
    ({"cpl": np.zeros((300, 1), np.uint8)}, "cpl"),
    ({"size": np.zeros(300, np.float64)}, "size"),
    ({"tb_delta": np.zeros(3, np.uint32)}, "tb_delta"),
    ({"kind": np.array(["x"] * 300, object)}, "kind"),
    ({"page_gpa": np.array([0x1000, 0x5001], np.uint64)}, "page_gpa"),
    ({"page_gpa": np.array([0x1000, 0x1000], np.uint64)}, "page_gpa"),
    ({"page_gpa": np.array([0x1000, 0xFEE00000], np.uint64)}, "page_gpa"),
    ({"page_gpa": np.array([0x1000, 2**51], np.uint64)}, "page_gpa"),
    ({"page_gpa": np.zeros(17, np.uint64)}, "page_gpa"),
    ({"page_gpa": np.zeros(0, np.uint64)}, "page_gpa"),
    ({"page_t0": np.zeros((2, 511), np.uint64)}, "page_t0"),
    ({"page_t1": np.zeros((1, 512), np.uint64)}, "page_t1"),
    ({"page_t0": np.asfortranarray(np.ones((2, 512), np.uint64))}, "page_t0"),
    ({"meta": np.array("{")}, "meta"),
    ({"meta": np.array("[1]")}, "meta"),
    ({"meta": np.array("{}")}, r"meta\.mode"),
    ({"meta": np.array('{"mode": "pae", "nrec": -1}')}, r"meta\.nrec"),
    ({"meta": np.array(["{}"])}, "meta"),
    ({"meta": np.array(5)}, "meta"),
]


@pytest.mark.parametrize(("change", "named"), BROKEN, ids=[f"{i}-{named}" for i, (_, named) in enumerate(BROKEN)])
def test_a_column_that_is_not_what_it_should_be_is_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = write_npz(tmp_path, broken(small_columns(), **change))
    with pytest.raises(FormatError, match=rf"small\.npz: {named}"):
        open_trace(path)


@pytest.mark.parametrize(("column", "value"), [("kind", 6), ("kind", 255), ("size", 5), ("flags", 8), ("cpl", 4)])
def test_a_record_of_no_known_kind_is_named_with_its_number(tmp_path: Path, column: str, value: int) -> None:
    columns = small_columns()
    columns[column][123] = value
    npz = write_npz(tmp_path, columns)
    raw = tmp_path / "small.raw"
    raw.write_bytes(raw_bytes(columns))
    for path in (npz, raw):
        with pytest.raises(FormatError, match=rf"{column}: record 123 has {value}"):
            list(open_trace(path).chunks(50))


MAPS: list[tuple[object, str]] = [
    ([], "expected an object"),
    ({"other": AREAS}, "no key"),
    ({"small": {}}, "list"),
    ({"small": []}, "'ram'"),
    ({"small": [5]}, r"small\[0\]"),
    ({"small": [{**AREAS[0], "start": "x"}]}, "start"),
    ({"small": [{**AREAS[0], "start": -4096}]}, "start"),
    ({"small": [{**AREAS[0], "end": hex(2**52)}]}, "end"),
    ({"small": [{**AREAS[0], "start": "0x20000"}]}, "end"),
    ({"small": [{**AREAS[0], "end": "0xfffe"}]}, "4 KiB"),
    ({"small": [{**AREAS[0], "kind": None}]}, "kind"),
    ({"small": [{**AREAS[0], "name": 5}]}, "name"),
    ({"small": [{**AREAS[0], "prot": 5}]}, "prot"),
    ({"small": [AREAS[0], AREAS[0]]}, "overlap"),
]


@pytest.mark.parametrize(("document", "named"), MAPS, ids=[f"{i}-{named}" for i, (_, named) in enumerate(MAPS)])
def test_a_memory_map_that_is_not_what_it_should_be_is_named(tmp_path: Path, document: object, named: str) -> None:
    path = write_npz(tmp_path, small_columns())
    write_map(tmp_path, document)
    with pytest.raises(FormatError, match=named):
        open_trace(path)


def test_a_memory_map_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = write_npz(tmp_path, small_columns())
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 100_000):
        (tmp_path / "memory-map.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"memory-map\.json: memory map"):
            open_trace(path)


@pytest.mark.parametrize("name", ["absent.npz", "absent.raw.zst", "README.md"])
def test_a_file_that_is_not_there_or_not_a_trace_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=name):
        open_trace(tmp_path / name)


def test_a_header_that_claims_more_than_the_file_holds_allocates_nothing(tmp_path: Path) -> None:
    columns = small_columns()
    path = write_npz(tmp_path, broken(columns, page_t0=None))
    for shape in ((2**40, 512), (-2, 512)):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("page_t0.npy", header.getvalue() + bytes(64))
        with pytest.raises(FormatError, match="page_t0"):
            open_trace(path)
        path = write_npz(tmp_path, broken(columns, page_t0=None))


def read_or_refuse(path: Path) -> Columns | None:
    """The records, or None where the reader refused by its own error."""
    try:
        return read_all(open_trace(path))
    except FormatError as error:
        assert str(path.parent) in str(error)
        return None


def pack_npz(folder: Path) -> bytes:
    return write_npz(folder, small_columns(2000)).read_bytes()


def pack_zst(folder: Path) -> bytes:
    write_npz(folder, small_columns(2000))
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    return compressor.compress(raw_bytes(small_columns(2000)))


FORMS: list[tuple[str, Callable[[Path], bytes]]] = [("cut.npz", pack_npz), ("cut.raw.zst", pack_zst)]


@pytest.mark.parametrize(("name", "pack"), FORMS, ids=["npz", "zst"])
@given(data=st.data())
def test_a_truncated_file_is_refused_wherever_it_ends(
    folder: Path, name: str, pack: Callable[[Path], bytes], data: st.DataObject
) -> None:
    content = pack(folder)
    path = folder / f"small{name}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        assert read_or_refuse(path) is None
    finally:
        path.unlink()


@pytest.mark.parametrize(("name", "pack"), FORMS, ids=["npz", "zst"])
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_changes_nothing(
    folder: Path, name: str, pack: Callable[[Path], bytes], data: st.DataObject
) -> None:
    content = bytearray(pack(folder))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / f"small{name}"
    path.write_bytes(content)
    try:
        read = read_or_refuse(path)
        if read is not None and name.endswith("npz"):
            assert same_records(read, small_columns(2000))
        elif read is not None:
            written = small_columns(2000)
            # The raw form names table stores; everything else is as written.
            assert all(np.array_equal(read[column], written[column]) for column in ("a", "b", "c", "flags", "cpl"))
    finally:
        path.unlink()


@given(content=st.binary(max_size=400))
def test_bytes_of_any_kind_are_refused(folder: Path, content: bytes) -> None:
    write_npz(folder, small_columns())
    for name in ("smallany.npz", "smallany.raw.zst"):
        path = folder / name
        path.write_bytes(content)
        try:
            assert read_or_refuse(path) is None
        finally:
            path.unlink()


def test_a_raw_file_that_ends_inside_a_record_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path, small_columns())
    for name, content in (("small.raw", bytes(33)), ("small.raw.zst", zstandard.compress(bytes(33)))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            list(open_trace(tmp_path / name).chunks())


def test_reading_the_shared_traces_agrees_with_their_own_counts(shared: Path) -> None:
    for path in sorted((shared / "traces").glob("*.npz")):
        trace = open_trace(path)
        faults = sum(int(np.count_nonzero(chunk.kind == Kind.PF)) for chunk in trace.chunks())
        assert faults == trace.meta["npf"]


def test_table_stores_named_from_raw_records_are_those_the_recorder_named(shared: Path) -> None:
    def stores(path: Path) -> npt.NDArray[np.uint64]:
        rows = []
        for chunk in open_trace(path).chunks():
            held = chunk.kind == Kind.PTSTORE
            rows.append(np.stack([chunk.a[held], chunk.b[held], chunk.c[held], chunk.size[held].astype(np.uint64)], 1))
        return np.concatenate(rows)

    compact = stores(shared / "traces/linux-x86_64-4level-mmio.npz")
    raw = stores(shared / "traces/linux-x86_64-4level-mmio-first1M.raw.zst")
    assert len(raw) > 1000
    assert np.array_equal(raw, compact[: len(raw)])


@given(
    header=st.text(max_size=120)
    | st.builds(
        lambda descr, order, shape: f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}",
        st.sampled_from(["'<u8'", "'|u1'", "'|O'", "[('a', '<u8')]", "'<U9'", "5", "(", "'x'"]),
        st.sampled_from(["False", "True", "None", "'"]),
        st.sampled_from(
            [
                "(300,)",
                "()",
                "(300, 1)",
                "(-1,)",
                "(2.5,)",
                "(99999999999999999999,)",
                "300",
                "[300]",
                "('",
            ]
        ),
    )
)
def test_an_array_header_of_any_text_is_refused_unless_it_says_what_it_should(folder: Path, header: str) -> None:
    columns = small_columns()
    good = "{'descr': '|u1', 'fortran_order': False, 'shape': (300,), }"
    path = write_npz(folder, broken(columns, kind=None), "smallheader")
    text = header.encode()
    with zipfile.ZipFile(path, "a") as archive:
        head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        archive.writestr("kind.npy", head + columns["kind"].tobytes())
    try:
        read = read_or_refuse(path)
        assert read is None or "".join(header.split()) == "".join(good.split())
    finally:
        path.unlink()
