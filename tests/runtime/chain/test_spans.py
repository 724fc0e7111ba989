from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.runtime.chain.spans import FineFrames, fine_frames, groups_of_span, in_span, refine_span, span_of_groups


def samples(groups: int, per_group: int, interval_s: float) -> np.ndarray:
    return (np.arange(groups * per_group) * interval_s).reshape(groups, per_group)


def test_a_span_runs_from_first_sample_to_last_sample_plus_one_interval() -> None:
    times = samples(8, 2, 0.5)
    assert span_of_groups((1, 2), times, interval_s=0.5, duration_s=8) == (1.0, 3.0)
    assert span_of_groups((7, 7), times, interval_s=0.5, duration_s=7.8) == (7.0, 7.8)


@pytest.mark.parametrize("per_group", [1, 2, 3])
@pytest.mark.parametrize("interval_s", [0.5, 1 / 3, 2.0])
def test_labels_are_the_inverse_of_named_spans(per_group: int, interval_s: float) -> None:
    times = samples(9, per_group, interval_s)
    duration_s = times[-1, -1] + interval_s
    for first in range(9):
        for last in range(first, 9):
            span = span_of_groups((first, last), times, interval_s=interval_s, duration_s=duration_s)
            assert groups_of_span(*span, times) == (first, last)


def test_labels_cover_every_sample_of_the_span_and_no_group_more() -> None:
    times = samples(8, 2, 0.5)
    assert groups_of_span(1.5, 3.5, times) == (1, 3)
    assert groups_of_span(1.6, 3.0, times) == (2, 2)
    assert groups_of_span(1.6, 3.1, times) == (2, 3)


def test_a_span_between_two_samples_is_named_by_the_nearest() -> None:
    times = samples(4, 1, 1.0)
    assert groups_of_span(1.1, 1.4, times) == (1, 1)
    assert groups_of_span(1.6, 1.9, times) == (2, 2)
    assert groups_of_span(9.0, 9.5, times) == (3, 3)


def test_rounded_container_times_do_not_shift_a_label() -> None:
    times = np.array([[0.0], [0.033], [0.067], [0.1]])
    assert groups_of_span(1 / 30, 3 / 30, times) == (1, 2)


def grid(seconds: float, fps: float = 4) -> np.ndarray:
    return np.arange(int(seconds * fps)) / fps


def test_fine_frames_are_the_grid_inside_the_widened_span() -> None:
    frames = fine_frames((2.0, 3.0), grid(8), fine_fps=4, margin_s=0.5, max_frames=64)
    assert frames.indices.tolist() == [6, 7, 8, 9, 10, 11, 12, 13]
    assert frames.times.tolist() == (frames.indices / 4).tolist()
    assert frames.interval_s == 0.25
    clipped = fine_frames((0.0, 8.0), grid(8), fine_fps=4, margin_s=1, max_frames=64)
    assert clipped.indices.tolist() == list(range(32))


def test_thinning_follows_the_grid_of_the_video() -> None:
    wide = fine_frames((0.25, 7.75), grid(8), fine_fps=4, margin_s=0, max_frames=8)
    assert wide.indices.tolist() == [4, 8, 12, 16, 20, 24, 28]
    assert wide.interval_s == 1.0
    other = fine_frames((2.3, 6.0), grid(8), fine_fps=4, margin_s=0, max_frames=8)
    assert other.indices.tolist() == [10, 12, 14, 16, 18, 20, 22]
    assert {12, 16, 20} == set(other.indices.tolist()) & set(wide.indices.tolist())


def test_there_is_always_a_fine_frame() -> None:
    between = fine_frames((1.05, 1.1), grid(8), fine_fps=4, margin_s=0, max_frames=64)
    assert between.indices.tolist() == [4]
    after = fine_frames((20.0, 21.0), grid(8), fine_fps=4, margin_s=0, max_frames=64)
    assert after.indices.tolist() == [31]
    image = fine_frames((0.0, 0.5), np.zeros(1), fine_fps=4, margin_s=1, max_frames=1)
    assert image.indices.tolist() == [0]


def ten_frames() -> FineFrames:
    return FineFrames(indices=np.arange(10), times=np.arange(10) / 4, interval_s=0.25)


def test_presence_moves_both_ends() -> None:
    presence = np.array([0.1, 0.2, 0.9, 0.1, 0.1, 0.8, 0.5, 0.49, 0, 0])
    assert refine_span((0, 2.5), ten_frames(), presence, threshold=0.5, duration_s=9) == (0.5, 1.75)
    assert refine_span((1, 1.2), ten_frames(), presence, threshold=0.5, duration_s=9) == (0.5, 1.75)


def test_the_span_is_unchanged_if_nothing_is_present_and_ends_with_the_video() -> None:
    assert refine_span((0.3, 2.2), ten_frames(), np.full(10, 0.4), threshold=0.5, duration_s=9) == (0.3, 2.2)
    assert refine_span((0.3, 2.2), ten_frames(), np.ones(10), threshold=0.5, duration_s=2.3) == (0, 2.3)


def test_in_span_is_half_open_and_never_empty() -> None:
    times = np.array([0.0, 0.5, 1.0, 1.5])
    assert in_span(times, (0.5, 1.5)).tolist() == [False, True, True, False]
    assert in_span(times, (0.6, 0.9)).tolist() == [False, True, False, False]
    assert in_span(times, (9.0, 9.5)).tolist() == [False, False, False, True]
