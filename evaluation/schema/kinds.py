"""JSON schemas of single values, from which definitions are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = "dict[str, Any]"

NUMBERS: Schema = {"type": "number"}
NUMBERS_OR_NULL: Schema = {"type": ["number", "null"]}
TEXTS: Schema = {"type": "string"}
"""Kinds of items of arrays and of values of maps."""


def of(kind: str, text: str, **rules: Any) -> Schema:
    """Return the schema of a JSON type; a kind that ends in `?` may be null."""
    name = kind.removesuffix("?")
    types = {"type": [name, "null"] if kind.endswith("?") else name}
    if kind.endswith("?") and "enum" in rules:
        rules["enum"] = [*rules["enum"], None]
    return {**types, "description": text, **rules}


def ref(name: str, text: str, *, null: bool = False) -> Schema:
    """Return a reference to a definition."""
    target = {"$ref": f"#/$defs/{name}"}
    return {"anyOf": [target, {"type": "null"}], "description": text} if null else {**target, "description": text}


def list_of(name: str, text: str, *, null: bool = False) -> Schema:
    """Return a list of a definition."""
    return of("array?" if null else "array", text, items={"$ref": f"#/$defs/{name}"})


def record(text: str, fields: Mapping[str, Schema], *, optional: tuple[str, ...] = ()) -> Schema:
    """Return an object; other fields than these may follow in later versions."""
    required = [name for name in fields if name not in optional]
    return {"type": "object", "description": text, "properties": dict(fields), "required": required}


def counts(text: str, fields: Mapping[str, str], kind: str, *, optional: bool = False) -> Schema:
    """Return an object of numbers, all of them optional if `optional`."""
    described = {name: of(kind, about, minimum=0) for name, about in fields.items()}
    return record(text, described, optional=tuple(fields) if optional else ())


def map_of(values: Schema, text: str) -> Schema:
    """Return an object whose names are free, with values of one schema."""
    return of("object", text, additionalProperties=values)


def share(text: str) -> Schema:
    """Return a number from 0 to 1, or null."""
    return of("number?", text, minimum=0, maximum=1)
