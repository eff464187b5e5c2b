"""The house rules that a machine can check: floors, directive lines, sizes, literals."""

import ast
import graphlib
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvmmmu"

DIRECTIVES = "# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True"

# Inside engine/ a file cimports only those before it.  The one list; add a new room where the truth asks for it.
ENGINE_ORDER = (
    "answers hooks state atomics counters claim locks memory codec events drain memmap reserve memslots slotsets "
    "hostmem walk tlbcache pscache tlbflush quick translate single nestedpaths accept pdecache rows ring "
    "paths gather nestedcache nested batch choose grants cases snapshot hostpages pfns pages nxpages rmap tlb "
    "lookup guest sptes track tlbwalk tlblist zap leaf prefetch sync rewrite shadow roles tdp passes recovery "
    "trees mmiocache roots fault notifier dirty region birth write registers emulate vcpu many moves insn replay "
    "embed"
).split()

# From the ground up; a floor imports only from itself and the floors below.
FLOORS: list[tuple[str, set[str]]] = [
    ("bits", {"bits", "errors", "outcome", "_version"}),
    ("engine", {"engine"}),
    ("core", {"_core"}),
    (
        "face",
        {
            *("_arguments", "behaviour", "constants", "cpu", "events", "memslots", "mmio", "paging", "records"),
            *("events31", "spte_host"),
            # What face objects hand out or print themselves with.
            # ``check`` and ``trees`` look at a copy of the state: they may stand below the VM that offers them.
            *("check", "execution", "explain", "sptes", "stats", "tlb", "trees", "vcpu", "vm", "walks"),
            *("vcpu_explain", "vcpu_replay", "vcpu_tlb"),
        },
    ),
    ("eyes and readers", {"dumps", "golden", "traces"}),
    ("conform", {"conform"}),
    ("analysis", {"analysis"}),
    ("adapters", {"adapters"}),
    ("cli", {"cli"}),
]
FLOOR_OF = {room: number for number, (_, rooms) in enumerate(FLOORS) for room in rooms}
# The front door lists names of the face and of the eyes.
FRONT = next(number for number, (name, _) in enumerate(FLOORS) if name == "eyes and readers")

ROOM_LINES = 500
# The door cannot be split (one extension, no include); it holds checks only and is kept short by review.
DOOR_LINES = 2320
# Every struct of the machine stands in one file, by design.
STATE_LINES = 700

