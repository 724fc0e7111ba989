"""Resize RGB frames, on the host with Pillow or on their device."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.host.packages import load_package

Frame = TypeVar("Frame", np.ndarray, DeviceArray)


def resize(rgb: Frame, size: tuple[int, int]) -> Frame:
    """Return an RGB frame, uint8 [H, W, 3], at (height, width) `size`, by Pillow's bicubic filter.

    A frame on a device stays there, and gets the same bytes.
    """
    if isinstance(rgb, DeviceArray):
        return rgb.context.resize(rgb, size, resize)
    image = load_package("PIL.Image", "pillow")
    if rgb.shape[:2] == size:
        return np.array(rgb)
    resized = image.fromarray(np.ascontiguousarray(rgb)).resize((size[1], size[0]), image.Resampling.BICUBIC)
    return np.array(resized)
