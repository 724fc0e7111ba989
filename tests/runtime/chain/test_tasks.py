"""The other tasks of the chain: only the span, only an image, and a track from a first box."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bridge_stg.runtime.errors import QueryError, VideoError
from tests.errors import raises
from tests.fakes.chain import clip, fake_grounder

SCRIPT = {"the car": "<2.2 seconds> to <4.2 seconds>", "the cat": "none"}


def test_a_span_is_that_of_the_answer_and_computes_no_boxes() -> None:
    grounder = fake_grounder(script=SCRIPT)
    found = grounder.span(clip(present=(3, 4)), "the car")
    assert found.found and found.span == found.named_span == (2.0, 5.0) and found.task == "span"
    assert found.tube is None and found.boxes is None and found.tokens["fine"] == 0
    assert not grounder.sessions["spatial_decoder"].calls  # type: ignore[attr-defined]
    assert not grounder.span(clip(), "the cat").found
    assert grounder.span(clip(), "the cat", allow_none=False).found
    json.dumps(found.to_json(), allow_nan=False)


def test_an_image_always_has_a_box() -> None:
    grounder, image = fake_grounder(script=SCRIPT), clip(present=(0, 1))[0][1]
    found = grounder.locate(image, "the cat")
    assert found.found and found.task == "image" and found.boxes is not None and len(found.boxes) == 1
    with raises("video.not_an_image", "the stream of frames", kind=VideoError):
        grounder.locate(clip(), "the car")  # type: ignore[arg-type]
    images = len(grounder.sessions["vision_encoder"].calls)  # type: ignore[attr-defined]
    for call in (lambda: grounder.locate(clip(), "it"), lambda: grounder.open(clip(), image_only=True)):  # type: ignore[arg-type]
        with raises("video.not_an_image", kind=VideoError):
            call()
    assert len(grounder.sessions["vision_encoder"].calls) == images  # type: ignore[attr-defined]


def test_a_track_has_a_box_for_every_frame_and_begins_as_given() -> None:
    video = clip(present=(0, 4))
    grounder = fake_grounder()
    found = grounder.track(video, (8, 6, 24, 30))
    assert found.found and found.task == "track" and found.span is not None and found.span[0] == 0
    assert found.boxes is not None and found.tube is not None
    np.testing.assert_allclose(found.boxes.times, [time for time, _ in video])
    np.testing.assert_allclose(found.boxes.boxes[0], [8, 6, 24, 30])
    after = found.boxes.times >= found.span[1]
    assert after.any() and not found.boxes.visible[after].any()
    np.testing.assert_allclose(found.boxes.boxes[after], found.tube.boxes[-1][None].repeat(after.sum(), 0))
    fed = "".join(grounder.sessions["language_model"].tokenizer.decode(row) for row in prompts(grounder))  # type: ignore[attr-defined]
    assert "Track the object, first at 125 125 375 624." in fed  # of 64 x 48 pixels, in 0 ... 999


def test_an_opened_video_runs_every_task() -> None:
    grounder = fake_grounder(script=SCRIPT)
    with grounder.open(clip(present=(0, 5))) as video:
        assert video.span("the car").span == (2.0, 5.0)
        assert video.ground("the car").boxes is not None
        assert video.track([0, 0, 10, 10], query="the car").task == "track"
        with raises("video.not_an_image", kind=VideoError):
            video.locate("the car")


@pytest.mark.parametrize(
    "box", [(1, 2, 3), (10, 10, 5, 20), (0, 0, float("nan"), 5), "a box", None, (70, 0, 90, 10), (-9, -9, -1, -1)]
)
def test_a_bad_first_box_is_rejected(box: object) -> None:
    with raises("query.bad_box", kind=QueryError):
        fake_grounder().track(clip(), box)  # type: ignore[arg-type]


def prompts(grounder: object) -> list[list[int]]:
    """Return the ids of every call of the language model."""
    return [row.tolist() for call in grounder.sessions["language_model"].calls for row in call["input_ids"]]  # type: ignore[attr-defined]
