"""One frame of a video as a JPEG, for browsers that cannot play the file."""

from __future__ import annotations

import io
import time
from contextlib import closing

import numpy as np

from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.decoder import Decoder
from bridge_stg.runtime.video.playback import play
from bridge_stg.server.videos.probe import FileInfo

TOLERANCE_S = 1e-3
WITHIN_S = 20.0
SEEK_FROM_S = 2.0


def still(path: str, info: FileInfo, time_s: float, stream: int | None = None) -> tuple[bytes, float]:
    """Return the frame displayed at a time as a JPEG, and its own time. Raises VideoError, and Interrupted if slow."""
    seeks = info.media_type.startswith("video/") and time_s > SEEK_FROM_S
    rgb, at = (_seek(path, time_s, stream) if seeks else None) or _read(path, time_s, stream)
    return jpeg(rgb), at


def _seek(path: str, time_s: float, stream: int | None) -> tuple[np.ndarray, float] | None:
    """Decode from the key frame before the time; return None if the file's timestamps do not allow it."""
    end, found = time.monotonic() + WITHIN_S, None
    with closing(Decoder(path, stream)) as decoder:
        first = next(decoder.frames(), None)
        if first is None or first.pts is None or not decoder.seekable:
            return None
        for frame in decoder.frames_from(first.pts + int(time_s / decoder.time_base)):
            if frame.pts is None or time.monotonic() > end:
                return None
            at = float((frame.pts - first.pts) * decoder.time_base)
            if at > time_s + TOLERANCE_S:
                break
            found = frame, at
        return None if found is None else (decoder.converter.rgb(found[0]), found[1])


def _read(path: str, time_s: float, stream: int | None) -> tuple[np.ndarray, float]:
    """Decode from the beginning."""
    limits = Limits(deadline_s=WITHIN_S)
    with play(path, stream) as source:
        at, rgb = next(source.frames)
        for later, frame in source.frames:
            if later > time_s + TOLERANCE_S:
                break
            limits.check()
            at, rgb = later, frame
    return rgb, at


def jpeg(rgb: np.ndarray) -> bytes:
    """Return an image uint8 [H, W, 3] as a JPEG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(rgb)).save(file, "JPEG", quality=88)
    return file.getvalue()
