"""Compare a runner's outputs with the torch reference; every reported time has its parity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy, box_iou

Arrays = Mapping[str, np.ndarray]
COMPARED = {
    "vision": "visual_tokens", "prefill": "logits", "prefill_text": "logits", "decode": "logits", "bridge": "taps",
}  # fmt: skip


def parity(row: str, found: Arrays, reference: Arrays) -> dict[str, Any]:
    """Compare one row's outputs.

    Returns:
        `cosine` and `worst_cosine`, mean and minimum over all vectors along the last axis; for logits also
        `same_choice`, the share of positions with the reference's most likely token. For boxes `iou` and `worst_iou`
        over the reference's frames, where a missing frame counts 0. Empty if the runner returned no such output.
    """
    if row in ("spatial", "end_to_end"):
        return _boxes(row, found, reference) if "boxes" in found else {}
    name = COMPARED[row]
    if name not in found:
        return {}
    mine, theirs = np.asarray(found[name], np.float64), np.asarray(reference[name], np.float64)
    if mine.size != theirs.size:
        return {"error": f"{name} has shape {list(mine.shape)}, the reference's {list(theirs.shape)}"}
    mine = mine.reshape(-1, theirs.shape[-1])
    theirs = theirs.reshape(-1, theirs.shape[-1])
    cosines = np.sum(mine * theirs, -1) / np.maximum(
        np.linalg.norm(mine, axis=-1) * np.linalg.norm(theirs, axis=-1), 1e-30
    )
    result = {"cosine": round(float(cosines.mean()), 6), "worst_cosine": round(float(cosines.min()), 6)}
    if name == "logits":
        result["same_choice"] = round(float((mine.argmax(-1) == theirs.argmax(-1)).mean()), 4)
    return result


def _boxes(row: str, found: Arrays, reference: Arrays) -> dict[str, Any]:
    mine, theirs = (np.asarray(arrays["boxes"], np.float64).reshape(-1, 4) for arrays in (found, reference))
    if row == "spatial":
        mine, theirs = box_cxcywh_to_xyxy(mine), box_cxcywh_to_xyxy(theirs)
    else:
        answered = dict(zip(np.round(found["times"], 4).tolist(), mine, strict=True))
        nothing = np.zeros(4)
        mine = np.stack([answered.get(time, nothing) for time in np.round(reference["times"], 4).tolist()])
    if mine.shape != theirs.shape:
        return {"error": f"{len(mine)} boxes, the reference has {len(theirs)}"}
    ious = box_iou(mine, theirs)
    return {"iou": round(float(ious.mean()), 4), "worst_iou": round(float(ious.min()), 4)}
