"""README: its snippets run, and what it points at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def heading_of(snippet: str) -> str:
    return re.findall(r"^### (.*)", README[: README.index(snippet)], re.MULTILINE)[-1]


def test_three_uses_are_shown() -> None:
    assert [heading_of(snippet) for snippet in SNIPPETS] == [
        "Call the ops",
        "Run the benchmarks",
        "Drop a selector into SimCLR",
    ]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=heading_of)
@pytest.mark.filterwarnings("ignore:the memory bank is cold")
def test_snippet_runs(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_documented_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    known = set(re.findall(r"^([a-z]+[a-z0-9-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]+)", README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    prose = {"alone"}
    assert named - prose <= known
