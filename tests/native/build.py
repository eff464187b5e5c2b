"""Build and run the native mains beside this file: ``python tests/native/build.py NAME [options] [arguments]``.

A main is ``NAME.pyx``: it cimports the engine, is translated with line directives and linked with the three lines of
``main.c``.  libpython is linked because the translated module names it; no interpreter is started.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
INCLUDE = ROOT / "kvmmmu" / "include"

SANITIZERS = {
    "": [],
    "tsan": ["-fsanitize=thread"],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
}
TEST_BUILDS = {"forced"}  # mains that need the points of hooks.h


def write_names(out: Path) -> None:
    """Points and mutants of ``hooks.h`` by number, for the command line."""
    hooks = (INCLUDE / "kvmmmu" / "hooks.h").read_text()
    lines = []
    for kind in ("POINT", "MUTANT"):
        names = re.findall(rf"^ *KVMMMU_{kind}_(\w+)(?: = \d+)?,", hooks, re.MULTILINE)
        body = "".join(f'    [KVMMMU_{kind}_{name}] = "{name}",\n' for name in names)
        lines.append(f"static const char *const {kind.lower()}_names[KVMMMU_{kind}S] = {{\n{body}}};\n")
    (out / "names.h").write_text("\n".join(lines))


def run(*command: str | Path) -> None:
    """Run a step of the build; its output is shown when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(str(part) for part in command)}\n{done.stdout}{done.stderr}")


def build(name: str, sanitizer: str = "", out: Path | None = None, cflags: str = "") -> Path:
    """Build a main; returns the program."""
    out = out or ROOT / "build" / "native" / (name + (f"-{sanitizer}" if sanitizer else ""))
    out.mkdir(parents=True, exist_ok=True)
    write_names(out)
    translated = out / f"{name}.c"
    cython = [sys.executable, "-m", "cython", "-3", "--line-directives", "-I", ROOT, "-I", HERE]
    run(*cython, HERE / f"{name}.pyx", "-o", translated)
    flags = [*shlex.split(cflags or ("-O1 -g" if sanitizer else "-O0 -g")), "-fwrapv", "-w", "-pthread"]
    flags += SANITIZERS[sanitizer]
    if name in TEST_BUILDS:
        flags.append("-DKVMMMU_TEST")
    library = sysconfig.get_config_var("LIBDIR")
    program = out / name
    includes = [f"-I{path}" for path in (INCLUDE, HERE, out, sysconfig.get_config_var("INCLUDEPY"))]
    sources = [translated, HERE / "main.c", *([HERE / "turns.c"] if name in TEST_BUILDS else [])]
    python = f"-lpython{sysconfig.get_config_var('LDVERSION')}"
    libraries = [f"-L{library}", f"-Wl,-rpath,{library}", python, "-lm", "-ldl"]
    run(os.environ.get("CC", "cc"), *flags, *includes, *sources, "-o", program, *libraries)
    return program


def run_checked(program: Path, arguments: list[str]) -> int:
    """Run the stress program and check every invariant of each state it hands out; its own exit status, or 1."""
    from kvmmmu.check.run import check_snapshot
    from kvmmmu.check.snapshot import Snapshot

    states = violated = 0
    with subprocess.Popen([program, "--snapshots", *arguments], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while head := child.stdout.read(8):
            words = np.frombuffer(child.stdout.read(8 * int.from_bytes(head, "little")), np.uint64)
            found = [violation for violation in check_snapshot(Snapshot(words)) if not violation.hole]
            states += 1
            violated += bool(found)
            for violation in found[:20]:
                print(f"state {states}: {violation}", file=sys.stderr)
    print(f"{states} states at rest, {violated} with an invariant violated", file=sys.stderr)
    return child.returncode or int(violated > 0 or states == 0)


def main() -> int:
    """Build what the command line asks for, then run it with the arguments that are not for the build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--tsan", action="store_true", help="under ThreadSanitizer")
    how.add_argument("--asan", action="store_true", help="under AddressSanitizer and UBSan")
    parser.add_argument("--cflags", default="", help="instead of -O0 -g (sanitizers: -O1 -g)")
    args, rest = parser.parse_known_args()
    rest = [argument for argument in rest if argument != "--"]
    program = build(args.name, "tsan" if args.tsan else "asan" if args.asan else "", cflags=args.cflags)
    return run_checked(program, rest) if args.name == "stress" else subprocess.run([program, *rest]).returncode


if __name__ == "__main__":
    sys.exit(main())
