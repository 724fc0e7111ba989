"""Score answers against the ground truth: the scores of one sample, and the metrics of many.

Tubes are scored on the annotation's own frames; boxes between the model's frames come from `Tube.at`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bridge_stg.evaluation import metrics
from bridge_stg.evaluation.samples import Sample, Truth
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.chain.spans import in_span

MAIN = {"tube": "vIoU", "span": "IoU", "image": "IoU", "track": "AO"}
"""The score of a sample by which samples are compared and ordered."""
DECIMALS = 3


def score(sample: Sample, truth: Truth, result: Grounding) -> dict[str, Any]:
    """Return the part of a result row that describes the answer, as plain values.

    Returns:
        `scores` by name; `prediction` with `found`, `span` in seconds, and `times`, `boxes` (xyxy in pixels of the
        annotation): the computed boxes of a tube, the one box of an image, one per frame of a tracked target; for the
        latter also `overlaps`, the IoU in every counted frame.
    """
    prediction: dict[str, Any] = {"found": result.found}
    if result.found and result.span is not None and sample.task != "image":
        prediction["span"] = [round(float(side), 6) for side in result.span]
    if sample.task == "span":
        span = result.span if result.found else None
        iou = 0.0 if truth.span is None or span is None else metrics.temporal_iou(truth.span, span)
        return {"scores": {"IoU": iou}, "prediction": prediction}
    tube = _tube(result, truth.size)
    if sample.task == "track":
        boxes = tracked(truth, tube)
        return _track_row(truth, boxes) | {"prediction": prediction | _boxes(truth.times, boxes)}
    if sample.task == "image":
        box = np.zeros((1, 4), np.float32) if tube is None else tube.at(np.zeros(1)).boxes
        prediction |= {} if tube is None else _boxes(np.zeros(1), box)
        return {"scores": {"IoU": float(box_iou(truth.boxes, box)[0])}, "prediction": prediction}
    if tube is not None:
        prediction |= _boxes(tube.times, tube.boxes)
    if not truth.present:
        right = float(not result.found)
        return {"scores": {"tIoU": right, "vIoU": right}, "prediction": prediction}
    truth = covering(truth, result.span if result.found else None)
    covered, boxes = np.zeros(len(truth.times), bool), np.zeros((len(truth.times), 4))
    if result.span is not None and tube is not None and len(truth.times):
        covered = in_span(truth.times, result.span)
        boxes[covered] = tube.at(truth.times[covered]).boxes
    scores = {
        "tIoU": metrics.frame_iou(truth.inside, covered),
        "vIoU": metrics.tube_iou(truth.inside, truth.boxes.astype(np.float64), covered, boxes),
    }
    return {"scores": scores, "prediction": prediction}


def score_nothing(sample: Sample, truth: Truth) -> dict[str, Any]:
    """Return the scores of a sample that failed: no answer, which scores 0."""
    if sample.task == "track":
        return _track_row(truth, np.zeros((len(truth.times), 4)))
    return {"scores": {"tIoU": 0.0, "vIoU": 0.0} if sample.task == "tube" else {"IoU": 0.0}}


def tracked(truth: Truth, tube: Tube | None) -> np.ndarray:
    """Return a tracked target's boxes [N, 4]; the first is the one that was given, as in GOT-10k's toolkit."""
    boxes = np.zeros((len(truth.times), 4)) if tube is None else tube.at(truth.times).boxes.astype(np.float64)
    boxes[0] = truth.boxes[0]
    return boxes


def covering(truth: Truth, span: tuple[float, float] | None) -> Truth:
    """Return a ground truth whose frames extend over a predicted span, if the length of the clip is unknown."""
    if truth.interval_s is None or span is None or not len(truth.times):
        return truth
    step = truth.interval_s
    before = np.arange(truth.times[0] - step, max(span[0], 0.0) - 1e-6, -step)[::-1]
    after = np.arange(truth.times[-1] + step, span[1] - 1e-6, step)
    added = (len(before), len(after))
    return replace(
        truth,
        times=np.concatenate([before, truth.times, after]),
        inside=np.pad(truth.inside, added),
        boxes=np.pad(truth.boxes, (added, (0, 0))),
        counted=np.pad(truth.counted, added, constant_values=True),
    )


def metrics_by_group(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the metrics of finished samples, by task, and by group if a dataset has groups.

    A sample that failed scores 0, as in HC-STVG's own evaluation; `failed` counts them. Absent targets count in AUROC
    and in the share that was recognized, not in the means over tubes.
    """
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["index"]):  # sums of floats depend on their order
        parts.setdefault(row["task"], []).append(row)
        if row.get("group"):
            parts.setdefault(f"{row['task']} / {row['group']}", []).append(row)
    return {name: _metrics(part) for name, part in parts.items()}


def _metrics(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    task = rows[0]["task"]
    counts: dict[str, float] = {"samples": len(rows), "failed": sum("error" in row for row in rows)}
    if task == "track":
        scored = [np.asarray(row["overlaps"], np.float64) for row in rows if row["overlaps"]]
        return counts | (dict(metrics.track_scores(scored)) if scored else {})
    there, absent = ([row for row in rows if row["present"] is present] for present in (True, False))
    found: dict[str, float] = {}
    if there and task == "tube":
        found = dict(metrics.tube_scores(*([row["scores"][name] for row in there] for name in ("tIoU", "vIoU"))))
    elif there and task == "span":
        found = dict(metrics.span_scores([row["scores"]["IoU"] for row in there]))
    elif there:
        found = {"Acc@0.5": metrics.recall_at([row["scores"]["IoU"] for row in there], 0.5)}
    if absent:
        found["absent"] = len(absent)
        positive, negative = ([row["absent"] for row in part if "absent" in row] for part in (absent, there))
        found["AUROC"] = metrics.auroc(positive, negative)
        found["absent recognized"] = float(np.mean([row["scores"]["vIoU"] for row in absent]))
    return counts | found


def _track_row(truth: Truth, boxes: np.ndarray) -> dict[str, Any]:
    ious = metrics.overlaps(truth.boxes, boxes, truth.size)[truth.counted]
    scores = {"AO": float(ious.mean())} if len(ious) else {}
    return {"scores": scores, "overlaps": [round(float(iou), 6) for iou in ious]}


def boxes_at(prediction: Mapping[str, Any], times: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] at times [N]; zeros, which overlap with nothing, where the prediction has none."""
    known = np.asarray(prediction.get("times", ()), np.float64)
    if not len(known):
        return np.zeros((len(times), 4))
    boxes = np.asarray(prediction["boxes"], np.float32).reshape(-1, 4)
    ones = np.ones(len(known), np.float32)
    return Tube(known, boxes, ones, ones > 0).at(times).boxes.astype(np.float64)


def _tube(result: Grounding, size: tuple[int, int] | None) -> Tube | None:
    """Return a result's tube, its boxes scaled from the media file's size to that of the annotation."""
    source = result.tube if result.tube is not None else result.boxes
    if not result.found or source is None or not len(source.times):
        return None
    scale = np.tile(np.divide(size, result.size), 2) if size is not None else np.ones(4)
    boxes = (source.boxes * scale).astype(np.float32)
    return Tube(times=source.times, boxes=boxes, presence=source.presence, visible=source.visible)


def _boxes(times: np.ndarray, boxes: np.ndarray) -> dict[str, Any]:
    return {
        "times": [round(float(time), 6) for time in times],
        "boxes": [[round(float(side), DECIMALS) for side in box] for box in boxes],
    }
