"""Random changes of a clip that keep its queries true: the same for all its frames, boxes and texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.training.data.labels import Label
from bridge_stg.training.data.media import Crop, Medium
from bridge_stg.training.recipe import Augmentation

LEAST_SIDE = 0.5  # of a cropped or scaled frame, as a share of the whole one
LEAST_LEFT = 0.5  # share of a span that is left when a clip starts later
COLOUR = (0.7, 1.3)  # factors on brightness, contrast and saturation
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SIDES = {"left": "right", "right": "left"}
SIDE = re.compile(r"(?<![^\W_])(left|right)(?=most|wards?|hand|[\W_]|$)", re.IGNORECASE)
NO_SIDE = re.compile(
    r"(?<!\bthe )(?<!\bto )(?<!\bon )(?<!\bfar )\b("
    r"left (the|an?|his|her|their|its|it|him|them|alone|over|behind|for|from|without)|"
    r"right (now|away|before|after|next|there|here|behind|in front|above|below|under|beside|at|as|when|where|by|near)"
    r")\b|\b(has|have|had|just|he|she|they|who|was|were|been) left\b|\ball right\b|\b(counter|anti)?-?clockwise\b",
    re.IGNORECASE,
)
"""Words that a mirrored clip would make wrong: "left" and "right" that name no side, and senses of rotation."""


@dataclass(frozen=True)
class View:
    """How a clip is shown.

    Attributes:
        crop: part of each frame; None: all of it.
        flip: whether left and right are exchanged.
        colour: factors on brightness, contrast and saturation.
        scale: factor on each side of the frames, after the rule of sizes.
        later_s: seconds of the clip's start that are left out.
    """

    crop: Crop | None = None
    flip: bool = False
    colour: tuple[float, float, float] | None = None
    scale: float = 1.0
    later_s: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether the frames can be made from those of the unchanged clip."""
        return self.crop is None and self.scale == 1.0 and self.later_s == 0.0

    def spec(self, spec: ModelSpec, size: tuple[int, int]) -> ModelSpec:
        """Return the spec whose rule of sizes gives the scaled frames of a medium of `size` (width, height)."""
        if self.scale == 1.0:
            return spec
        width, height = size if self.crop is None else (self.crop[2] - self.crop[0], self.crop[3] - self.crop[1])
        frames = spec.frames
        coarse, fine = (int(self.scale**2 * h * w) for h, w in frame_sizes(height, width, spec))
        frames = replace(
            frames,
            coarse_max_pixels=max(frames.coarse_min_pixels, min(coarse, frames.coarse_max_pixels)),
            fine_max_pixels=max(frames.fine_min_pixels, min(fine, frames.fine_max_pixels)),
        )
        return replace(spec, frames=frames)

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """Return cropped and scaled frames, uint8 [..., height, width, 3], with flip and colours."""
        if self.flip:
            frames = np.ascontiguousarray(frames[..., ::-1, :])
        if self.colour is None:
            return frames
        brightness, contrast, saturation = self.colour
        painted = np.empty_like(frames)
        for index in np.ndindex(frames.shape[:-3]):  # one frame in float32 at a time
            frame = frames[index].astype(np.float32)
            grey = (frame @ GREY)[..., None]
            brighter = (grey + saturation * (frame - grey)) * brightness
            painted[index] = ((brighter - 128) * contrast + 128).round().clip(0, 255)
        return painted

    def label(self, label: Label, size: tuple[int, int]) -> Label:
        """Return a label of a medium of `size` (width, height) whose boxes refer to the cropped and flipped frames."""
        boxes = label.boxes
        if self.crop is not None:
            left, top, right, bottom = self.crop
            origin, side = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
            boxes = ((boxes * np.array([*size, *size]) - origin) / side).clip(0, 1)
        if self.flip:
            boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], -1)
        return replace(label, boxes=boxes)

    def query(self, text: str) -> str:
        """Return a query, with the words of sides exchanged if the frames are flipped."""
        return swap_sides(text) if self.flip else text


def choose_view(
    rng: np.random.Generator, augment: Augmentation, medium: Medium, labels: Sequence[Label | None],
    queries: Sequence[str], *, tracks: bool, group_s: float,
) -> View:  # fmt: skip
    """Return a random view of a clip that keeps every target as present as it is.

    Args:
        rng: source of randomness; the same amount is used whatever is chosen.
        augment: probability of each change.
        medium: the clip's medium; an animation is not cropped, and only videos and folders of frames start later.
        labels: one per query; None: absent. Without known boxes, a present target could be cropped away.
        queries: their texts; without a mirrored form, they prevent a flip.
        tracks: whether a query gives the box of the first frame, which then stays the first.
        group_s: seconds of a group of coarse frames.
    """
    wanted, amount = rng.random(5), rng.random(9)
    present = [label for label in labels if label is not None]
    crop: Crop | None = None
    if wanted[0] < augment.crop and medium.kind != "animation" and all(len(label.times) for label in present):
        boxes = np.concatenate([label.boxes for label in present]) if present else np.zeros((0, 4))
        crop = _crop(amount[:4], boxes, medium.size)
    colour = COLOUR[0] + amount[4:7] * (COLOUR[1] - COLOUR[0])
    later = 0.0
    if wanted[4] < augment.time and medium.kind in ("video", "frames") and not tracks and medium.duration_s:
        latest = [label.span[0] + (1 - LEAST_LEFT) * (label.span[1] - label.span[0]) for label in present]
        later = amount[8] * min([group_s, LEAST_LEFT * medium.duration_s, *latest])
    return View(
        crop=crop,
        flip=bool(wanted[1] < augment.flip) and not any(map(NO_SIDE.search, queries)),
        colour=(float(colour[0]), float(colour[1]), float(colour[2])) if wanted[2] < augment.colour else None,
        scale=float(LEAST_SIDE + amount[7] * (1 - LEAST_SIDE)) if wanted[3] < augment.scale else 1.0,
        later_s=float(later),
    )


def swap_sides(text: str) -> str:
    """Return a text with "left" and "right" exchanged, also in "leftmost" or "right-hand", in the same case."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        swapped = SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return SIDE.sub(other, text)


def _crop(amount: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> Crop:
    """Return a part of a frame of `size` (width, height) with all boxes [N, 4] in 0..1; `amount` [4] is in 0..1."""
    edges = []
    for axis, pixels in enumerate(size):
        low = float(boxes[:, axis].min()) if len(boxes) else 0.5
        high = float(boxes[:, axis + 2].max()) if len(boxes) else 0.5
        least = max(LEAST_SIDE, high - low)
        side = least + amount[axis] * (1 - least)
        first, last = max(0.0, high - side), min(low, 1 - side)
        start = first + amount[axis + 2] * (last - first)
        edges.append((int(start * pixels), min(pixels, int(np.ceil((start + side) * pixels)))))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom
