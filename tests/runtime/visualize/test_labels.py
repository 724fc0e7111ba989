"""Labels stay in the frame and cover no other label, for many random boxes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bridge_stg.runtime.visualize.labels import Area, LabelPlacer, overlap


def random_frame(rng: np.random.Generator) -> tuple[tuple[int, int], list[Area], list[tuple[int, int]]]:
    """Return a frame's size, and boxes, some of them partly outside, with the sizes of their labels."""
    width, height = (int(side) for side in rng.integers(60, 2000, 2))
    count = int(rng.integers(1, 9))
    corners = np.sort(rng.uniform(-0.2, 1.2, (count, 2, 2)), axis=1) * (width, height)
    sizes = np.stack([rng.uniform(0.05, 0.6, count) * width, np.full(count, rng.uniform(0.03, 0.15) * height)], 1)
    boxes = [(int(box[0]), int(box[1]), int(box[2]), int(box[3])) for box in corners.reshape(-1, 4)]
    return (width, height), boxes, [(max(1, int(w)), max(1, int(h))) for w, h in sizes]


def test_labels_never_overlap_or_leave_the_frame() -> None:
    rng, labels, placed_labels, outside, overlaps = np.random.default_rng(0), 0, 0, 0, 0
    for _ in range(400):
        size, boxes, sizes = random_frame(rng)
        strip = (0, int(0.85 * size[1]), *size)
        areas = LabelPlacer(size).place(boxes, sizes, keys=range(len(boxes)), taken=[strip])
        placed = [area for area in areas if area is not None]
        outside += sum(not (0 <= a[0] < a[2] <= size[0] and 0 <= a[1] < a[3] <= size[1]) for a in placed)
        overlaps += sum(overlap(a, b) > 0 for a, b in itertools.combinations([*placed, strip], 2))
        assert all(a is None or (a[2] - a[0], a[3] - a[1]) == wanted for a, wanted in zip(areas, sizes, strict=True))
        labels, placed_labels = labels + len(boxes), placed_labels + len(placed)
    assert (outside, overlaps) == (0, 0)
    assert placed_labels > 0.99 * labels


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((100, 100, 200, 200), (100, 80, 180, 100)),  # above
        ((100, 5, 200, 200), (100, 200, 180, 220)),  # below
        ((260, 100, 290, 200), (220, 80, 300, 100)),  # above, moved into the frame
        ((-40, -40, 340, 340), (0, 0, 80, 20)),  # inside
        ((10, -5, 60, 305), (60, 0, 140, 20)),  # beside
    ],
)
def test_place_of_one_label(box: Area, expected: Area) -> None:
    assert LabelPlacer((300, 300)).place([box], [(80, 20)], keys=[0], taken=[]) == [expected]


def test_a_label_goes_to_the_last_free_place_or_nowhere() -> None:
    placer, box = LabelPlacer((100, 40)), (0, 0, 100, 40)
    taken = [(0, 0, 100, 20), (0, 20, 40, 40)]
    assert placer.place([box], [(60, 20)], keys=[0], taken=taken) == [(40, 20, 100, 40)]
    assert placer.place([box, box], [(61, 20), (200, 5)], keys=[0, 1], taken=taken) == [None, None]


def test_a_label_stays_on_its_side_while_the_box_moves() -> None:
    placer, tops = LabelPlacer((300, 300)), []
    for top in (22, 18, 22, 18):
        area = placer.place([(100, top, 200, top + 100)], [(80, 20)], keys=[7], taken=[(0, 0, 1, 1)])[0]
        assert area is not None
        tops.append(area[1] - top)
    assert tops == [-20, 100, 100, 100]
