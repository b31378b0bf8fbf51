"""Reads WordNet 3.0's database files, as Debian's `wordnet-base` has them (format: wndb(5WN))."""

import os
from dataclasses import dataclass
from pathlib import Path

PARTS = ("noun", "verb", "adj", "adv")
# of nouns, then of verbs: categories 3 to 28 and 29 to 43 (lexnames(5WN))
CATEGORIES = {
    0: "adj.all", 1: "adj.pert", 2: "adv.all", 3: "noun.Tops", 4: "noun.act", 5: "noun.animal", 6: "noun.artifact",
    7: "noun.attribute", 8: "noun.body", 9: "noun.cognition", 10: "noun.communication", 11: "noun.event",
    12: "noun.feeling", 13: "noun.food", 14: "noun.group", 15: "noun.location", 16: "noun.motive", 17: "noun.object",
    18: "noun.person", 19: "noun.phenomenon", 20: "noun.plant", 21: "noun.possession", 22: "noun.process",
    23: "noun.quantity", 24: "noun.relation", 25: "noun.shape", 26: "noun.state", 27: "noun.substance", 28: "noun.time",
    29: "verb.body", 30: "verb.change", 31: "verb.cognition", 32: "verb.communication", 33: "verb.competition",
    34: "verb.consumption", 35: "verb.contact", 36: "verb.creation", 37: "verb.emotion", 38: "verb.motion",
    39: "verb.perception", 40: "verb.possession", 41: "verb.social", 42: "verb.stative", 43: "verb.weather",
    44: "adj.ppl",
}  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """A sense: its words, its definition without examples, its lexicographer's category and its hypernyms' keys."""

    key: str
    words: tuple[str, ...]
    definition: str
    category: int
    parents: tuple[str, ...]


def find() -> Path:
    """The folder with data.noun; FileNotFoundError says where it was looked for."""
    named = os.environ.get("SPECTRAL_KERNELS_DATA")
    places = [Path(named), Path(named) / "wordnet"] if named else []
    places += [Path("data/wordnet"), Path("data/usr/share/wordnet"), Path("/usr/share/wordnet")]
    for place in places:
        if (place / "data.noun").is_file():
            return place
    raise FileNotFoundError(f"no data.noun in {', '.join(map(str, places))}; tools/fetch_wordnet.sh gets WordNet")


def read(folder: Path, parts: tuple[str, ...] = PARTS) -> list[Synset]:
    """Synsets of some parts of speech in the order of the files; ValueError names a line that is not one."""
    found = []
    for part in parts:
        path = folder / f"data.{part}"
        with path.open(encoding="latin-1") as file:
            for number, line in enumerate(file, 1):
                if line.startswith("  "):  # the licence
                    continue
                try:
                    found.append(_synset(line))
                except (IndexError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}: not a synset: {line[:60]!r}") from error
    return found


def _synset(line: str) -> Synset:
    data, _, gloss = line.partition(" | ")
    if not gloss:
        raise ValueError("no gloss")
    fields = data.split()
    offset, category, kind, count = fields[0], int(fields[1]), fields[2], int(fields[3], 16)
    # an adjective's word may end in its place: galore(ip)
    words = tuple(word.partition("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    at = 4 + 2 * count
    pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
    parents = tuple(part + target for symbol, target, part, _ in pointers if symbol in ("@", "@i"))
    definition = gloss.partition('; "')[0].strip()
    return Synset(("a" if kind == "s" else kind) + offset, words, definition, category, parents)
