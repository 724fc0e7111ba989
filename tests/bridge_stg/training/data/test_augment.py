"""Words of sides in mirrored queries, and parts of frames that contain every box."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.training.data.augment import View, choose_view, swap_sides
from bridge_stg.training.data.labels import Label
from bridge_stg.training.data.media import Medium
from bridge_stg.training.recipe import Augmentation

ALL = Augmentation(crop=1.0, flip=1.0, colour=1.0, scale=1.0, time=1.0)
VIDEO = Medium("video", (200, 100), 10.0)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the man on the left", "the man on the right"),
        ("Left car, RIGHT dog", "Right car, LEFT dog"),
        ("the leftmost and the right-most cup", "the rightmost and the left-most cup"),
        ("a left-hand glove, Right-handed", "a right-hand glove, Left-handed"),
        ("turns leftwards, then rightward", "turns rightwards, then leftward"),
        ("her lefthand ring", "her righthand ring"),
        ("the bright upright cleft leftover copyright", "the bright upright cleft leftover copyright"),
    ],
)
def test_sides_are_exchanged(text: str, swapped: str) -> None:
    assert swap_sides(text) == swapped and swap_sides(swapped) == text


def label(times: list[float], boxes: list[list[float]], span: tuple[float, float] = (2.0, 6.0)) -> Label:
    return Label(span, np.array(times), np.array(boxes).reshape(-1, 4), np.ones(len(times), bool))


def view(
    labels: list[Label | None], *, seed: int = 0, medium: Medium = VIDEO, query: str = "", **options: bool
) -> View:
    queries = [query] * len(labels)
    rng, tracks = np.random.default_rng(seed), options.get("tracks", False)
    return choose_view(rng, ALL, medium, labels, queries, tracks=tracks, group_s=1.0)


@pytest.mark.parametrize(
    "query",
    ["who left the room", "the dog right behind the car", "all right", "a wheel that turns clockwise", "she left"],
)
def test_queries_without_a_mirrored_form_are_not_flipped(query: str) -> None:
    assert not view([None], query=query).flip
    assert view([None], query="the dog on the right behind the car to the left").flip


def test_a_crop_contains_all_boxes_and_half_of_each_side() -> None:
    found = [
        label([2.0, 5.0], [[0.1, 0.2, 0.3, 0.3], [0.5, 0.3, 0.9, 0.4]]),
        None,
        label([3.0], [[0.4, 0.6, 0.5, 0.7]]),
    ]
    crops = set()
    for seed in range(50):
        crop = view(found, seed=seed).crop
        assert crop is not None
        left, top, right, bottom = crop
        assert 0 <= left <= 20 and 180 <= right <= 200 and 0 <= top <= 20 and 70 <= bottom <= 100
        assert right - left >= 100 and bottom - top >= 50
        crops.add(crop)
        shown = view(found, seed=seed)
        for one in (found[0], found[2]):
            assert one is not None
            boxes = View(crop=shown.crop).label(one, VIDEO.size).boxes
            pixels = one.boxes * np.array([200, 100, 200, 100]) - np.array([left, top, left, top])
            np.testing.assert_allclose(boxes * np.tile([right - left, bottom - top], 2), pixels, atol=1e-9)
            assert ((boxes >= 0) & (boxes <= 1)).all()
    assert len(crops) > 20


def test_what_would_change_presence_is_not_done() -> None:
    unknown = label([], [])
    assert view([unknown]).crop is None and view([None]).crop is not None
    assert view([None], medium=Medium("animation", (200, 100), None)).crop is None
    tracked = label([0.0], [[0.1, 0.1, 0.2, 0.2]], (0.0, 6.0))
    assert view([tracked]).later_s > 0 and view([tracked], tracks=True).later_s == 0
    assert view([tracked], medium=Medium("image", (200, 100), 0.0)).later_s == 0
    for seed in range(20):
        short = label([0.0], [[0.1, 0.1, 0.2, 0.2]], (0.0, 0.5))
        assert view([short], seed=seed).later_s < 0.25 and 0.5 <= view([short], seed=seed).scale <= 1


def test_a_label_that_starts_later_keeps_its_boxes() -> None:
    moved = label([0.0, 1.0, 2.0], [[0.0, 0, 0.2, 1], [0.1, 0, 0.3, 1], [0.2, 0, 0.4, 1]], (0.0, 3.0)).shifted(0.5)
    assert moved.span == (0.0, 2.5) and moved.times.tolist() == [0.0, 0.5, 1.5]
    np.testing.assert_allclose(moved.boxes[:, 0], [0.05, 0.1, 0.2])


def test_hidden_and_outside_boxes_are_not_counted() -> None:
    found = Label((0.0, 4.0), np.arange(4.0), np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 1, 1]]) * 0.5,
                  np.array([True, False, True, True]))  # fmt: skip
    times = np.array([0.0, 0.4, 0.9, 1.4, 1.6, 2.0, 3.0, 5.0])
    assert found.counted(times).tolist() == [True, True, False, False, True, True, False, True]
    assert found.positive(times).tolist() == [True] * 7 + [False]


def test_colours_change_and_keep_the_order_of_channels() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8, 3), np.uint8)
    changed = View(colour=(0.8, 1.2, 0.9)).frames(frames)
    assert changed.shape == frames.shape and changed.dtype == np.uint8 and not np.array_equal(changed, frames)
    assert np.array_equal(View(colour=(1.0, 1.0, 1.0)).frames(frames), frames)
    assert np.array_equal(View().frames(frames), frames)
    grey = np.full((1, 4, 4, 3), 100, np.uint8)
    assert np.array_equal(np.unique(View(colour=(1.0, 1.0, 1.3)).frames(grey)), [100])
