"""From truth and answer to scores, on cases worked by hand, and against sums written out frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.evaluation.samples import Sample, Truth, image_truth, span_truth, tube_truth
from bridge_stg.evaluation.scoring import covering, metrics_by_group, score, score_nothing
from bridge_stg.runtime.chain.results import Grounding
from tests.evaluation.fake_models import grounding

SIZE = (100, 80)
BOX = np.array([10, 10, 30, 30], np.float32)


def sample(task: str) -> Sample:
    return Sample(id="1", task=task, media=Path("v"), media_name="v", query="q", read_truth=lambda: span_truth(None))


def ten_frames(start: int, stop: int, **options: Any) -> Truth:
    """Ten frames at 2 per second, the target still at BOX in frames start … stop − 1."""
    frames = np.arange(10)
    inside = (frames >= start) & (frames < stop)
    return tube_truth(frames / 2, inside, np.tile(BOX, (10, 1)), span=(start / 2, stop / 2), **options)


def answered(start: float, end: float, box: np.ndarray = BOX, **options: Any) -> Grounding:
    return grounding([start, (start + end) / 2], [box, box], span=(start, end), size=SIZE, **options)


def test_tube_by_hand() -> None:
    truth = ten_frames(2, 6)  # 1.0 to 3.0 s
    found = score(sample("tube"), truth, answered(1.0, 3.0))
    assert found["scores"] == pytest.approx({"tIoU": 1, "vIoU": 1})
    assert found["prediction"]["span"] == [1.0, 3.0] and found["prediction"]["boxes"][0] == [10, 10, 30, 30]
    # Frames 4 … 7 answered, 2 of them true, of 6 in all; the box has half the height.
    half = score(sample("tube"), truth, answered(2.0, 4.0, BOX - [0, 0, 0, 10]))["scores"]
    assert half == pytest.approx({"tIoU": 2 / 6, "vIoU": 2 * 0.5 / 6})
    assert score(sample("tube"), truth, answered(1, 3, found=False))["scores"] == {"tIoU": 0, "vIoU": 0}
    assert score_nothing(sample("tube"), truth)["scores"] == {"tIoU": 0, "vIoU": 0}


def test_boxes_are_interpolated_between_the_models_frames() -> None:
    """The model looked at 1 and 3 s only; the annotation's frames at 1, 1.5, 2, 2.5 get interpolated boxes."""
    boxes = np.array([[0, 0, 20, 20], [40, 0, 60, 20]], np.float32)
    moved = np.array([[10 * i, 0, 10 * i + 20, 20] for i in range(-2, 8)], np.float32)
    frames = np.arange(10)
    inside = (frames >= 2) & (frames < 6)
    truth = tube_truth(frames / 2, inside, moved, span=(1.0, 3.0))
    assert score(sample("tube"), truth, grounding([1.0, 3.0], boxes, span=(1.0, 3.0)))["scores"] == pytest.approx(
        {"tIoU": 1, "vIoU": 1}
    )


def test_tube_against_a_loop_over_frames() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        count, fps = int(rng.integers(5, 40)), float(rng.choice([5, 29.97, 12.5]))
        start, stop = sorted(rng.choice(count + 1, 2, replace=False))
        boxes = rng.uniform(0, 50, (count, 4)).astype(np.float32)
        boxes[:, 2:] += boxes[:, :2]
        times, inside = np.arange(count) / fps, (np.arange(count) >= start) & (np.arange(count) < stop)
        truth = tube_truth(times, inside, boxes, span=(start / fps, stop / fps))
        first, last = sorted(rng.choice(count + 1, 2, replace=False))
        fine = np.sort(rng.uniform(first / fps, last / fps, 4))
        predicted = rng.uniform(0, 50, (4, 4)).astype(np.float32)
        predicted[:, 2:] += predicted[:, :2]
        result = grounding(fine, predicted, span=(first / fps, last / fps))
        shared = union = 0
        total = 0.0
        for frame in range(count):
            true, covered = start <= frame < stop, first <= frame < last
            union += true or covered
            if true and covered:
                shared += 1
                t = frame / fps
                i = int(np.searchsorted(fine, t))
                if i == 0 or i == len(fine):
                    box = predicted[min(i, len(fine) - 1)]
                else:
                    part = (t - fine[i - 1]) / (fine[i] - fine[i - 1])
                    box = predicted[i - 1] * (1 - part) + predicted[i] * part
                width = max(0.0, min(box[2], boxes[frame][2]) - max(box[0], boxes[frame][0]))
                height = max(0.0, min(box[3], boxes[frame][3]) - max(box[1], boxes[frame][1]))
                areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, boxes[frame]))
                total += width * height / (areas - width * height)
        found = score(sample("tube"), truth, result)["scores"]
        assert found["tIoU"] == pytest.approx(shared / union)
        assert found["vIoU"] == pytest.approx(total / union, rel=1e-4)


def test_boxes_are_scaled_to_the_annotation() -> None:
    """The user's copy of the video has half the annotated size."""
    truth = ten_frames(2, 6, size=SIZE)
    result = grounding([1.0, 2.0], [BOX / 2, BOX / 2], span=(1.0, 3.0), size=(50, 40))
    assert score(sample("tube"), truth, result)["scores"]["vIoU"] == pytest.approx(1)


