"""Place labels at boxes so that no label covers another one or leaves the frame. Knows nothing of drawing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

Area = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom are outside the area."""


def overlap(first: Area, second: Area) -> int:
    """Return the number of pixels in both areas."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)


class LabelPlacer:
    """Places labels greedily: above, below, beside or inside their box, else at the nearest free place.

    It remembers the side of each label, so that labels do not jump between the frames of a video.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size  # width and height of the frame, in pixels
        self._sides: dict[int, int] = {}

    def place(
        self, boxes: Sequence[Area], labels: Sequence[tuple[int, int]], *, keys: Sequence[int], taken: Sequence[Area]
    ) -> list[Area | None]:
        """Return the area of each label, or None where the frame has no free place of that size.

        Args:
            boxes: a box for each label; it may leave the frame.
            labels: widths and heights.
            keys: what tells a label from the others across frames.
            taken: areas where no label may be.
        """
        placed: list[Area | None] = []
        for key, box, (width, height) in zip(keys, boxes, labels, strict=True):
            used = [*taken, *(area for area in placed if area is not None)]
            best: tuple[float, int, Area | None] = (float("inf"), -1, None)
            for side, area in self._candidates(box, width, height, used):
                if area[0] < 0 or area[1] < 0 or area[2] > self.size[0] or area[3] > self.size[1]:
                    continue
                if any(overlap(area, other) for other in used):
                    continue
                cost = self._cost(area, box, boxes) - (0.5 if self._sides.get(key) == side else 0)
                if cost < best[0]:
                    best = cost, side, area
            placed.append(best[2])
            if best[2] is not None:
                self._sides[key] = best[1]
        return placed

    def _candidates(self, box: Area, width: int, height: int, used: Sequence[Area]) -> Iterator[tuple[int, Area]]:
        """Yield (side, area): at the box, then all that touch the frame's border or a used area at left and top.

        If any free place exists, then one of these is free: a label in it can be pushed to the left and up.
        """
        frame_width, frame_height = self.size
        left, top = min(max(box[0], 0), frame_width), min(max(box[1], 0), frame_height)
        right, bottom = max(left, min(box[2], frame_width)), max(top, min(box[3], frame_height))
        beside = min(top, frame_height - height)
        corners = [(left, top - height), (right - width, top - height), (left, bottom), (right - width, bottom)]
        corners += [(right, beside), (left - width, beside)]
        corners += itertools.product((left, right - width), (top, bottom - height))
        for side, (x, y) in enumerate(corners):
            moved = x if side in (4, 5) else max(0, min(x, frame_width - width))
            yield side, (moved, y, moved + width, y + height)
        columns = {0, left, *(area[2] for area in used)}
        rows = {0, top, *(area[3] for area in used)}
        for x, y in itertools.product(sorted(columns), sorted(rows)):
            yield len(corners), (x, y, x + width, y + height)

    @staticmethod
    def _cost(area: Area, box: Area, boxes: Sequence[Area]) -> float:
        """Return how much of the label covers boxes, those of others twice; more if it does not touch its own."""
        size = max(1, (area[2] - area[0]) * (area[3] - area[1]))
        covered = (2 * sum(overlap(area, other) for other in boxes) - overlap(area, box)) / size
        apart = max(box[0] - area[2], area[0] - box[2], box[1] - area[3], area[1] - box[3], 0)
        return covered + (4 + apart / max(1, area[3] - area[1]) if apart else 0)
