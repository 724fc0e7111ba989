"""The commands `doctor` and `triton`: what a machine has and lacks, and a model repository for a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def doctor(as_json: bool) -> None:
    """Show devices, drivers, memory and engines of this machine, and what each backend lacks."""
    from bridge_stg.runtime.backends.doctor import diagnose, format_diagnosis

    diagnosis = diagnose()
    click.echo(json.dumps(diagnosis.to_json(), indent=1) if as_json else format_diagnosis(diagnosis))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model repository: a folder.")
@click.option("--name", default="bridge_stg", show_default=True, help="Of the model.")
@click.option("--backend", default="auto", show_default=True, help="The engine that runs the graphs.")
@click.option("--variant", help="The graphs' dialect; by default the one that fits the server.")
@click.option("--media", help="Folder on the server that VIDEO names files in; without it, only VIDEO_BYTES is taken.")
@click.option("--max-batch", type=click.IntRange(min=1), default=16, show_default=True, help="Queries in one batch.")
@click.option(
    "--queue-delay-us", type=click.IntRange(min=0), default=5000, show_default=True, help="Wait for others to join."
)
@click.option("--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Processes with the model.")
@click.option("--kind", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@click.option(
    "--open-videos", type=click.IntRange(min=0), default=4, show_default=True, help="Kept open between batches."
)
@click.option("--deadline", "deadline_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS")
@click.option("--overwrite", is_flag=True, help="Replace a model of this name.")
def triton(bundle: Path, out: Path, overwrite: bool, **serving: Any) -> None:
    """Write a model repository for Triton Inference Server that serves BUNDLE."""
    from bridge_stg.triton.repository import Serving, write_repository

    made = write_repository(bundle, out, Serving(**serving), overwrite=overwrite)
    click.echo(f"{made} is complete. Start it with: tritonserver --model-repository={out}")
