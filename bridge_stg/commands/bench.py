"""The command `bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, STDOUT, OutputFile
from bridge_stg.commands.progress import ProgressBar
from bridge_stg.commands.results import write_text
from bridge_stg.runtime.errors import BridgeError


def counts(value: str) -> tuple[int, ...]:
    """Return comma-separated numbers, each at least 1."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in value.split(",")]
    if not all(found):
        raise click.BadParameter(f"{value!r}: expected numbers of frames, each at least 1, as in 8,32,128.")
    return tuple(found)


@click.command()
@options.bundle_argument
@click.option("--video", help="Measure with this video instead of rendered ones.")
@click.option(
    "--frames", type=counts, metavar="N,…",
    help="Coarse frames of the rendered videos; default: 8,32,128, as far as the model reads as many at once.",
)  # fmt: skip
@click.option("--query", help='What to find; default: "the red square", which rendered videos show.')
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Measured calls per video.")
@click.option("--json", "json_file", type=OutputFile(".json", stdout=True), help="Write the figures; -: to stdout.")
@options.text_options
@options.backend_options()
def bench(
    *, bundle: Path, video: str | None, frames: tuple[int, ...] | None, query: str | None, rounds: int,
    json_file: Path | None, **given: Any,
) -> None:  # fmt: skip
    """Measure how fast BUNDLE is on this machine: loading, the first answer, every stage, and peak memory.

    Each call reads and encodes its video anew. Close other programs for figures that can be compared.
    """
    if video is not None and frames is not None:
        raise BridgeError("options.conflict", "--frames sizes rendered videos; leave it out, or leave out --video.")
    from bridge_stg.evaluation import bench as measuring

    load_options = {**options.pop_head_options(given), **given}
    with ProgressBar() as progress:
        measured = measuring.bench(
            bundle, video=video, frames=frames, query=measuring.QUERY if query is None else query, rounds=rounds,
            progress=progress, **load_options,
        )  # fmt: skip
    if json_file != STDOUT:
        click.echo(measuring.table(measured))
    if json_file is not None:
        write_text(json_file, json.dumps(measured, indent=1) + "\n")
        if json_file != STDOUT:
            click.echo(f"wrote {json_file}")
