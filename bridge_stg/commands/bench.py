"""The command `bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, output_file
from bridge_stg.commands.progress import ProgressBar
from bridge_stg.runtime.errors import BridgeError


class Counts(click.ParamType):
    """Comma-separated numbers, each at least 1."""

    name = "N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers."""
        return tuple(COUNT.convert(part, param, ctx) for part in value.split(",")) if isinstance(value, str) else value


@click.command()
@options.bundle_argument
@click.option("--video", help="Measure with this video instead of rendered ones.")
@click.option("--frames", type=Counts(), help="Coarse frames of the rendered videos; default: 8,32,128.")
@click.option("--query", help='What to find; default: "the red square", which rendered videos show.')
@click.option("--rounds", type=COUNT, default=5, show_default=True, help="Measured calls per video.")
@click.option("--json", "json_file", type=output_file(".json"), help="Write the figures.")
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
    from bridge_stg.runtime.host.files import replacing

    load_options = {**options.pop_head_options(given), **given}
    with ProgressBar() as progress:
        measured = measuring.bench(
            bundle, video=video, frames=frames or measuring.FRAMES, query=query or measuring.QUERY, rounds=rounds,
            progress=progress, **load_options,
        )  # fmt: skip
    click.echo(measuring.table(measured))
    if json_file is not None:
        with replacing(json_file) as temporary:
            temporary.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        click.echo(f"wrote {json_file}")
