"""Build dataclasses from JSON values, checking every field's type and range against its annotation.

A range is part of the annotation: `Annotated[int, Between(1, 64)]`. Knows nothing of files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

T = TypeVar("T")
_type_hints = functools.cache(typing.get_type_hints)


@dataclass(frozen=True)
class Between:
    """Numbers from `least` to `most`; integers that are multiples of `step`."""

    least: float
    most: float
    step: int = 1

    def accepts(self, value: Any) -> bool:
        """Return whether a number is in the range."""
        return self.least <= value <= self.most and (type(value) is float or value % self.step == 0)

    def __str__(self) -> str:
        return f" from {self.least:,} to {self.most:,}" + (f", a multiple of {self.step}" if self.step > 1 else "")


@dataclass(frozen=True)
class Text:
    """Strings of `least` to `most` characters that contain each of `parts` once."""

    least: int = 0
    most: int = 10_000
    parts: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether a string fits."""
        return self.least <= len(value) <= self.most and all(value.count(part) == 1 for part in self.parts)

    def __str__(self) -> str:
        return f" of {self.least} to {self.most:,} characters" + "".join(f" with one {part}" for part in self.parts)


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """Build a dataclass from JSON values; a field may be a dataclass, tuple, mapping, union or scalar.

    Raises ValueError if a field is unknown, missing, of a wrong type, out of the range of its annotation or rejected by
    the dataclass itself; the message names the field by its path below `where`, such as
    `graphs.vision_encoder.standard.opset`.
    """
    return typing.cast(T, _read(kind, value, where))


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        same = [part for part in args if (typing.get_args(part) or (part,))[0] is type(value)]
        others = same or [part for part in args if part is not type(None)]
        if same or (len(others) == 1 and value is not None):
            return _read(others[0], value, where)
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _read_dataclass(kind, value, where)
    elif origin is tuple and isinstance(value, (list, tuple)):
        parts = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(parts) == len(value):
            return tuple(_read(p, v, f"{where}[{i}]") for i, (p, v) in enumerate(zip(parts, value, strict=True)))
    elif isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {key: _read(args[1], v, f"{where}.{key}" if where else key) for key, v in value.items()}
    elif _fits(kind, value):
        return value
    try:
        text = json.dumps(value, default=repr)
    except TypeError:  # a key of YAML, such as a date
        text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}…"
    raise ValueError(f"{where or 'the file'} is {text}, expected {_kind_name(kind)}")


def _fits(kind: Any, value: Any) -> bool:
    """Return whether a scalar has the type, and is in the range, of a field."""
    kind, limit = typing.get_args(kind) if typing.get_origin(kind) is Annotated else (kind, None)
    if kind not in (Any, type(value)) and not (kind is float and type(value) is int):  # a bool is an int too
        return False
    return limit is None or limit.accepts(value)


def _read_dataclass(kind: Any, value: dict[str, Any], where: str) -> Any:
    prefix = f"{where}." if where else ""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            raise ValueError(f"unknown field {prefix}{name}")
    for name, f in fields.items():
        if name not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"field {prefix}{name} is missing")
    hints = _type_hints(kind, include_extras=True)
    parts = {name: _read(hints[name], part, f"{prefix}{name}") for name, part in value.items()}
    try:
        return kind(**parts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _kind_name(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{_kind_name(args[0])}{kind.__metadata__[0]}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_kind_name, args))
    if origin is tuple:
        return "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
    names = {type(None): "null", int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, "an object")
