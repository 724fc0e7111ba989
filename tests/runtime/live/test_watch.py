"""Standing queries on a stream: the answers are those for plain videos, at constant cost, until the watch stops."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.errors import EngineError, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.live.watch import LiveUpdate
from tests.errors import raises
from tests.fakes.chain import clip, fake_grounder, fake_spec
from tests.fakes.live_chain import Counting, live_grounder, stream

QUERIES = ["the car", "a dog that runs", "two men"]


def counting(grounder: Grounder) -> tuple[Counting, Counting]:
    sessions: Any = grounder.sessions
    return sessions["vision_encoder"], sessions["language_model"]


@pytest.mark.parametrize("queries", [QUERIES[:1], QUERIES], ids=["in the window's cache", "in a batch"])
@pytest.mark.parametrize("kv_budget_bytes", [2**29, 1])
def test_every_answer_is_that_of_the_same_frames_in_one_prefill(queries: list[str], kv_budget_bytes: int) -> None:
    frames = clip(30.0, present=(5.0, 22.0))
    grounder = fake_grounder(kv_budget_bytes=kv_budget_bytes)
    windows, answers, found = set(), set(), 0
    with grounder.watch(frames, queries, window_s=8) as watch:
        for update in watch:
            start, end = update.window
            windows.add(start)
            same_frames = [(time_s - start, frame) for time_s, frame in frames if start <= time_s < end]
            with grounder.open(iter(same_frames)) as video:
                for live, whole in zip(update.groundings, video.ground_many(queries), strict=True):
                    assert live.answer == whole.answer and live.coarse == whole.coarse
                    assert live.scores == pytest.approx(whole.scores, abs=1e-6)
                    answers.add(live.answer)
                    if whole.tube is not None:
                        assert live.tube is not None and live.span is not None and whole.span is not None
                        found += 1
                        np.testing.assert_allclose(live.span, np.add(whole.span, start), atol=1e-9)
                        np.testing.assert_allclose(live.tube.times, whole.tube.times + start, atol=1e-9)
                        np.testing.assert_allclose(live.tube.boxes, whole.tube.boxes, atol=1e-4)
    assert watch.stats.answers == 30 and watch.stats.rebuilds == 5 and watch.stats.ended == "source"
    assert windows == {0.0, 5.0, 10.0, 15.0, 20.0, 25.0}  # eight groups of a second; the newer four are kept
    assert found > 5 and len(answers) > 5  # the fake model's answers depend on every token that it sees


def test_the_cost_per_frame_is_constant() -> None:
    grounder = live_grounder(seeing=False)
    encoder, language = counting(grounder)
    seen = []
    with grounder.watch(stream(300), ["the car"], window_s=8) as watch:
        for _ in watch:
            seen.append((language.calls, language.tokens, encoder.frames, language.allocated))
    stats = watch.stats
    assert stats.groups == stats.answers == 300
    assert stats.rebuilds == 59 == (300 - 4) // 5  # the ninth group finds a full window, and leaves it half full
    calls, tokens, frames, allocated = np.array(seen)[9::5].T  # by the same step of every period of five groups
    early, late = slice(2, 27), slice(-25, None)
    for counted in (calls, tokens):
        cost = np.diff(counted)
        assert cost[late].mean() == pytest.approx(cost[early].mean(), rel=0.02)  # answers differ in length
        assert cost.max() <= 1.25 * cost.min()
    assert np.diff(frames).max() <= 5 + 20  # five coarse groups, and each of their fine frames at most once
    assert set(allocated) == {1}  # one cache for good
    # A token of the window is fed when its group comes, and by four of five rebuilds again: never a third time.
    a_group = len("<0.0 seconds>") + 3 + 2 + 2
    assert stats.prefilled_tokens < 2 * 300 * a_group
    assert 0 < stats.longest_rebuild_s < stats.rebuild_s and stats.to_json()["cost_s"] > 0


def test_each_coarse_frame_is_encoded_once() -> None:
    grounder = live_grounder(fake_spec(fine_max_pixels=32 * 32), seeing=True)  # bright frames only go to the fine pass
    encoder, _ = counting(grounder)
    with grounder.watch(stream(40), ["the car"], window_s=8) as watch:
        assert sum(len(update.groundings) for update in watch) == 40
    assert encoder.frames == 40 == watch.stats.groups and encoder.calls == 40


def updates_of(frames: Any, **options: Any) -> tuple[list[LiveUpdate], Any]:
    with live_grounder().watch(frames, ["the car"], **{"window_s": 8, **options}) as watch:
        return list(watch), watch.stats


def test_events_in_the_time_of_the_stream() -> None:
    updates, _ = updates_of(stream(40, bright=((6, 14), (25, 28)), start_s=1000.0))
    events = [event for update in updates for event in update.events]
    assert [(event.kind, event.time_s) for event in events] == [
        ("appeared", 1006.0),
        ("left", 1014.0),
        ("appeared", 1025.0),
        ("left", 1028.0),
    ]
    assert [event.known_s for event in events] == [
        1007,
        1016,
        1026,
        1030,
    ]  # reported when the next group, or its absence, is known
    tube = events[2].grounding.tube
    assert tube is not None and tube.times[0] == 1025 and events[2].to_json()["tube"][0]["time_s"] == 1025
    assert updates[-1].known_s == 1040 and updates[-1].window[0] == 1035


def test_every_and_duration() -> None:
    updates, stats = updates_of(stream(40), every_s=4)
    assert [update.known_s for update in updates] == [1, *range(4, 41, 4)] and stats.skipped_answers == 0
    updates, stats = updates_of(stream(10.5), every_s=4)
    assert [update.known_s for update in updates] == [1, 4, 8, 10]  # the end is answered too
    updates, stats = updates_of(stream(40), duration_s=5)
    assert updates[-1].known_s == 5 and stats.ended == "duration"
    stats = updates_of(stream(40), every_s=0.25)[1]  # a group is the least that is new
    assert (stats.answers, stats.skipped_answers, stats.round_s) == (40, 0, 1)


def test_latency_and_wall_time_count_from_the_arrival_of_the_newest_frame() -> None:
    grounder = live_grounder()
    slowed(grounder, 0.05)
    source = paced(6, 0.01, bright=((2, 6),))  # 8 frames a group, so that one comes every 80 ms
    before = datetime.now(timezone.utc)
    with grounder.watch(source, ["the car"], window_s=8, latest_wins=True) as watch:
        updates = list(watch)
    took_s = (datetime.now(timezone.utc) - before).total_seconds()
    assert all(0.05 < update.latency_s < took_s for update in updates)
    stats = watch.stats
    assert stats.latency_median_s == pytest.approx(np.median([update.latency_s for update in updates]))
    assert stats.latency_median_s <= stats.latency_p95_s <= max(update.latency_s for update in updates)
    walls = [update.wall_time for update in updates]
    assert before < walls[0] and walls == sorted(walls) and (walls[-1] - before).total_seconds() <= took_s
    event = next(event for update in updates for event in update.events)
    update = next(update for update in updates if event in update.events)
    assert event.wall_time is not None
    assert (update.wall_time - event.wall_time).total_seconds() == pytest.approx(update.known_s - event.time_s)


def test_queries_may_change_while_it_runs() -> None:
    with live_grounder().watch(stream(40, bright=((2, 40),)), ["the car"], window_s=8) as watch:
        first = next(watch)
        watch.set_queries(["the car", "the dog"])
        second = next(watch)
        third = next(watch)
        watch.set_queries([])
        assert next(watch).groundings == ()
        assert watch.queries == ()
        with raises("query.duplicate"):
            watch.set_queries(["the car", "the car"])
    assert [len(update.groundings) for update in (first, second, third)] == [1, 2, 2]
    assert [event.query for event in third.events] == ["the car", "the dog"]


def test_bad_arguments_fail_at_once() -> None:
    grounder = live_grounder()
    for options, word in (
        ({"every_s": 0}, "every_s=0"),
        ({"every_s": True}, "every_s=True"),
        ({"stall_s": 10**400}, "stall_s"),
        ({"queue_groups": 0}, "queue_groups"),
        ({"moved_iou": 2}, "moved_iou"),
        ({"moved_iou": "0.5"}, "moved_iou"),
        ({"deadline_s": -1}, "deadline_s"),
    ):
        with raises("live.bad_option", word):
            grounder.watch(stream(4), ["the car"], **options)  # type: ignore[arg-type]
    for window_s in (0.5, 65.0, -1.0, math.nan, True):
        with raises("options.out_of_range", "2 to 64 s", kind=VideoError):
            grounder.watch(stream(4), ["the car"], window_s=window_s)
    with pytest.raises(QueryError, match="query 1 "):
        grounder.watch(stream(4), ["the car", " "])
    with raises("query.not_a_list"):
        grounder.watch(stream(4), "the car")
    grounder.close()
    with pytest.raises(EngineError, match="closed"):
        grounder.watch(stream(4), ["the car"])


def slowed(grounder: Grounder, seconds: float) -> None:
    session: Any = grounder.sessions["vision_encoder"]
    session.session.before = lambda feeds: time.sleep(seconds)


def paced(seconds: float, pace: float, **options: Any) -> Iterator[tuple[float, np.ndarray]]:
    for time_s, frame in stream(seconds, **options):
        time.sleep(pace)
        yield time_s, frame


def test_a_slow_machine_drops_the_oldest_and_counts_it() -> None:
    grounder = live_grounder()
    slowed(grounder, 0.03)  # a group comes every 8 ms
    with grounder.watch(paced(60, 0.001), ["the car"], window_s=8, latest_wins=True) as watch:
        updates = list(watch)
    stats = watch.stats
    assert stats.frames == 480 and stats.dropped_groups > 10 and stats.skipped_answers > 5
    assert stats.groups + stats.dropped_groups == 60 and stats.dropped_coarse_frames == 2 * stats.dropped_groups
    assert updates[-1].known_s == 60  # the latest is never dropped
    assert max(update.behind_s for update in updates[:-1]) < 10
    assert all(end - start <= 8 for start, end in (update.window for update in updates))


def test_a_source_without_latest_wins_waits_for_the_model() -> None:
    grounder = live_grounder()
    slowed(grounder, 0.002)
    taken: list[float] = []

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for time_s, frame in stream(40):
            taken.append(time_s)
            yield time_s, frame

    with grounder.watch(frames(), ["the car"], window_s=8) as watch:
        ahead = [taken[-1] - update.known_s for update in watch]
    assert watch.stats.dropped_groups == 0 and watch.stats.groups == 40
    assert max(ahead) <= 4  # two groups wait, one is in the reader, one is being made


def test_a_round_that_passes_its_deadline_is_stopped_and_counted() -> None:
    grounder = live_grounder()
    language: Any = grounder.sessions["language_model"]
    slow = {"left": 3}

    def before(feeds: Any) -> None:
        if feeds["visual_index"].max() == 0 and slow["left"]:
            slow["left"] -= 1
            time.sleep(0.3)

    language.session.before = before
    with grounder.watch(stream(20, bright=((2, 20),)), ["the car"], window_s=8, deadline_s=0.25) as watch:
        updates = list(watch)
    assert watch.stats.late_answers == 3 and len(updates) == 17 == watch.stats.answers - 3
    assert updates[-1].groundings[0].found  # what the stopped rounds left in the cache does no harm


def endless() -> Iterator[tuple[float, np.ndarray]]:
    yield from stream(1e6)


@pytest.mark.parametrize("how", ["stop", "cancel", "close", "break"])
def test_a_watch_can_be_stopped_in_four_ways(how: str) -> None:
    event = threading.Event()
    closed: list[str] = []

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        try:
            yield from endless()
        finally:
            closed.append("source")

    before = threading.active_count()
    with live_grounder().watch(frames(), ["the car"], window_s=8, cancel=event) as watch:
        for count, _ in enumerate(watch):
            if count == 3:
                if how == "break":
                    break
                {"stop": watch.stop, "cancel": event.set, "close": watch.close}[how]()
    assert count == 3 and watch.stats.ended == "stopped"
    assert closed == ["source"] and threading.active_count() == before
    assert list(watch) == []


def test_stop_from_another_thread_while_the_source_is_silent() -> None:
    go_on = threading.Event()

    def silent() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(3)
        go_on.wait(20)

    watch = live_grounder().watch(silent(), ["the car"], window_s=8)
    threading.Timer(0.3, watch.stop).start()
    began = time.monotonic()
    assert len(list(watch)) in (2, 3)
    go_on.set()
    assert time.monotonic() - began < 10 and watch.stats.ended == "stopped"


def test_errors_of_sources_that_stall_break_or_are_empty() -> None:
    go_on = threading.Event()

    def stalls() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(3)
        go_on.wait(20)

    def breaks() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(3)
        raise RuntimeError("the cable is out")

    def backwards() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(3)
        yield from stream(1)

    def grows() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(3)
        yield 3.0, np.zeros((96, 128, 3), np.uint8)

    for frames, code, value in (
        (stalls(), "live.stalled", "0.2 s"),
        (breaks(), "live.connection_lost", "RuntimeError: the cable is out"),
        (backwards(), "video.bad_time", "0.0 s after 2.875 s"),
        (grows(), "video.size_changed", "128 × 96"),
        (iter([]), "video.no_frames", ""),
        (iter(["frame"]), "video.bad_frame", "str"),
    ):
        updates = []
        stall_s = 0.2 if code == "live.stalled" else 20.0
        with raises(code, value):
            with live_grounder().watch(frames, ["the car"], window_s=8, stall_s=stall_s) as watch:
                for update in watch:
                    updates.append(update)
        assert watch.stats.ended == "error"
        assert len(updates) == watch.stats.answers
    go_on.set()


def test_a_gap_in_the_stream_is_not_filled() -> None:
    def gapped() -> Iterator[tuple[float, np.ndarray]]:
        yield from stream(5, bright=((0, 5),))
        yield from stream(5, bright=((0, 5),), start_s=65.0)

    updates, stats = updates_of(gapped())
    assert stats.gaps == 1 and stats.groups < 15 and stats.skipped_answers == 0
    assert updates[-1].window == (65.0, 70.0)  # nothing of a minute ago
    assert all(end - start <= 8 for start, end in (update.window for update in updates))


def test_closing_the_grounder_ends_its_watches() -> None:
    grounder = live_grounder()
    with grounder.watch(endless(), ["the car"], window_s=8) as watch:
        next(watch)
        grounder.close()
        with pytest.raises(EngineError, match="closed"):
            list(watch)
    assert watch.stats.ended == "error" and grounder.sessions["vision_encoder"].session.closed  # type: ignore


def test_a_window_that_does_not_fit_the_prompt() -> None:
    import dataclasses

    spec = fake_spec()
    small = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=300))
    with raises("live.window_too_large", "window"):
        list(live_grounder(small).watch(stream(4), ["the car"], window_s=32))
