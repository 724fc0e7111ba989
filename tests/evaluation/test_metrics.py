"""Metrics on cases worked by hand, and against sums written out another way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bridge_stg.evaluation.metrics import (
    auroc,
    bounded,
    frame_iou,
    overlaps,
    recall_at,
    span_scores,
    temporal_iou,
    track_scores,
    tube_iou,
    tube_scores,
)


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
    assert scores == pytest.approx({"m_tIoU": 0.5, "m_vIoU": 0.3, "vIoU@0.3": 1 / 3, "vIoU@0.5": 1 / 3})


def test_auroc():
    assert auroc([0.9, 0.8], [0.1, 0.2]) == 1
    assert auroc([0.1], [0.9]) == 0
    assert auroc([0.5, 0.5], [0.5]) == 0.5
    assert auroc([3, 1], [2, 0]) == pytest.approx(0.75)
    assert np.isnan(auroc([], [1]))


def test_auroc_against_the_area_under_the_curve():
    """The curve is drawn point by point, and the area beneath it summed by trapezoids."""
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 6, 30) / 5 + 0.2, rng.integers(0, 6, 20) / 5
    points = [
        ((negative >= threshold).mean(), (positive >= threshold).mean())
        for threshold in [np.inf, *np.unique(np.concatenate([positive, negative]))[::-1]]
    ]
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
    assert auroc(positive.tolist(), negative.tolist()) == pytest.approx(area)


def test_spans_count_from_the_threshold_on():
    """TALL compares with >=: an IoU of exactly 0.5 is found at 0.5."""
    ious = [0.2, 0.3, 0.5, 0.71]
    assert span_scores(ious) == pytest.approx({"R1@0.3": 0.75, "R1@0.5": 0.5, "R1@0.7": 0.25, "mIoU": 1.71 / 4})
    assert recall_at([temporal_iou((0, 2), (0, 1))], 0.5) == 1
    assert temporal_iou((5, 4), (4, 5)) == 0  # an empty true span, as a few published lines have


def test_span_iou_against_counting_milliseconds():
    rng = np.random.default_rng(2)
    for _ in range(20):
        first, second = np.sort(rng.integers(0, 5000, (2, 2)), 1).tolist()
        a, b = set(range(*first)), set(range(*second))
        expected = len(a & b) / len(a | b)
        assert temporal_iou(tuple(np.divide(first, 1000)), tuple(np.divide(second, 1000))) == pytest.approx(expected)


def test_accuracy_counts_from_one_half_on():
    assert recall_at([0.49, 0.5, 1.0, 0.0], 0.5) == 0.5


def test_frames_count_above_the_threshold():
    """GOT-10k's toolkit compares with >; frames of all sequences are pooled."""
    scores = track_scores([np.array([0.5, 0.75, 0.8, 0.95]), np.array([0.0])])
    assert scores == pytest.approx({"AO": 0.6, "SR@0.5": 3 / 5, "SR@0.75": 2 / 5, "AO/sequence": 0.375})


def test_boxes_are_bounded_as_by_the_toolkit():
    """A box that begins outside is moved in at its full width; what reaches out on the other side is cut off."""
    boxes = np.array([[-10, 5, 10, 15], [90, 50, 130, 90], [-5, -5, 200, 200], [150, 20, 160, 30]], float)
    expected = [[0, 5, 20, 15], [90, 50, 100, 80], [0, 0, 100, 80], [100, 20, 100, 30]]
    np.testing.assert_array_equal(bounded(boxes, (100, 80)), expected)


def test_overlaps_against_counting_pixels():
    """Whole-number boxes, drawn as pixels after the toolkit's clipping."""
    rng = np.random.default_rng(3)
    width, height = 40, 30
    for _ in range(20):
        rects = np.concatenate([rng.integers(-8, 35, (2, 2)), rng.integers(1, 20, (2, 2))], 1)
        masks = []
        for left, top, w, h in rects:
            x, y = min(max(left, 0), width), min(max(top, 0), height)
            mask = np.zeros((height, width), bool)
            mask[y : y + h, x : x + w] = True
            masks.append(mask)
        union = (masks[0] | masks[1]).sum()
        expected = (masks[0] & masks[1]).sum() / union if union else 0
        corners = np.concatenate([rects[:, :2], rects[:, :2] + rects[:, 2:]], 1).astype(float)
        assert overlaps(corners[:1], corners[1:], (width, height))[0] == pytest.approx(expected)
