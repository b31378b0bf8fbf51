"""Scripts, and what is read once in a process: run by a Python of their own, or imported under a name of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs in the project's folder, without what the environment asks of Triton and the package; ends with this status."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "SPECTRAL"))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done


def module_of(path: Path, name: str) -> Any:
    """A file that is in no package, or that is loaded anew."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module
