"""The field's metrics. Numbers only: frames, boxes and spans in, scores out.

A tube is judged on the video's own frames: S_i are the frames that truth and prediction share, S_u those of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bridge_stg.runtime.boxes import box_iou


def temporal_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return the IoU of two spans in seconds (Gao et al., Charades-STA, arXiv 1705.02101); 0 where both are empty."""
    shared = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - shared
    return shared / union if union > 0 else 0.0


def frame_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return tIoU on frames: |S_i| / |S_u| of two boolean masks [n] (Zhang et al., VidSTG, arXiv 2001.06891)."""
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else 0.0


def tube_iou(truth: np.ndarray, truth_boxes: np.ndarray, predicted: np.ndarray, predicted_boxes: np.ndarray) -> float:
    """Return vIoU: the sum of box IoU over S_i, divided by |S_u| (VidSTG, arXiv 2001.06891, section 5.1).

    Args:
        truth: bool [n], frames of the true tube.
        truth_boxes: [n, 4] xyxy, read where `truth`.
        predicted: bool [n], frames of the predicted tube.
        predicted_boxes: [n, 4] xyxy, read where `predicted`.
    """
    union = np.count_nonzero(truth | predicted)
    shared = truth & predicted
    if not union or not shared.any():
        return 0.0
    return float(box_iou(truth_boxes[shared], predicted_boxes[shared]).sum() / union)


def tube_scores(t_ious: Sequence[float], v_ious: Sequence[float]) -> Mapping[str, float]:
    """Return m_tIoU, m_vIoU and the shares of clips whose vIoU is above 0.3 and 0.5."""
    v = np.asarray(v_ious, np.float64)
    return {
        "clips": len(v),
        "m_tIoU": float(np.mean(t_ious)),
        "m_vIoU": float(v.mean()),
        "vIoU@0.3": float((v > 0.3).mean()),
        "vIoU@0.5": float((v > 0.5).mean()),
    }


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    (Hanley & McNeil, Radiology 143, 1982.)
    """
    first, second = np.asarray(positive, np.float64)[:, None], np.asarray(negative, np.float64)[None]
    if not first.size or not second.size:
        return float("nan")
    return float(((first > second) + 0.5 * (first == second)).mean())
