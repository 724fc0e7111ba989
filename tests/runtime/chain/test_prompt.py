"""Prompt segments: separately tokenized, with positions that count on, and queries that are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.demo.tiny_model import demo_config, write_demo_tokenizer
from bridge_stg.runtime.bundle.spec import PromptSpec
from bridge_stg.runtime.chain.prompt import Tokenizer, check_query, query_segment, time_strings, video_segment
from bridge_stg.runtime.errors import BundleError, QueryError, VideoError

SPEC = demo_config().model_spec()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("prompt") / "tokenizer.json"
    write_demo_tokenizer(path)
    return Tokenizer.from_file(path)


def test_every_group_follows_its_time(tokenizer):
    segment = video_segment(tokenizer, SPEC, [0.25, 1.25, 12.25], (2, 3))
    text = tokenizer.decode(segment.input_ids)
    pads = "<|video_pad|>" * 6
    group = "<{} seconds><|vision_start|>" + pads + "<|vision_end|>"
    assert text == "<|im_start|>user\n" + "".join(map(group.format, ("0.2", "1.2", "12.2")))
    np.testing.assert_array_equal(segment.visual_index[segment.visual_index > 0], np.arange(1, 19))


def test_positions_of_a_group_are_its_grid(tokenizer):
    segment = video_segment(tokenizer, SPEC, [0.25], (2, 3))
    visual = segment.visual_index > 0
    start = segment.positions[0, visual][0]
    np.testing.assert_array_equal(segment.positions[:, visual] - start, [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2] * 2])
    assert segment.positions[0, np.flatnonzero(visual)[-1] + 1] == start + 3
    following = query_segment(tokenizer, SPEC, "the dog", segment.next_position)
    assert following.positions[0, 0] == segment.next_position == segment.positions.max() + 1


def test_the_query_is_asked_as_written(tokenizer):
    segment = query_segment(tokenizer, SPEC, "  The  red\tcar. ", 5)
    assert tokenizer.decode(segment.input_ids) == "find the red car.<|im_end|>\n<|im_start|>assistant\n"
    assert not segment.visual_index.any()


def test_tracking_prints_the_first_box(tokenizer):
    segment = query_segment(tokenizer, SPEC, "the car", 5, first_box=(0, 0.1, 0.5, 1.2))
    assert "first at 0 100 500 999." in tokenizer.decode(segment.input_ids)


def test_unknown_words_and_scripts_survive(tokenizer):
    for query in ("der große Hund", "赤い車", "🚗"):
        assert query.lower() in tokenizer.decode(query_segment(tokenizer, SPEC, query, 0).input_ids)


@pytest.mark.parametrize(
    "query, message",
    [
        ("", "is empty"), ("   ", "is empty"), ("...", "is empty"), ("x" * 10_000, "10,000 characters"),
        ("a\x00b", "control character"), ("the <|im_end|> car", "markers"), ("\ud800", "Unicode"), (7, "found int"),
    ],
)  # fmt: skip
def test_bad_queries_are_named(tokenizer, query, message):
    with pytest.raises(QueryError, match=message):
        check_query(tokenizer, SPEC.prompt, query)


def test_times_too_close_to_print_are_refused():
    with pytest.raises(VideoError, match="0.2 s and 0.2 s"):
        time_strings([0.2, 0.21], PromptSpec())
    assert time_strings([0.2, 0.21], PromptSpec(time_decimals=2)) == ["<0.20 seconds>", "<0.21 seconds>"]


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with pytest.raises(BundleError, match="no such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is not a tokenizer.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
