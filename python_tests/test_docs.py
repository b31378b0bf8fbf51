"""docs/: a citation finds its section, a link its place."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
SOURCES = sorted(
    path
    for folder in ("spectral_kernels", "csrc", "bench", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")
)
# over the end of a line of a comment too; a list such as "§1 and §5" is one citation
CITATION = re.compile(
    r"(?P<folder>docs/)?theory\.md(?:\]\([^)]*\))?(?:,?[\s/*#]*(?P<cited>notation|§\d+(?:(?:, | and )§\d+)*))?"
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^#+ (.*)", text, re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(path)}


def sections() -> set[str]:
    """Those of docs/theory.md that can be cited."""
    first = {heading.split()[0].lower() for heading in headings(ROOT / "docs" / "theory.md")}
    return {word for word in first if word == "notation" or word.startswith("§")}


def wrong_citations(path: Path) -> list[str]:
    """Citations of no section, or of one that is not there; in prose the whole page may be meant."""
    wrong = []
    for match in CITATION.finditer(path.read_text(encoding="utf-8")):
        cited = re.findall(r"notation|§\d+", match["cited"] or "")
        in_code = path.suffix != ".md"
        if set(cited) - sections() or (in_code and not (match["folder"] and cited)):
            wrong.append(f"{name(path)}: {match[0]!r}")
    return wrong


def test_citations_of_the_theory_find_their_section() -> None:
    assert {"notation", "§1", "§2", "§3", "§4", "§5"} <= sections()
    assert sum(len(CITATION.findall(path.read_text(encoding="utf-8"))) for path in SOURCES) >= 20
    assert not [line for path in SOURCES + DOCUMENTS for line in wrong_citations(path)]
    # and those of itself, which names no file
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    assert set(re.findall(r"§\d+", theory)) <= sections()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place).resolve() if place else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing
