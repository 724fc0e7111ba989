"""Box arithmetic in numpy. Every function takes and returns boxes in the last axis of size 4.

`xyxy` is left, top, right, bottom; `cxcywh` is centre and size. Both in any unit (0..1 or pixels).
"""

from __future__ import annotations

import numpy as np


def box_cxcywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Turn boxes [..., 4] from centre and size into corners, in the same unit and dtype."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def box_xyxy_to_cxcywh(boxes: np.ndarray) -> np.ndarray:
    """Turn boxes [..., 4] from corners into centre and size, in the same unit and dtype."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], axis=-1)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas [...] of xyxy boxes [..., 4]; a box whose corners are swapped has area 0."""
    size = np.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return size[..., 0] * size[..., 1]


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union [...] of xyxy boxes [..., 4], pair by pair; 0 where both are empty.

    The leading axes broadcast: `box_iou(a[:, None], b[None])` is the table of all pairs.
    """
    overlap, union = _overlap_and_union(a, b)
    return _divide(overlap, union)


def box_generalized_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return generalized IoU [...] in -1..1 of xyxy boxes [..., 4], pair by pair (Rezatofighi et al., CVPR 2019).

    Unlike IoU it tells near misses from far ones: the share of the hull that neither box covers is subtracted.
    """
    overlap, union = _overlap_and_union(a, b)
    hull = np.concatenate([np.minimum(a[..., :2], b[..., :2]), np.maximum(a[..., 2:], b[..., 2:])], axis=-1)
    hull_area = box_area(hull)
    return _divide(overlap, union) - _divide(hull_area - union, hull_area)


def boxes_to_pixels(boxes: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Scale xyxy boxes [..., 4] from 0..1 to pixels of a frame, and clip them to it; float32."""
    return clip_boxes(boxes.astype(np.float32) * _frame_size(width, height), width=width, height=height)


def boxes_to_unit(boxes: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Scale xyxy boxes [..., 4] from pixels of a frame to 0..1, and clip them to it; float32."""
    return clip_boxes(boxes, width=width, height=height) / _frame_size(width, height)


def clip_boxes(boxes: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Clip xyxy pixel boxes [..., 4] to a frame of width x height; float32."""
    return np.clip(boxes.astype(np.float32), np.float32(0), _frame_size(width, height))


def _overlap_and_union(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = box_area(np.concatenate([low, high], axis=-1))
    return overlap, box_area(a) + box_area(b) - overlap


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    positive = whole > 0
    return np.where(positive, part / np.where(positive, whole, 1), 0)


def _frame_size(width: int, height: int) -> np.ndarray:
    return np.array([width, height, width, height], np.float32)
