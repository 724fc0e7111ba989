from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.runtime.chain.boxes import box_area, box_cxcywh_to_xyxy, box_iou, boxes_to_pixels


def random_boxes(n: int, seed: int = 0) -> np.ndarray:
    corners = np.random.default_rng(seed).random((n, 2, 2)).astype(np.float32)
    return np.concatenate([corners.min(1), corners.max(1)], axis=-1)


def test_centre_and_size_become_corners() -> None:
    assert box_cxcywh_to_xyxy(np.array([[5.0, 6.0, 2.0, 4.0]])).tolist() == [[4, 4, 6, 8]]
    assert box_cxcywh_to_xyxy(np.ones((4, 5, 4), np.float32)).shape == (4, 5, 4)


def test_iou_of_known_boxes() -> None:
    a = np.array([0.0, 0.0, 2.0, 2.0])
    assert box_iou(a, a) == 1
    assert box_iou(a, np.array([1.0, 1.0, 3.0, 3.0])) == pytest.approx(1 / 7)
    assert box_iou(a, np.array([2.0, 0.0, 4.0, 2.0])) == 0
    assert box_iou(np.zeros(4), np.zeros(4)) == 0
    assert box_area(np.array([2.0, 2.0, 1.0, 1.0])) == 0


def test_iou_agrees_with_counting_pixels() -> None:
    boxes = (random_boxes(12, seed=3) * 40).round()
    masks = np.zeros((12, 40, 40), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int)):
        mask[y0:y1, x0:x1] = True
    both, either = (masks[:6] & masks[6:]).sum((1, 2)), (masks[:6] | masks[6:]).sum((1, 2))
    np.testing.assert_allclose(box_iou(boxes[:6], boxes[6:]), both / np.maximum(either, 1), atol=1e-6)


def test_pairs_broadcast_to_a_table() -> None:
    table = box_iou(random_boxes(3)[:, None], random_boxes(3)[None])
    assert table.shape == (3, 3)
    np.testing.assert_allclose(np.diag(table), 1)


def test_pixels_are_scaled_and_clipped() -> None:
    pixels = boxes_to_pixels(np.array([[-0.1, 0.5, 0.5, 1.2]]), width=100, height=50)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, [[0, 25, 50, 50]])
