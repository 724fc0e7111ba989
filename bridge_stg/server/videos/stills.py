"""One frame of a video as a JPEG, for browsers that cannot play the file."""

from __future__ import annotations

import io
import time

import numpy as np

from bridge_stg.runtime.errors import Interrupted
from bridge_stg.runtime.video.decoder import Decoder, shown_rgb
from bridge_stg.runtime.video.playback import play
from bridge_stg.server.videos.probe import FileInfo

TOLERANCE_S = 1e-3
WITHIN_S = 20.0
SEEK_FROM_S = 2.0


def still(path: str, info: FileInfo, time_s: float) -> tuple[bytes, float]:
    """Return a JPEG of the frame that is shown at a time, and the frame's own time in seconds from the first frame.

    Raises:
        VideoError: the file cannot be read (again).
        Interrupted: finding the frame takes too long.
    """
    found = _by_seeking(path, time_s) if info.media_type.startswith("video/") and time_s > SEEK_FROM_S else None
    shown, at = found or _by_reading(path, time_s)
    return jpeg(shown), at


def _by_seeking(path: str, time_s: float) -> tuple[np.ndarray, float] | None:
    """Decode from the key frame before the time; None where the file's times do not allow that."""
    decoder, end = Decoder(path), time.monotonic() + WITHIN_S
    try:
        first = next(decoder.frames(), None)
        if first is None or first.pts is None:
            return None
        shown = None
        for frame in decoder.frames_from(first.pts + int(time_s / decoder.time_base)):
            if frame.pts is None or time.monotonic() > end:
                return None
            at = float((frame.pts - first.pts) * decoder.time_base)
            if at > time_s + TOLERANCE_S:
                break
            shown = frame, at
        return None if shown is None else (shown_rgb(shown[0]), shown[1])
    finally:
        decoder.close()


def _by_reading(path: str, time_s: float) -> tuple[np.ndarray, float]:
    end = time.monotonic() + WITHIN_S
    with play(path) as source:
        at, shown = next(source.frames)
        for later, frame in source.frames:
            if later > time_s + TOLERANCE_S:
                break
            if time.monotonic() > end:
                raise Interrupted(f"finding the frame took more than {WITHIN_S:g} s")
            at, shown = later, frame
    return shown, at


def jpeg(rgb: np.ndarray) -> bytes:
    """Return a picture uint8 [H, W, 3] as a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(file, "JPEG", quality=88)
    return file.getvalue()
