"""The command `schema`: the JSON schema of results."""

from __future__ import annotations

import json

import click


@click.command()
@click.argument("name", default="document")
@click.option("--markdown", is_flag=True, help="Print the tables of docs/results.md instead.")
def schema(name: str, markdown: bool) -> None:
    """Print the JSON schema of what commands and the server write.

    NAME is `document` (infer --json, the default), `result`, `table_row` (infer-many), `watch_line`, or another part
    that docs/results.md describes.
    """
    from bridge_stg.evaluation import schema as results

    click.echo(results.tables() if markdown else json.dumps(results.schema(name), indent=1, ensure_ascii=False))
