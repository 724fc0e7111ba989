"""Draw the answers of queries on frames: boxes with name and score, a legend, the time, and a bar per span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bridge_stg.runtime.chain.results import FrameBoxes, Grounding
from bridge_stg.runtime.visualize.canvas import INK, WHITE, colour_of, draw_box, fit_text, shade
from bridge_stg.runtime.visualize.fonts import drawable, font, font_for
from bridge_stg.runtime.visualize.labels import Area, LabelPlacer

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SAME_FRAME_S = 1e-3
NOT_FOUND = ": not found"
LARGEST_LEGEND = 0.25  # of the frame's height


class Painter(Protocol):
    """Draws on frames of one size."""

    size: tuple[int, int]

    def paint(self, image: Image.Image, time_s: float) -> None:
        """Draw on the frame shown at `time_s`, in place."""


@dataclass(frozen=True)
class Mark:
    """A box to draw: of the query at index `place`, left, top, right, bottom in pixels. A text head has no `score`."""

    place: int
    box: Sequence[float]
    score: float | None = None
    visible: bool = True
    interpolated: bool = False


def names_of(queries: Sequence[str]) -> list[str]:
    """Return each query as it can be drawn on this system; without a font for its letters, as "query 1"."""
    return [drawable(" ".join(query.split()), f"query {place + 1}") for place, query in enumerate(queries)]


def frame_index(boxes: FrameBoxes, time_s: float) -> int | None:
    """Return the index of the box of the frame shown at `time_s`; None if it has no box."""
    index = int(np.searchsorted(boxes.times, time_s - SAME_FRAME_S))
    return index if index < len(boxes) and abs(boxes.times[index] - time_s) <= SAME_FRAME_S else None


def marks_at(groundings: Sequence[Grounding], time_s: float) -> list[Mark]:
    """Return the boxes of the frame shown at `time_s`."""
    marks = []
    for place, grounding in enumerate(groundings):
        boxes = grounding.boxes
        index = None if boxes is None else frame_index(boxes, time_s)
        if boxes is not None and index is not None:
            # After a track has left the span, its last box is repeated: no score belongs to it.
            left = grounding.task == "track" and grounding.span is not None and time_s >= grounding.span[1]
            score = float(boxes.presence[index]) if grounding.heads == "bridge" and not left else None
            seen, interpolated = bool(boxes.visible[index]), bool(boxes.interpolated[index])
            marks.append(Mark(place, boxes.boxes[index].tolist(), score, seen, interpolated))
    return marks


class BoxPainter:
    """Draws boxes with the name of their query and their score on frames of `size` (width, height).

    A box is dashed if the target is probably not visible, thinner if it is interpolated. A label for which the frame
    has no free place is left out.
    """

    def __init__(self, queries: Sequence[str], size: tuple[int, int], *, text_size: int, thickness: int) -> None:
        self.size, self.names, self.thickness = size, names_of(queries), thickness
        self._fonts = [font_for(name, text_size) for name in self.names]
        self._height, self._padding = round(1.4 * text_size), max(2, text_size // 4)
        self._placer = LabelPlacer(size)

    def paint(self, draw: ImageDraw.ImageDraw, marks: Sequence[Mark], *, taken: Sequence[Area] = ()) -> None:
        """Draw the marks; no label is drawn in the areas `taken`."""
        for mark in marks:
            thickness = self.thickness - (self.thickness // 3 if mark.interpolated else 0)
            colour = colour_of(mark.place)
            draw_box(draw, mark.box, self.size, thickness=thickness, dashed=not mark.visible, colour=colour)
        around = self.thickness + 1  # boxes are drawn around the target, with a dark line
        grown = [_grown(mark.box, around) for mark in marks]
        texts = [self._text(mark) for mark in marks]
        widths = [round(self._fonts[mark.place].getlength(text)) for mark, text in zip(marks, texts, strict=True)]
        labels = [(width + 2 * self._padding, self._height) for width in widths]
        areas = self._placer.place(grown, labels, keys=[mark.place for mark in marks], taken=taken)
        for mark, text, area in zip(marks, texts, areas, strict=True):
            if area is not None:
                draw.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), fill=colour_of(mark.place))
                middle = (area[0] + self._padding, (area[1] + area[3]) / 2)
                draw.text(middle, text, INK, self._fonts[mark.place], anchor="lm")

    def _text(self, mark: Mark) -> str:
        score = "" if mark.score is None else f"{mark.score:.2f}"
        text_font = self._fonts[mark.place]
        room = 0.6 * self.size[0] - 2 * self._padding - text_font.getlength(score + " ")
        name = fit_text(self.names[mark.place], text_font, room)
        return f"{name} {score}".strip() if len(name) > 2 or not score else score


def _grown(box: Sequence[float], by: int) -> Area:
    left, top, right, bottom = (round(float(side)) for side in box)
    return left - by, top - by, right + by, bottom + by


class FramePainter:
    """Draws boxes, a legend, the time and a bar per query on frames of `size` (width, height).

    Without the video's length (None) no bars are drawn, and for an image (0) no time either.
    """

    def __init__(self, groundings: Sequence[Grounding], size: tuple[int, int], duration_s: float | None) -> None:
        self.groundings, self.size, self.duration_s = groundings, size, duration_s
        width, height = size
        side = min(size)
        self.text_size = max(11, round(side / 26))
        self.margin = max(3, self.text_size // 2)
        queries = [grounding.query for grounding in groundings]
        self.boxes = BoxPainter(queries, size, text_size=self.text_size, thickness=max(2, round(side / 110)))
        self.row = round(1.3 * self.text_size)
        lanes = len(groundings) if duration_s and width > 2 * self.margin else 0
        self.lane = max(2, min(self.text_size // 4, round(0.1 * height / max(1, lanes)))) if lanes else 0
        self.lane_gap = 0 if lanes < 2 else max(1, self.lane // 3)
        lanes_height = lanes * (self.lane + self.lane_gap) + self.margin if lanes else 0
        time_width = round(font(self.text_size).getlength("0000.00 s")) if duration_s != 0 else 0
        self.legend = self._legend(width - 3 * self.margin - time_width, round(LARGEST_LEGEND * height) - lanes_height)
        rows = 1 + max((row for _, row, _, _ in self.legend), default=0)
        self.strip_top = max(0, height - rows * self.row - lanes_height - self.margin)
        self.lanes_top = height - lanes_height

    def _legend(self, room: float, height: int) -> list[tuple[float, int, int, str]]:
        """Return (x, row, index of the query, text) of the entries, cut so that their rows fit in `height`.

        Without room for a few letters each, there is no legend.
        """
        most = max(1, height // self.row)
        for share in range(1, len(self.groundings) + 1):
            entries = self._entries(room, room / share)
            if entries and entries[-1][1] < most:
                return entries
        return []

    def _entries(self, room: float, widest: float) -> list[tuple[float, int, int, str]]:
        """Return the entries from left to right in as many rows as they need, none wider than `widest` pixels."""
        swatch, x, row, entries = self.text_size + self.margin // 2, 0.0, 0, []
        for place, (name, grounding) in enumerate(zip(self.boxes.names, self.groundings, strict=True)):
            text_font, end = font_for(name, self.text_size), "" if grounding.found else NOT_FOUND
            text_room = widest - swatch - 2 * self.margin - text_font.getlength(end)
            if text_room < 2 * self.text_size:
                return []
            text = fit_text(name, text_font, text_room) + end
            width = swatch + text_font.getlength(text)
            if x and x + width > room:
                x, row = 0.0, row + 1
            entries.append((self.margin + x, row, place, text))
            x += width + 2 * self.margin
        return entries

    def paint(self, image: Image.Image, time_s: float) -> None:
        """Draw on the frame shown at `time_s`, in place."""
        from PIL import ImageDraw

        strip = (0, self.strip_top, *self.size)
        draw = ImageDraw.Draw(image)
        self.boxes.paint(draw, marks_at(self.groundings, time_s), taken=[strip])
        shade(image, strip, 0.65)
        middle = self.strip_top + self.margin // 2 + self.row / 2
        swatch = round(0.7 * self.text_size)
        for x, row, place, text in self.legend:
            y = middle + row * self.row
            draw.rectangle((x, y - swatch / 2, x + swatch, y + swatch / 2), fill=colour_of(place))
            style: dict[str, Any] = {"font": font_for(self.boxes.names[place], self.text_size), "anchor": "lm"}
            draw.text((x + self.text_size + self.margin // 2, y), text, WHITE, **style)
        if self.duration_s != 0:
            right = self.size[0] - self.margin
            draw.text((right, middle), f"{time_s:.2f} s", WHITE, font(self.text_size), anchor="rm")
        if self.lane and self.duration_s:
            self._paint_lanes(draw, time_s, self.duration_s)

    def _paint_lanes(self, draw: ImageDraw.ImageDraw, time_s: float, duration_s: float) -> None:
        left, right = self.margin, self.size[0] - self.margin

        def x(time_s: float) -> float:
            return left + (right - left) * min(max(time_s / duration_s, 0.0), 1.0)

        top = self.lanes_top
        for place, grounding in enumerate(self.groundings):
            draw.rectangle((left, top, right, top + self.lane - 1), fill=(110, 114, 120))
            if grounding.span is not None:
                start, end = (x(side) for side in grounding.span)
                draw.rectangle((start, top, max(start + 1, end), top + self.lane - 1), fill=colour_of(place))
            top += self.lane + self.lane_gap
        half = max(2, self.lane // 3)
        area = (x(time_s) - half, self.lanes_top - self.lane // 2, x(time_s) + half, top - 1 + self.lane // 2)
        draw.rectangle(area, fill=WHITE)
