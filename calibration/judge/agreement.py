"""How like two models' answers to one sample are: the measure where nobody has annotated the clips, and a finer one
where somebody has, since a box that moves by a pixel shows here long before a metric changes.

Works on the predictions of result rows: `found`, and by task `span`, `times` and `boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.evaluation.metrics import frame_iou, temporal_iou, tube_iou
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Tube
from bridge_stg.runtime.chain.spans import in_span

STEP_S = 0.05
"""Two tubes are compared on a grid of this distance: neither model's frames have a say in it."""


def likeness(task: str, reference: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, float]:
    """Return how like a prediction is to a reference's, each in 0..1, 1 where neither found anything.

    Returns:
        `tIoU` and `vIoU` of a tube, `IoU` of a span or image, `AO` of a track; and `boxes`, the mean IoU of the boxes
        where both have one, which is left out where there is no such place. Nothing but zeros where one alone found
        the target.
    """
    names = {"tube": ("tIoU", "vIoU"), "track": ("AO",)}.get(task, ("IoU",))
    found = bool(reference.get("found")), bool(prediction.get("found"))
    if not all(found):
        return dict.fromkeys(names, float(found[0] == found[1]))
    if task == "span":
        return {"IoU": temporal_iou(_span(reference), _span(prediction))}
    if task != "tube":
        boxes = _shared_boxes(reference, prediction)
        return dict.fromkeys((*names, "boxes"), float(boxes.mean())) if len(boxes) else dict.fromkeys(names, 0.0)
    spans = [_span(reference), _span(prediction)]
    times = np.arange(min(span[0] for span in spans), max(span[1] for span in spans), STEP_S) + STEP_S / 2
    inside = [in_span(times, span) for span in spans]
    first, second = (_boxes_at(one, times) for one in (reference, prediction))
    found_scores = {"tIoU": frame_iou(*inside), "vIoU": tube_iou(inside[0], first, inside[1], second)}
    both = inside[0] & inside[1]
    return found_scores | ({"boxes": float(box_iou(first[both], second[both]).mean())} if both.any() else {})


def _span(prediction: Mapping[str, Any]) -> tuple[float, float]:
    start, end = prediction["span"]
    return float(start), float(end)


def _boxes_at(prediction: Mapping[str, Any], times: np.ndarray) -> np.ndarray:
    """Return boxes [N, 4] at times [N]; zeros, which overlap with nothing, where a prediction has none."""
    known = np.asarray(prediction.get("times", ()), np.float64)
    if not len(known):
        return np.zeros((len(times), 4))
    boxes = np.asarray(prediction["boxes"], np.float32).reshape(-1, 4)
    ones = np.ones(len(known), np.float32)
    return Tube(known, boxes, ones, ones > 0).at(times).boxes.astype(np.float64)


def _shared_boxes(reference: Mapping[str, Any], prediction: Mapping[str, Any]) -> np.ndarray:
    """Return IoU [N] of an image's box or of a track's boxes, at the reference's own times."""
    times = np.asarray(reference.get("times", ()), np.float64)
    if not len(times) or not prediction.get("times"):
        return np.zeros(0)
    return box_iou(_boxes_at(reference, times), _boxes_at(prediction, times))
