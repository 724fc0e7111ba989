"""One page that shows groundings: frames of the spans with their boxes, and a timeline with the presence curves."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.runtime.chain.results import FrameBoxes, Grounding
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.video.playback import Playback, play
from bridge_stg.runtime.visualize.canvas import INK, WHITE, Colour, colour_of, fit_text
from bridge_stg.runtime.visualize.crop import paint_inset, view_of
from bridge_stg.runtime.visualize.fonts import font, font_for
from bridge_stg.runtime.visualize.painter import BoxPainter, marks_at, names_of

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

MAX_FRAMES = 12
PAGE_WIDTH, MARGIN, GAP = 1056, 28, 12
LABEL_HEIGHT, LEGEND_ROW = 28, 34
CURVE_TITLE, CURVE_HEIGHT, BAR_HEIGHT = 20, 64, 14
LARGEST_PICTURE = 640 * 480  # most pixels of a frame that is kept while a video is read
GREY: Colour = (104, 110, 120)
FAINT: Colour = (190, 195, 203)
PALE: Colour = (226, 229, 234)
DOUBT: Colour = (176, 84, 0)


def contact_sheet(video: Any, groundings: Grounding | Sequence[Grounding], out: str | os.PathLike[str]) -> Path:
    """Write a PNG with the queries, up to 12 frames of the spans with boxes, and a timeline of the whole video.

    A frame with small targets only is cropped around them, with the whole frame as an inset. The sheet of absent
    targets shows frames of the whole video.

    `video` is the grounded one: a path, an array [H, W, 3], or an iterable of (time_s, RGB uint8 [H, W, 3]);
    `groundings` are those of one or more queries on it. `out` is replaced only when complete. Raises VideoError if the
    video cannot be read, BridgeError if `out` cannot be written.
    """
    drawn = (groundings,) if isinstance(groundings, Grounding) else tuple(groundings)
    found = [grounding.boxes for grounding in drawn if grounding.boxes is not None]
    with play(video, drawn[0].stream if drawn else None) as source:
        if not found:
            shown = _spread(source, MAX_FRAMES)
        else:
            times = shown_times(found)
            shown = list(zip(times.tolist(), source.frames_at(times), strict=True))
        duration_s = source.end_s if source.duration_s is None else source.duration_s
    page = compose(drawn, shown, duration_s)
    with replacing(out) as temporary:
        page.save(temporary, format="PNG", optimize=True)
    return Path(out)


def shown_times(found: Sequence[FrameBoxes]) -> np.ndarray:
    """Return at most 12 times of frames with boxes, in order, spread evenly, with one at least of each query."""
    times = np.unique(np.concatenate([boxes.times for boxes in found]))
    shown: np.ndarray = times[_evenly(len(times), MAX_FRAMES)]
    missed = [boxes.times[len(boxes) // 2] for boxes in found if not np.isin(boxes.times, shown).any()]
    if missed and len(found) <= MAX_FRAMES:
        middles = [boxes.times[len(boxes) // 2] for boxes in found]
        shown = np.unique(np.concatenate([times[_evenly(len(times), MAX_FRAMES - len(found))], middles]))
    return shown


def _evenly(length: int, count: int) -> np.ndarray:
    """Return at most `count` indices spread evenly over `length`."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int))


def _spread(source: Playback, count: int) -> list[tuple[float, np.ndarray]]:
    """Return at most `count` frames spread evenly over the whole video, reduced in size, with their times."""
    kept: list[tuple[float, np.ndarray]] = []
    stride = 1
    for index, (time_s, picture) in enumerate(source.intervals()):
        if index % stride == 0:
            frame = picture()
            height, width = frame.shape[:2]
            scale = max(1.0, (height * width / LARGEST_PICTURE) ** 0.5)
            kept.append((time_s, np.asarray(thumbnail(frame, (round(width / scale) or 1, round(height / scale) or 1)))))
        if len(kept) == 8 * count:
            kept, stride = kept[::2], 2 * stride
    return [kept[i] for i in _evenly(len(kept), count)]


