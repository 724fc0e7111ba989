"""The command `infer-many`: plain inference over a table of (video, query), or over a folder of videos."""

from __future__ import annotations

import os
from pathlib import Path

import click

from bridge_stg.commands.evaluate import SampleProgress
from bridge_stg.commands.options import THREADS
from bridge_stg.evaluation.run.executor import ENGINES

SUFFIXES = (".jsonl", ".parquet")


@click.command("infer-many")
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--media", type=click.Path(path_type=Path), help="Where TABLE's paths start; default: its own folder.")
@click.option("--query", "queries", multiple=True, help="If TABLE is a folder: what to find in each file; repeatable.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Default: the demo bundle, exported if need be.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A .jsonl or .parquet file for the rows.")
@click.option(
    "--task",
    type=click.Choice(["tube", "span", "image"]),
    default="tube",
    show_default=True,
    help="When and where; only when; or the one box in an image, where the target is for sure.",
)
@click.option("--allow-none/--no-allow-none", default=True, help="Whether `not in this video` is a possible answer.")
@click.option("--max-visual-tokens", type=click.IntRange(min=1), help="What a video may take of the prompt.")
@click.option("--engine", type=click.Choice(ENGINES), default="local", show_default=True, help="Who asks the model.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of --engine ray; by default one, or one a GPU.")
@click.option("--overwrite", is_flag=True, help="Start again instead of keeping finished rows.")
@click.option("--retry-failed", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option("--backend", default="auto", show_default=True, help="The engine that runs the graphs.")
@click.option("--variant", help="The graphs' dialect; by default the one that fits this machine.")
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
def infer_many(
    table: Path,
    media: Path | None,
    queries: tuple[str, ...],
    bundle: Path | None,
    out: Path,
    task: str,
    allow_none: bool,
    max_visual_tokens: int | None,
    engine: str,
    workers: int | None,
    overwrite: bool,
    retry_failed: bool,
    backend: str,
    variant: str | None,
    threads: int | None,
) -> int:
    """Ask every (video, query) of TABLE, and write a row for each.

    TABLE is JSON lines or CSV with `video` and `query`, or a folder of videos with --query. What fails is a row with
    its error, and the exit code is 1. Finished rows are kept: after a kill, the same command goes on.
    """
    if out.suffix.lower() not in SUFFIXES or out.is_dir():
        raise click.UsageError(f"--out is {str(out)!r}; expected the name of a file in {' or '.join(SUFFIXES)}.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK | os.X_OK):
        raise click.UsageError(f"--out is {str(out)!r}: no folder {str(out.parent)!r} to write into. Make it first.")
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.evaluation.run.bundle_model import bundle_model
    from bridge_stg.evaluation.run.executor import open_engine
    from bridge_stg.evaluation.run.infer_many import infer_many as run
    from bridge_stg.evaluation.run.queries import read_questions

    if out.exists() and table.exists() and out.samefile(table):
        raise click.UsageError(f"{out} is the table itself; give another name for --out.")
    questions = read_questions(table, media, queries=queries, pictures=task == "image")
    path = bundle if bundle is not None else demo_bundle(progress=lambda stage, *_: click.echo(f"  {stage}", err=True))
    with SampleProgress() as progress, open_engine(engine, workers=workers, threads=threads) as asker:
        inferred = run(
            questions,
            bundle_model(path, path.resolve().name, backend=backend, variant=variant, threads=asker.threads),
            out,
            task=task,
            allow_none=allow_none,
            max_visual_tokens=max_visual_tokens,
            engine=asker,
            overwrite=overwrite,
            retry_failed=retry_failed,
            progress=progress,
        )
    click.echo(f"{inferred.answered} answered, {inferred.failed} failed; the rows are in {out}")
    if inferred.first_error is not None:
        click.echo(f"The first that failed is {inferred.first_error}", err=True)
        click.echo("Mend that, and ask the failed again with --retry-failed.", err=True)
    return 1 if inferred.failed else 0
