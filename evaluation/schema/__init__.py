"""The JSON schema of everything that commands and the server write, and its tables for the documentation.

The single place where fields are defined: `bridge-stg schema` prints it, docs/results.md has its tables, the server's
OpenAPI document contains it, and the tests validate what each command writes against it. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge_stg.evaluation.schema.bundles import BUNDLES
from bridge_stg.evaluation.schema.evaluations import EVALUATIONS
from bridge_stg.evaluation.schema.kinds import Schema
from bridge_stg.evaluation.schema.live import LIVE, WATCHED
from bridge_stg.evaluation.schema.machine import MACHINE
from bridge_stg.evaluation.schema.results import RESULT, RESULTS, ROW, SEARCHED
from bridge_stg.runtime.chain.results import SCHEMA
from bridge_stg.runtime.errors import BridgeError

__all__ = ["DEFINITIONS", "DOCUMENTS", "RESULT", "ROW", "SEARCHED", "WATCHED", "inlined", "schema", "tables"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS = (
    "document", "line", "table_header", "table_row", "watch_line", "bench", "doctor", "estimates", "error",
    "log_line", "evaluation_report", "evaluation_header", "evaluation_row", "calibration_report", "export_report",
    "parity_report", "demo_figures", "demo_text_figures",
)  # fmt: skip
"""Definitions of whole JSON documents or lines; the others are parts of them."""
DEFINITIONS: Mapping[str, Schema] = {**RESULTS, **LIVE, **MACHINE, **EVALUATIONS, **BUNDLES}
"""All definitions by name."""


def schema(name: str = "document") -> Schema:
    """Return the JSON schema of a definition, complete with those that it refers to.

    Raises:
        BridgeError: no definition has this name.
    """
    if name not in DEFINITIONS:
        message = f"no part of the results is called {name!r}; expected one of {', '.join(DEFINITIONS)}"
        raise BridgeError("options.invalid", message)
    used = {key: DEFINITIONS[key] for key in DEFINITIONS if key in _names(name, set())}
    return {
        "$schema": DIALECT,
        "title": f"bridge-stg {name}, version {SCHEMA}",
        "$ref": f"#/$defs/{name}",
        "$defs": used,
    }


def inlined(name: str) -> Schema:
    """Return a definition with what it refers to in place, for documents that have references of their own."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            target = {} if "$ref" not in value else replaced(DEFINITIONS[value["$ref"].rpartition("/")[2]])
            return target | {key: replaced(inner) for key, inner in value.items() if key != "$ref"}
        return [replaced(inner) for inner in value] if isinstance(value, list) else value

    found: Schema = replaced(DEFINITIONS[name])
    return found


def tables() -> str:
    """Return a table of fields per definition, in Markdown."""
    return "\n\n".join(_table(name, definition) for name, definition in DEFINITIONS.items())


def _table(name: str, definition: Schema) -> str:
    lines = [f"### `{name}`", "", definition["description"]]
    if "properties" not in definition:
        return "\n".join([*lines, "", f"One of: {_type(definition)}."])
    lines += ["", "| field | type | meaning |", "|---|---|---|"]
    for field, about in definition["properties"].items():
        optional = "" if field in definition["required"] else ", optional"
        lines.append(f"| `{field}` | {_type(about)}{optional} | {about['description']} |")
    return "\n".join(lines)


def _type(about: Schema) -> str:
    """Return a field's type in words."""
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        return f"[{name}](#{name})"
    if "anyOf" in about:
        return " or ".join(map(_type, about["anyOf"]))
    kinds = [about["type"]] if isinstance(about["type"], str) else about["type"]
    if kinds[0] == "array":
        items = about["items"]
        kinds = [
            f"list of {_type(items)}" if "$ref" in items else f"list of {items.get('type', 'string')}s",
            *kinds[1:],
        ]
    return " or ".join(kinds)


def _names(name: str, found: set[str]) -> set[str]:
    """Return a definition's name with those of all that it refers to, added to `found`."""
    if name not in found:
        found.add(name)
        for other in _refs(DEFINITIONS[name]):
            _names(other, found)
    return found


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        return own + [name for inner in value.values() for name in _refs(inner)]
    return [name for inner in value for name in _refs(inner)] if isinstance(value, list) else []
