"""A search finds hard cuts: a joined file is searched as its clips are, each as a file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.index.index import VisualIndex
from bridge_stg.runtime.search.occurrences import SearchResult
from bridge_stg.runtime.video import decoder
from tests.errors import raises
from tests.fakes.answers import write_video
from tests.fakes.live_chain import live_grounder

FPS = 8
OPTIONS: dict[str, Any] = {"window_s": 8.0, "overlap": 0.25}
# Seconds of clips and gaps, and where the target slowly appears in them; no length is a whole group.
PARTS = ((9.375, (2.0, 6.0)), (2.875, None), (5.625, (0.5, 4.5)), (1.125, None), (12.25, (8.0, 11.5)))


def part(number: int) -> list[np.ndarray]:
    """Return frames whose left or right half has one grey level, and whose other half brightens with the target."""
    seconds, target = PARTS[number]
    times = np.arange(round(seconds * FPS)) / FPS
    shown = np.zeros(len(times))
    if target is not None:
        inside = (times >= target[0]) & (times < target[1])
        shown[inside] = np.sin(np.pi * (times[inside] - target[0]) / (target[1] - target[0]))
    frames = []
    for share in shown:
        frame = np.full((48, 64, 3), 60, np.uint8)
        frame[: 24 if number % 2 else 48, :32] = 0
        frames.append(np.maximum(frame, np.uint8(255 * share)))
    return frames


def timed(frames: list[np.ndarray]) -> list[tuple[float, np.ndarray]]:
    return [(i / FPS, frame) for i, frame in enumerate(frames)]


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frames = [frame for number in range(len(PARTS)) for frame in part(number)]
    return write_video(tmp_path_factory.mktemp("video") / "joined.mp4", timed(frames))


def search(video: Any, index: VisualIndex | None = None, **options: Any) -> SearchResult:
    return live_grounder(index=index).search(video, ["the car"], **{**OPTIONS, **options})[0]


def found(result: SearchResult, start_s: float = 0.0) -> list[tuple[tuple[float, float], list[float], list[float]]]:
    """Return the span, the times of the boxes and the boxes of each occurrence, in order of time."""
    assert all(one.span and one.boxes for one in result.occurrences)
    occurrences = sorted(result.occurrences, key=lambda one: one.span or (0, 0))
    return [
        (
            (one.span[0] + start_s, one.span[1] + start_s),
            (one.boxes.times + start_s).round(6).tolist(),
            one.boxes.boxes.round(1).ravel().tolist(),
        )
        for one in occurrences
        if one.span is not None and one.boxes is not None
    ]


def test_a_joined_file_is_searched_as_its_clips(joined: Path, tmp_path: Path) -> None:
    result = search(joined)
    starts = accumulate((seconds for seconds, _ in PARTS), initial=0.0)
    alone = [
        (search(write_video(tmp_path / f"{number}.mp4", timed(part(number)))), start)
        for number, start in zip(range(len(PARTS)), starts, strict=False)
    ]
    expected = [one for single, start in alone for one in found(single, start)]
    assert len(expected) == 3 and result.windows.shots == len(PARTS)
    assert result.windows.count == sum(single.windows.count for single, _ in alone)
    for (span, times, boxes), (own_span, own_times, own_boxes) in zip(found(result), expected, strict=True):
        assert span == pytest.approx(own_span, abs=1e-6) and times == own_times
        assert boxes == pytest.approx(own_boxes, abs=0.5)
    without = search(joined, cuts=False)
    assert without.windows.shots == 1 and found(without) != found(result)


def test_a_search_that_was_stopped_and_one_with_an_index_find_the_same_shots(
    joined: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, state, seen = search(joined), tmp_path / "state.jsonl", []

    with raises("call.cancelled", kind=Interrupted):
        search(joined, state=state, cancel=lambda: len(seen) > 3, progress=lambda *_: seen.append(1))
    assert 1 < len(state.read_bytes().splitlines()) < plain.windows.count
    resumed = search(joined, state=state)
    assert found(resumed) == found(plain) and resumed.windows == plain.windows

    index = VisualIndex(tmp_path / "index", {})
    first = search(joined, index)
    monkeypatch.setattr(decoder.Decoder, "frames", lambda self: iter(()))
    second = search(joined, index)
    assert found(second) == found(first) == found(plain) and second.windows == first.windows == plain.windows


def panned(seconds: float) -> Iterator[np.ndarray]:
    """Yield a camera's slow pan over stripes."""
    wide = np.repeat(np.random.default_rng(0).integers(0, 255, 40), 8).astype(np.uint8)
    for i in range(round(seconds * FPS)):
        yield np.broadcast_to(wide[i : i + 64, None], (48, 64, 3)).copy()


@pytest.mark.parametrize(
    ("changed", "shots"),
    [
        ({}, 1),
        ({40: 255}, 1),  # a flash
        (dict.fromkeys(range(40, 44), 255), 2),  # half a second of white: the way back is no cut, it comes too soon
        (dict.fromkeys(range(40, 60), 255), 3),
        ({i: 255 * (i // 4 % 2) for i in range(24, 88)}, 9),  # 8 s of strobe light: at most one shot per second
    ],
)
def test_what_is_a_cut(changed: dict[int, int], shots: int) -> None:
    frames = list(panned(14))
    for place, grey in changed.items():
        frames[place] = np.full((48, 64, 3), grey, np.uint8)
    assert search(iter(timed(frames))).windows.shots == shots


def test_black_bars_do_not_hide_a_cut() -> None:
    frames = [np.zeros((48, 64, 3), np.uint8) for _ in range(48)]
    for frame in frames[24:]:
        frame[:, 24:40] = 40  # a dark upright clip in a wide frame
    assert search(iter(timed(frames))).windows.shots == 2


def test_an_occurrence_does_not_cross_a_cut() -> None:
    left = np.full((48, 64, 3), 255, np.uint8)
    left[:, 32:] = 210
    frames = [left] * 40 + [left[:, ::-1]] * 40  # the target stays, but as another picture
    spans = [one.span for one in search(iter(timed(frames))).occurrences]
    assert sorted(span for span in spans if span) == [(0.0, 5.0), (5.0, 10.0)]
    assert [one.span for one in search(iter(timed(frames)), cuts=False).occurrences] == [(0.0, 10.0)]