def thumbnail(frame: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return an RGB array [H, W, 3] as an image of `size` (width, height)."""
    from PIL import Image

    return Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)


def grid(count: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """Return the number of columns and the (width, height) of a cell's image."""
    aspect = size[0] / size[1]
    columns = min(count, 6 if aspect < 0.8 else 3 if aspect > 2.4 else 4)
    inner = PAGE_WIDTH - 2 * MARGIN
    width = (inner - (columns - 1) * GAP) // columns
    height = min(width / aspect, 480)
    return columns, (max(1, round(height * aspect)), max(1, round(height)))


def compose(
    groundings: Sequence[Grounding], shown: Sequence[tuple[float, np.ndarray]], duration_s: float
) -> Image.Image:
    """Return the page with the frames shown, and their times. `duration_s` is 0 for an image: no timeline."""
    from PIL import Image, ImageDraw

    size = (shown[0][1].shape[1], shown[0][1].shape[0])
    columns, cell_size = grid(len(shown), size)
    row_height = cell_size[1] + (LABEL_HEIGHT if duration_s else 0) + GAP
    top = MARGIN + (78 if len(groundings) == 1 else LEGEND_ROW * len(groundings) + 12)
    grid_bottom = top - (-len(shown) // columns) * row_height
    timeline_height = _timeline_height(groundings) if duration_s else 0
    page = Image.new("RGB", (PAGE_WIDTH, grid_bottom + timeline_height + MARGIN - GAP), WHITE)
    draw = ImageDraw.Draw(page)
    names = names_of([grounding.query for grounding in groundings])
    (_title if len(groundings) == 1 else _legend)(draw, groundings, names, duration_s)
    boxes = BoxPainter(names, cell_size, text_size=14, thickness=3)
    for i, (time_s, frame) in enumerate(shown):
        row, column = divmod(i, columns)
        left, upper = MARGIN + column * (cell_size[0] + GAP), top + row * row_height
        cell, zoom = _cell(groundings, time_s, frame, boxes)
        page.paste(cell, (left, upper))
        if duration_s:
            draw.text((left, upper + cell_size[1] + 5), f"{time_s:.2f} s", INK, font(15))
            if zoom > 1:
                note = f"{'' if cell_size[0] < 150 else 'enlarged '}{zoom:g}x"
                draw.text((left + cell_size[0], upper + cell_size[1] + 5), note, GREY, font(15), anchor="ra")
    if duration_s:
        _timeline(page, groundings, [time_s for time_s, _ in shown], duration_s, grid_bottom)
    return page


def _cell(
    groundings: Sequence[Grounding], time_s: float, frame: np.ndarray, painter: BoxPainter
) -> tuple[Image.Image, float]:
    """Return a frame with its boxes in the size of the painter, and by how much it is enlarged."""
    from PIL import Image, ImageDraw

    size = (frame.shape[1], frame.shape[0])
    marks = marks_at(groundings, time_s)
    scale = np.tile(np.divide(size, groundings[0].size), 2) if groundings else np.ones(4)
    view = view_of([np.asarray(mark.box) * scale for mark in marks], size, painter.size)
    cell = Image.fromarray(frame).resize(painter.size, Image.Resampling.LANCZOS, box=view)
    zoom = round(size[0] / (view[2] - view[0]), 2)
    draw = ImageDraw.Draw(cell)
    inside = [replace(mark, box=_in_view(np.asarray(mark.box) * scale, view, painter.size)) for mark in marks]
    taken = [paint_inset(cell, frame, view, [mark.box for mark in inside])] if zoom > 1 else []
    painter.paint(draw, inside, taken=taken)
    return cell, zoom


def _in_view(box: np.ndarray, view: tuple[float, ...], size: tuple[int, int]) -> list[float]:
    """Return a box of the frame in pixels of the cell that shows the part `view` of it."""
    scale = np.divide(size, (view[2] - view[0], view[3] - view[1]))
    return [float(side) for side in (box - np.tile(view[:2], 2)) * np.tile(scale, 2)]


def _status(grounding: Grounding, duration_s: float) -> str:
    presence = f", presence {grounding.scores.get('presence', 0):.2f}" if grounding.heads == "bridge" else ""
    if not grounding.found:
        return f"not in this video (probability {grounding.scores.get('absent', 0):.2f})"
    if grounding.span is None or not duration_s:
        return f"found{presence}"
    start, end = grounding.span
    return f"from {start:.2f} s to {end:.2f} s of {duration_s:.2f} s{presence}"


def _title(draw: ImageDraw.ImageDraw, groundings: Sequence[Grounding], names: Sequence[str], duration_s: float) -> None:
    inner, grounding = PAGE_WIDTH - 2 * MARGIN, groundings[0]
    large = font_for(names[0], 30)
    draw.text((MARGIN, MARGIN - 6), fit_text(names[0], large, inner), INK, large)
    draw.text((MARGIN, MARGIN + 36), _status(grounding, duration_s), GREY if grounding.found else DOUBT, font(18))


def _legend(
    draw: ImageDraw.ImageDraw, groundings: Sequence[Grounding], names: Sequence[str], duration_s: float
) -> None:
    """Draw a row per query: its colour, the query, and what was found."""
    small, right = font(17), PAGE_WIDTH - MARGIN
    for place, (grounding, name) in enumerate(zip(groundings, names, strict=True)):
        y, status = MARGIN + place * LEGEND_ROW + 10, _status(grounding, duration_s)
        draw.rounded_rectangle((MARGIN, y - 9, MARGIN + 18, y + 9), radius=4, fill=colour_of(place))
        draw.text((right, y), status, GREY if grounding.found else DOUBT, small, anchor="rm")
        name_font, left = font_for(name, 22), MARGIN + 30
        text = fit_text(name, name_font, right - small.getlength(status) - left - 2 * GAP)
        draw.text((left, y), text, INK, name_font, anchor="lm")


def _has_curve(grounding: Grounding) -> bool:
    """Return whether there is presence to draw; text heads compute none."""
    return grounding.tube is not None and grounding.heads == "bridge"


def _curve_height(groundings: Sequence[Grounding]) -> int:
    return CURVE_HEIGHT if any(_has_curve(grounding) for grounding in groundings) else 0


def _timeline_height(groundings: Sequence[Grounding]) -> int:
    height = _curve_height(groundings)
    return (CURVE_TITLE + height if height else 0) + len(groundings) * (BAR_HEIGHT + 4) + 34


def _timeline(
    page: Image.Image, groundings: Sequence[Grounding], shown: Sequence[float], duration_s: float, top: int
) -> None:
    """Draw presence as curves, the spans as bars beneath them, a mark for each frame shown, and seconds."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(page)
    small = font(14)
    left, right = MARGIN + 4, PAGE_WIDTH - MARGIN - 4
    height = _curve_height(groundings)
    floor = top + (CURVE_TITLE + height if height else 0)

    def x(time_s: float) -> float:
        return left + (right - left) * min(max(time_s / duration_s, 0.0), 1.0)

    if height:
        for level in (floor, floor - height):
            draw.line((left, level, right, level), fill=PALE, width=1)
        for place, grounding in enumerate(groundings):
            _curve(draw, grounding, x, floor, place=place, filled=len(groundings) == 1)
        draw.text((left, floor - height - 5), "presence 1", GREY, small, anchor="ls")
    upper = floor + 6
    for place, grounding in enumerate(groundings):
        lower = upper + BAR_HEIGHT
        draw.rounded_rectangle((left, upper, right, lower), radius=4, fill=PALE)
        start, end = grounding.span or (0.0, -1.0)
        if grounding.span is not None:
            draw.rounded_rectangle((x(start), upper, max(x(end), x(start) + 4), lower), radius=4, fill=colour_of(place))
        for time_s in shown:
            mark = (x(time_s) - 2.5, upper + 4.5, x(time_s) + 2.5, lower - 4.5)
            draw.ellipse(mark, fill=WHITE if start <= time_s < end else FAINT)
        upper = lower + 4
    step = tick_step(duration_s, room=(right - left) / 70)
    for tick in np.arange(0, duration_s + 1e-6, step):
        draw.line((x(tick), upper - 2, x(tick), upper + 2), fill=GREY, width=1)
        anchor = "la" if tick == 0 else "ra" if x(tick) > right - 20 else "ma"
        draw.text((x(tick), upper + 5), f"{tick:g} s", GREY, small, anchor=anchor)


def _curve(
    draw: ImageDraw.ImageDraw,
    grounding: Grounding,
    x: Callable[[float], float],
    floor: int,
    *,
    place: int,
    filled: bool,
) -> None:
    """Draw the presence of a query over its span."""
    if grounding.span is None or grounding.tube is None or not _has_curve(grounding):
        return
    start, end = (x(side) for side in grounding.span)
    tube, colour = grounding.tube, colour_of(place)
    curve = [(x(t), floor - CURVE_HEIGHT * float(p)) for t, p in zip(tube.times, tube.presence, strict=True)]
    curve = [(start, curve[0][1]), *curve, (end, curve[-1][1])]
    if filled:
        tint = tuple(round(0.2 * part + 0.8 * 255) for part in colour)
        draw.polygon([(start, floor), *curve, (end, floor)], fill=tint)
    draw.line(curve, fill=colour, width=2, joint="curve")


def tick_step(duration_s: float, *, room: float) -> float:
    """Return a round number of seconds between ticks, so that at most `room` ticks fit in."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
    return next((step for step in steps if duration_s / step <= room), duration_s)
