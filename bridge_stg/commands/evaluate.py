"""The commands `evaluate` and `convert-refs`. Bundles are evaluated without torch, checkpoints in eager torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bridge_stg.commands.options import THREADS
from bridge_stg.evaluation.datasets.registry import BENCHMARKS
from bridge_stg.evaluation.run.executor import ENGINES
from bridge_stg.runtime.errors import BridgeError

if TYPE_CHECKING:
    from bridge_stg.evaluation.run.evaluate import Model


class Shard(click.ParamType):
    """`i/n`: the i-th of n parts, counted from 1."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, _, second = str(value).partition("/")
        if not (first.isdigit() and second.isdigit() and 1 <= int(first) <= int(second)):
            self.fail(f"{value!r} is no shard; expected i/n with 1 ≤ i ≤ n, such as 2/8.", param, ctx)
        return int(first), int(second)


@click.command()
@click.argument("benchmark", type=click.Choice(list(BENCHMARKS)))
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="The published file or folder; repeatable where a benchmark has two.",
)
@click.option("--media", type=click.Path(path_type=Path), help="Videos or images; default: beside the annotations.")
@click.option(
    "--model",
    "models",
    type=click.Path(path_type=Path),
    multiple=True,
    required=True,
    help="A checkpoint or bundle; repeatable. The first is what the others are compared with.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder for results and report.")
@click.option("--split", help="Where the files hold several, such as val or testA.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first so many samples.")
@click.option("--shard", type=Shard(), default="1/1", show_default=True, help="Only the i-th of n parts of them.")
@click.option("--overwrite", is_flag=True, help="Start again instead of keeping finished samples.")
@click.option("--retry-failed", is_flag=True, help="Ask again what failed in an earlier run.")
@click.option("--backend", default="auto", show_default=True, help="The engine that runs bundles.")
@click.option("--variant", help="The bundles' dialect; by default the one that fits this machine.")
@click.option("--threads", type=THREADS, help="CPU threads; by default the engine decides.")
@click.option("--engine", type=click.Choice(ENGINES), default="local", show_default=True, help="Who asks the models.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes of --engine ray; by default one, or one a GPU.")
def evaluate(
    benchmark: str,
    annotations: tuple[Path, ...],
    media: Path | None,
    models: tuple[Path, ...],
    out: Path,
    split: str | None,
    limit: int | None,
    shard: tuple[int, int],
    overwrite: bool,
    retry_failed: bool,
    backend: str,
    variant: str | None,
    threads: int | None,
    engine: str,
    workers: int | None,
) -> None:
    """Score models side by side on a BENCHMARK's own files, in the field's metrics.

    Nothing is downloaded. Finished samples are kept: after a kill, the same command goes on.
    """
    from bridge_stg.evaluation.datasets.registry import read_benchmark
    from bridge_stg.evaluation.report.report import table_text, write_report
    from bridge_stg.evaluation.run.evaluate import evaluate as run
    from bridge_stg.evaluation.run.evaluate import result_path
    from bridge_stg.evaluation.run.executor import open_engine

    dataset = read_benchmark(benchmark, annotations, media, split=split)
    with SampleProgress() as progress, open_engine(engine, workers=workers, threads=threads) as asker:
        described = named_models(models, backend=backend, variant=variant, threads=asker.threads)
        evaluation = run(
            dataset,
            described,
            out,
            limit=limit,
            shard=shard,
            overwrite=overwrite,
            retry_failed=retry_failed,
            engine=asker,
            progress=progress,
        )
    values = write_report(evaluation, out)
    click.echo(table_text(values))
    if benchmark == "got-10k":
        from bridge_stg.evaluation.datasets.got10k import write_results

        for model in described:
            folder = out / "got10k" / result_path(out, model).stem
            count = write_results(list(evaluation.rows[model.label].values()), folder)
            click.echo(f"wrote the boxes of {count} sequences to {folder}; zip its contents for the server")
    click.echo(f"wrote {out / 'report.json'} and {out / 'report.html'}")
    for label, failures in values["failed"].items():
        if failures and len(failures) == values["finished"][label]:
            raise BridgeError(
                f"every sample of {label} failed, the first with {failures[0]['error']}. Mend that, and ask again with "
                "--retry-failed."
            )


@click.command("convert-refs")
@click.argument("refs", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def convert_refs(refs: Path, out: Path) -> None:
    """Turn RefCOCO's REFS pickle, such as refs(unc).p, into the JSON file OUT, executing nothing."""
    from bridge_stg.evaluation.datasets.refcoco_pickle import convert_refs as convert

    click.echo(f"{convert(refs, out)} refs are in {out}")


class SampleProgress:
    """A progress bar on stderr with samples and time left, one a model; nothing where stderr is not a terminal."""

    def __init__(self) -> None:
        self.label: str | None = None
        self.bar: Any = None

    def __call__(self, label: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if label != self.label:
            self.close()
            # Samples finished in an earlier run took no time of this one: `initial` keeps them out of the estimate.
            self.label, self.bar = label, tqdm(desc=label, total=total, initial=done, unit="sample", disable=None)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> SampleProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def named_models(paths: Sequence[Path], *, backend: str, variant: str | None, threads: int | None) -> list[Model]:
    """Return models with labels of their own: the folder's name, or as much of its path as tells them apart.

    Raises:
        BridgeError: a path is neither a bundle nor a checkpoint, or is given twice.
    """
    from bridge_stg.evaluation.run.bundle_model import bundle_model

    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(resolved):
        if path in resolved[:place]:
            raise BridgeError(f"{paths[place]} is given twice with --model; expected each model once.")
    made = []
    for path, whole in zip(paths, resolved):
        parts = 1
        while sum(other.parts[-parts:] == whole.parts[-parts:] for other in resolved) > 1:
            parts += 1
        label = "/".join(whole.parts[-parts:])
        if (path / "manifest.json").is_file():
            made.append(bundle_model(path, label, backend=backend, variant=variant, threads=threads))
        elif (path / "config.json").is_file():
            made.append(checkpoint_model(path, label))
        else:
            found = "does not exist" if not path.exists() else "is a file" if path.is_file() else "has neither"
            raise BridgeError(
                f"{path} {found}; expected the folder of a bundle (manifest.json) or of a checkpoint (config.json)."
            )
    return made


def checkpoint_model(path: Path, label: str) -> Model:
    """Return a checkpoint as a model in eager torch: it is the same while its files and torch are."""
    import torch

    from bridge_stg.checkpoint.checkpoint import load_checkpoint
    from bridge_stg.evaluation.run.evaluate import Model

    files = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".safetensors"))
    identity = {
        "kind": "checkpoint",
        "fingerprint": contents_digest(files, path),
        "engine": f"torch {torch.__version__}",
    }
    return Model(label, identity, lambda: contextlib.nullcontext(load_checkpoint(path).grounder()))


WHOLE_BYTES, BLOCKS, BLOCK_BYTES = 2**26, 64, 2**16


def contents_digest(files: Sequence[Path], root: Path) -> str:
    """Return a SHA-256 over files: names, sizes, and their bytes; of files over 64 MiB, 64 blocks spread over them.

    Two trainings of one model differ in nearly every block, and hashing tens of gigabytes would take minutes.
    """
    import hashlib

    whole = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        whole.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_BYTES:
                whole.update(stream.read())
                continue
            for block in range(BLOCKS):
                stream.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                whole.update(stream.read(BLOCK_BYTES))
    return whole.hexdigest()
