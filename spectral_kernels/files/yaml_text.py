"""YAML as plain values: no aliases, no key twice, nothing deep, and one error for whatever else is wrong."""

from typing import Any

from spectral_kernels.optional import require

LIMIT = 2**16  # bytes of a settings file
DEPTH = 20


def from_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: no YAML, an alias, a key that stands twice, nested deeper than `DEPTH`, a number of thousands of digits.
        ModuleNotFoundError: PyYAML is missing.
    """
    yaml = require("yaml", "reading a config", "PyYAML")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = f"in line {self.peek_event().start_mark.line + 1}"
            # a value by reference may be as large as it likes
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"an alias {mark}: write the value out")
            if self.depth == DEPTH:
                raise ValueError(f"nested deeper than {DEPTH} levels {mark}")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.MappingNode):
                seen: set[str] = set()
                for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                    if key in seen:
                        raise ValueError(f"the key {key[:60]!r} stands twice in the section {mark}")
                    seen.add(key)
            return node

    try:
        return Loader(text).get_single_data()
    except Exception as error:  # a value that is not of its tag ends in errors of any kind
        raise ValueError(" ".join(str(error).split())[:300]) from error
