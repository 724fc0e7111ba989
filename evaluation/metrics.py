"""The field's standard metrics: scores of frames, boxes and spans. Knows nothing of models and files.

Comparisons with a threshold use `>` or `>=` as the published code does. A tube is scored on the video's own frames:
S_i are the frames that truth and prediction share, S_u those of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bridge_stg.runtime.chain.boxes import box_iou


def temporal_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return the IoU of two spans in seconds (Gao et al., Charades-STA, arXiv 1705.02101); 0 if both are empty."""
    shared = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = (first[1] - first[0]) + (second[1] - second[0]) - shared
    return shared / union if union > 0 else 0.0


def frame_iou(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return tIoU on frames: |S_i| / |S_u| of two boolean masks [n] (Zhang et al., VidSTG, arXiv 2001.06891)."""
    union = np.count_nonzero(truth | predicted)
    return np.count_nonzero(truth & predicted) / union if union else 0.0


def tube_iou(truth: np.ndarray, truth_boxes: np.ndarray, predicted: np.ndarray, predicted_boxes: np.ndarray) -> float:
    """Return vIoU: the sum of box IoU over S_i, divided by |S_u| (VidSTG, arXiv 2001.06891, section 5.1).

    Each tube has a mask of its frames, bool [n], and boxes [n, 4] xyxy that are read there.
    """
    union = np.count_nonzero(truth | predicted)
    shared = truth & predicted
    if not union or not shared.any():
        return 0.0
    return float(box_iou(truth_boxes[shared], predicted_boxes[shared]).sum() / union)


def tube_scores(t_ious: Sequence[float], v_ious: Sequence[float]) -> Mapping[str, float]:
    """Return m_tIoU, m_vIoU and the shares of clips whose vIoU is above (`>`) 0.3 and 0.5.

    (VidSTG, arXiv 2001.06891, section 5.1; `>` in eval_hcvg.py of github.com/tzhhhh123/HC-STVG and in TubeDETR's code.)
    """
    v = np.asarray(v_ious, np.float64)
    return {
        "m_tIoU": float(np.mean(t_ious)),
        "m_vIoU": float(v.mean()),
        "vIoU@0.3": float((v > 0.3).mean()),
        "vIoU@0.5": float((v > 0.5).mean()),
    }


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Return the area under the ROC curve: the chance that a positive scores above a negative, where ties count half.

    (Hanley & McNeil, Radiology 143, 1982.)
    """
    first, second = np.asarray(positive, np.float64), np.sort(np.asarray(negative, np.float64))
    if not first.size or not second.size:
        return float("nan")
    below, through = (np.searchsorted(second, first, side=side) for side in ("left", "right"))
    return float(((below + through) / 2).mean() / second.size)


def recall_at(ious: Sequence[float], threshold: float) -> float:
    """Return the share of queries whose one predicted span or box has an IoU of at least `threshold`.

    For spans this is R1@m (Gao et al., TALL, arXiv 1705.02101: "R@1, IoU=m"; `>=` in compute_IoU_recall_top_n_forreg
    of github.com/jiyanggao/TALL). For boxes at 0.5 it is Acc@0.5 (Mao et al., arXiv 1511.02283; `>=` in the code of the
    comprehension results of RefCOCO's authors).
    """
    return float((np.asarray(ious, np.float64) >= threshold).mean())


def span_scores(ious: Sequence[float]) -> Mapping[str, float]:
    """Return R1@0.3, R1@0.5, R1@0.7 and mIoU of temporal grounding, from the IoU of each query's span."""
    return {f"R1@{m}": recall_at(ious, m) for m in (0.3, 0.5, 0.7)} | {"mIoU": float(np.mean(ious))}


def bounded(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Clip boxes [N, 4] xyxy to an image as GOT-10k's toolkit does (rect_iou in got10k/utils/metrics.py).

    Left and top are clipped, then width and height to the rest of the image: a box that begins outside is moved inside
    at its full width.
    """
    boxes = np.asarray(boxes, np.float64)
    bound = np.asarray(size, np.float64)
    corner = np.clip(boxes[:, :2], 0, bound)
    return np.concatenate([corner, corner + np.clip(boxes[:, 2:] - boxes[:, :2], 0, bound - corner)], 1)


def overlaps(truth: np.ndarray, predicted: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Return IoU [N] of a target's boxes and a tracker's, xyxy in pixels, both clipped to an image of known size."""
    if size is not None:
        truth, predicted = bounded(truth, size), bounded(predicted, size)
    iou: np.ndarray = np.clip(box_iou(np.asarray(truth, np.float64), np.asarray(predicted, np.float64)), 0, 1)
    return iou


def track_scores(overlaps_by_sequence: Sequence[np.ndarray]) -> Mapping[str, float]:
    """Return AO, SR@0.5 and SR@0.75 over all frames of all sequences, and AO as a mean over sequences.

    AO is the mean overlap, SR@t the share of frames whose overlap is above t (`>`). The frames of all sequences are
    pooled, so long ones weigh more, as in `report` of GOT-10k's toolkit (github.com/got-10k/toolkit,
    experiments/got10k.py). The caller omits each sequence's first frame and those in which the target is hidden
    (cover 0). Other toolkits use the mean of the sequences' AO, here AO/sequence.
    """
    frames = np.concatenate([np.asarray(o, np.float64) for o in overlaps_by_sequence])
    sequences = [float(np.mean(o)) for o in overlaps_by_sequence if len(o)]
    return {
        "AO": float(frames.mean()),
        "SR@0.5": float((frames > 0.5).mean()),
        "SR@0.75": float((frames > 0.75).mean()),
        "AO/sequence": float(np.mean(sequences)),
    }