_CYTHON_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+c?import\s+\(?([^#]*)|c?import\s+([\w.]+))")


def sources(*suffixes: str) -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*") if path.suffix in suffixes)


CYTHON = sources(".pxd", ".pyx")
PYTHON = sources(".py", ".pyi")
KERNELS = [path for path in CYTHON if path.parent.name in ("bits", "engine")]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_imports(text: str) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
            assert node.level == 0, f"line {node.lineno}: relative import"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found += [(node.lineno, str(name.value)) for name in node.args if isinstance(name, ast.Constant)]
    return found


def cython_imports(text: str) -> list[tuple[int, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        match = _CYTHON_IMPORT.match(line)
        if match and match[3]:
            found.append((number, match[3]))
        elif match:
            found += [(number, f"{match[1]}.{name.strip()}") for name in match[2].split(",") if name.strip(" ()")]
    return found


def place(module: str) -> tuple[int, int] | None:
    """Floor and, inside engine/, the position on it; None for modules that are not ours or name the front door."""
    parts = module.split(".")
    if parts[0] != "kvmmmu" or len(parts) < 2 or parts[1] not in FLOOR_OF:
        return None
    position = ENGINE_ORDER.index(parts[2]) if parts[1] == "engine" and len(parts) > 2 and parts[2] != "*" else -1
    return FLOOR_OF[parts[1]], position


def upward_imports(path: Path) -> list[str]:
    module = module_of(path)
    here = (FRONT, -1) if module == "kvmmmu" else place(module)
    assert here is not None, f"{ids(path)} stands on no floor: add its room to FLOORS"
    text = path.read_text()
    found = cython_imports(text) if path.suffix in (".pxd", ".pyx") else python_imports(text)
    wrong = []
    for number, target in found:
        there = place(target)
        # The same module twice: a name imported from a module reads as kvmmmu.engine.state.Vm.
        if there is None or target.startswith(module + "."):
            continue
        looks_up = there[0] > here[0] or (there[0] == here[0] and -1 < here[1] <= there[1])
        if looks_up:
            wrong.append(f"{ids(path)}:{number}: imports {target}, which stands above it")
    return wrong


def possible_order() -> list[str]:
    """The present order with new rooms put where their cimports allow; raises CycleError where nothing can."""
    needs = {}
    for path in (PACKAGE / "engine").glob("*.pxd"):
        targets = [target.split(".") for _, target in cython_imports(path.read_text())]
        needs[path.stem] = {parts[2] for parts in targets if parts[:2] == ["kvmmmu", "engine"]} - {path.stem}
    del needs["__init__"]
    sorter = graphlib.TopologicalSorter(needs)
    sorter.prepare()
    order: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready += sorter.get_ready()
        ready.sort(key=lambda room: ENGINE_ORDER.index(room) if room in ENGINE_ORDER else -1)
        order.append(ready.pop(0))
        sorter.done(order[-1])
    return order


def test_the_cimports_of_the_engine_have_an_order() -> None:
    assert set(possible_order()) >= {"state", "walk", "replay"}


@pytest.mark.parametrize("path", CYTHON + PYTHON, ids=ids)
def test_a_floor_imports_only_from_floors_below(path: Path) -> None:
    assert upward_imports(path) == []


def test_every_engine_room_has_its_place_in_the_order() -> None:
    rooms = {path.stem for path in (PACKAGE / "engine").glob("*.pxd")} - {"__init__"}
    assert rooms <= set(ENGINE_ORDER), f"an order that the cimports allow: {' '.join(possible_order())}"


def test_an_upward_import_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    low, high = ENGINE_ORDER[0], ENGINE_ORDER[-1]
    room = tmp_path / "kvmmmu" / "engine" / f"{low}.pxd"
    room.parent.mkdir(parents=True)
    room.write_text(f"from kvmmmu.engine.{high} cimport step\nfrom kvmmmu.bits.spte cimport spte_pfn\n")
    assert len(upward_imports(room)) == 1
    face = tmp_path / "kvmmmu" / "sptes.py"
    face.write_text("from kvmmmu import cli\nimport importlib\nimportlib.import_module('kvmmmu.conform.run')\n")
    assert len(upward_imports(face)) == 2


_CIMPORT = re.compile(r"^from [\w.]+ cimport (\([^)]*\)|[^\n(]+)$", re.M)


def unused_cimports(text: str) -> list[str]:
    unused = []
    for statement in _CIMPORT.finditer(text):
        rest = text[: statement.start()] + text[statement.end() :]
        for name in re.findall(r"\w+(?=\s*(?:,|\)|$))", statement[1]):
            if not re.search(rf"\b{name}\b", rest):
                unused.append(name)
    return unused


# ``state`` passes on the structs of ``answers``; the package's own names are for those who cimport it.
@pytest.mark.parametrize("path", [path for path in KERNELS if path.name not in ("state.pxd", "__init__.pxd")], ids=ids)
def test_what_a_room_cimports_it_uses(path: Path) -> None:
    assert unused_cimports(path.read_text()) == []


def test_an_unused_cimport_would_be_seen() -> None:
    assert unused_cimports("from a cimport (\n    b, c,\n)\nfrom d cimport e, f\nb(e)\n") == ["c", "f"]


def test_every_function_of_the_engine_has_a_caller() -> None:
    users = [*CYTHON, *(ROOT / "tests").rglob("*.p*x*"), *(ROOT / "benchmarks").glob("*.pyx")]
    said = Counter(re.findall(r"\w+", _CIMPORT.sub("", "\n".join(path.read_text() for path in users))))
    for path in (PACKAGE / "engine").glob("*.pxd"):
        for name in re.findall(r"^cdef inline [^(\n]*?(\w+)\(", path.read_text(), re.M):
            assert said[name] > 1, f"{ids(path)}: nobody calls {name}"


@pytest.mark.parametrize("path", [path for path in CYTHON if path.stat().st_size], ids=ids)
def test_every_cython_file_begins_with_the_directive_line(path: Path) -> None:
    assert path.read_text().splitlines()[0] == DIRECTIVES


@pytest.mark.parametrize("path", CYTHON + PYTHON + sources(".h"), ids=ids)
def test_no_room_is_longer_than_a_room(path: Path) -> None:
    limit = DOOR_LINES if path.name.startswith("_core.py") else STATE_LINES if path.name == "state.pxd" else ROOM_LINES
    assert len(path.read_text().splitlines()) <= limit


def without_comments(path: Path) -> list[tuple[int, str]]:
    text = re.sub(r'"""[\s\S]*?"""', lambda match: "\n" * match[0].count("\n"), path.read_text())
    return [(number, line.split("#")[0]) for number, line in enumerate(text.splitlines(), 1)]


def wide_literals(line: str) -> list[str]:
    """Integer literals of more than 32 bits, and shifts of an int literal that leave an int."""
    words = re.findall(r"\b(?:0x[0-9a-fA-F]+|\d+)\b", line)
    wide = [word for word in words if int(word, 16 if "x" in word else 10) >= 1 << 32]
    wide += re.findall(r"\b\d+ *<< *(?:3[1-9]|[4-9]\d)\b", line)
    return wide


@pytest.mark.parametrize("path", CYTHON, ids=ids)
def test_64_bit_constants_stand_in_bits_h_alone(path: Path) -> None:
    assert [(number, wide_literals(line)) for number, line in without_comments(path) if wide_literals(line)] == []


def test_a_wide_literal_would_be_seen() -> None:
    assert wide_literals("x = 0x100000000") == ["0x100000000"]
    assert wide_literals("x = 1 << 52") == ["1 << 52"]
    assert wide_literals("x = 4294967296") == ["4294967296"]
    assert wide_literals("x = 0xffffffff + (1 << 30) + y[12]") == []


@pytest.mark.parametrize("path", KERNELS, ids=ids)
def test_kernels_take_raw_pointers_not_memoryviews(path: Path) -> None:
    views = [number for number, line in without_comments(path) if re.search(r"\w\[\s*:(:\s*1?)?\s*[\],]", line)]
    assert views == []


@pytest.mark.parametrize("path", CYTHON + PYTHON, ids=ids)
def test_nothing_prints(path: Path) -> None:
    assert [number for number, line in without_comments(path) if re.search(r"(?<![.\w])print\(", line)] == []
