"""Validate values against the JSON schema of results, which the tests of commands and the server do."""

from __future__ import annotations

from typing import Any

import jsonschema

from bridge_stg.evaluation.schema import schema


def validate(value: Any, name: str) -> None:
    """Check that a value is as the definition says, and that it has no field without a definition."""
    jsonschema.Draft202012Validator(_closed(schema(name))).validate(value)


def _closed(part: Any) -> Any:
    """Return a schema in which objects with listed fields have no others."""
    if isinstance(part, dict):
        closed = {key: _closed(value) for key, value in part.items()}
        return closed | ({"additionalProperties": False} if isinstance(part.get("properties"), dict) else {})
    return [_closed(value) for value in part] if isinstance(part, list) else part
