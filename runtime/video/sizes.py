"""The sizes that frames are resized to: the rule of the vision encoders."""

from __future__ import annotations

import math

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import VideoError


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the (height, width) that a frame is resized to: multiples of `factor`, close to its aspect ratio.

    The rule of Qwen2-VL's and Qwen3-VL's image processors (transformers, `smart_resize`): round each side to a
    multiple of the factor, then scale both into min_pixels … max_pixels. Raises VideoError for a side of 0 or an
    aspect ratio above 200.
    """
    if height < 1 or width < 1 or max(height, width) / min(height, width) > 200:
        raise VideoError("video.bad_shape", f"a frame of {width} × {height} pixels: its aspect ratio must be ≤ 200")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / scale / factor) * factor, math.floor(width / scale / factor) * factor
    elif rows * columns < min_pixels:
        rows, columns = smallest_size(height, width, factor=factor, min_pixels=min_pixels)
    return max(factor, rows), max(factor, columns)


def smallest_size(height: int, width: int, *, factor: int, min_pixels: int) -> tuple[int, int]:
    """Return the smallest (height, width) with at least `min_pixels`: the result of `smart_size` for a tiny frame."""
    scale = math.sqrt(min_pixels / (height * width))
    return math.ceil(height * scale / factor) * factor, math.ceil(width * scale / factor) * factor


def frame_sizes(height: int, width: int, spec: ModelSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the (height, width) of a video's coarse frames and of its fine frames; see `smart_size`."""
    frames, factor = spec.frames, spec.vision.patch_size * spec.vision.merge_size
    coarse = {"min_pixels": frames.coarse_min_pixels, "max_pixels": frames.coarse_max_pixels}
    fine = {"min_pixels": frames.fine_min_pixels, "max_pixels": frames.fine_max_pixels}
    return smart_size(height, width, factor=factor, **coarse), smart_size(height, width, factor=factor, **fine)
