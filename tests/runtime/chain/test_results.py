from __future__ import annotations

import json

import numpy as np

from bridge_stg.runtime.chain.results import SCHEMA, Grounding, Tube, tube_in_span
from bridge_stg.runtime.chain.spans import FineFrames
from bridge_stg.runtime.video.token_budget import CoarseChoice


def tube() -> Tube:
    boxes = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [10, 20, 20, 30]], np.float32)
    presence = np.array([0.9, 0.2, 0.8], np.float32)
    return Tube(times=np.array([1.0, 2.0, 3.0]), boxes=boxes, presence=presence, visible=presence >= 0.5)


def test_boxes_are_interpolated_between_fine_frames_and_marked() -> None:
    found = tube().at(np.array([1.0, 1.25, 2.0, 2.5]))
    np.testing.assert_allclose(found.boxes, [[0, 0, 10, 10], [2.5, 0, 12.5, 10], [10, 0, 20, 10], [10, 10, 20, 20]])
    assert found.interpolated.tolist() == [False, True, False, True]
    assert found.visible.tolist() == [True, True, False, False]
    np.testing.assert_allclose(found.presence, [0.9, 0.725, 0.2, 0.5], rtol=1e-6)
    assert len(found) == 4 and found.boxes.dtype == np.float32


def test_outside_the_fine_frames_the_nearest_box_is_repeated() -> None:
    found = tube().at(np.array([0.0, 9.0]))
    np.testing.assert_allclose(found.boxes, tube().boxes[[0, 2]])
    assert found.interpolated.all()


def test_the_tube_keeps_the_frames_of_the_final_span() -> None:
    frames = FineFrames(indices=np.arange(6), times=np.arange(6) / 2, interval_s=0.5)
    boxes = np.arange(24, dtype=np.float32).reshape(6, 4)
    presence = np.array([0, 0.9, 0.1, 0.9, 0, 0], np.float32)
    made = tube_in_span((0.5, 2.0), frames, shown_times=frames.times, boxes=boxes, presence=presence, threshold=0.5)
    assert made.times.tolist() == [0.5, 1.0, 1.5]
    np.testing.assert_array_equal(made.boxes, boxes[1:4])
    assert made.visible.tolist() == [True, False, True]


def test_a_frame_shown_at_several_grid_times_gets_one_box() -> None:
    frames = FineFrames(indices=np.arange(4), times=np.arange(4) / 2, interval_s=0.5)
    made = tube_in_span(
        (0.0, 2.0),
        frames,
        shown_times=np.array([0.0, 0.0, 0.9, 0.9]),
        boxes=np.arange(16, dtype=np.float32).reshape(4, 4),
        presence=np.ones(4, np.float32),
        threshold=0.5,
    )
    assert made.times.tolist() == [0.0, 0.9]
    assert made.boxes[:, 0].tolist() == [0, 8]


def grounding(found: bool) -> Grounding:
    return Grounding(
        query="the red car",
        found=found,
        span=(1.0, np.float64(3.25)) if found else None,
        tube=tube() if found else None,
        boxes=tube().at(np.array([1.0, 1.5])) if found else None,
        size=(64, 48),
        coarse=CoarseChoice(np.float64(0.5), (32, 16), 3, 12, 20, ("max_visual_tokens",)),
        answer="1 to 3" if found else "none",
        named_span=(1.0, 3.0) if found else None,
        scores={"absent": np.float32(0.25), "answer": 0.5, "presence": 0.6},
        tokens={"coarse": np.int64(12), "fine": 3, "dense": 60, "ratio": 0.25},
        timings={"total": 0.5},
    )


def test_json_has_plain_values() -> None:
    values = json.loads(json.dumps(grounding(True).to_json(), allow_nan=False))
    assert values["schema"] == SCHEMA
    assert values["span"] == {"start_s": 1.0, "end_s": 3.25}
    assert values["tube"][1] == {"time_s": 2.0, "box": [10, 0, 20, 10], "presence": 0.2, "visible": False}
    assert values["boxes"][1]["interpolated"] is True
    assert values["tokens"] == {"coarse": 12, "fine": 3, "dense": 60, "ratio": 0.25}
    assert values["size"] == {"width": 64, "height": 48}
    assert values["coarse"] == {
        "fps": 0.5, "size": {"width": 32, "height": 16}, "groups": 3, "tokens": 12, "max_visual_tokens": 20,
        "limited_by": ["max_visual_tokens"],
    }  # fmt: skip


def test_json_of_an_absent_target() -> None:
    values = json.loads(json.dumps(grounding(False).to_json()))
    assert values["found"] is False
    assert values["span"] is values["named_span"] is values["tube"] is values["boxes"] is None
    assert values.keys() == grounding(True).to_json().keys()
