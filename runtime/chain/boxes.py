"""Box arithmetic in numpy: boxes lie in the last axis, of size 4, in any unit (0..1 or pixels).

`xyxy` is left, top, right, bottom; `cxcywh` is centre and size.
"""

from __future__ import annotations

import numpy as np


def box_cxcywh_to_xyxy(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes [..., 4] from centre and size to corners, in the same unit and dtype."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def box_area(boxes: np.ndarray) -> np.ndarray:
    """Return the areas [...] of xyxy boxes [..., 4]; a box whose corners are swapped has area 0."""
    area: np.ndarray = np.maximum(boxes[..., 2:] - boxes[..., :2], 0).prod(axis=-1)
    return area


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return intersection over union [...] of xyxy boxes [..., 4], pair by pair; 0 where both are empty.

    The leading axes broadcast: `box_iou(a[:, None], b[None])` is the table of all pairs.
    """
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    overlap = box_area(np.concatenate([low, high], axis=-1))
    union = box_area(a) + box_area(b) - overlap
    return np.where(union > 0, overlap / np.where(union > 0, union, 1), 0)


def boxes_to_pixels(boxes: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Scale xyxy boxes [..., 4] from 0..1 to pixels of a frame, and clip them to it; float32."""
    size = np.array([width, height, width, height], np.float32)
    pixels: np.ndarray = np.clip(boxes.astype(np.float32) * size, np.float32(0), size)
    return pixels
