"""Settings read from YAML and `key=value` overrides, every key and type checked."""

import contextlib
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from spectral_kernels.checks import shortened
from spectral_kernels.files.reading import FileError, read_text, shown
from spectral_kernels.files.yaml_text import LIMIT, from_yaml
from spectral_kernels.training.augment import DEFAULTS, AugmentConfig
from spectral_kernels.training.config import Config, flat

CONFIG_FOLDER = Path(__file__).parent / "configs"


def named_configs() -> list[str]:
    """The configs that come with the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def read_config(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config by the name of one that comes with the package (with or without ".yaml"), or from a YAML file.

    Args:
        overrides: `"train.steps=500"`, values in YAML.

    Raises:
        FileNotFoundError: neither a name nor a file.
        ValueError: no file, no valid YAML (an alias, a key that stands twice), unknown keys (the nearest known one is
            offered), wrong types, values out of range.
    """
    given = Path(name_or_file)
    packaged = CONFIG_FOLDER / f"{str(name_or_file).removesuffix('.yaml')}.yaml"
    # "tiny" is the package's, whatever lies in this folder; "tiny.yaml" is a file here first
    path = given if not packaged.is_file() or (given.suffix == ".yaml" and given.is_file()) else packaged
    if not path.exists():
        raise FileNotFoundError(
            f"no config {shown(name_or_file)!r}: name a YAML file or one of {', '.join(named_configs())}"
        )
    content = _yaml(read_text(path, LIMIT), shown(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise FileError(path, f"must hold a mapping, got {type(content).__name__}")
    for override in overrides:
        _override(content, override)
    return build_config(content)


def build_config(content: Mapping[str, Any]) -> Config:
    """A `Config` from nested plain types, every key and type checked; what `augment` does not say is as the
    data set asks for (`augment.DEFAULTS`)."""
    config: Config = _build(Config, content, "")
    given = content.get("augment") or {}
    augment = _build(AugmentConfig, {**DEFAULTS.get(config.data.name, {}), **given}, "augment.")
    return replace(config, augment=augment)


def _yaml(text: str, source: str) -> Any:
    try:
        return from_yaml(text)
    except ValueError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def _override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override must look like train.steps=500, got {shortened(override)}")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        child = section.get(parent)
        section[parent] = child if isinstance(child, dict) else {}
        section = section[parent]
    section[last] = _yaml(value, override[:100])


def _build(cls: Any, content: Any, prefix: str) -> Any:
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{prefix.rstrip('.') or 'the config'} must be a section of key: value, got {shortened(content)}"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        if key not in hints:
            name = f"{prefix}{key if isinstance(key, str) else shortened(key)}"[:100]
            raise ValueError(f"unknown key {name}{_nearest(name)}")
        hint = hints[key]
        values[key] = (
            _build(hint, {} if value is None else value, f"{prefix}{key}.")
            if is_dataclass(hint)
            else _convert(value, hint, f"{prefix}{key}")
        )
    return cls(**values)


def _nearest(key: str) -> str:
    known = [*flat(Config().to_dict()), *(item.name for item in fields(Config))]
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    close = difflib.get_close_matches(key, known, 1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], by_leaf, 1)
    ]
    return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(f.name for f in fields(Config))}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the annotated type, or a ValueError that names the key."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (wanted,) = (option for option in options if option is not type(None))
    if typing.get_origin(wanted) is tuple:
        return _convert_tuple(value, typing.get_args(wanted), key)
    if wanted is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML 1.1 reads 1e-4 as text
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{key} must be {names[wanted]}, got {shortened(value)}")
    return value


def _convert_tuple(value: Any, items: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{key} must be a list such as [a, b], got {shortened(value)}")
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{key} must hold {len(items)} values, got {shortened(value)}")
    return tuple(_convert(part, hint, key) for part, hint in zip(value, items, strict=True))
