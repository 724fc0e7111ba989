"""One page that shows a grounding: frames of the span with their boxes, and a timeline with the presence curve."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.video.playback import Playback, play
from bridge_stg.runtime.visualize.canvas import INK, TARGET, WHITE, Colour, draw_box, fit_text, font, font_for

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

MAX_FRAMES = 12
PAGE_WIDTH, MARGIN, GAP = 1056, 28, 12
LABEL_HEIGHT = 28
CURVE_HEIGHT, BAR_HEIGHT = 64, 14
LARGEST_PICTURE = 640 * 480  # most pixels of a frame that is kept while a video is read
GREY: Colour = (104, 110, 120)
PALE: Colour = (226, 229, 234)
TINT: Colour = (255, 216, 244)
DOUBT: Colour = (176, 84, 0)


def contact_sheet(video: Any, grounding: Grounding, out: str | os.PathLike[str]) -> Path:
    """Write a PNG with the query, up to 12 frames of the span with boxes and times, and a timeline of the whole video.

    The sheet of an absent target shows frames of the whole video.

    `video` is the grounded one: a path, an array [H, W, 3], or an iterable of (time_s, RGB uint8 [H, W, 3]). `out` is
    replaced only when complete. Raises VideoError if the video cannot be read, BridgeError if `out` cannot be written.
    """
    boxes = grounding.boxes
    with play(video, grounding.stream) as source:
        if boxes is None:
            shown = _spread(source, MAX_FRAMES)
        else:
            times = boxes.times[_evenly(len(boxes), MAX_FRAMES)]
            shown = list(zip(times.tolist(), source.frames_at(times), strict=True))
        duration_s = source.end_s if source.duration_s is None else source.duration_s
    page = compose(grounding, shown, duration_s)
    with replacing(out) as temporary:
        page.save(temporary, format="PNG", optimize=True)
    return Path(out)


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


def compose(grounding: Grounding, shown: Sequence[tuple[float, np.ndarray]], duration_s: float) -> Image.Image:
    """Return the page with the frames shown, and their times. `duration_s` is 0 for an image: no timeline."""
    from PIL import Image, ImageDraw

    columns, (width, height) = grid(len(shown), grounding.size)
    top = MARGIN + 78
    grid_bottom = top - (-len(shown) // columns) * (height + LABEL_HEIGHT + GAP)
    curve_height = CURVE_HEIGHT if grounding.found else 0
    page_height = grid_bottom + (curve_height + BAR_HEIGHT + 46 if duration_s else 0) + MARGIN - GAP
    page = Image.new("RGB", (PAGE_WIDTH, page_height), WHITE)
    draw = ImageDraw.Draw(page)
    _title(draw, grounding, duration_s)
    for i, (time_s, frame) in enumerate(shown):
        row, column = divmod(i, columns)
        left, upper = MARGIN + column * (width + GAP), top + row * (height + LABEL_HEIGHT + GAP)
        cell = thumbnail(frame, (width, height))
        label = (left, upper + height + 5)
        if duration_s:
            draw.text(label, f"{time_s:.2f} s", INK, font(15))
        if (boxes := grounding.boxes) is not None:
            index = int(np.searchsorted(boxes.times, time_s))
            box = boxes.boxes[index] * np.tile(np.divide(cell.size, grounding.size), 2)
            draw_box(ImageDraw.Draw(cell), box, cell.size, thickness=3, dashed=not boxes.visible[index])
            note = f"{'' if width < 150 else 'presence '}{boxes.presence[index]:.2f}"
            colour = GREY if boxes.visible[index] else DOUBT
            if grounding.heads == "bridge":  # of text heads every presence is 1
                draw.text((left + width, label[1]), note, colour, font(15), anchor="ra")
        page.paste(cell, (left, upper))
    if duration_s:
        _timeline(page, grounding, [time_s for time_s, _ in shown], duration_s, grid_bottom)
    return page


def _title(draw: ImageDraw.ImageDraw, grounding: Grounding, duration_s: float) -> None:
    inner = PAGE_WIDTH - 2 * MARGIN
    large, scores = font_for(grounding.query, 30), grounding.scores
    draw.text((MARGIN, MARGIN - 6), fit_text(grounding.query, large, inner), INK, large)
    presence = f", presence {scores.get('presence', 0):.2f}" if grounding.heads == "bridge" else ""
    line = f"found{presence}"
    if not grounding.found:
        line = f"not in this video (probability {scores.get('absent', 0):.2f})"
    elif grounding.span is not None and duration_s:
        start, end = grounding.span
        line = f"from {start:.2f} s to {end:.2f} s of {duration_s:.2f} s{presence}"
    draw.text((MARGIN, MARGIN + 36), line, GREY if grounding.found else DOUBT, font(18))


def _timeline(page: Image.Image, grounding: Grounding, shown: Sequence[float], duration_s: float, top: int) -> None:
    """Draw presence as a filled curve, the span as a bar beneath it, a mark for each frame shown, and seconds."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(page)
    small = font(14)
    left, right = MARGIN + 4, PAGE_WIDTH - MARGIN - 4
    floor = top + (8 + CURVE_HEIGHT if grounding.found else 0)
    bar = (left, floor + 6, right, floor + 6 + BAR_HEIGHT)

    def x(time_s: float) -> float:
        return left + (right - left) * min(max(time_s / duration_s, 0.0), 1.0)

    draw.rounded_rectangle(bar, radius=4, fill=PALE)
    if grounding.span is not None and grounding.tube is not None and grounding.boxes is not None:
        start, end = (x(t) for t in grounding.span)
        for level in (floor, floor - CURVE_HEIGHT):
            draw.line((left, level, right, level), fill=PALE, width=1)
        tube = grounding.tube
        curve = [(x(t), floor - CURVE_HEIGHT * float(p)) for t, p in zip(tube.times, tube.presence, strict=True)]
        curve = [(start, curve[0][1]), *curve, (end, curve[-1][1])]
        draw.polygon([(start, floor), *curve, (end, floor)], fill=TINT)
        draw.line(curve, fill=TARGET, width=2, joint="curve")
        draw.text((left, floor - CURVE_HEIGHT + 4), "presence 1", GREY, small)
        draw.rounded_rectangle((start, bar[1], max(end, start + 4), bar[3]), radius=4, fill=TARGET)
    for time_s in shown:
        mark = (x(time_s) - 2.5, bar[1] + 4.5, x(time_s) + 2.5, bar[3] - 4.5)
        draw.ellipse(mark, fill=WHITE if grounding.found else GREY)
    step = tick_step(duration_s, room=(right - left) / 70)
    for tick in np.arange(0, duration_s + 1e-6, step):
        draw.line((x(tick), bar[3] + 2, x(tick), bar[3] + 6), fill=GREY, width=1)
        anchor = "la" if tick == 0 else "ra" if x(tick) > right - 20 else "ma"
        draw.text((x(tick), bar[3] + 9), f"{tick:g} s", GREY, small, anchor=anchor)


def tick_step(duration_s: float, *, room: float) -> float:
    """Return a round number of seconds between ticks, so that at most `room` ticks fit in."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
    return next((step for step in steps if duration_s / step <= room), duration_s)
