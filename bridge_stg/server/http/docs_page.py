"""The page at /docs: the API as its OpenAPI document says, without scripts and without a network."""

from __future__ import annotations

from html import escape
from typing import Any


def docs_page(openapi: dict[str, Any]) -> str:
    """Return HTML for an OpenAPI document."""
    about = openapi["info"]
    rows = [
        _operation(path, method, operation)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, schema) for name, schema in openapi.get("components", {}).get("schemas", {}).items()]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(about["title"])}: API</title><link rel="stylesheet" href="/page/style.css"></head>'
        f'<body class="docs"><main><h1>{escape(about["title"])} {escape(about["version"])}</h1>'
        f"<p>{escape(about['description'])}</p>"
        '<p><a href="/openapi.json">openapi.json</a> · <a href="/">the page</a></p>'
        f"{''.join(rows)}<h2>Bodies</h2>{''.join(schemas)}</main></body></html>"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<li><code>{escape(parameter['name'])}</code> ({escape(parameter['in'])}"
        f"{', required' if parameter.get('required') else ''})</li>"
        for parameter in operation.get("parameters", [])
    )
    takes = ", ".join(operation.get("requestBody", {}).get("content", {}))
    answers = ", ".join(operation["responses"])
    return (
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', ''))}</p>"
        + (f"<ul>{parameters}</ul>" if parameters else "")
        + (f"<p>Takes: {escape(takes)}</p>" if takes else "")
        + f"<p>Answers: {escape(answers)}</p></section>"
    )


def _schema(name: str, schema: dict[str, Any]) -> str:
    fields = "".join(
        f"<li><code>{escape(field)}</code>{': ' + escape(about['description']) if 'description' in about else ''}</li>"
        for field, about in schema.get("properties", {}).items()
    )
    return f"<section><h3>{escape(name)}</h3><p>{escape(schema.get('description', ''))}</p><ul>{fields}</ul></section>"
