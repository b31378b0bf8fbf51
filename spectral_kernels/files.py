"""Files that are whole or not there: written beside and moved into place."""

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


def replace_file(path: Path, fill: Callable[[Any], None]) -> None:
    """Write a text file through `fill(file)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        fill(file)
    os.replace(temporary, path)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, at least one, with the names of the first as header."""
    rows = list(rows)

    def fill(file: Any) -> None:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

    replace_file(path, fill)
