"""``docs/lockless-walk.md``: every case has its section, and what a section names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "lockless-walk.md").read_text()
FORCED = set(re.findall(r'case_add\(c, b"(\w+)"', (ROOT / "tests" / "native" / "forced.pyx").read_text()))
FIELDS = ("Writer", "Reader sees", "Outcome", "Why", "Backed by")
CASES = 44

SECTIONS = {
    int(number): (title, body)
    for number, title, body in re.findall(r"^### C(\d+)\. (.+)\n([\s\S]*?)(?=^##)", DOCUMENT, re.M)
}


def backing(number: int) -> str:
    return SECTIONS[number][1].split("- **Backed by:**")[1]


def engine_functions() -> set[str]:
    names: set[str] = set()
    for path in [*(ROOT / "kvmmmu").rglob("*.pxd"), *(ROOT / "kvmmmu" / "include").rglob("*.h")]:
        names |= set(re.findall(r"^(?:cdef inline|static inline)[^(\n]*?(\w+)\s*\(", path.read_text(), re.M))
    header = (ROOT / "kvmmmu" / "engine" / "atomics.pxd").read_text()
    return names | set(re.findall(r'(\w+) "kvmmmu_', header)) | set(re.findall(r'"(kvmmmu_\w+)"', header))


def test_every_case_has_its_section() -> None:
    assert sorted(SECTIONS) == list(range(1, CASES + 1))


@pytest.mark.parametrize("number", SECTIONS)
def test_a_section_answers_every_question(number: int) -> None:
    for field in FIELDS:
        assert f"- **{field}:** " in SECTIONS[number][1]


@pytest.mark.parametrize("number", SECTIONS)
def test_the_models_and_tests_of_a_section_exist(number: int) -> None:
    text = backing(number)
    models = [
        name for group in re.findall(r"models? ((?:`\w+`(?:, )?)+)", text) for name in re.findall(r"`(\w+)`", group)
    ]
    forced = [
        name for group in re.findall(r"forced: ((?:`\w+`(?:, )?)+)", text) for name in re.findall(r"`(\w+)`", group)
    ]
    tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert models or forced or tests
    assert [name for name in models if not (ROOT / "models" / f"{name}.pml").is_file()] == []
    assert [name for name in forced if name not in FORCED] == []
    assert [name for path, name in tests if f"def {name}(" not in (ROOT / path).read_text()] == []


@pytest.mark.parametrize("number", SECTIONS)
def test_a_writers_functions_exist(number: int) -> None:
    writer = SECTIONS[number][1].split("- **Reader sees:**")[0]
    known = engine_functions()
    named = set(re.findall(r"`(\w+)`", writer)) - {"mmu_lock", "root_count"}
    assert sorted(named - known) == []


@pytest.mark.parametrize("subject", ["life", "pass", "batch"])
def test_every_forced_case_is_in_the_document(subject: str) -> None:
    cases = (ROOT / "tests" / "native" / f"cases_{subject}.pxd").read_text()
    names = set(re.findall(r"^cdef inline int (c\d+_\w+)\(", cases, re.M))
    assert sorted(name for name in names if f"`{name}`" not in DOCUMENT) == []
    assert sorted(names - FORCED) == []


def test_the_traces_are_what_spin_says_of_steps_that_exist() -> None:
    blocks = re.findall(r"(?:^    .+\n)+", DOCUMENT.split("## What the controls show")[1], re.M)
    steps = set(re.findall(r"\((\w+)\)\n", "".join(blocks)))
    assert len(blocks) >= 6
    assert sorted(steps - engine_functions()) == []


def test_an_spte_is_one_word_that_the_walk_reads_whole() -> None:
    walk = (ROOT / "kvmmmu" / "bits" / "shadow_walk.pxd").read_text()
    body = walk.split("cdef inline int shadow_walk(")[1]
    assert body.count("kvmmmu_ld_acquire_u64(") == 1
    assert "uint64_t kvmmmu_ld_acquire_u64(const uint64_t *p)" in walk
    # No other read of an entry: the address is formed in that call alone.
    assert re.findall(r"\*\(|\barena\[|\bbase\[", body) == []


def test_every_walk_reads_entries_by_loads_that_acquire() -> None:
    engine = ROOT / "kvmmmu" / "engine"
    for room in ("walk", "single", "quick", "paths", "nestedpaths", "nestedcache", "pdecache"):
        text = (engine / f"{room}.pxd").read_text()
        assert re.findall(r"\b(?:kvmmmu_)?ld_u(?:64|32)\b", text) == [], room
        assert "ld_acquire_u64(" in text, room
