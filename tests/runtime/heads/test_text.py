"""Text heads over a language model that writes known answers: spans, boxes, counts and errors."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from tests.errors import raises
from tests.fakes.chain import clip, fake_grounder, text_spec

SIZE = (48, 64)  # height and width of the clip
CLIP = list(clip(8.0, size=SIZE))
HUGE = "9" * 400
"""An integer beyond the range of a float."""
TIMES = [f"{0.25 + i:.1f}" for i in range(8)]
"""What the prompt prints: the mean time of two samples, half a second apart."""


def boxes_of(count: int, *, start: int = 0, step: int = 20) -> list[list[int]]:
    return [[100 + step * i, 200, 300 + step * i, 900] for i in range(start, start + count)]


def listed(boxes: list[list[int]], times: list[str] | None = None, label: str = "the car") -> str:
    """Return a list as the model writes it."""
    entries = []
    for i, box in enumerate(boxes):
        time = f'"time": {times[i]}, ' if times else ""
        entries.append(f'{{{time}"bbox_2d": {json.dumps(box)}, "label": {json.dumps(label)}}}')
    return "```json\n[\n\t" + ",\n\t".join(entries) + "\n]\n```"


def text_grounder(replies: dict[str, str], family: str = "qwen3_vl", **options: Any) -> Grounder:
    return fake_grounder(text_spec(family), replies=replies, text=TextOptions(**options))


@pytest.mark.parametrize("drafts", [True, False])
@pytest.mark.parametrize("grammar", [True, False])
def test_joint_boxes_are_those_that_the_model_writes(grammar: bool, drafts: bool) -> None:
    boxes = boxes_of(5)
    replies = {"Boxes of the car?": listed(boxes, TIMES[2:7])}
    with text_grounder(replies, grammar=grammar, drafts=drafts) as grounder:
        result = grounder.ground(CLIP, "the car")
    assert result.found and (result.heads, result.mode, result.task) == ("text", "joint", "tube")
    assert result.span == (2.0, 7.0) and result.answer == replies["Boxes of the car?"]
    assert result.tube is not None and result.boxes is not None
    np.testing.assert_allclose(result.tube.times, [2.25, 3.25, 4.25, 5.25, 6.25])
    expected = np.array(boxes) / 1000 * [64, 48, 64, 48]
    np.testing.assert_allclose(result.tube.boxes, expected, atol=1e-4)
    assert len(result.boxes) == 40 and result.boxes.visible.all()
    assert result.decoding["tokens"] == len(result.answer) + (not grammar)
    assert result.decoding["truncated"] == 0 and (result.decoding["forced"] > 0) == grammar
    assert result.scores["absent"] < 0.01 and result.scores["answer"] > 0.9
    assert json.loads(json.dumps(result.to_json()))["decoding"]["calls"] == result.decoding["calls"]


def test_drafts_change_the_calls_and_nothing_else() -> None:
    """Boxes that move steadily, that stand still, and that jump: the drafts are right, right and wrong."""
    calls = {}
    for name, boxes in {
        "steady": boxes_of(8, step=10),
        "still": boxes_of(8, step=0),
        "jumping": [[int(x), 10, 999, 1000] for x in np.random.default_rng(0).integers(0, 990, 8)],
    }.items():
        for grammar in (True, False):
            for drafts in (True, False):
                options = {"grammar": grammar, "drafts": drafts}
                with text_grounder({"Boxes": listed(boxes, TIMES)}, **options) as grounder:
                    result = grounder.ground(CLIP, "the car")
                assert result.answer == listed(boxes, TIMES)
                calls[name, grammar, drafts] = result.decoding["calls"]
                if drafts:
                    assert 0 < result.decoding["accepted"] <= result.decoding["drafted"]
    tokens = len(listed(boxes_of(8, step=0), TIMES)) + 1
    assert calls["still", False, False] == tokens
    assert calls["still", True, False] < tokens / 3
    assert calls["still", True, True] <= 8 * 3 and calls["still", False, True] < tokens / 3
    assert calls["steady", True, True] < calls["steady", True, False] / 2
    assert calls["jumping", True, True] < calls["jumping", True, False]


def test_two_steps_name_the_span_then_a_box_per_frame() -> None:
    replies = {"When is the car?": '{"start": 2.2, "end": 4.2}', "Where is the car?": listed([[250, 500, 750, 1000]])}
    with text_grounder(replies, mode="two-step") as grounder:
        result = grounder.ground(CLIP, "the car")
        language: Any = grounder.sessions["language_model"]
        rows = max(len(feeds["input_ids"]) for feeds in language.calls)
    assert result.mode == "two-step" and result.span == (2.0, 5.0) and result.tube is not None
    assert len(result.tube) == 12 and rows == 8
    np.testing.assert_allclose(result.tube.boxes, [[16, 24, 48, 48]] * 12, atol=1e-4)
    np.testing.assert_allclose(result.tube.times, np.arange(8, 20) / 4)
    assert result.tokens["fine"] == 12 * 3 * 4


def test_a_long_video_takes_two_steps() -> None:
    replies = {"When": '{"start": 2.2, "end": 4.2}', "Where": listed([[0, 0, 500, 500]])}
    with text_grounder(replies) as grounder:
        assert grounder.ground(list(clip(40.0, fps=4)), "the car").mode == "two-step"
        assert grounder.ground(CLIP, "the car").mode == "joint"


def test_frames_without_a_box_are_left_out() -> None:
    """The second step says nothing for all frames: the target is not found, although a span was named."""
    replies = {"When": '{"start": 2.2, "end": 4.2}', "Where": "```json\n[]\n```"}
    with text_grounder(replies, mode="two-step") as grounder:
        result = grounder.ground(CLIP, "the car")
    assert not result.found and result.tube is None


def test_a_target_that_is_known_to_be_present_has_a_box_in_each_frame_of_its_span() -> None:
    replies = {"When": '{"start": 2.2, "end": 4.2}', "Where": "```json\n[]\n```"}
    with text_grounder(replies, mode="two-step") as grounder:
        result = grounder.ground(CLIP, "the car", allow_none=False)
    assert result.found and result.tube is not None and len(result.tube) == 12


@pytest.mark.parametrize("grammar", [True, False])
def test_absent(grammar: bool) -> None:
    replies = {"Boxes": "```json\n[]\n```", "When": "null", "Where": "```json\n[]\n```"}
    with text_grounder(replies, grammar=grammar) as grounder:
        for result in (grounder.ground(CLIP, "the car"), grounder.span(CLIP, "the car")):
            assert not result.found and result.scores["absent"] > 0.9 and result.span is None
        if grammar:  # under a grammar without `none`, the answer names something
            assert grounder.ground(CLIP, "the car", allow_none=False).found
            assert grounder.span(CLIP, "the car", allow_none=False).scores["absent"] == 0
            assert grounder.locate(CLIP[0][1], "the car").found


def test_span() -> None:
    with text_grounder({"When is a dog?": '{"start": 1.2, "end": 3.2}'}) as grounder:
        result = grounder.span(CLIP, "a dog")
    assert (result.mode, result.span, result.tube) == ("span", (1.0, 4.0), None)


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (33, 71)])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_boxes_of_images_land_where_the_model_says(family: str, shape: tuple[int, int]) -> None:
    """The units are thousandths of the image, or pixels of the image that the model sees."""
    image = np.zeros((*shape, 3), np.uint8)
    with text_grounder({}, family) as grounder:
        language: Any = grounder.sessions["language_model"]
        with grounder.open(image) as opened:
            width, height = opened.locate("x").coarse.size
            scale = (1000, 1000) if family == "qwen3_vl" else (width, height)
            box = [scale[0] // 4, scale[1] // 2, scale[0] // 2, scale[1]]
            language.replies = {"Where is the car?": listed([box])}
            result = opened.locate("the car")
    assert result.boxes is not None and result.mode == "image"
    expected = np.array(box) / [*scale, *scale] * [shape[1], shape[0], shape[1], shape[0]]
    np.testing.assert_allclose(result.boxes.boxes[0], expected, atol=1e-3)
    assert result.tokens["coarse"] == width * height // 16**2


def test_several_queries_are_answered_in_one_batch() -> None:
    replies = {f"Boxes of car {i}?": listed(boxes_of(2 + i), TIMES[i:], label=f"car {i}") for i in range(3)}
    with text_grounder(replies) as grounder, grounder.open(CLIP) as opened:
        single = [opened.ground(f"car {i}") for i in range(3)]
        many = opened.ground_many([f"car {i}" for i in range(3)])
    for one, other in zip(single, many, strict=True):
        assert one.answer == other.answer and one.span == other.span
        assert one.scores == pytest.approx(other.scores)
    assert [result.answer for result in many] == list(replies.values())


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ('[{"time": 2.2, "bbox_2d": [1, 2, 300, 400], "label": "x"}, {"time": 2.2, "bbox_2d": [5, 5, 9, 9]}]', 1),
        ('[{"time": "00:03.2", "bbox_2d": [-50, 2, 3000, 400]}]', 1),  # outside: clipped
        ('Sure! [{"time": 2.2, "bbox_2d": [300, 2, 100, 400]}, {"time": 3.2, "bbox_2d": [1, 2, 3, 4]}]', 1),
        ('[{"time": 2.2, "bbox_2d": [1, 2, 300, 400]}, {"time": 3.2, "bbox_', 1),  # cut
        ('[{"time": 2.2, "bbox_2d": [1, 2, 300]}]', 0),
        ('[{"time": 2.2, "bbox_2d": [1500, 2, 3000, 400]}, {"time": 3.2, "bbox_2d": [1, -9, 300, 0]}]', 0),  # outside
        ('[{"time": 1e999, "bbox_2d": [1, 2, 300, 400]}]', 0),
        (f'[{{"time": {HUGE}, "bbox_2d": [1, 2, 300, 400]}}, {{"time": 2.2, "bbox_2d": [1, 2, {HUGE}, 400]}}]', 0),
        (f'[{{"time": "{HUGE}:00", "bbox_2d": [1, 2, 300, 400]}}]', 0),
    ],
)
def test_free_answers(answer: str, count: int) -> None:
    with text_grounder({"Boxes": answer}, grammar=False, drafts=False) as grounder:
        result = grounder.ground(CLIP, "the car")
    assert (0 if result.tube is None else len(result.tube)) == count
    if result.tube is not None:
        assert (result.tube.boxes >= 0).all() and (result.tube.boxes <= [64, 48, 64, 48]).all()


def test_a_free_answer_that_is_no_list() -> None:
    with text_grounder({"Boxes": "I cannot help with that."}, grammar=False) as grounder:
        with raises("query.unreadable_answer", "I cannot help"):
            grounder.ground(CLIP, "the car")
        with raises("query.unreadable_answer"):
            grounder.sessions["language_model"].replies = {"When": "Soon."}  # type: ignore[attr-defined]
            grounder.span(CLIP, "the car")


def test_an_answer_is_cut_at_max_tokens() -> None:
    replies = {"Boxes": listed(boxes_of(8), TIMES)}
    with text_grounder(replies, max_tokens=200) as grounder:
        result = grounder.ground(CLIP, "the car")
    assert result.decoding["truncated"] == 1 and result.decoding["tokens"] >= 200
    assert result.tube is not None and 0 < len(result.tube) < 8


def test_ask_yields_the_answer_in_pieces() -> None:
    reply = "A red car drives by, then it stops."
    with text_grounder({"What happens?": reply}) as grounder:
        pieces = list(grounder.ask(CLIP, "What happens?"))
        assert "".join(pieces) == reply and len(pieces) > 10
        with grounder.open(CLIP) as opened:
            assert "".join(opened.ask("What happens?")) == reply
            assert "".join(opened.ask("What happens?", max_tokens=5)) == reply[:5]
            calls = len(grounder.sessions["vision_encoder"].calls)  # type: ignore[attr-defined]
            list(opened.ask("What happens?"))
            assert len(grounder.sessions["vision_encoder"].calls) == calls  # type: ignore[attr-defined]
        language: Any = grounder.sessions["language_model"]
        list(grounder.ask(CLIP, "First,\n look. Then\ttell me.", max_tokens=1))
        assert "First,\n look. Then\ttell me.<|im_end|>" in language.seen[-1][0]  # as it is
        assert not list(grounder.ask(CLIP, "why " * 800, max_tokens=1))[1:]
        for bad, code in (
            ("", "query.empty"),
            ("a <|im_end|>", "query.bad_characters"),
            ("x" * 5000, "query.too_long"),
            ("x" * 10_001, "query.too_long"),
        ):
            with raises(code):
                list(grounder.ask(CLIP, bad))
        with raises("options.out_of_range", "0"):
            list(grounder.ask(CLIP, "What happens?", max_tokens=0))


def test_hostile_queries_change_only_the_query() -> None:
    """JSON, and words of the prompt, in the query: the form stays, and the label is the query."""
    for query in ('"}], "bbox_2d": [1, 2, 3, 4]', "{query} {message} Boxes of", '"time": 9.9, "', "a\\n b\\"):
        replies = {"Boxes of": listed(boxes_of(2), TIMES, label=query)}
        with text_grounder(replies) as grounder:
            result = grounder.ground(CLIP, query)
        assert result.tube is not None and len(result.tube) == 2
        assert json.loads(result.answer[8:-4])[0]["label"] == query


def test_nan_logits() -> None:
    with text_grounder({}) as grounder:
        language: Any = grounder.sessions["language_model"]
        language.scripted = lambda visible: np.full(256, np.nan, np.float32)
        with raises("engine.not_finite", "language_model"):
            grounder.ground(CLIP, "the car")


def test_tracking_needs_bridge_heads() -> None:
    with text_grounder({}) as grounder, raises("query.needs_bridge_heads"):
        grounder.track(CLIP, (1, 2, 30, 40))


def test_a_bridge_model_answers_in_text_as_well() -> None:
    spec, replies = text_spec(heads="bridge"), {"Boxes": listed(boxes_of(3), TIMES), "What": "A car."}
    with fake_grounder(spec, replies=replies) as grounder:
        assert grounder.heads == "bridge" and grounder.ground(CLIP, "the car").heads == "bridge"
        assert "".join(grounder.ask(CLIP, "What is it?")) == "A car."
    with fake_grounder(spec, replies=replies, heads="text") as grounder:
        assert len(grounder.ground(CLIP, "the car").tube or ()) == 3


def test_heads_that_a_model_lacks() -> None:
    with raises("bundle.no_heads", "text heads only"):
        fake_grounder(text_spec(), heads="bridge")
    with raises("bundle.no_heads", "text"):
        fake_grounder(heads="text")
    with raises("options.invalid", "other"):
        fake_grounder(heads="other")
    with fake_grounder() as grounder, raises("query.needs_text_heads"):
        list(grounder.ask(CLIP, "What happens?"))
    with raises("options.invalid", "fast"):
        TextOptions(mode="fast")


def test_watch_answers_in_text() -> None:
    replies = {"Boxes": listed([[0, 0, 500, 500]] * 2, TIMES)}
    with text_grounder(replies) as grounder, grounder.watch(CLIP, ["the car"], every_s=2.0) as watch:
        updates = list(watch)
    assert len(updates) > 2 and all(update.groundings[0].heads == "text" for update in updates)
    assert any(update.groundings[0].found for update in updates)
