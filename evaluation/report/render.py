"""Render the HTML pages of the reports from Jinja2 templates; what a page says is in its template."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

PACKAGE = Path(__file__).parents[2]
"""Templates are named by their path in the package, such as `evaluation/report/base.html.j2`."""


def render(template: str, **values: Any) -> str:
    """Return a page as HTML. Values are escaped; one that the template names and `values` lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(PACKAGE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, extensions=["jinja2.ext.do"],
    )  # fmt: skip
    environment.filters |= {"number": number, "base64": lambda content: base64.b64encode(content).decode()}
    return environment.get_template(template).render(values)


def number(value: float | None, form: str) -> str:
    """Return a number in a format such as `.4f`, a dash for None."""
    return "–" if value is None else format(value, form)
