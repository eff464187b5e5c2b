"""Compile the C example against the kvmmmu and the Python that run this: ``python build.py [OUTPUT]``."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import kvmmmu

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Compile and link."""
    output = sys.argv[1] if len(sys.argv) > 1 else "embed_c"
    value = sysconfig.get_config_var
    compiler = shlex.split(os.environ.get("CC", "cc"))
    includes = [f"-I{HERE}", f"-I{kvmmmu.get_include()}", f"-isystem{sysconfig.get_paths()['include']}"]
    warnings = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
    library = [f"-L{value('LIBDIR')}", f"-Wl,-rpath,{value('LIBDIR')}", f"-lpython{value('LDVERSION')}"]
    if not value("Py_ENABLE_SHARED"):
        library = [f"-L{value('LIBPL')}", "-Wl,--export-dynamic", *library]
    system = shlex.split(f"{value('LIBS') or ''} {value('SYSLIBS') or ''}")
    sources = [str(HERE / "main.c"), str(HERE / "engine.c")]
    subprocess.run([*compiler, "-O2", *warnings, *includes, *sources, "-o", output, *library, *system], check=True)


if __name__ == "__main__":
    main()
