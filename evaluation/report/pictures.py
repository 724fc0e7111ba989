"""Draw one sample: a few frames with the true box and each model's, and a timeline of their spans."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from bridge_stg.evaluation.media import video_input
from bridge_stg.evaluation.samples import Sample, Truth
from bridge_stg.evaluation.scoring import boxes_at
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.visualize.canvas import INK, WHITE, Colour
from bridge_stg.runtime.visualize.contact_sheet import GREY, PALE, thumbnail
from bridge_stg.runtime.visualize.fonts import font

TRUE: Colour = (0, 170, 110)
MODELS: tuple[Colour, ...] = ((255, 45, 190), (245, 150, 0), (40, 150, 240), (150, 90, 220), (120, 120, 20))
"""Colours that differ in hue and brightness; a sixth model gets the first again."""
FRAMES, COLUMNS, CELL_WIDTH, GAP, BAR = 4, 2, 300, 6, 12


def colour_of(place: int) -> Colour:
    """Return the colour of a model, by its place in the report."""
    return MODELS[place % len(MODELS)]


def case_picture(sample: Sample, rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a PNG of a sample and its answers: result rows by model, in the order of the report.

    Raises:
        BridgeError: the media file cannot be read, or the ground truth is not as published.
    """
    truth, image = sample.read_truth(), sample.task == "image"
    predictions = [row.get("prediction") or {} for row in rows.values()]
    spans = [truth.span, *(prediction.get("span") for prediction in predictions)]
    duration_s = _duration_s(sample)
    times = np.zeros(1) if image else _picked_times(spans, duration_s)
    with play(video_input(sample), sample.stream) as source:
        frames = source.frames_at(times)
    size = (frames[0].shape[1], frames[0].shape[0])
    height = round(CELL_WIDTH * size[1] / size[0])
    columns, rows_of_cells = min(COLUMNS, len(times)), -(-len(times) // COLUMNS)
    bottom = rows_of_cells * (height + GAP)
    page_height = bottom - GAP if image else bottom + len(spans) * (BAR + 4) + 18
    page = Image.new("RGB", (columns * (CELL_WIDTH + GAP) - GAP, page_height), WHITE)
    scale = np.tile(np.divide((CELL_WIDTH, height), truth.size or size), 2)
    for place, (time, frame) in enumerate(zip(times, frames)):
        cell = thumbnail(frame, (CELL_WIDTH, height))
        for box, colour in _boxes(truth, predictions, time, task=sample.task):
            _outline(ImageDraw.Draw(cell), box * scale, colour)
        row, column = divmod(place, COLUMNS)
        page.paste(cell, (column * (CELL_WIDTH + GAP), row * (height + GAP)))
    if not image:
        _timeline(page, bottom, spans, times, duration_s)
    file = io.BytesIO()  # a palette of 256 colours keeps a report with dozens of pictures small
    page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, "PNG", optimize=True)
    return file.getvalue()


def _duration_s(sample: Sample) -> float:
    with play(video_input(sample), sample.stream) as source:
        if source.duration_s is None:
            for _ in source.intervals():
                pass  # the end of a video without a header is known after its last frame
        return source.end_s if source.duration_s is None else source.duration_s


def _picked_times(spans: Sequence[Sequence[float] | None], duration_s: float) -> np.ndarray:
    """Return the times of the frames to show: evenly over all spans, or over the whole video if none is known."""
    known = [span for span in spans if span]
    start = max(0.0, min((span[0] for span in known), default=0.0))
    end = min(duration_s, max((span[1] for span in known), default=duration_s))
    if end <= start:
        start, end = 0.0, duration_s
    return start + (end - start) * (np.arange(FRAMES) + 0.5) / FRAMES


def _boxes(
    truth: Truth, predictions: list[Mapping[str, Any]], time: float, *, task: str
) -> list[tuple[np.ndarray, Colour]]:
    """Return the boxes at a time, in the annotation's pixels, with their colours; the true one comes first."""
    drawn: list[tuple[np.ndarray, Colour]] = []
    if truth.inside.any():
        nearest = int(np.abs(truth.times - time).argmin())
        if truth.inside[nearest]:
            drawn.append((truth.boxes[nearest], TRUE))
    for place, prediction in enumerate(predictions):
        span = prediction.get("span")
        if not prediction.get("boxes") or (task == "tube" and span and not span[0] <= time < span[1]):
            continue
        drawn.append((boxes_at(prediction, np.asarray([0.0 if task == "image" else time]))[0], colour_of(place)))
    return drawn


def _outline(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour) -> None:
    left, top, right, bottom = (round(float(side)) for side in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=INK, width=4)
    draw.rectangle((left, top, right, bottom), outline=colour, width=2)


def _timeline(
    page: Image.Image, top: int, spans: Sequence[Sequence[float] | None], times: np.ndarray, duration_s: float
) -> None:
    """Draw a bar for the true span and for each model's, ticks at the frames shown, and the ends in seconds."""

    def x(time: float) -> float:
        return (page.width - 1) * min(max(time / duration_s, 0.0), 1.0)

    draw = ImageDraw.Draw(page)
    for place, span in enumerate(spans):
        y, colour = top + place * (BAR + 4), colour_of(place - 1) if place else TRUE
        draw.rounded_rectangle((0, y, page.width - 1, y + BAR), radius=3, fill=PALE)
        if span:
            draw.rounded_rectangle((x(span[0]), y, max(x(span[1]), x(span[0]) + 3), y + BAR), radius=3, fill=colour)
    bottom = top + len(spans) * (BAR + 4)
    for time in times:
        draw.line((x(time), top, x(time), bottom - 4), fill=INK, width=1)
    draw.text((0, bottom - 2), "0 s", GREY, font(13))
    draw.text((page.width - 1, bottom - 2), f"{duration_s:.1f} s", GREY, font(13), anchor="ra")