def test_frames_continue_if_the_length_of_the_clip_is_unknown() -> None:
    frames = np.arange(4)
    truth = tube_truth(1 + frames / 2, frames >= 0, np.tile(BOX, (4, 1)), span=(1.0, 3.0), interval_s=0.5)
    wide = covering(truth, (0.0, 4.0))
    assert list(wide.times) == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
    assert list(wide.inside) == [False] * 2 + [True] * 4 + [False] * 2
    assert covering(truth, (1.2, 2.0)).times.tolist() == truth.times.tolist()
    assert score(sample("tube"), truth, answered(0.0, 4.0))["scores"] == pytest.approx({"tIoU": 0.5, "vIoU": 0.5})


def test_absent_targets() -> None:
    truth = span_truth(None)
    right = score(sample("tube"), truth, answered(0, 1, found=False))
    wrong = score(sample("tube"), truth, answered(0, 1))
    assert (right["scores"]["vIoU"], wrong["scores"]["vIoU"]) == (1, 0)
    assert right["prediction"] == {"found": False}


def test_spans_and_images() -> None:
    assert score(sample("span"), span_truth((0.0, 4.0)), answered(2, 4))["scores"] == {"IoU": 0.5}
    assert score(sample("span"), span_truth((4.0, 4.0)), answered(2, 4))["scores"] == {"IoU": 0.0}
    found = score(sample("image"), image_truth(BOX), grounding([0.0], [BOX], span=(0, 0.5)))
    assert found["scores"] == {"IoU": 1.0} and found["prediction"]["boxes"] == [[10, 10, 30, 30]]
    assert "span" not in found["prediction"]
    assert score_nothing(sample("image"), image_truth(BOX))["scores"] == {"IoU": 0.0}


def test_tracks() -> None:
    truth = ten_frames(0, 10, size=SIZE)
    truth.counted[[0, 5]] = False
    off = np.tile(BOX + 10, (10, 1))
    off[0] = 0  # the model is given the first box, which is not scored
    found = score(sample("track"), truth, grounding(truth.times, off, span=(0, 5), size=SIZE))
    assert found["prediction"]["boxes"][0] == [10, 10, 30, 30]
    assert found["overlaps"] == [round(100 / 700, 6)] * 8
    assert found["scores"]["AO"] == pytest.approx(1 / 7)
    # Frames outside the span hold the nearest box.
    few = grounding([2.0, 2.5], [BOX, BOX], span=(2.0, 3.0), size=SIZE)
    assert score(sample("track"), truth, few)["scores"]["AO"] == pytest.approx(1)
    assert score_nothing(sample("track"), truth)["overlaps"] == [0.0] * 8


def row(index: int, task: str = "tube", *, present: bool = True, **more: Any) -> dict[str, Any]:
    return {"id": str(index), "index": index, "task": task, "group": "", "present": present, "scores": {}} | more


def test_metrics_by_group() -> None:
    rows = [
        row(0, scores={"tIoU": 1.0, "vIoU": 0.6}, absent=0.1, group="declarative"),
        row(1, scores={"tIoU": 0.5, "vIoU": 0.3}, absent=0.4, group="interrogative"),
        row(2, scores={"tIoU": 0.0, "vIoU": 0.0}, error="VideoError: no", group="interrogative"),
        row(3, present=False, scores={"tIoU": 1.0, "vIoU": 1.0}, absent=0.3),
        row(4, present=False, scores={"tIoU": 0.0, "vIoU": 0.0}, absent=0.05),
        row(5, "span", scores={"IoU": 0.5}),
        row(6, "image", scores={"IoU": 0.7}),
        row(7, "track", scores={"AO": 0.6}, overlaps=[0.4, 0.8]),
        row(8, "track", scores={}, overlaps=[]),
    ]
    found = metrics_by_group(rows)
    assert found["tube"] == pytest.approx(
        {"samples": 5, "failed": 1, "m_tIoU": 0.5, "m_vIoU": 0.3, "vIoU@0.3": 1 / 3, "vIoU@0.5": 1 / 3, "absent": 2,
         "AUROC": 0.25, "absent recognized": 0.5}
    )  # fmt: skip
    assert found["tube / interrogative"]["samples"] == 2 and found["tube / declarative"]["m_vIoU"] == 0.6
    assert found["span"] == {"samples": 1, "failed": 0, "R1@0.3": 1, "R1@0.5": 1, "R1@0.7": 0, "mIoU": 0.5}
    assert found["image"] == {"samples": 1, "failed": 0, "Acc@0.5": 1}
    assert found["track"]["AO"] == pytest.approx(0.6) and found["track"]["samples"] == 2
    assert metrics_by_group(rows[::-1]) == found
    assert metrics_by_group([]) == {}


def test_figures_do_not_depend_on_the_order_of_rows() -> None:
    """A resumed or sharded run finishes samples in another order; sums of floats would differ in the last digit."""
    rng = np.random.default_rng(0)
    rows = [row(i, scores={"tIoU": float(t), "vIoU": float(v)}) for i, (t, v) in enumerate(rng.random((500, 2)))]
    shuffled = [rows[i] for i in rng.permutation(500)]
    assert float(np.mean([r["scores"]["vIoU"] for r in rows])) != float(
        np.mean([r["scores"]["vIoU"] for r in shuffled])
    )
    assert metrics_by_group(shuffled) == metrics_by_group(rows)
