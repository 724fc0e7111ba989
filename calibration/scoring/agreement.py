"""Agreement of two models' answers to one sample: the measure without annotations, and a finer one with them.

Works on the predictions of result rows: `found`, and by task `span`, `times` and `boxes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.evaluation.metrics import frame_iou, temporal_iou, tube_iou
from bridge_stg.evaluation.scoring import boxes_at
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.spans import in_span

STEP_S = 0.05
"""Step of the time grid on which two tubes are compared; it depends on neither model's frames."""


def agreement(task: str, reference: Mapping[str, Any], prediction: Mapping[str, Any]) -> dict[str, float]:
    """Return the agreement of a prediction with a reference, each value in 0..1.

    Returns:
        `tIoU` and `vIoU` of a tube, `IoU` of a span or image, `AO` of a track; and `boxes`, the mean IoU of the boxes
        where both have one, if any. 1 if neither found the target, 0 if only one did.
    """
    names = {"tube": ("tIoU", "vIoU"), "track": ("AO",)}.get(task, ("IoU",))
    found = bool(reference.get("found")), bool(prediction.get("found"))
    if not all(found):
        return dict.fromkeys(names, float(found[0] == found[1]))
    if task == "span":
        return {"IoU": temporal_iou(_span(reference), _span(prediction))}
    if task != "tube":
        times = np.asarray(reference.get("times", ()), np.float64)
        if not len(times) or not prediction.get("times"):
            return dict.fromkeys(names, 0.0)
        iou = float(box_iou(boxes_at(reference, times), boxes_at(prediction, times)).mean())
        return dict.fromkeys((*names, "boxes"), iou)
    spans = [_span(reference), _span(prediction)]
    times = np.arange(min(span[0] for span in spans), max(span[1] for span in spans), STEP_S) + STEP_S / 2
    inside = [in_span(times, span) for span in spans]
    first, second = (boxes_at(one, times) for one in (reference, prediction))
    scores = {"tIoU": frame_iou(*inside), "vIoU": tube_iou(inside[0], first, inside[1], second)}
    both = inside[0] & inside[1]
    return scores | ({"boxes": float(box_iou(first[both], second[both]).mean())} if both.any() else {})


def _span(prediction: Mapping[str, Any]) -> tuple[float, float]:
    start, end = prediction["span"]
    return float(start), float(end)
