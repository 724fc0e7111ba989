"""The commands that run a model over many samples: `evaluate`, `infer-many`, `index`, and two for the demo and RefCOCO.

Bundles run without torch, checkpoints in eager torch.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands import options
from bridge_stg.commands.options import COUNT, PATH, OutputFile, OutputFolder, shard
from bridge_stg.commands.progress import LOG, ProgressBar, note_unknown_words, note_untrained, stage_line
from bridge_stg.evaluation.datasets.registry import DATASETS
from bridge_stg.runtime.errors import BridgeError

if TYPE_CHECKING:
    from bridge_stg.evaluation.run.evaluate import Model
    from bridge_stg.runtime import TextOptions

WHOLE_BYTES, BLOCKS, BLOCK_BYTES = 2**26, 64, 2**16


@click.command()
@click.argument("dataset", type=click.Choice(list(DATASETS)))
@click.option(
    "--annotations", type=PATH, multiple=True, required=True, help="Annotation file or folder as published; repeatable."
)
@click.option("--media", type=PATH, help="Folder of the videos or images; default: that of the annotations.")
@click.option(
    "--model", "models", type=PATH, multiple=True, required=True,
    help="Checkpoint or bundle to evaluate; repeatable. Others are compared with the first.",
)  # fmt: skip
@click.option("--out", type=OutputFolder(), required=True, help="Folder for results and report.")
@click.option("--split", help="Split to read if the files have several, such as val or testA.")
@click.option("--limit", type=COUNT, help="Evaluate only the first N samples.")
@click.option("--shard", type=shard, default="1/1", metavar="I/N", show_default=True, help="Evaluate only part I of N.")
@options.stream_option
@options.many_options
def evaluate(
    *, dataset: str, annotations: tuple[Path, ...], media: Path | None, models: tuple[Path, ...], out: Path,
    split: str | None, stream: int | None, executor: str, workers: int | None, backend: str, variant: str | None,
    threads: int | None, **given: Any,
) -> None:  # fmt: skip
    """Evaluate and compare models on the published files of a DATASET, with its standard metrics.

    Nothing is downloaded. Finished samples are kept: the same command resumes a run that was stopped.
    """
    from bridge_stg.evaluation.datasets.registry import read_dataset
    from bridge_stg.evaluation.report.report import table_text, write_report
    from bridge_stg.evaluation.run.evaluate import evaluate as run
    from bridge_stg.evaluation.run.evaluate import result_path
    from bridge_stg.evaluation.run.executor import open_executor

    head_options = options.pop_head_options(given)
    samples = read_dataset(dataset, annotations, media, split=split).with_stream(stream)
    opening = open_executor(executor, workers=workers, threads=threads)
    with ProgressBar(unit="sample") as progress, opening as opened:
        described = named_models(models, backend=backend, variant=variant, threads=opened.threads, **head_options)
        for path, model in zip(models, described, strict=True):
            note_untrained(model.spec, path, heads=head_options["heads"])
        evaluation = run(samples, described, out, executor=opened, progress=progress, **given)
    values = write_report(evaluation, out)
    click.echo(table_text(values))
    if dataset == "got-10k":
        from bridge_stg.evaluation.datasets.got10k import write_results

        for model in described:
            folder = out / "got10k" / result_path(out, model).stem
            count = write_results(list(evaluation.rows[model.label].values()), folder)
            click.echo(f"wrote the boxes of {count} sequences to {folder}; zip its contents for the server")
    click.echo(f"wrote {out / 'report.json'} and {out / 'report.html'}")
    for label, failures in values["failed"].items():
        if failures and len(failures) == values["finished"][label]:
            what = f"every sample of {label} failed; the first error: {failures[0]['error']}"
            raise BridgeError("evaluation.all_failed", f"{what}. Fix it, and retry with --retry-failed.")


@click.command("infer-many")
@click.argument("table", type=PATH)
@click.option("--media", type=PATH, help="Folder of the videos or images; default: that of TABLE.")
@options.text_queries_options
@options.bundle_option
@click.option("--out", type=OutputFile(".jsonl", ".parquet"), required=True, help="JSON lines or Parquet file.")
@options.query_options
@options.search_options
@options.index_option
@options.many_options
def infer_many(
    *, table: Path, media: Path | None, texts: tuple[str, ...], queries_file: Path | None, bundle: Path | None,
    out: Path, task: str | None, first_box: tuple[float, ...] | None, index: Path | None,
    max_index_bytes: int | None, executor: str, workers: int | None, backend: str, variant: str | None,
    threads: int | None, **given: Any,
) -> int:  # fmt: skip
    """Answer every (video, query) of TABLE, and write a row for each.

    TABLE is JSON lines or CSV with `video` (a file or an http or https address) and `query`, or a folder of videos,
    with --query or --queries. For --task track, a row or --first-box has the box of the first frame. A failure is a
    row with its error, and the exit code is 1. Finished rows, and finished windows of long videos, are kept: the same
    command resumes a run that was stopped.
    """
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.evaluation.run.evaluate import bundle_model
    from bridge_stg.evaluation.run.executor import open_executor
    from bridge_stg.evaluation.run.infer_many import infer_many as run
    from bridge_stg.evaluation.run.queries import read_queries

    if out.exists() and table.exists() and out.samefile(table):
        raise BridgeError("output.is_input", f"{out} is the table itself; choose another --out.")
    load_options = {
        "backend": backend, "variant": variant, "index": index, "max_index_bytes": max_index_bytes,
        **options.pop_head_options(given),
    }  # fmt: skip
    task, queries = options.chosen_task(task, first_box), options.all_queries(texts, queries_file)
    options.check_search(task, given["window"], cuts=given["cuts"], top=given["top"])
    rows = read_queries(table, media, texts=queries, task=task, first_box=first_box)
    path = bundle or demo_bundle(progress=stage_line)
    opening = open_executor(executor, workers=workers, threads=threads)
    with ProgressBar(unit="sample") as progress, opening as opened:
        model = bundle_model(path, path.resolve().name, threads=opened.threads, **load_options)
        note_untrained(model.spec, path, heads=load_options["heads"])
        note_unknown_words(model.spec, (row.text for row in rows))
        done = run(rows, model, out, task=task, executor=opened, progress=progress, **given)
    click.echo(f"{done.answered} answered, {done.failed} failed; the rows are in {out}")
    if done.first_error is not None:
        LOG.error("The first error: %s", done.first_error)
        LOG.error("Fix it, and retry the failed queries with --retry-failed.")
    return 1 if done.failed else 0


@click.command()
@click.argument("videos", nargs=-1, required=True, type=PATH)
@click.option(
    "--index", "folder", type=OutputFolder(), metavar="DIR", required=True, help="Folder of the index; created if new."
)
@options.index_size_option
@click.option("--fine", is_flag=True, help="Store all fine frames too, which takes far more disk.")
@click.option("--remove", is_flag=True, help="Delete what the index has of VIDEOS instead.")
@options.bundle_option
@options.visual_tokens_option
@options.stream_option
@options.executor_options
@options.text_options
@options.backend_options()
def index(
    *, videos: tuple[Path, ...], folder: Path, max_index_bytes: int | None, fine: bool, remove: bool,
    bundle: Path | None, executor: str, workers: int | None, backend: str, variant: str | None, threads: int | None,
    max_visual_tokens: int | None, stream: int | None, **given: Any,
) -> int:  # fmt: skip
    """Keep the visual tokens of VIDEOS (files and folders) on disk, for `infer` and `infer-many` with --index DIR.

    Queries with the same bundle and options then decode and encode nothing that is stored. A file that cannot be read
    is named, and the exit code is 1. What is stored already is kept: the same command resumes one that was stopped.
    """
    from bridge_stg.commands.tables import index_line, index_total
    from bridge_stg.demo.bundle import demo_bundle
    from bridge_stg.evaluation.run.evaluate import bundle_model
    from bridge_stg.evaluation.run.executor import open_executor
    from bridge_stg.evaluation.run.index_files import index_files, video_files
    from bridge_stg.runtime.index.index import remove_file

    files = video_files(videos)
    if remove:
        removed = sum(remove_file(folder, file) for file in files)
        click.echo(f"deleted {removed / 1e6:.1f} MB of {len(files)} files from {folder}")
        return 0
    path = bundle or demo_bundle(progress=stage_line)
    load_options = {
        "backend": backend, "variant": variant, "index": folder, "max_index_bytes": max_index_bytes,
        **options.pop_head_options(given),
    }  # fmt: skip
    call = {"fine": fine, "max_visual_tokens": max_visual_tokens, "stream": stream}
    done = []
    opening = open_executor(executor, workers=workers, threads=threads)
    with ProgressBar(unit="file") as progress, opening as opened:
        model = bundle_model(path, path.resolve().name, threads=opened.threads, **load_options)
        for row in index_files(files, model, executor=opened, progress=progress, **call):
            click.echo(index_line(row))
            done.append(row)
    click.echo(index_total(done, folder))
    return 1 if any(row.error for row in done) else 0


@click.command("convert-refs")
@click.argument("refs", type=PATH)
@click.argument("out", type=PATH)
def convert_refs(refs: Path, out: Path) -> None:
    """Convert RefCOCO's REFS pickle, such as refs(unc).p, to the JSON file OUT without running its code."""
    from bridge_stg.evaluation.datasets.refcoco import convert_refs as convert

    click.echo(f"{convert(refs, out)} refs are in {out}")


