"""Groundings as plain text."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bridge_stg.commands.tables import grounding_table, result_table
from bridge_stg.runtime.search.occurrences import SearchedWindows, SearchResult
from bridge_stg.runtime.video.token_budget import CoarseChoice
from tests.bridge_stg.commands.fake_grounder import COUNTS, FakeVideo


def test_table_names_the_limits_of_the_coarse_frames() -> None:
    coarse = CoarseChoice(0.25, (48, 32), 1, 6, 6, ("max_visual_tokens", "max_positions"))
    table = grounding_table(dataclasses.replace(FakeVideo().ground("the dog"), coarse=coarse))
    limits = "6 of 6 tokens; limited by max_visual_tokens, max_positions"
    assert f"coarse frames: 0.25 per second at 48 × 32 pixels, 1 group, {limits}\n" in table


def test_table_names_the_stream_and_a_clock_without_time_stamps() -> None:
    result = FakeVideo().ground("the dog")
    assert "times:" not in grounding_table(result) and "stream" not in grounding_table(result)
    assert "video stream 2\n" in grounding_table(dataclasses.replace(result, stream=2))
    assert "times: guessed" in grounding_table(dataclasses.replace(result, clock="guessed"))
    assert "frame rate" in grounding_table(dataclasses.replace(result, clock="frame_rate"))


def test_table_shows_at_most_twelve_boxes() -> None:
    result = FakeVideo().ground("the dog")
    assert result.boxes is not None and result.tube is not None
    long = result.tube.at(np.linspace(0.4, 1.6, 500))
    object.__setattr__(result, "boxes", long)
    rows = [line for line in grounding_table(result).splitlines() if line.startswith("     ")]
    assert len(rows) == 1 + 12
    assert rows[1].split()[0] == "0.40" and rows[-1].split()[0] == "1.60"


def test_table_separates_the_seconds_of_the_video_from_those_of_the_queries() -> None:
    timings = {"decode_video": 1.0, "prefill": 2.0, "answer": 0.25, "total": 3.5}
    table = grounding_table(dataclasses.replace(FakeVideo().ground("the dog"), timings=timings))
    assert "seconds, video: decode_video 1.00, prefill 2.00\n" in table
    assert table.endswith("seconds, queries: answer 0.25\n  seconds, both: total 3.50")


def test_table_states_no_span_of_an_image() -> None:
    result = dataclasses.replace(FakeVideo().ground("the dog"), heads="text", mode="image", decoding=COUNTS)
    assert "  found\n" in grounding_table(result)


def test_table_of_a_track_marks_the_frames_after_its_span() -> None:
    result = FakeVideo().ground("the dog")
    assert result.tube is not None
    track = dataclasses.replace(result, task="track", span=(0.4, 1.0))
    object.__setattr__(track, "boxes", result.tube.at(np.array([0.5, 0.9, 1.0, 1.5])))
    rows = [line for line in grounding_table(track).splitlines() if line.startswith("     ")][1:]
    assert ["not followed: the last box" in row for row in rows] == [False, False, True, True]


@pytest.mark.parametrize(("count", "said"), [(1, "1 window of at most 20 s, 0"), (3, "3 windows of at most 20 s that")])
def test_table_of_a_search_counts_its_windows(count: int, said: str) -> None:
    windows = SearchedWindows(length_s=20.0, overlap_s=5.0, count=count, absent=0, shots=1)
    search = SearchResult(best=FakeVideo().ground("the dog"), occurrences=(), windows=windows)
    assert f"searched 1 shot in {said}" in result_table(search)
