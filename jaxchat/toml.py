"""Frozen dataclasses of settings as TOML and back, strictly: an unknown key or a wrong type is an error naming it."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
import unicodedata
from typing import Any

from jaxchat.errors import UsageError


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.depth": 4, ...}` of a configuration, in the order of the fields."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_toml(config: Any, reasons: dict[str, str] | None = None) -> str:
    """The configuration as TOML that `config.load_config` reads back to an equal object; `reasons` become comments."""
    lines, sections = [], []
    reasons = reasons or {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            sections.append(f.name)
        else:
            lines.append(f"{f.name} = {_toml_value(value)}")
    for name in sections:
        lines += ["", f"[{name}]"]
        for key, value in flatten(getattr(config, name)).items():
            if value is not None:
                reason = reasons.get(f"{name}.{key}")
                lines.append(f"{key} = {_toml_value(value)}" + (f"  # {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    # JSON's strings are TOML's basic strings, except that TOML also wants DEL escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse_value(key: str, text: str) -> Any:
    """A TOML value; anything that is not one is taken as a plain string (so `--set data.source=files:x` works)."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def insert(table: dict[str, Any], key: str, value: Any) -> None:
    """Put a value where a dotted key says."""
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UsageError(f"{key}: unknown key")
    table[last] = value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Advice: the known name most like this one, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def build(cls: type, table: dict[str, Any], prefix: str = "", root: type | None = None) -> Any:
    """An object of the frozen dataclass `cls` from nested tables; `UsageError` names a wrong key or type.

    `root`: of which the known keys are, for the advice; `cls` itself by default.
    """
    root = root or cls
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{prefix}{key}: unknown key{_suggest(root, prefix + key)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(f"{prefix}{key}: is a section, not a value")
            values[key] = build(typing.cast(type, hint), value, f"{prefix}{key}.", root)
        else:
            values[key] = _convert(f"{prefix}{key}", hint, value)
    return cls(**values)


def _suggest(root: type, key: str) -> str:
    """Nearest known key, by the whole dotted name or by its last part."""
    known = list(flatten(root()))
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = f", did you mean {by_leaf[0]}?" if by_leaf else nearest(key, known)
    return near or "; docs/configuration.md has every key"


def _convert(key: str, hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, list) else [value]  # --set serve.api_keys=one
        if any(type(v) is not item and not (item is float and type(v) is int) for v in values):
            raise UsageError(f"{key}: needs a list of {'strings' if item is str else 'numbers'}, not {value!r}")
        return tuple(_convert(key, item, v) for v in values)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        plain = unicodedata.normalize("NFKC", value) if isinstance(value, str) else value
        advice = f"; did you mean {plain}, in plain digits?" if plain != value and hint is not str else ""
        raise UsageError(f"{key}: needs {_TYPE_NAMES[hint]}, not {value!r}{advice}")
    if hint is float and not math.isfinite(value):
        raise UsageError(f"{key}: needs a finite number, not {value!r}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