@click.command("evaluate-demo")
@click.option(
    "--out",
    type=OutputFile(".json"),
    default=Path("assets/demo/figures.json"),
    show_default=True,
    help="File of the figures.",
)
@click.option("--clips", type=COUNT, default=200, show_default=True, help="Number of held-out clips.")
@options.bundle_option
@click.option("--checkpoint", type=PATH, help="Evaluate this checkpoint in eager torch instead.")
@click.option("--text-bundle", type=PATH, help="Compare this demo bundle with text heads with --bundle.")
@options.variant_option()
def evaluate_demo(out: Path, *, text_bundle: Path | None, **options: Any) -> None:
    """Evaluate the demo model on held-out clips, with controls, or compare its text heads with its bridge heads."""
    if text_bundle is not None:
        if options.pop("checkpoint") is not None or options.pop("variant") is not None:
            raise BridgeError("options.conflict", "--text-bundle excludes --checkpoint and --variant.")
        from bridge_stg.demo.text_heads.held_out import evaluate_text_demo

        click.echo(evaluate_text_demo(out, text=text_bundle, **options))
        return
    from bridge_stg.demo.held_out import evaluate_demo as measure

    click.echo(measure(out, **options))


def named_models(paths: Sequence[Path], **load_options: Any) -> list[Model]:
    """Return models with unique labels: the folder's name, or as much of its path as makes it unique.

    `load_options` are the keyword arguments of `bundle_model`.
    """
    from bridge_stg.evaluation.run.evaluate import bundle_model

    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise BridgeError("options.conflict", f"{path} appears twice in --model; list each model once.")
    models = []
    for path, whole in zip(paths, resolved):
        count = 1
        while sum(other.parts[-count:] == whole.parts[-count:] for other in resolved) > 1:
            count += 1
        label = "/".join(whole.parts[-count:])
        if (path / "manifest.json").is_file():
            models.append(bundle_model(path, label, **load_options))
        elif (path / "config.json").is_file():
            models.append(checkpoint_model(path, label, heads=load_options["heads"], text=load_options["text"]))
        else:
            found = "does not exist" if not path.exists() else "is a file" if path.is_file() else "has neither"
            what = f"{path} {found}; expected the folder of a bundle (manifest.json) or checkpoint (config.json)."
            raise BridgeError("evaluation.no_model", what)
    return models


def checkpoint_model(path: Path, label: str, *, heads: str | None = None, text: TextOptions | None = None) -> Model:
    """Return a checkpoint as a model in eager torch, identified by the contents of its files and torch's version.

    `heads` and `text` are as for `Grounder.load`.
    """
    import torch

    from bridge_stg.checkpoint.checkpoint import load_checkpoint, load_config
    from bridge_stg.evaluation.run.evaluate import Model, text_identity
    from bridge_stg.model.torch_session import torch_grounder

    files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors"))
    contents = contents_digest(files, path)
    identity = {"kind": "checkpoint", "fingerprint": contents, "engine": f"torch {torch.__version__}"}
    spec = load_config(path).model_spec()
    identity |= text_identity(spec, heads, text)

    def open_model() -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext(torch_grounder(load_checkpoint(path), heads=heads, text=text))

    return Model(label, identity, open_model, spec)


def contents_digest(files: Sequence[Path], root: Path) -> str:
    """Return a SHA-256 over names, sizes and bytes of files; of files over 64 MiB, over 64 blocks spread over them.

    Two trainings of one model differ in nearly every block, and hashing tens of gigabytes would take minutes.
    """
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for block in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
