"""A search finds every occurrence in a long video with one decode, encodes each frame once, and can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bridge_stg.runtime.errors import Interrupted, QueryError, VideoError
from bridge_stg.runtime.search.occurrences import SearchResult, score_of
from tests.errors import raises
from tests.fakes.clips import write
from tests.fakes.live_chain import live_grounder, stream

BRIGHT = ((3.0, 5.0), (21.0, 26.0), (40.0, 43.0), (44.0, 46.0), (59.0, 60.5))
OPTIONS: dict[str, Any] = {"window_s": 8.0, "overlap": 0.25, "cuts": False}


def search(*, bright: tuple[tuple[float, float], ...] = BRIGHT, seconds: float = 60.5, **options: Any) -> SearchResult:
    frames = stream(seconds, bright=bright)
    return live_grounder().search(frames, ["the car"], **{**OPTIONS, **options})[0]


def spans(result: SearchResult) -> list[tuple[float, float]]:
    return sorted(one.span for one in result.occurrences if one.span is not None)


def test_every_occurrence_is_found_once_with_boxes_for_every_frame() -> None:
    result = search()
    assert spans(result) == [pytest.approx(span, abs=1e-6) for span in BRIGHT]
    assert result.windows.count == 10 and result.windows.length_s == 8 and result.windows.overlap_s == 2
    for one in result.occurrences:
        assert one.span is not None and one.tube is not None and one.boxes is not None
        start, end = one.span
        np.testing.assert_allclose(one.boxes.times, np.arange(start, end - 1e-6, 1 / 8), atol=1e-9)
        np.testing.assert_allclose(one.tube.times, np.arange(start, end - 1e-6, 1 / 4), atol=1e-9)
    scores = [score_of(one) for one in result.occurrences]
    assert scores == sorted(scores, reverse=True) and result.best is result.occurrences[0]
    row = result.to_json()
    assert row["span"] == row["occurrences"][0]["span"] and row["windows"]["absent"] == result.windows.absent < 8


def test_a_target_that_stays_is_one_occurrence() -> None:
    result = search(bright=((2.0, 50.0),))
    assert spans(result) == [pytest.approx((2.0, 50.0))]
    tube = result.best.tube
    assert tube is not None and len(tube) == 48 * 4 and (np.diff(tube.times) > 0).all()


def test_a_result_says_where_the_times_of_the_file_come_from(tmp_path: Path) -> None:
    timed = write(tmp_path / "a.mp4", [np.full((48, 64, 3), 90, np.uint8)] * 80, rate=8)
    untimed = tmp_path / "a.h264"
    with av.open(str(timed)) as source, av.open(str(untimed), "w", format="h264") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    grounder = live_grounder()
    for path, clock in ((timed, "timestamps"), (untimed, "frame_rate")):
        (found,) = grounder.search(path, ["the car"], **OPTIONS)
        assert found.best.clock == clock == grounder.ground(path, "the car").clock


def test_windows_without_the_target_and_top() -> None:
    nothing = search(bright=())
    assert not nothing.found and nothing.occurrences == () and nothing.windows.absent == nothing.windows.count == 10
    best = search(top=2)
    assert len(best.occurrences) == 2
    assert spans(search(task="span", bright=((10.0, 12.0),))) == [pytest.approx((10.0, 12.0))]


def test_frames_are_encoded_once_in_constant_memory() -> None:
    for seconds in (60, 120):
        grounder = live_grounder()
        sessions: Any = grounder.sessions
        frames = stream(seconds, bright=((20.0, 22.0),))
        grounder.search(frames, ["the car", "a dog"], **OPTIONS)
        encoder = sessions["vision_encoder"]
        # Frames of one colour are encoded once per call; the fine frames of the target are a few more.
        assert encoder.frames <= seconds and sessions["language_model"].allocated == 2


def test_finished_windows_are_not_computed_again(tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    grounder = live_grounder()
    sessions: Any = grounder.sessions
    whole = grounder.search(stream(60.5, bright=BRIGHT), ["the car"], **OPTIONS)[0]
    calls = sessions["language_model"].calls

    seen: list[float] = []

    def stop() -> bool:
        return len(seen) > 5

    with raises("call.cancelled", kind=Interrupted):
        grounder.search(
            stream(60.5, bright=BRIGHT), ["the car"], state=state, cancel=stop,
            progress=lambda stage, done, total: seen.append(done), **OPTIONS,
        )  # fmt: skip
    finished = len(state.read_bytes().splitlines()) - 1
    assert 3 < finished < 8
    with state.open("ab") as file:
        file.write(b'{"frame_times": [0.')  # a line that was not written to its end
    with raises("search.other_state", kind=VideoError):
        grounder.search(stream(60.5, bright=BRIGHT), ["a dog"], state=state, **OPTIONS)
    before = sessions["language_model"].calls
    resumed = grounder.search(stream(60.5, bright=BRIGHT), ["the car"], state=state, **OPTIONS)[0]
    assert sessions["language_model"].calls - before < 0.7 * calls
    assert spans(resumed) == [pytest.approx(span, abs=1e-6) for span in spans(whole)]
    assert resumed.windows == whole.windows and not state.exists()
    for one, other in zip(resumed.occurrences, whole.occurrences, strict=True):
        assert one.to_json()["boxes"] == other.to_json()["boxes"] and one.scores == pytest.approx(
            other.scores, abs=1e-5
        )


def test_a_state_that_is_complete_only_needs_the_last_step(tmp_path: Path) -> None:
    state, kept = tmp_path / "state.jsonl", tmp_path / "kept.jsonl"

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(20, bright=((3.0, 5.0),))

    grounder = live_grounder()

    def keep(*_: Any) -> None:
        if state.exists():
            kept.write_bytes(state.read_bytes())

    first = grounder.search(frames(), ["the car"], state=state, progress=keep, **OPTIONS)[0]
    first_state = kept.read_bytes()
    second = grounder.search(frames(), ["the car"], state=kept, **OPTIONS)[0]
    assert spans(first) == spans(second) and first.windows == second.windows

    lines = first_state.splitlines(keepends=True)
    state.write_bytes(b"".join([*lines[:-1], lines[-1].replace(b'"shot_s": 0.0', b'"shot_s": "0"')]))
    with raises("search.other_state", kind=VideoError):  # a line that was changed
        grounder.search(frames(), ["the car"], state=state, **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [{"window_s": 0.5}, {"window_s": 1e4}, {"window_s": "8"}, {"overlap": 1.0}, {"top": 0}, {"task": "image"}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with raises("options.out_of_range" if "window_s" in options else "search.bad_option", kind=VideoError):
        search(**options)


def test_bad_queries_and_files(tmp_path: Path) -> None:
    grounder = live_grounder()
    with raises("query.not_a_list", kind=QueryError):
        grounder.search(stream(4), "the car")
    with raises("query.empty", kind=QueryError):
        grounder.search(stream(4), ["the car", " "])
    with raises("video.not_found", kind=VideoError):
        grounder.search(tmp_path / "missing.mp4", ["the car"])
    other = tmp_path / "notes.txt"
    for text, code in (("notes", "output.exists"), ('{"id": "1"}\n', "search.other_state")):
        other.write_text(text)
        with raises(code, other):
            grounder.search(stream(4), ["the car"], state=other)
        assert other.read_text() == text
