"""Lets a CUDA build of torch be imported without its CUDA libraries: `.venv-torch-oldest/bin/python tools/stub_cuda.py`.

The newest and the oldest torch come as CUDA builds only, whose libraries are gigabytes that no CPU test calls but that the
loader wants there. Where one is missing beside the running Python's torch, a stub is made: a library of that name with
every function that is asked of it. Calling one ends the process with the function's name, so that no test passes on it.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CUDA = "(?:cu|nccl|nv)"
HEAD = """\
#include <stdio.h>
#include <stdlib.h>
static void stop(const char* name) {
  fprintf(stderr, "%s was called, of which tools/stub_cuda.py made a stub\\n", name);
  abort();
}
"""


def torch_libraries() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("there is no torch to make stubs for")
    return Path(spec.origin).parent / "lib"


def missing(folder: Path) -> tuple[list[str], dict[str, set[str]]]:
    """CUDA's libraries that torch does not find, and what is asked of them: version -> functions, "" without a version."""
    # all that an import loads; what torch loads once it sees a GPU stays missing
    command = ["ldd", "-r", str(folder / "libtorch_python.so")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, set[str]] = {}
    undefined = rf"^undefined symbol: ({CUDA}\w+)(?:, version (\S+))?\s"
    for name, version in re.findall(undefined, said, re.MULTILINE):
        functions.setdefault(version, set()).add(name)
    return sorted(set(re.findall(rf"^\s*(lib{CUDA}\S+) => not found", said, re.MULTILINE))), functions


def main() -> None:
    folder = torch_libraries()
    libraries, functions = missing(folder)
    if not libraries:
        return
    lines = [HEAD]
    for name in sorted(set().union(*functions.values())):
        lines.append(f'void {name}(void) {{ stop("{name}"); }}')
    # every stub has every function, so that none need be told which library it is of
    versions = [f"{version} {{ {'; '.join(sorted(names))}; }};" for version, names in functions.items() if version]
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        script.write_text("\n".join(versions) + "\n", encoding="utf-8")
        flags = ["-shared", "-fPIC", "-w", f"-Wl,--version-script={script}"]
        for library in libraries:
            target = folder / library
            subprocess.run(["cc", *flags, f"-Wl,-soname,{library}", "-o", target, source], check=True)
    print(f"stubs of {', '.join(libraries)}", file=sys.stderr)


if __name__ == "__main__":
    main()
