"""Evaluate models on a dataset: query, score, write a line per sample; a later run resumes one that was stopped."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.media import video_input
from bridge_stg.evaluation.run.executor import Executor, LocalExecutor, Lost
from bridge_stg.evaluation.run.results import ResultFile, read_results
from bridge_stg.evaluation.samples import Dataset, Sample, Truth
from bridge_stg.evaluation.scoring import metrics_by_group, score, score_nothing
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.spec import ModelSpec, chosen_heads
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import TASKS
from bridge_stg.runtime.errors import AnnotationError, BridgeError, EngineError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions

BUFFER_FRAMES = 1024
"""Frames kept of a stream, such as a part of a video or a folder of frames: 128 s at 8 fine frames per second."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model to evaluate.

    Attributes:
        label: its name in tables; unique in a run.
        identity: plain values that identify the model, such as a bundle's fingerprint.
        open: returns a context manager whose value has `ground`, `span`, `locate` and `track`.
        spec: its spec, which says whether it was trained and what it knows; None: unknown.
    """

    label: str
    identity: Mapping[str, Any]
    open: Callable[[], AbstractContextManager[Any]]
    spec: ModelSpec | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of a run.

    Attributes:
        dataset: the dataset.
        found: the samples within this run's limit, over all shards, whose media file was found.
        missing: those whose medium was not found.
        rows: finished samples by model, then by sample id.
        metrics: metrics by model, then by task and group.
        models: identity of each model, by its label.
    """

    dataset: Dataset
    found: Sequence[Sample]
    missing: Sequence[Sample]
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]
    models: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """Fields of a result row that every report reads: those of `describe`, the scores and the seconds."""

    index: int
    task: str
    group: str
    query: str
    media: str
    present: bool
    scores: Mapping[str, float]
    seconds: float
    error: str = ""
    prediction: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}, expected one of: {', '.join(TASKS)}")


def bundle_model(
    path: Path, label: str, *, backend: str = "auto", variant: str | None = None, threads: int | None = None,
    heads: str | None = None, text: TextOptions | None = None, index: Path | None = None,
    max_index_bytes: int | None = None,
) -> Model:  # fmt: skip
    """Return a bundle as a model, identified by its fingerprint, backend, variants, and options of text heads.

    The arguments are those of `Grounder.load`; an index changes no answer.
    """
    bundle = Bundle.load(path)
    chosen = choose(bundle, backend=backend, variant=variant)
    identity = {
        "kind": "bundle", "fingerprint": bundle.manifest.fingerprint,
        "engine": f"{chosen.backend} {chosen.version}", "variants": dict(chosen.variants),
    }  # fmt: skip
    identity |= text_identity(bundle.manifest.spec, heads, text)
    options: dict[str, Any] = {"backend": backend, "variant": variant, "threads": threads, "heads": heads, "text": text}
    if index is not None:
        options["index"] = index.resolve()
    if max_index_bytes is not None:
        options["max_index_bytes"] = max_index_bytes
    return Model(label, identity, lambda: Grounder.load(path, **options), bundle.manifest.spec)


def text_identity(spec: ModelSpec, heads: str | None, text: TextOptions | None) -> dict[str, Any]:
    """Return what text heads add to a model's identity, empty for bridge heads.

    Arguments as for `Grounder.load`. Raises BundleError if the model lacks the heads.
    """
    if chosen_heads(spec, heads) != "text":
        return {}
    return {"heads": "text", "text": dataclasses.asdict(text or TextOptions())}


def evaluate(
    dataset: Dataset, models: Sequence[Model], out: Path, *, limit: int | None = None,
    shard: tuple[int, int] = (1, 1), overwrite: bool = False, retry_failed: bool = False,
    executor: Executor | None = None, progress: Callable[[str, int, int], Any] | None = None,
) -> Evaluation:  # fmt: skip
    """Evaluate models on a dataset, one after the other, into `out`/samples/LABEL.jsonl.

    Args:
        dataset: the dataset.
        models: models with different labels.
        out: a folder, made if it does not exist. Finished samples in it are kept, those of other shards too.
        limit: use only the first `limit` samples; None: all.
        shard: (i, n): every n-th of these, starting with the i-th; each shard writes a separate file.
        overwrite: discard this run's files.
        retry_failed: retry samples that failed in an earlier run; otherwise a failure is a finished sample.
        executor: runs the models; None: in this process.
        progress: called as progress(label, done, total) before the first and after each sample.

    Raises:
        BridgeError: no media file was found, a file in `out` has results of another run, or a model cannot be opened.
        AnnotationError: the ground truth of a sample is not as published.
    """
    report = progress or (lambda label, done, total: None)
    samples = dataset.chosen(limit=limit)
    missing = [sample for sample in samples if sample.media is None]
    if len(missing) == len(samples):
        what = f"none of the {len(samples)} media of {dataset.name} was found; the first is {missing[0].media_name!r}"
        raise BridgeError("evaluation.no_media", f"{what}. Pass their folder with --media.")
    todo = [sample for sample in dataset.chosen(limit=limit, shard=shard) if sample.media is not None]
    places = {sample.id: place for place, sample in enumerate(dataset.samples)}
    answer_sample = partial(answer, allow_none=dataset.allow_none)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        identity = identity_of(dataset, model)
        with ResultFile(result_path(out, model, shard), identity, overwrite=overwrite, row_kind=Row) as results:
            finished = ({} if overwrite else _other_shards(out, model, identity, results.path)) | results.rows
            left = [
                (places[sample.id], sample)
                for sample in todo
                if sample.id not in finished or (retry_failed and "error" in finished[sample.id])
            ]
            before, total = len(todo) - len(left), len(todo)
            report(model.label, before, total)
            if left:
                with closing((executor or LocalExecutor()).answers(model.open, answer_sample, left)) as answers:
                    for done, (place, row) in enumerate(answers, before + 1):
                        results.add(lost_row(*left[place], row.error) if isinstance(row, Lost) else row)
                        report(model.label, done, total)
            found = _other_shards(out, model, identity, results.path) | results.rows
        rows[model.label] = {sample.id: found[sample.id] for sample in samples if sample.id in found}
    return Evaluation(
        dataset=dataset,
        found=[sample for sample in samples if sample.media is not None],
        missing=missing,
        rows=rows,
        metrics={label: metrics_by_group(list(finished.values())) for label, finished in rows.items()},
        models={model.label: model.identity for model in models},
    )


def answer(grounder: Any, numbered: tuple[int, Sample], *, allow_none: bool) -> dict[str, Any]:
    """Answer one sample, given with its place in the dataset, and return its result row; a failure is part of it.

    Raises:
        AnnotationError: the sample's ground truth is not as published.
        ImportError: a package is missing, which would fail every sample.
    """
    index, sample = numbered
    truth = sample.read_truth()
    began = time.perf_counter()
    try:
        result = run_task(grounder, sample, truth, allow_none=allow_none)
        seconds = time.perf_counter() - began
        scored = score(sample, truth, result)
        if "absent" in result.scores:
            scored["absent"] = float(result.scores["absent"])
        check_finite(scored)
    except (AnnotationError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - any failure becomes a row, and the other samples continue
        seconds = time.perf_counter() - began
        scored = score_nothing(sample, truth) | {"error": f"{type(error).__name__}: {error}"}
    else:
        scored["answer"] = result.answer
        scored["size"] = list(result.size)
    return describe(index, sample, truth) | scored | {"seconds": round(seconds, 4)}


def lost_row(index: int, sample: Sample, error: str) -> dict[str, Any]:
    """Return the result row of a sample that the executor could not answer."""
    truth = sample.read_truth()
    return describe(index, sample, truth) | score_nothing(sample, truth) | {"error": error, "seconds": 0.0}


def describe(index: int, sample: Sample, truth: Truth) -> dict[str, Any]:
    """Return the part of a result row that describes the sample."""
    return {
        "id": sample.id, "index": index, "task": sample.task, "group": sample.group, "query": sample.query,
        "media": sample.media_name, "present": truth.present,
    }  # fmt: skip


def check_finite(values: Mapping[str, Any]) -> None:
    """Raise EngineError if an answer has NaN or infinity in it, as after an overflow in low precision."""
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise EngineError("engine.not_finite", "the answer has numbers that are not finite") from None


def run_task(grounder: Any, sample: Sample, truth: Truth, *, allow_none: bool) -> Grounding:
    """Run a sample's task: `ground`, `span`, `locate` or `track`."""
    video = video_input(sample)
    options = {"stream": sample.stream} if isinstance(video, str) else {"buffer_frames": BUFFER_FRAMES}
    if sample.task in ("tube", "span"):
        method = grounder.ground if sample.task == "tube" else grounder.span
        result: Grounding = method(video, sample.query, allow_none=allow_none, **options)
    elif sample.task == "image":
        result = grounder.locate(video, sample.query)
    else:
        result = grounder.track(video, truth.boxes[0], query=sample.query, **options)
    return result


def identity_of(dataset: Dataset, model: Model) -> dict[str, Any]:
    """Return the values that must agree for results to belong to the same run."""
    return {
        "benchmark": dataset.name, "split": dataset.split, "annotations": dataset.annotations,
        "allow_none": dataset.allow_none, "stream": dataset.stream, "model": dict(model.identity),
    }  # fmt: skip


def result_path(out: Path, model: Model, shard: tuple[int, int] = (1, 1)) -> Path:
    """Return the file of a model's results, one for each shard."""
    name = re.sub(r"[^A-Za-z0-9_.@-]+", "_", model.label)
    return out / "samples" / (f"{name}.jsonl" if shard[1] == 1 else f"{name}.{shard[0]}of{shard[1]}.jsonl")


def _other_shards(out: Path, model: Model, identity: Mapping[str, Any], mine: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a model's other files in the folder, whatever their shards were."""
    name = re.compile(re.escape(result_path(out, model).stem) + r"(\.\d+of\d+)?\.jsonl")
    files = [file for file in sorted(mine.parent.iterdir()) if name.fullmatch(file.name) and file != mine]
    return {sample: row for file in files for sample, row in read_results(file, identity, Row).items()}
