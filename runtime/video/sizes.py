"""The sizes that frames are resized to: the rule of the vision encoders, and the resizing itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) that a frame is resized to: multiples of `factor`, close to its aspect ratio.

    The rule of Qwen2-VL's and Qwen3-VL's image processors (transformers, `smart_resize`): round each side to a
    multiple of the factor, then scale both into min_pixels … max_pixels.

    Raises:
        VideoError: a side is empty, or the aspect ratio is above 200.
    """
    if height < 1 or width < 1 or max(height, width) / min(height, width) > 200:
        raise VideoError(
            f"a frame of {width} × {height} pixels cannot be used: expected an aspect ratio of at most 200"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / scale / factor) * factor, math.floor(width / scale / factor) * factor
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor
    return max(factor, rows), max(factor, columns)


def smallest_size(height: int, width: int, *, factor: int, min_pixels: int) -> tuple[int, int]:
    """Return the smallest (height, width) of at least `min_pixels`: what `smart_size` makes of a tiny frame."""
    scale = math.sqrt(min_pixels / (height * width))
    return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor


def frame_sizes(height: int, width: int, spec: ModelSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (height, width) of a video's coarse and of its fine frames.

    Raises:
        VideoError: see `smart_size`.
    """
    frames, factor = spec.frames, spec.vision.patch_size * spec.vision.merge_size
    return (
        smart_size(
            height, width, factor=factor, min_pixels=frames.coarse_min_pixels, max_pixels=frames.coarse_max_pixels
        ),
        smart_size(height, width, factor=factor, min_pixels=frames.fine_min_pixels, max_pixels=frames.fine_max_pixels),
    )


def resize(rgb: Any, size: tuple[int, int]) -> Any:
    """Return an RGB picture, uint8 [H, W, 3], at (height, width) `size`, by Pillow's bicubic filter.

    A picture on a device stays there, and gets the same bytes.
    """
    if isinstance(rgb, DeviceArray):
        return rgb.context.resizer.resize(rgb, size)
    image = load_package("PIL.Image", "pillow")
    if rgb.shape[:2] == size:
        return np.array(rgb)
    picture = image.fromarray(np.ascontiguousarray(rgb))
    return np.array(picture.resize((size[1], size[0]), image.Resampling.BICUBIC))
