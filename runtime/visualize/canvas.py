"""Boxes, labels and text on Pillow images, shared by annotated videos and contact sheets."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from bridge_stg.runtime.visualize.fonts import Font

Colour = tuple[int, int, int]

TARGET: Colour = (255, 45, 190)  # rare in photographs, and in contrast with foliage, sky, asphalt and skin
INK: Colour = (28, 30, 34)
WHITE: Colour = (255, 255, 255)
COLOURS: tuple[Colour, ...] = (
    TARGET, (25, 200, 255), (255, 198, 26), (61, 220, 107),
    (255, 122, 31), (169, 139, 255), (47, 224, 200), (255, 90, 90),
)  # fmt: skip
"""Colours of the queries, on all of which INK is readable; the server's page uses the same, in the same order."""


def colour_of(place: int) -> Colour:
    """Return the colour of a query, by its place among those of a picture."""
    return COLOURS[place % len(COLOURS)]


def fit_text(text: str, text_font: Font, width: float) -> str:
    """Return the text on one line, cut with an ellipsis where it is longer than `width` pixels."""
    text = " ".join(text.split())
    if text_font.getlength(text) <= width:
        return text

    def too_long(length: int) -> bool:
        return text_font.getlength(text[:length].rstrip() + "…") > width

    # The longest prefix that fits, by bisection: queries may have thousands of characters.
    return text[: bisect.bisect(range(1, len(text) + 1), False, key=too_long)].rstrip() + "…"


def draw_box(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    size: tuple[int, int],
    *,
    thickness: int,
    dashed: bool = False,
    colour: Colour = TARGET,
) -> None:
    """Draw a box in a colour between dark lines, which are visible on any background.

    `box` is left, top, right, bottom, `size` the image's width and height, all in pixels. Sides outside the image are
    drawn along its border. A dashed box says that the target is probably not visible.
    """
    # The line is drawn around the box, so that it does not hide a small target.
    left, top = (max(round(float(side)) - thickness, 0) for side in box[:2])
    right, bottom = (min(round(float(side)) + thickness, limit) - 1 for side, limit in zip(box[2:], size, strict=True))
    left, top = min(left, size[0] - 2 * thickness), min(top, size[1] - 2 * thickness)
    right, bottom = max(right, left + 2 * thickness), max(bottom, top + 2 * thickness)
    if not dashed:
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=INK, width=thickness + 2)
        draw.rectangle((left, top, right, bottom), outline=colour, width=thickness)
        return
    inner = thickness - 1
    for fill, grown in ((INK, 1), (colour, 0)):
        for (first, last), y in itertools.product(_dashes(left, right, thickness), (top, bottom - inner)):
            draw.rectangle((first - grown, y - grown, last + grown, y + inner + grown), fill=fill)
        for (first, last), x in itertools.product(_dashes(top, bottom, thickness), (left, right - inner)):
            draw.rectangle((x - grown, first - grown, x + inner + grown, last + grown), fill=fill)


def _dashes(start: int, end: int, thickness: int) -> list[tuple[int, int]]:
    """Divide the pixels start … end (inclusive) into dashes of about 4 times the thickness, with one at each end."""
    distance, length, gap = end - start + 1, 4 * thickness, 3 * thickness
    step = (distance + gap) / max(1, round((distance + gap) / (length + gap)))
    firsts = [start + round(i * step) for i in range(round((distance + gap) / step))]
    return [(first, max(first, min(first + round(step) - gap - 1, end))) for first in firsts]


def shade(image: Image.Image, area: tuple[int, int, int, int], strength: float) -> None:
    """Darken an area of an image in place, so that white text on it is readable. `strength` is 0 … 1."""
    from PIL import Image

    part = image.crop(area)
    image.paste(Image.blend(part, Image.new("RGB", part.size, INK), strength), area[:2])
