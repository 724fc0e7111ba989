"""Draw one sample: a few frames with the true box and each model's, and a timeline of their spans."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.evaluation.media import video_input
from bridge_stg.evaluation.samples import Sample, Truth
from bridge_stg.runtime.chain.results import Tube
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.visualize.canvas import INK, WHITE, Colour, font
from bridge_stg.runtime.visualize.contact_sheet import GREY, PALE, picture_spec, thumbnail

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

TRUE: Colour = (0, 170, 110)
MODELS: tuple[Colour, ...] = ((255, 45, 190), (245, 150, 0), (40, 150, 240), (150, 90, 220), (120, 120, 20))
"""Colours that differ in hue and brightness; a sixth model gets the first again."""
FRAMES, COLUMNS, CELL_WIDTH, GAP, BAR = 4, 2, 300, 6, 12


def colour_of(place: int) -> Colour:
    """Return the colour of a model, by its place in the report."""
    return MODELS[place % len(MODELS)]


def case_picture(sample: Sample, rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a PNG of a sample and its answers.

    Args:
        sample: the sample.
        rows: its result rows, by model in the order of the report.

    Raises:
        VideoError: the medium cannot be read.
        AnnotationError: the truth is not as published.
    """
    from PIL import Image, ImageDraw

    truth = sample.read_truth()
    predictions = [row.get("prediction") or {} for row in rows.values()]
    sizes = [tuple(row["size"]) for row in rows.values() if "size" in row]
    with open_source(video_input(sample), picture_spec(sizes[0] if sizes else (640, 480))) as source:
        times = picked_times(truth, predictions, source.duration_s, image=sample.task == "image")
        frames = source.fine(times).frames
        size, duration_s = (source.width, source.height), source.duration_s
    height = round(CELL_WIDTH * size[1] / size[0])
    bars = 0 if sample.task == "image" else 1 + len(predictions)
    columns, rows_of_cells = min(COLUMNS, len(times)), -(-len(times) // COLUMNS)
    bottom = rows_of_cells * (height + GAP)
    page_size = columns * (CELL_WIDTH + GAP) - GAP, bottom + bars * (BAR + 4) + 18 if bars else bottom - GAP
    page = Image.new("RGB", page_size, WHITE)
    scale = np.tile(np.divide((CELL_WIDTH, height), truth.size or size), 2)
    for place, (time, frame) in enumerate(zip(times, frames)):
        cell = thumbnail(frame, (CELL_WIDTH, height))
        for box, colour in _boxes(truth, predictions, time, image=sample.task == "image", task=sample.task):
            _outline(ImageDraw.Draw(cell), box * scale, colour)
        row, column = divmod(place, COLUMNS)
        page.paste(cell, (column * (CELL_WIDTH + GAP), row * (height + GAP)))
    if bars:
        _timeline(
            ImageDraw.Draw(page),
            width=page.width,
            top=bottom,
            truth=truth,
            predictions=predictions,
            times=times,
            duration_s=duration_s,
        )
    return _png(page)


def picked_times(truth: Truth, predictions: list[Mapping[str, Any]], duration_s: float, *, image: bool) -> np.ndarray:
    """Return the times of the frames to show: evenly over all spans, or over the whole video if none is known."""
    if image:
        return np.zeros(1)
    spans = [span for span in (truth.span, *(p.get("span") for p in predictions)) if span]
    start = max(0.0, min((span[0] for span in spans), default=0.0))
    end = min(duration_s, max((span[1] for span in spans), default=duration_s))
    if end <= start:
        start, end = 0.0, duration_s
    return start + (end - start) * (np.arange(FRAMES) + 0.5) / FRAMES


def _boxes(
    truth: Truth, predictions: list[Mapping[str, Any]], time: float, *, image: bool, task: str
) -> list[tuple[np.ndarray, Colour]]:
    """Return the boxes of one moment, in the annotation's pixels, with their colours; the true one comes first."""
    drawn: list[tuple[np.ndarray, Colour]] = []
    if truth.inside.any():
        nearest = int(np.abs(truth.times - time).argmin())
        if truth.inside[nearest]:
            drawn.append((truth.boxes[nearest], TRUE))
    for place, prediction in enumerate(predictions):
        if not prediction.get("boxes"):
            continue
        span = prediction.get("span")
        if task == "tube" and span and not span[0] <= time < span[1]:
            continue
        boxes = np.asarray(prediction["boxes"], np.float32)
        ones = np.ones(len(boxes), np.float32)
        tube = Tube(np.asarray(prediction["times"], np.float64), boxes, ones, ones > 0)
        drawn.append((tube.at(np.asarray([0.0 if image else time])).boxes[0], colour_of(place)))
    return drawn


def _outline(draw: ImageDraw.ImageDraw, box: np.ndarray, colour: Colour) -> None:
    left, top, right, bottom = (round(float(side)) for side in box)
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=INK, width=4)
    draw.rectangle((left, top, right, bottom), outline=colour, width=2)


def _timeline(
    draw: ImageDraw.ImageDraw,
    *,
    width: int,
    top: int,
    truth: Truth,
    predictions: list[Mapping[str, Any]],
    times: np.ndarray,
    duration_s: float,
) -> None:
    """Draw a bar for the true span and for each model's, ticks at the frames shown, and the ends in seconds."""

    def x(time: float) -> float:
        return (width - 1) * min(max(time / duration_s, 0.0), 1.0)

    spans = [truth.span, *(p.get("span") for p in predictions)]
    colours = [TRUE, *(colour_of(place) for place in range(len(predictions)))]
    for place, (span, colour) in enumerate(zip(spans, colours)):
        y = top + place * (BAR + 4)
        draw.rounded_rectangle((0, y, width - 1, y + BAR), radius=3, fill=PALE)
        if span:
            draw.rounded_rectangle((x(span[0]), y, max(x(span[1]), x(span[0]) + 3), y + BAR), radius=3, fill=colour)
    bottom = top + len(spans) * (BAR + 4)
    for time in times:
        draw.line((x(time), top, x(time), bottom - 4), fill=INK, width=1)
    draw.text((0, bottom - 2), "0 s", GREY, font(13))
    draw.text((width - 1, bottom - 2), f"{duration_s:.1f} s", GREY, font(13), anchor="ra")


def _png(page: Image.Image) -> bytes:
    """Return a picture as PNG; a palette of 256 colours keeps a report with dozens of them small."""
    from PIL import Image

    file = io.BytesIO()
    page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, "PNG", optimize=True)
    return file.getvalue()
