"""Metrics on cases worked by hand, and against sums written out another way."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.evaluation.metrics import auroc, frame_iou, temporal_iou, tube_iou, tube_scores


def mask(start: int, stop: int, length: int = 10) -> np.ndarray:
    return (np.arange(length) >= start) & (np.arange(length) < stop)


@pytest.mark.parametrize(
    "first, second, expected",
    [((0, 2), (0, 2), 1), ((0, 2), (1, 3), 1 / 3), ((0, 1), (1, 2), 0), ((0, 4), (1, 2), 0.25), ((1, 1), (1, 1), 0)],
)
def test_temporal_iou(first, second, expected):
    assert temporal_iou(first, second) == pytest.approx(expected)


def test_frame_iou():
    assert frame_iou(mask(2, 6), mask(4, 8)) == pytest.approx(2 / 6)
    assert frame_iou(mask(0, 0), mask(0, 0)) == 0


def test_tube_iou_divides_by_the_union_of_frames():
    boxes = np.tile(np.array([0, 0, 10, 10], float), (10, 1))
    half = np.tile(np.array([0, 0, 10, 5], float), (10, 1))
    assert tube_iou(mask(2, 6), boxes, mask(2, 6), boxes) == pytest.approx(1)
    assert tube_iou(mask(2, 6), boxes, mask(4, 8), half) == pytest.approx(2 * 0.5 / 6)
    assert tube_iou(mask(0, 2), boxes, mask(5, 8), boxes) == 0


def test_tube_iou_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, predicted = rng.random(12) < 0.6, rng.random(12) < 0.6
        a, b = (np.sort(rng.uniform(0, 50, (12, 2, 2)), 1).reshape(12, 4) for _ in range(2))
        total, union = 0.0, 0
        for i in range(12):
            union += bool(truth[i] or predicted[i])
            if truth[i] and predicted[i]:
                w = max(0, min(a[i, 2], b[i, 2]) - max(a[i, 0], b[i, 0]))
                h = max(0, min(a[i, 3], b[i, 3]) - max(a[i, 1], b[i, 1]))
                areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a[i], b[i])]
                total += w * h / (sum(areas) - w * h)
        assert tube_iou(truth, a, predicted, b) == pytest.approx(total / union, rel=1e-5)


def test_scores_count_clips_above_a_threshold():
    scores = tube_scores([1.0, 0.5, 0.0], [0.6, 0.3, 0.0])
    assert scores == pytest.approx({"clips": 3, "m_tIoU": 0.5, "m_vIoU": 0.3, "vIoU@0.3": 1 / 3, "vIoU@0.5": 1 / 3})


def test_auroc():
    assert auroc([0.9, 0.8], [0.1, 0.2]) == 1
    assert auroc([0.1], [0.9]) == 0
    assert auroc([0.5, 0.5], [0.5]) == 0.5
    assert auroc([3, 1], [2, 0]) == pytest.approx(0.75)
    assert np.isnan(auroc([], [1]))
