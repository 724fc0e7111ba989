"""Score a bundle by its answers: time spans and boxes, against annotations or against another bundle's tubes.

`evaluation.run.evaluate` runs the samples, so that a killed run resumes; this file turns its rows into scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.calibration.scoring.agreement import agreement
from bridge_stg.evaluation.run.evaluate import Model, evaluate
from bridge_stg.evaluation.samples import Dataset
from bridge_stg.evaluation.scoring import MAIN
from bridge_stg.runtime.errors import BridgeError

METRICS: Mapping[str, Mapping[str, str]] = {
    "tube": {"tIoU": "m_tIoU", "vIoU": "m_vIoU"},
    "span": {"IoU": "mIoU"},
    "image": {"IoU": "IoU"},
    "track": {"AO": "AO"},
}
"""By task: score of a sample → name of its mean."""

EARLY_STOPS = (16, 48)
"""Numbers of samples after which a model with a large drop is given up."""

RESAMPLES = 2000
CONFIDENCE = 0.95

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (percentile bootstrap: Efron & Tibshirani, 1993, chapter 13)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a bundle's answers.

    Attributes:
        label: the bundle's name in tables.
        samples: number of samples.
        failed: number of samples that ended in an error; they score 0.
        labelled: whether annotations are the ground truth; otherwise the reference's own tubes are.
        metrics: name → mean, in 0..1.
        drops: name → mean loss against the reference, sample by sample, in points of 1/100.
        answer_agreement: share of samples with the reference's answer; None without one, as are the next two.
        box_iou: mean IoU with the reference's boxes, over samples, where both have boxes.
        tube_iou: mean vIoU (other tasks: IoU) with the reference's tubes.
        seconds_median: seconds per sample.
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
        """The largest drop of any metric, in points; negative if all metrics have risen."""
        return max((drop.value for drop in self.drops.values()), default=0.0)

    @property
    def changed(self) -> float:
        """Share of the answers that differ from the reference's, in percent."""
        return 0.0 if self.answer_agreement is None else 100 * (1 - self.answer_agreement)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without the rows."""
        values = {part.name: getattr(self, part.name) for part in dataclasses.fields(self) if part.name != "rows"}
        for name in ("metrics", "drops"):
            values[name] = {metric: dataclasses.asdict(interval) for metric, interval in values[name].items()}
        return values


def score_model(
    model: Model,
    dataset: Dataset,
    *,
    folder: Path,
    reference: Scores | None = None,
    labelled: bool = True,
    seed: int = 0,
    stop_above: float | None = None,
    fill_rows: Callable[[int | None], Any] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Scores:
    """Evaluate a model on every sample, and score its answers.

    Args:
        model: a bundle, or another model with the methods of one.
        dataset: the samples.
        folder: folder of the rows, `folder`/samples/LABEL.jsonl; samples that have a row are not evaluated again.
        reference: scores of the model to compare with, on the same dataset.
        labelled: whether the dataset's annotations are the ground truth. If not, the reference's tubes are; without a
            reference, the model's own.
        seed: seed of the bootstrap.
        stop_above: drop in points at which to stop early: when the low end of a drop's interval is above it after one
            of `EARLY_STOPS` samples, the scores are those of the samples so far.
        fill_rows: writes the rows of the first n samples (None: all) in another process; called before each
            evaluation.
        progress: see `evaluate`.

    Raises:
        BridgeError: every sample failed, or as for `evaluate`.
    """
    early = [] if stop_above is None or reference is None else [n for n in EARLY_STOPS if n < len(dataset.samples)]
    for limit in (*early, None):
        if fill_rows is not None:
            fill_rows(limit)
        rows = evaluate(dataset, [model], folder, limit=limit, progress=progress).rows[model.label]
        scores = score_rows(model.label, rows, reference=reference, labelled=labelled, seed=seed)
        if stop_above is not None and any(drop.low > stop_above for drop in scores.drops.values()):
            break
    return scores


def score_rows(
    label: str, rows: Rows, *, reference: Scores | None = None, labelled: bool = True, seed: int = 0
) -> Scores:
    """Score finished rows; see `score_model`."""
    failures = [row["error"] for row in rows.values() if "error" in row]
    if failures and len(failures) == len(rows):
        what = f"all {len(rows)} samples failed with {label}; first error: {failures[0]}. Try `infer` on one of them"
        raise BridgeError("calibration.all_samples_failed", what)
    shares = {name: _agreement(reference.rows[name] if reference else row, row) for name, row in rows.items()}
    values = _by_metric(rows) if labelled else _by_metric(rows, shares)
    seconds = [row["seconds"] for row in rows.values()]
    metrics = {metric: bootstrap(list(found.values()), seed=seed) for metric, found in values.items()}
    median = float(np.median(seconds)) if seconds else None
    scores = Scores(label, len(rows), len(failures), labelled, metrics, seconds_median=median, rows=rows)
    if reference is None:
        return scores
    before = _by_metric(reference.rows) if labelled else {m: dict.fromkeys(found, 1.0) for m, found in values.items()}
    boxes = [share["boxes"] for share in shares.values() if "boxes" in share]
    tubes = [_main(share) for share in shares.values()]
    same = [reference.rows[name].get("answer") == row.get("answer") for name, row in rows.items()]
    drops = {
        metric: bootstrap([100 * (before[metric][name] - value) for name, value in found.items()], seed=seed)
        for metric, found in values.items()
    }
    iou = float(np.mean(boxes)) if boxes else None
    share, tube_iou = float(np.mean(same)), float(np.mean(tubes))
    return dataclasses.replace(scores, drops=drops, answer_agreement=share, box_iou=iou, tube_iou=tube_iou)


def bootstrap(values: Sequence[float], *, seed: int = 0) -> Interval:
    """Return the mean of values and its 95 % interval, the same for the same values and seed."""
    array = np.asarray(values, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def worst_cases(scores: Scores, reference: Scores, *, count: int = 6) -> list[dict[str, Any]]:
    """Return the samples with the least agreement: `id`, `why` and `scores` by label, worst first."""
    found = sorted(
        (_main(_agreement(reference.rows[name], row)), row["index"], name) for name, row in scores.rows.items()
    )
    return [
        {
            "id": name,
            "why": f"its tube shares {share:.2f} with that of {reference.label}",
            "scores": {
                one.label: one.rows[name]["scores"].get(MAIN[one.rows[name]["task"]]) for one in (reference, scores)
            },
        }
        for share, _, name in found[:count]
    ]


def _by_metric(rows: Rows, shares: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, dict[str, float]]:
    """Return the scores against annotations, or else the given ones, by metric and id."""
    found: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if shares is None and row["task"] == "tube" and not row["present"]:
            continue  # absent targets have no score, as in `evaluation.scoring.figures`
        scores = row["scores"] if shares is None else shares[name]
        for score, metric in METRICS[row["task"]].items():
            if score in scores:
                found.setdefault(metric, {})[name] = scores[score]
    return found


def _agreement(reference: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    """Return the agreement of two rows; a failed row agrees only with another failed row."""
    if "error" in reference or "error" in row:
        return dict.fromkeys(METRICS[row["task"]], float("error" in reference and "error" in row))
    return agreement(row["task"], reference["prediction"], row["prediction"])


def _main(shares: Mapping[str, float]) -> float:
    return shares.get("vIoU", next(iter(shares.values())))
