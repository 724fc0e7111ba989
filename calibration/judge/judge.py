"""Judge a bundle by what it answers: time spans and boxes, against annotations or against another bundle's own tubes.

The runner of benchmarks asks, so that a killed run goes on at the sample; what is here turns rows into a judgement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.calibration.judge.agreement import likeness
from bridge_stg.evaluation.run.evaluate import Model, evaluate
from bridge_stg.evaluation.samples import Dataset
from bridge_stg.runtime.errors import BridgeError

METRICS: Mapping[str, Mapping[str, str]] = {
    "tube": {"tIoU": "m_tIoU", "vIoU": "m_vIoU"},
    "span": {"IoU": "mIoU"},
    "image": {"IoU": "IoU"},
    "track": {"AO": "AO"},
}
"""By task: a sample's score and the name of its mean."""

LOOKS = (16, 48)
RESAMPLES = 2000
CONFIDENCE = 0.95

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """A mean, and the interval that holds it with 95 % confidence (bootstrap over samples, percentile method).

    (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.)
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Judgement:
    """What a bundle's answers are worth.

    Attributes:
        label: the bundle's name in tables.
        samples: how many were asked.
        failed: how many of them ended in an error; they score 0.
        labelled: whether the truth is that of annotators; otherwise it is the reference's own tubes.
        metrics: by name, in 0..1.
        drops: by name, what the reference has more, in points of 1/100, sample by sample.
        answer_agreement: share of samples with the reference's answer; None without one, as are the next two.
        box_iou: mean IoU with the reference's boxes, over samples, where both have boxes.
        tube_iou: mean vIoU (of other tasks: IoU) with the reference's tubes.
        seconds_median: of a sample, all of it.
        rows: the answers, by sample id.
    """

    label: str
    samples: int
    failed: int
    labelled: bool
    metrics: Mapping[str, Interval]
    drops: Mapping[str, Interval] = field(default_factory=dict)
    answer_agreement: float | None = None
    box_iou: float | None = None
    tube_iou: float | None = None
    seconds_median: float | None = None
    rows: Rows = field(default_factory=dict, repr=False)

    @property
    def drop(self) -> float:
        """The largest drop of any metric, in points; negative where all have risen."""
        return max((drop.value for drop in self.drops.values()), default=0.0)

    @property
    def changed(self) -> float:
        """Answers that are not the reference's, in percent."""
        return 0.0 if self.answer_agreement is None else 100 * (1 - self.answer_agreement)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, rows left out."""
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self) if part.name != "rows"}
        for name in ("metrics", "drops"):
            values[name] = {metric: dataclasses.asdict(interval) for metric, interval in values[name].items()}
        return values


def judge(
    model: Model,
    dataset: Dataset,
    *,
    folder: Path,
    reference: Judgement | None = None,
    labelled: bool = True,
    seed: int = 0,
    stop_above: float | None = None,
    ask: Callable[[int | None], Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Judgement:
    """Ask a model every sample, and judge its answers.

    Args:
        model: a bundle, or whatever has its methods.
        dataset: what to ask.
        folder: rows are kept in `folder`/samples/LABEL.jsonl, and those that are there are not asked again.
        reference: the judgement of the model that this one is compared with, on the same dataset.
        labelled: whether the dataset's truth counts. If not, the reference's own tubes are the truth; without a
            reference the model is its own.
        seed: of the bootstrap.
        stop_above: the rest is not asked once a drop is above so many points beyond doubt (the low end of its interval,
            looked at after `LOOKS` samples); the judgement is then of those that were.
        ask: fills the file of rows elsewhere, up to a number of samples; called before each look.
        progress: see `evaluate`.

    Raises:
        BridgeError: every sample failed, or as `evaluate`.
    """
    looks = [] if stop_above is None or reference is None else [n for n in LOOKS if n < len(dataset.samples)]
    for limit in (*looks, None):
        if ask is not None:
            ask(limit)
        rows = evaluate(dataset, [model], folder, limit=limit, progress=progress).rows[model.label]
        judged = judgement(model.label, rows, reference=reference, labelled=labelled, seed=seed)
        if stop_above is not None and any(drop.low > stop_above for drop in judged.drops.values()):
            break
    return judged


def judgement(
    label: str, rows: Rows, *, reference: Judgement | None = None, labelled: bool = True, seed: int = 0
) -> Judgement:
    """Judge finished rows; see `judge`."""
    failures = [row["error"] for row in rows.values() if "error" in row]
    if failures and len(failures) == len(rows):
        raise BridgeError(
            f"every one of the {len(rows)} samples that {label} was asked failed, the first with {failures[0]}. Look "
            "whether the bundle grounds one of them with `infer`"
        )
    alike = {name: _alike(reference.rows[name] if reference else row, row) for name, row in rows.items()}
    scores = _scores(rows) if labelled else _named(rows, alike)
    found = {metric: bootstrap(list(values.values()), seed=seed) for metric, values in scores.items()}
    seconds = [row["seconds"] for row in rows.values()]
    judged = Judgement(
        label=label,
        samples=len(rows),
        failed=len(failures),
        labelled=labelled,
        metrics=found,
        seconds_median=float(np.median(seconds)) if seconds else None,
        rows=rows,
    )
    if reference is None:
        return judged
    before = _scores(reference.rows) if labelled else {m: dict.fromkeys(v, 1.0) for m, v in scores.items()}
    drops = {
        metric: bootstrap([100 * (before[metric][name] - score) for name, score in values.items()], seed=seed)
        for metric, values in scores.items()
    }
    boxes = [found["boxes"] for found in alike.values() if "boxes" in found]
    tubes = [found["vIoU"] if "vIoU" in found else next(iter(found.values())) for found in alike.values()]
    same = [_answer(reference.rows[name]) == _answer(row) for name, row in rows.items()]
    return dataclasses.replace(
        judged,
        drops=drops,
        answer_agreement=float(np.mean(same)),
        box_iou=float(np.mean(boxes)) if boxes else None,
        tube_iou=float(np.mean(tubes)),
    )


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of values and its 95 % interval, the same for the same values and seed."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def worst_cases(judged: Judgement, reference: Judgement, *, count: int = 6) -> list[dict[str, Any]]:
    """Return the samples whose tubes are least like the reference's: `id`, `why` and `scores` by label, worst first."""
    found = []
    for name, row in judged.rows.items():
        alike = _alike(reference.rows[name], row)
        found.append((alike.get("vIoU", next(iter(alike.values()))), row["index"], name))
    cases = []
    for share, _, name in sorted(found)[:count]:
        scores = {one.label: _main_score(one.rows[name]) for one in (reference, judged)}
        cases.append(
            {"id": name, "why": f"its tube shares {share:.2f} with that of {reference.label}", "scores": scores}
        )
    return cases


def _scores(rows: Rows) -> dict[str, dict[str, float]]:
    """Return scores against the annotation by metric, then by id. Absent targets have none, as in `figures`."""
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if row["task"] == "tube" and not row["present"]:
            continue
        for score, metric in METRICS[row["task"]].items():
            if score in row["scores"]:
                found.setdefault(metric, {})[name] = row["scores"][score]
    return found


def _named(rows: Rows, alike: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return likeness by metric, then by id."""
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        for score, metric in METRICS[row["task"]].items():
            found.setdefault(metric, {})[name] = alike[name][score]
    return found


def _alike(reference: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """Return the likeness of two rows; one that failed is like another that failed, and like nothing else."""
    if "error" in reference or "error" in row:
        return dict.fromkeys(METRICS[row["task"]], float("error" in reference and "error" in row))
    return likeness(row["task"], reference["prediction"], row["prediction"])


def _answer(row: Mapping[str, Any]) -> tuple[str, str]:
    return ("failed", "") if "error" in row else ("answered", row["answer"])


def _main_score(row: Mapping[str, Any]) -> float | None:
    return row["scores"].get({"tube": "vIoU", "track": "AO"}.get(row["task"], "IoU"))
