"""Python blocks of a Markdown page, run as a reader would."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def snippets(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def outputs(document: Path) -> dict[str, str]:
    """What a block is said to print, where a block of text follows it."""
    blocks = r"^```python\n(.*?)^```\n\n```text\n(.*?)^```"
    return dict(re.findall(blocks, document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


def run(snippet: str, document: Path) -> dict[str, Any]:
    """The names that a snippet leaves."""
    names: dict[str, Any] = {"__name__": document.stem}
    exec(compile(snippet, document.name, "exec"), names)
    return names


def printed(snippet: str, document: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run(snippet, document)
    return output.getvalue()
