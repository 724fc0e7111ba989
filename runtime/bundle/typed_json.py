"""Build dataclasses from JSON values, checking every field's type against its annotation. Knows nothing of files."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Build a dataclass from JSON values; a field may be a dataclass, tuple, mapping, union or scalar.

    Raises ValueError if a field is unknown, missing, of a wrong type or rejected by the dataclass itself; the message
    names the field by its path below `where`, such as `graphs.vision_encoder.standard.opset`.
    """
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        others = [part for part in args if part is not type(None)]
        if len(others) == 1 and value is not None:
            return _read(others[0], value, where)
        if type(value) in args:
            return value
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_dataclass(kind, value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        parts = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(parts) == len(value):
            return tuple(_read(p, v, f"{where}[{i}]") for i, (p, v) in enumerate(zip(parts, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _read(args[1], v, f"{where}.{key}") for key, v in value.items()}
    elif kind in (Any, type(value)) or (kind is float and type(value) is int):  # not isinstance: a bool is an int too
        return value
    text = json.dumps(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    raise ValueError(f"{where or 'the file'} is {text}, expected {_kind_name(kind)}")


def _read_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    prefix = f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"unknown field {prefix}{name}")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"field {prefix}{name} is missing")
    hints = typing.get_type_hints(kind)
    parts = {name: _read(hints[name], part, f"{prefix}{name}") for name, part in value.items()}
    try:
        return kind(**parts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _kind_name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_kind_name, typing.get_args(kind)))
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind) or ("a list" if typing.get_origin(kind) is tuple else "an object")
