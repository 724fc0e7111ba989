"""Evaluate models on a benchmark: ask, score, write a line a sample, and go on where a killed run stopped.

A model is anything with `ground`, `span`, `locate` and `track`; knows nothing of how models are loaded.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.media import shown
from bridge_stg.evaluation.run.executor import Engine, LocalEngine, Lost
from bridge_stg.evaluation.run.results import ResultFile, read_results
from bridge_stg.evaluation.samples import Dataset, Sample, Truth
from bridge_stg.evaluation.scoring import figures, score, score_nothing
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import AnnotationError, BridgeError, EngineError

BUFFER_FRAMES = 1024
"""Frames kept of a stream, which parts of videos and folders of frames are: 128 s at 8 fine frames a second."""


@dataclass(frozen=True, eq=False)
class Model:
    """A model to evaluate.

    Attributes:
        label: its name in tables; unique in a run.
        identity: plain values that say which model it is, such as a bundle's fingerprint.
        open: returns a context manager whose value has `ground`, `span`, `locate` and `track`.
    """

    label: str
    identity: Mapping[str, Any]
    open: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What is known after a run.

    Attributes:
        dataset: what was asked.
        asked: the samples of this run's limit, over all shards, whose medium was found.
        missing: those whose medium was not.
        rows: finished samples by model, then by sample id.
        figures: metrics by model, then by task and group.
        models: what each model is, by its label.
    """

    dataset: Dataset
    asked: Sequence[Sample]
    missing: Sequence[Sample]
    rows: Mapping[str, Mapping[str, Mapping[str, Any]]]
    figures: Mapping[str, Mapping[str, Mapping[str, float]]]
    models: Mapping[str, Mapping[str, Any]]


