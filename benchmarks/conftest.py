"""What every benchmark needs: C reference loops compiled on the spot, and ratios beside the times."""

import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kvmmmu
from kvmmmu.analysis.measure import Work, quartiles, race, ratios

HERE = Path(__file__).resolve().parent
FLAGS = ["-O3", "-fwrapv", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ratios")
    group.addoption("--ratios", type=Path, help="Measure ratios only and append them to this file, one JSON a line.")
    group.addoption("--seconds", type=float, default=1.0, help="Time spent on each row of ratios.")
    group.addoption("--quick", action="store_true", help="Leave out what takes long to set up.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where only ratios are wanted, what reports none is left out: it has a command of its own."""
    if config.getoption("--ratios"):
        wanted = [item for item in items if "rows" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether benchmarks are to leave out what takes long to set up."""
    return bool(request.config.getoption("--quick"))


def compiler() -> str:
    found = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if found is None:
        pytest.fail("benchmarks need a C compiler (gcc or cc) for their reference loops")
    return found


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compile a C file of this directory with gcc -O3 and load it."""
    folder = tmp_path_factory.mktemp("reference")

    @functools.cache
    def compile_one(name: str) -> ctypes.CDLL:
        out = folder / f"{Path(name).stem}.so"
        subprocess.run([compiler(), *FLAGS, str(HERE / name), "-o", str(out)], check=True)
        library = ctypes.CDLL(str(out))
        for function in ("ref_translate", "ref_translate_ad", "ref_translate_unrolled"):
            if hasattr(library, function):
                pointer = ctypes.c_void_p
                getattr(library, function).argtypes = [*[pointer] * 3, ctypes.c_size_t, ctypes.c_uint64, pointer]
        return library

    return compile_one


@pytest.fixture(scope="session")
def kernels(build_pyx: Callable[[str], ModuleType]) -> ModuleType:
    """``kernels.pyx``, built against kvmmmu as any dependant is."""
    return build_pyx("kernels")


@pytest.fixture(scope="session")
def build_pyx(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModuleType]:
    """Build and import a Cython file of this directory by name, with C macros set to 1 if any are named."""
    return functools.cache(lambda name, *macros: build_pyx_in(tmp_path_factory.mktemp(name), name, *macros))


def build_pyx_in(folder: Path, name: str, *macros: str) -> ModuleType:
    """The same in a folder of the caller's; each build is a module of its own name."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    package = Path(kvmmmu.__file__).parent.parent
    # The engine's rooms are in a checkout; an installed package has none.
    rooms = [path for path in (HERE.parent, package) if (path / "kvmmmu" / "engine" / "fault.pxd").is_file()]
    if not rooms and "kvmmmu.engine" in (HERE / f"{name}.pyx").read_text():
        pytest.skip(f"{name}.pyx needs the engine's rooms, which no installed package has: run it in a checkout")
    source, name = HERE / f"{name}.pyx", "_".join([name, *map(str.lower, macros)])
    shutil.copy(source, folder / f"{name}.pyx")
    extension = Extension(
        name,
        [str(folder / f"{name}.pyx")],
        include_dirs=[kvmmmu.get_include(), str(HERE)],
        define_macros=[(macro, "1") for macro in macros],
        # Inlined as far as the extension is (setup.py).
        extra_compile_args=["-O3", "--param", "inline-unit-growth=100", "-fwrapv", "-g0"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the build tools
        modules = cythonize([extension], include_path=[*map(str, rooms), str(package)], quiet=True)
        build = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
        build.build_lib = build.build_temp = str(folder)
        build.ensure_finalized()
        build.run()
    (built,) = folder.glob(f"{name}*.so")
    spec = importlib.util.spec_from_file_location(name, built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rows:
    """Where the measured ratios go: a line of JSON a benchmark, written at once, so that a crash loses one row."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, request: pytest.FixtureRequest, benchmark: Any, **fields: Any) -> None:
        if self.path is not None:
            row = {"group": benchmark.group, "name": request.node.name, "file": request.node.path.name, **fields}
            with self.path.open("a") as out:
                out.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Rows:
    return Rows(request.config.getoption("--ratios"))


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any, rows: Rows) -> Callable[..., None]:
    """Report samples a bench took itself: seconds of one call, a list for "" (its own) and for each peer."""

    def note(samples: dict[str, list[float]], *, items: int, absent: dict[str, str] | None = None) -> None:
        own = quartiles(samples[""])
        over = {peer: ratios(samples, "", peer) for peer in samples if peer}
        benchmark.extra_info["items"] = items
        benchmark.extra_info["items_per_second"] = round(items / own.median)
        benchmark.extra_info |= {f"time_over_{peer}": round(ratio.median, 3) for peer, ratio in over.items()}
        benchmark.extra_info |= {f"absent_{peer}": why for peer, why in (absent or {}).items()}
        rows.add(
            request,
            benchmark,
            items=items,
            seconds=own.as_dict(),
            over={peer: ratio.as_dict() for peer, ratio in over.items()},
            absent=absent or {},
        )

    return note


@pytest.fixture
def against(request: pytest.FixtureRequest, benchmark: Any, record: Callable[..., None]) -> Iterator[Any]:
    """Time ``work`` and put rates and ratios against the named peers, measured in the same process, beside it.

    ``items``: what one call gets through.  ``absent``: peers that cannot take part, and why.  ``net``: take away
    what the loop costs.  Contestants are callables, or statements that see ``names``.
    """
    config = request.config

    def run(
        work: Work,
        *,
        items: int,
        absent: dict[str, str] | None = None,
        net: bool = False,
        names: dict[str, Any] | None = None,
        **peers: Work,
    ) -> None:
        contestants = {"": work, **peers}
        if benchmark.enabled or config.getoption("--ratios"):
            samples = race(contestants, seconds=config.getoption("--seconds"), net=net, namespace=names)
            record(samples, items=items, absent=absent)
        else:
            for contestant in contestants.values():
                call(contestant, names)
        benchmark(functools.partial(call, work, names))

    yield run


def call(work: Work, names: dict[str, Any] | None) -> object:
    return exec(work, names) if isinstance(work, str) else work()
