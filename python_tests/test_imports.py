"""Which module imports which: data flows one way, nothing runs in a circle, and no file is a heap."""

import ast
import subprocess
from collections.abc import Iterator

import pytest
from process_helpers import ROOT, run_python

PACKAGE = "spectral_kernels"
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / PACKAGE).rglob("*.py")
}
# what a part of the package must not import, at the top or inside of a function
STEPS = ("selection", "theory", "monitor", "inspection", "integrations", "training")
FORBIDDEN = {
    **dict.fromkeys(("ops", "kernels", "checks", "dispatch"), STEPS),
    **dict.fromkeys(("selection", "theory", "monitor", "inspection"), ("training",)),
}
LONGEST = 400
SOURCES = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")


def statements(body: list[ast.stmt], inner: bool) -> Iterator[ast.stmt]:
    """Those that run on import, and (`inner`) those of functions; none for type checkers alone."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(node.orelse, inner)
            continue
        yield node
        if inner or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, name, []), inner)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, inner)


def imported(module: str, inner: bool = False) -> set[str]:
    """Modules of the package that a module names."""
    found = set()
    for node in statements(ast.parse(PATHS[module].read_text(encoding="utf-8")).body, inner):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in PATHS else node.module)
    return found & PATHS.keys()


def test_imports_run_in_no_circle() -> None:
    left = {module: imported(module) for module in PATHS}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"in a circle, or needing one: {sorted(left)}"


@pytest.mark.parametrize("part", FORBIDDEN)
def test_data_flows_one_way(part: str) -> None:
    inside = [module for module in PATHS if f"{module}.".startswith(f"{PACKAGE}.{part}.")]
    assert inside
    wrong = [
        f"{module} imports {name}"
        for module in inside
        for name in sorted(imported(module, inner=True))
        if name.split(".")[1:2] and name.split(".")[1] in FORBIDDEN[part]
    ]
    assert not wrong


def test_importing_the_package_imports_nothing_optional() -> None:
    optional = {"matplotlib", "yaml", "sklearn", "tqdm", "PIL", "torchvision", "pandas"}
    # torch takes what it finds of them
    code = f"import sys, torch; before = set(sys.modules); import {PACKAGE}; print(*{optional} & sys.modules.keys() - before)"
    assert run_python("-c", code).stdout.split() == []


def test_no_file_is_long() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [name for name in listed.stdout.splitlines() if name.endswith(SOURCES) and (ROOT / name).is_file()]
    long = {name for name in paths if (ROOT / name).read_text(encoding="utf-8").count("\n") > LONGEST}
    assert not long, f"more than {LONGEST} lines: {sorted(long)}"
