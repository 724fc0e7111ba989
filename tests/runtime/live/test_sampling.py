"""Groups of a stream: the same samples as for a video of the same frames, in a short queue."""

from __future__ import annotations

import math
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.live.cuts import CutFinder
from bridge_stg.runtime.live.plan import LivePlan, plan_stream
from bridge_stg.runtime.live.reader import GroupQueue
from bridge_stg.runtime.live.sampling import LiveGroup, LiveSampler
from bridge_stg.runtime.video.open import open_source
from tests.errors import raises
from tests.fakes.chain import FakeTokenizer, fake_spec

TOKENIZER: Any = FakeTokenizer()


def plan_for(spec: ModelSpec, groups: int = 8) -> LivePlan:
    return plan_stream(48, 64, spec, TOKENIZER, groups=groups)


def sampled(plan: LivePlan, frames: list[tuple[float, np.ndarray]], hold_s: float = 2.0) -> tuple[list[LiveGroup], int]:
    sampler = LiveSampler(plan, hold_s=hold_s)
    groups = [group for time_s, frame in frames for group in sampler.add(time_s, lambda frame=frame: frame)]
    return [*groups, *sampler.finish()], sampler.gaps


def noise(times: np.ndarray) -> list[tuple[float, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(float(time), random.integers(0, 255, (48, 64, 3), np.uint8)) for time in times]


@pytest.mark.parametrize(
    ("coarse_fps", "fine_fps", "times"),
    [
        (2.0, 4.0, np.arange(96) / 8),
        (2.0, 4.0, np.arange(300) / 30),
        (2.0, 4.0, np.arange(6) * 1.7),
        (2.0, 5.0, 100 + np.cumsum(np.random.default_rng(1).choice([0.02, 0.04, 0.3], 80))),
        (3.0, 7.0, np.arange(200) / 29.97),
        (16.0, 4.0, np.arange(64) / 32),
    ],
)
def test_samples_are_those_of_a_video(coarse_fps: float, fine_fps: float, times: np.ndarray) -> None:
    spec = fake_spec(coarse_fps=coarse_fps, fine_fps=fine_fps)
    frames, plan = noise(times), plan_for(spec)
    groups, gaps = sampled(plan, frames)
    with open_source(iter(frames), spec) as source:
        coarse, grid = source.coarse(), source.fine_grid()
        fine = source.fine(grid)
    assert gaps == 0 and plan.interval_s == coarse.interval_s
    whole = coarse.frames[: len(groups)]
    assert len(coarse.frames) - len(groups) in (0, 1)  # a video fills its last group up
    np.testing.assert_array_equal(np.stack([group.frames for group in groups]), whole)
    places = np.array([group.place for group in groups])
    np.testing.assert_array_equal(plan.times(places[:, None] + np.arange(plan.group)), coarse.times[: len(groups)])
    samples = [sample for group in groups for sample in group.fine]
    end = plan.times(places[-1] + plan.group)
    inside = np.flatnonzero(grid < end - 1e-6)
    assert [sample.place for sample in samples] == inside[: len(samples)].tolist()
    assert len(samples) == len(inside)
    np.testing.assert_array_equal(np.stack([sample.frame for sample in samples]), fine.frames[inside])
    np.testing.assert_allclose([sample.time_s for sample in samples], fine.times[inside])


def test_groups_are_yielded_as_soon_as_they_are_complete() -> None:
    plan, found = plan_for(fake_spec()), []
    sampler = LiveSampler(plan, hold_s=2.0)
    for time_s, frame in noise(np.arange(33) / 8):
        found += [(time_s, group.place) for group in sampler.add(time_s, lambda frame=frame: frame)]
    assert found == [
        (0.875, 0),
        (1.875, 2),
        (2.875, 4),
        (3.875, 6),
    ]  # 0.75 has been shown


def test_gaps_are_left_empty() -> None:
    plan = plan_for(fake_spec())
    groups, gaps = sampled(plan, noise(np.concatenate([np.arange(20) / 8, 60.3 + np.arange(32) / 8])))
    assert gaps == 1
    assert [group.place for group in groups] == [0, 2, 4, 6, 122, 124, 126]  # the frame at 2.375 s is shown for 2 s
    assert all(len(group.fine) == 4 for group in groups)


def test_pictures_that_are_not_sampled_are_not_converted() -> None:
    plan, converted = plan_for(fake_spec()), []
    sampler = LiveSampler(plan, hold_s=2.0)
    for i in range(120):
        list(sampler.add(i / 30, lambda i=i: converted.append(i) or np.zeros((48, 64, 3), np.uint8)))  # type: ignore
    assert len(converted) == len(set(converted)) == 16


@pytest.mark.parametrize(("coarse_fps", "fine_fps"), [(2.0, 4.0), (3.0, 7.0)])
def test_shots_have_grids_of_their_own_and_frames_are_converted_in_time(coarse_fps: float, fine_fps: float) -> None:
    plan, cuts, newest = plan_for(fake_spec(coarse_fps=coarse_fps, fine_fps=fine_fps)), CutFinder(), 0

    def frame(number: int) -> np.ndarray:
        assert newest - number <= 2
        return np.full((48, 64, 3), 120 * (number // 47 % 2), np.uint8)

    sampler, groups = LiveSampler(plan, hold_s=math.inf, whole=True, cuts=cuts), []
    for newest in range(150):
        groups += sampler.add(newest / 30, partial(frame, newest))
    groups += sampler.finish()
    late = 1 / fine_fps  # a cut is found at the next fine frame
    assert len(cuts.times) == 3
    assert all(47 * k / 30 <= time <= 47 * k / 30 + late for k, time in enumerate(cuts.times, 1))
    for shot, start_s in enumerate([0.0, *cuts.times]):
        own = [group for group in groups if group.shot_s == start_s]
        assert [group.place for group in own] == list(range(0, plan.group * len(own), plan.group))
        assert all((group.frames == 120 * (shot % 2)).all() for group in own)
        assert own[0].shown_times[0] == own[0].fine[0].time_s == start_s
        assert own[-1].end_s == pytest.approx([*cuts.times, 5.0][shot])


def test_equal_printed_times_lower_the_rate() -> None:
    assert plan_for(fake_spec(coarse_fps=40.0)).stride > 1


def group_at(place: int) -> LiveGroup:
    return LiveGroup(place, np.zeros((2, 8, 8, 3), np.uint8), ())


def test_the_queue_drops_the_oldest_group() -> None:
    queue = GroupQueue(2, latest_wins=True)
    for place in range(5):
        assert queue.put(group_at(place))
    queue.end()
    assert queue.dropped == 3 and not queue.ended
    assert [queue.get(0).place, queue.get(0).place] == [3, 4]  # type: ignore[union-attr]
    assert queue.get(0) is None and queue.ended


def test_the_queue_makes_the_reader_wait() -> None:
    queue, put = GroupQueue(1, latest_wins=False), []
    thread = threading.Thread(target=lambda: put.extend(queue.put(group_at(place)) for place in range(3)))
    thread.start()
    assert queue.get(5).place == 0  # type: ignore[union-attr]
    queue.close()
    thread.join(5)
    assert not thread.is_alive() and queue.dropped == 0 and put[-1] is False


def test_an_error_is_raised_after_the_queued_groups() -> None:
    queue = GroupQueue(2, latest_wins=False)
    queue.put(group_at(0))
    queue.end(ValueError("broken"))
    assert queue.get(0) is not None
    with pytest.raises(ValueError, match="broken"):
        queue.get(0)


def test_frames_of_a_file_may_change_their_size() -> None:
    frames = noise(np.arange(64) / 8)
    frames[20:] = [(time, np.repeat(frame, 2, axis=0)) for time, frame in frames[20:]]
    spec = fake_spec(coarse_fps=2.0, fine_fps=4.0)
    with raises("video.size_changed", kind=VideoError):
        sampled(plan_for(spec), frames)
    sampler = LiveSampler(plan_for(spec), hold_s=math.inf, whole=True, cuts=CutFinder())
    groups = [group for time_s, frame in frames for group in sampler.add(time_s, lambda frame=frame: frame)]
    assert {group.frames.shape for group in [*groups, *sampler.finish()]} == {groups[0].frames.shape}
