"""docs/results.md against the schema: `python cli.py schema --markdown` prints its tables."""

from __future__ import annotations

import re
from pathlib import Path

from bridge_stg.evaluation import schema

PAGE = Path(__file__).parents[2] / "docs" / "results.md"


def test_the_tables_are_those_of_the_schema() -> None:
    (shown,) = re.findall(
        r"<!-- fields:begin -->\n(.*)\n<!-- fields:end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert shown == schema.tables()


def test_the_page_names_every_document() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in schema.DOCUMENTS if f"[`{name}`](#{name})" not in text]
