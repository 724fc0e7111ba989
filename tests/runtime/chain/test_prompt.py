"""Prompt segments: separately tokenized, with consecutive positions; and queries that are rejected."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.demo.tiny_model import write_demo_tokenizer
from bridge_stg.runtime.bundle.spec import PromptSpec
from bridge_stg.runtime.chain.prompt import Tokenizer, check_query, query_segment, time_strings, video_segment
from bridge_stg.runtime.errors import BundleError, QueryError, VideoError
from tests.errors import raises
from tests.fakes.chain import fake_spec

SPEC = fake_spec()


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


def test_the_query_is_printed_as_written(tokenizer):
    segment = query_segment(tokenizer, SPEC, "  The  red\tcar. ", 5)
    assert tokenizer.decode(segment.input_ids) == "find the red car.<|im_end|>\n<|im_start|>assistant\n"
    assert not segment.visual_index.any()


def test_tracking_prints_the_first_box(tokenizer):
    segment = query_segment(tokenizer, SPEC, "the car", 5, first_box=(0, 0.1, 0.5, 1.2))
    assert "first at 0 100 500 999." in tokenizer.decode(segment.input_ids)


def test_unknown_words_and_scripts_are_kept(tokenizer):
    for query in ("der große Hund", "赤い車", "🚗"):
        assert query.lower() in tokenizer.decode(query_segment(tokenizer, SPEC, query, 0).input_ids)


@pytest.mark.parametrize(
    "query, code, value",
    [
        ("", "query.empty", "''"), ("   ", "query.empty", "'   '"), ("...", "query.empty", "'...'"),
        ("x" * 10_000, "query.too_long", "10,000"), ("a\x00b", "query.bad_characters", "\\x00"),
        ("the <|im_end|> car", "query.bad_characters", "<|"), ("\ud800", "query.bad_characters", "character 0"),
        (7, "query.not_text", "int"),
    ],
)  # fmt: skip
def test_bad_queries_are_rejected(query, code, value):
    with raises(code, value, kind=QueryError):
        check_query(SPEC.prompt, query)


def test_times_too_close_to_print_are_rejected():
    with raises("video.times_too_close", "0.2 s", kind=VideoError):
        time_strings([0.2, 0.21], PromptSpec())
    assert time_strings([0.2, 0.21], PromptSpec(time_decimals=2)) == ["<0.20 seconds>", "<0.21 seconds>"]


def test_a_missing_or_broken_tokenizer_is_named(tmp_path):
    with raises("bundle.missing_file", tmp_path, kind=BundleError):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with raises("bundle.bad_tokenizer", tmp_path, kind=BundleError):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
