"""Images of synthetic scenes: tinted sprites, photographs and camera artefacts. Must not know time."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("car", "bus", "dog", "cat", "ball", "airplane", "bicycle", "tree", "bird", "boat")
COLOURS = {"red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 90, 235), "yellow": (240, 215, 40),
           "white": (238, 238, 238)}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
TRAIN_PHOTOS = ("chelsea", "astronaut", "grass", "brick", "gravel", "camera", "moon")
HELD_OUT_PHOTOS = ("coffee", "rocket", "hubble_deep_field")


@functools.lru_cache(maxsize=1)
def _sheet() -> Image.Image:
    return Image.open(Path(__file__).with_name("sprites.png")).convert("RGBA")


@functools.lru_cache(maxsize=30_000)
def sprite(name: int, colour: int, flipped: bool, width: int, height: int) -> Image.Image:
    """Return a tinted sprite; with width 0, in the size of the sheet, cropped to its opaque part."""
    if width == 0:
        cell = _sheet().height
        image = _sheet().crop((name * cell, 0, (name + 1) * cell, cell))
        image = image.crop(image.getchannel("A").point(lambda a: 255 if a > 96 else 0).getbbox())
        pixels = np.asarray(image).astype(np.float32)
        light = pixels[..., :3].mean(-1, keepdims=True) / 255
        tint = np.asarray(COLOURS[COLOUR_NAMES[colour]], np.float32)
        tinted = np.concatenate([np.clip((0.35 + 0.75 * light) * tint, 0, 255), pixels[..., 3:]], -1)
        return Image.fromarray(tinted.astype(np.uint8), "RGBA")
    image = sprite(name, colour, False, 0, 0).resize((width, height), Image.Resampling.LANCZOS)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image


@functools.lru_cache(maxsize=30_000)
def _blend(name: int, colour: int, flipped: bool, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    pixels = np.asarray(sprite(name, colour, flipped, width, height)).astype(np.uint16)
    alpha = pixels[..., 3:]
    return (pixels[..., :3] * alpha).astype(np.uint16), 255 - alpha


def paste(frame: np.ndarray, box: np.ndarray, name: int, colour: int, flipped: bool) -> None:
    """Draw a sprite into a frame, uint8 [height, width, 3], at a box [4] cxcywh in 0..1."""
    height, width = frame.shape[:2]
    w, h = max(4, round(float(box[2]) * width)), max(4, round(float(box[3]) * height))
    x = min(max(round(float(box[0]) * width - w / 2), 0), width - w)
    y = min(max(round(float(box[1]) * height - h / 2), 0), height - h)
    ink, keep = _blend(name, colour, flipped, w, h)
    region = frame[y : y + h, x : x + w]
    region[:] = ((region * keep + ink) // 255).astype(np.uint8)


def jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    """Return a frame after JPEG compression."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


@functools.lru_cache(maxsize=2)
def _photos(split: str) -> tuple[np.ndarray, ...]:
    from skimage import data

    names: Iterable[str] = TRAIN_PHOTOS if split == "train" else HELD_OUT_PHOTOS
    images = [np.asarray(getattr(data, name)()) for name in names]
    return tuple(np.stack([i] * 3, -1) if i.ndim == 2 else np.ascontiguousarray(i[..., :3]) for i in images)


def background(rng: np.random.Generator, split: str, aspect: float) -> np.ndarray:
    """Return a random crop of a photograph with changed light; in training, one in five is blurred colour noise."""
    if split == "train" and rng.random() < 0.2:
        grid = rng.integers(0, 256, (int(rng.integers(2, 12)), int(rng.integers(2, 12)), 3)).astype(np.uint8)
        image = Image.fromarray(grid).resize((256, round(256 / aspect)), Image.Resampling.BICUBIC)
    else:
        photos = _photos(split)
        photo = photos[rng.integers(len(photos))]
        height, width = photo.shape[:2]
        crop_h = float(rng.uniform(0.4, 1.0)) * min(height, width / aspect)
        crop_w = crop_h * aspect
        x, y = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
        image = Image.fromarray(photo).crop((int(x), int(y), int(x + crop_w), int(y + crop_h)))
        image = image.resize((320, round(320 / aspect)), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(image).astype(np.float32)
    if split == "train":
        pixels = pixels[..., rng.permutation(3)] if rng.random() < 0.3 else pixels
    pixels = pixels * rng.uniform(0.45, 1.1) + rng.uniform(-20, 20)
    grey = pixels.mean(-1, keepdims=True)
    faded: np.ndarray = np.clip(grey + (pixels - grey) * rng.uniform(0.2, 1.1), 0, 255).astype(np.uint8)
    return faded