def evaluate(
    dataset: Dataset,
    models: Sequence[Model],
    out: Path,
    *,
    limit: int | None = None,
    shard: tuple[int, int] = (1, 1),
    overwrite: bool = False,
    retry_failed: bool = False,
    engine: Engine | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Evaluation:
    """Evaluate models on a dataset, one after the other, into `out`/samples/LABEL.jsonl.

    Args:
        dataset: what to ask.
        models: their labels must differ.
        out: a folder, made if need be. Finished samples in it are kept, and those of other shards count too.
        limit: only the first so many samples.
        shard: (i, n): of these every n-th, beginning with the i-th; each shard writes a file of its own.
        overwrite: start this run's files again.
        retry_failed: ask again what failed in an earlier run; otherwise a failure is a finished sample.
        engine: who asks; this process if not given.
        progress: called as progress(label, done, total) before the first and after each sample.

    Raises:
        BridgeError: no medium was found, a file in `out` holds results of something else, or a model cannot be opened.
        AnnotationError: the truth of a sample is not as published.
    """
    report = progress or (lambda label, done, total: None)
    asker = engine or LocalEngine()
    everything = dataset.chosen(limit=limit)
    missing = [sample for sample in everything if sample.media is None]
    if len(missing) == len(everything):
        raise BridgeError(
            f"none of the {len(everything)} media of {dataset.name} was found; the first is {missing[0].sought!r}. "
            "Give the folder that holds them with --media."
        )
    todo = [sample for sample in dataset.chosen(limit=limit, shard=shard) if sample.media is not None]
    places = {sample.id: place for place, sample in enumerate(dataset.samples)}
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for model in models:
        identity = identity_of(dataset, model)
        with ResultFile(result_path(out, model, shard), identity, overwrite=overwrite) as results:
            known = {} if overwrite else _other_shards(out, model, identity, results.path)
            finished = known | results.rows
            left = [
                sample
                for sample in todo
                if sample.id not in finished or (retry_failed and "error" in finished[sample.id])
            ]
            report(model.label, len(todo) - len(left), len(todo))
            if left:
                numbered = [(places[sample.id], sample) for sample in left]
                asked = partial(answer, allow_none=dataset.allow_none)
                with closing(asker.answers(model.open, asked, numbered)) as answers:
                    for done, (place, row) in enumerate(answers, len(todo) - len(left) + 1):
                        results.add(lost(*numbered[place], row.error) if isinstance(row, Lost) else row)
                        report(model.label, done, len(todo))
            found = _other_shards(out, model, identity, results.path) | results.rows
        rows[model.label] = {sample.id: found[sample.id] for sample in everything if sample.id in found}
    return Evaluation(
        dataset=dataset,
        asked=[sample for sample in everything if sample.media is not None],
        missing=missing,
        rows=rows,
        figures={label: figures(list(found.values())) for label, found in rows.items()},
        models={model.label: model.identity for model in models},
    )


def answer(grounder: Any, numbered: tuple[int, Sample], *, allow_none: bool) -> dict[str, Any]:
    """Ask one sample, given with its place in the dataset, and return its result row; a failure is part of it.

    Raises:
        AnnotationError: the sample's truth is not as published.
        ImportError: a package is missing, which would fail every sample.
    """
    index, sample = numbered
    truth = sample.read_truth()
    began = time.perf_counter()
    try:
        result = ask(grounder, sample, truth, allow_none=allow_none)
        seconds = time.perf_counter() - began
        scored = score(sample, truth, result)
        if "absent" in result.scores:
            scored["absent"] = float(result.scores["absent"])
        check_finite(scored)
    except (AnnotationError, ImportError):
        raise
    except Exception as error:  # whatever it is, the other samples go on
        seconds = time.perf_counter() - began
        scored = score_nothing(sample, truth) | {"error": f"{type(error).__name__}: {error}"}
    else:
        scored["answer"] = result.answer
        scored["size"] = list(result.size)
    return describe(index, sample, truth) | scored | {"seconds": round(seconds, 4)}


def lost(index: int, sample: Sample, error: str) -> dict[str, Any]:
    """Return the result row of a sample whose answer an engine could not bring back."""
    truth = sample.read_truth()
    return describe(index, sample, truth) | score_nothing(sample, truth) | {"error": error, "seconds": 0.0}


def describe(index: int, sample: Sample, truth: Truth) -> dict[str, Any]:
    """Return what a result row says of its sample."""
    return {
        "id": sample.id,
        "index": index,
        "task": sample.task,
        "group": sample.group,
        "query": sample.query,
        "media": sample.sought,
        "present": truth.present,
    }


def check_finite(values: Mapping[str, Any]) -> None:
    """Refuse an answer with NaN or infinity in it, as overflow in low precision makes: it is wrong, not unknown."""
    try:
        json.dumps(values, allow_nan=False)
    except ValueError:
        raise EngineError("the answer holds numbers that are not finite") from None


def ask(grounder: Any, sample: Sample, truth: Truth, *, allow_none: bool) -> Grounding:
    """Call what answers a sample's task: `ground`, `span`, `locate` or `track`."""
    video = shown(sample)
    options = {} if isinstance(video, str) else {"buffer_frames": BUFFER_FRAMES}
    if sample.task == "tube":
        return grounder.ground(video, sample.query, allow_none=allow_none, **options)
    if sample.task == "span":
        return grounder.span(video, sample.query, allow_none=allow_none, **options)
    if sample.task == "image":
        return grounder.locate(video, sample.query)
    return grounder.track(video, truth.boxes[0], query=sample.query, **options)


def identity_of(dataset: Dataset, model: Model) -> dict[str, Any]:
    """Return what must agree for results to be of the same run."""
    return {
        "benchmark": dataset.name,
        "split": dataset.split,
        "annotations": dataset.annotations,
        "allow_none": dataset.allow_none,
        "model": dict(model.identity),
    }


def result_path(out: Path, model: Model, shard: tuple[int, int] = (1, 1)) -> Path:
    """Return the file of a model's results, one for each shard."""
    name = re.sub(r"[^A-Za-z0-9_.@-]+", "_", model.label)
    return out / "samples" / (f"{name}.jsonl" if shard[1] == 1 else f"{name}.{shard[0]}of{shard[1]}.jsonl")


def _other_shards(out: Path, model: Model, identity: Mapping[str, Any], mine: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a model's other files in the folder, whatever their shards were."""
    stem = result_path(out, model).stem
    pattern = re.compile(re.escape(stem) + r"(\.\d+of\d+)?\.jsonl")
    files = [file for file in sorted(mine.parent.iterdir()) if pattern.fullmatch(file.name) and file != mine]
    return dict(itertools.chain.from_iterable(_rows(file, identity) for file in files))


def _rows(file: Path, identity: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from read_results(file, identity).items()
