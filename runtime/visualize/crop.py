"""Enlarge the part of a frame around small targets, with the whole frame as an inset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from bridge_stg.runtime.visualize.canvas import INK, WHITE
from bridge_stg.runtime.visualize.labels import Area, overlap

if TYPE_CHECKING:
    from PIL import Image

TARGET_SHARE = 0.4  # of the cell's side that the targets take, if they are enlarged
LEAST_ZOOM, MOST_ZOOM, ZOOM_STEP = 1.5, 6.0, 0.5
MOST_ENLARGED = 2.0  # pixels of a cell per pixel of the frame
INSET_SHARE = 0.3  # of the cell's sides

View = tuple[float, float, float, float]
"""Left, top, right, bottom of the part of a frame that is shown, in its pixels."""


def view_of(boxes: Sequence[np.ndarray], size: tuple[int, int], cell: tuple[int, int]) -> View:
    """Return the part of a frame of `size` that a cell shows, with the frame's aspect: all of it, or that of the boxes.

    `size` and `cell` are (width, height) in pixels, `boxes` are xyxy in pixels of the frame.
    """
    whole = (0.0, 0.0, float(size[0]), float(size[1]))
    if not boxes:
        return whole
    corners = np.clip(np.stack(boxes).reshape(-1, 2), 0, size)  # [2N, xy]
    low, high = corners.min(axis=0), corners.max(axis=0)
    share = float(((high - low) / size).max())
    zoom = min(TARGET_SHARE / max(share, 1e-6), MOST_ZOOM, MOST_ENLARGED * size[0] / cell[0])
    zoom = ZOOM_STEP * (zoom // ZOOM_STEP)  # so that most frames of a sheet have the same
    if zoom < LEAST_ZOOM:
        return whole
    part = np.divide(size, zoom)
    start = np.clip((low + high - part) / 2, 0, size - part)
    left, top, right, bottom = (float(side) for side in (*start, *(start + part)))
    return left, top, right, bottom


def paint_inset(cell: Image.Image, frame: np.ndarray, view: View, boxes: Sequence[Sequence[float]]) -> Area:
    """Draw the whole frame, with `view` outlined, in the corner of a cell that hides the least of the boxes.

    Returns the area of the inset.
    """
    from PIL import Image, ImageDraw

    height, width = frame.shape[:2]
    inset = tuple(max(1, round(INSET_SHARE * side)) for side in cell.size)
    picture = Image.fromarray(frame).resize((inset[0], inset[1]), Image.Resampling.BOX)
    scale = np.tile(np.divide(inset, (width, height)), 2)
    outline = ImageDraw.Draw(picture)
    left, top, right, bottom = (round(side) for side in np.asarray(view) * scale)
    outline.rectangle((left - 1, top - 1, right, bottom), outline=INK)
    outline.rectangle((left, top, right - 1, bottom - 1), outline=WHITE)
    targets = [(round(b[0]), round(b[1]), round(b[2]), round(b[3])) for b in boxes]
    corners = [(x, y) for y in (cell.height - inset[1], 0) for x in (cell.width - inset[0], 0)]
    areas = [(x, y, x + inset[0], y + inset[1]) for x, y in corners]
    area = min(areas, key=lambda corner: sum(overlap(corner, target) for target in targets))
    cell.paste(picture, area[:2])
    border = (area[0] - 1, area[1] - 1, area[2], area[3])
    ImageDraw.Draw(cell).rectangle(border, outline=WHITE)
    return border
