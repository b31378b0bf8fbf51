"""docs/: a citation finds its section, a link its place; every op has a page, tests and a benchmark under its name; the
examples of the pages print what they say.
"""

import pkgutil
import re
from pathlib import Path

import pytest
from snippets import ROOT, outputs, printed, snippets

import spectral_kernels as sk
from spectral_kernels import ops

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
    """Those of docs/theory.md that can be cited: "notation", and "§1" for a heading "1. …"."""
    first = {heading.split()[0].lower() for heading in headings(ROOT / "docs" / "theory.md")}
    return {re.sub(r"(\d+)\.", r"§\1", word) for word in first if word == "notation" or re.fullmatch(r"\d+\.", word)}


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


OPS = sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if not module.name.startswith("_"))
PAGES = sorted((ROOT / "docs" / "ops").glob("*.md"))


def functions(op: str) -> list[str]:
    """What the package exports of an op."""
    home = f"{ops.__name__}.{op}"
    return sorted(
        public for public in sk.__all__ if f"{getattr(getattr(sk, public), '__module__', '')}.".startswith(f"{home}.")
    )


@pytest.mark.parametrize("op", OPS)
def test_one_stem_names_one_thing(op: str) -> None:
    benchmarks = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "bench").glob("*.py"))
    exported = functions(op)
    assert exported
    there = {
        f"docs/ops/{op}.md": (ROOT / "docs" / "ops" / f"{op}.md").exists(),
        f"python_tests/ops/test_{op}*.py": any((ROOT / "python_tests" / "ops").glob(f"test_{op}*.py")),
        f"bench/*.py with sk.{' or sk.'.join(exported)}": any(
            re.search(rf"\bsk\.{function}\b", benchmarks) for function in exported
        ),
        f"README.md with a link to docs/ops/{op}.md": f"(docs/ops/{op}.md)" in (ROOT / "README.md").read_text("utf-8"),
    }
    missing = [what for what, found in there.items() if not found]
    assert not missing


def test_every_page_is_of_an_op() -> None:
    assert [page.stem for page in PAGES] == OPS
    assert {"covariance", "greedy", "infonce"} < set(OPS) and functions("greedy") == ["greedy_select"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_examples_print_what_they_say(page: Path) -> None:
    said = outputs(page)
    assert said and list(said) == snippets(page)
    assert {snippet: printed(snippet, page) for snippet in said} == said
    # and what is promised of an op is on its page
    text = page.read_text(encoding="utf-8")
    assert not [function for function in functions(page.stem) if f"sk.{function}" not in text]
    parts = ("Cost", "Accuracy", "Dtypes", "Special rows", "Backends")
    assert not [part for part in parts if f"\n**{part}.** " not in text]
    assert "(../theory.md#" in text and "Benchmarks: " in text


def test_files_that_pages_name_exist() -> None:
    """Of the package's, the tests' and the benchmarks' files, by their path; of tests of ops by their name too."""
    missing = []
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # of other days
            continue
        for path in re.findall(r"`([\w./-]+\.(?:py|h|cpp|md|csv|png))`", document.read_text(encoding="utf-8")):
            places = (ROOT, ROOT / "python_tests", ROOT / "python_tests" / "ops", document.parent)
            if "/" in path and not any((place / path).exists() for place in places):
                missing.append(f"{name(document)}: {path}")
            if path.startswith("test_") and not list((ROOT / "python_tests").rglob(path)):
                missing.append(f"{name(document)}: {path}")
    assert not missing


def test_tests_that_the_integrations_name_exist() -> None:
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| [\w-]+ \d", line)]
    named = [(file, re.findall(r"`(test_\w+)`", row)) for row in rows for file in re.findall(r"`(test_\w+\.py)`", row)]
    assert len(rows) == len(named) >= 10
    for file, names in named:
        source = (ROOT / "python_tests" / "integrations" / file).read_text(encoding="utf-8")
        assert not [name for name in names if f"def {name}(" not in source]
