"""Decode a video file with PyAV: one frame after the other, each with its time and as it is shown.

Knows nothing of sampling and sizes.
"""

from __future__ import annotations

import os
import stat
import zlib
from array import array
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package

MAX_TOLERANCE_S = 1e-3
DEFAULT_FRAME_S = Fraction(1, 25)
FFMPEG_PIXELS = 2**31 - 1
DISCONTINUITY_S = 1.0  # a time stamp that goes back by more starts a new clock (joined recordings)

_codec_options = {"max_pixels": str(FFMPEG_PIXELS)}


def limit_frames(pixels: int | None) -> None:
    """Limit the pixels per frame of all decoders opened later in this process; None: FFmpeg's own limit.

    Use this to read untrusted files: a frame may be larger than the file's header says. Such frames count as damaged.
    """
    _codec_options["max_pixels"] = str(FFMPEG_PIXELS if pixels is None else pixels)


def check_path(path: str | bytes) -> str:
    """Return the path of a file that can be opened. Raises VideoError for any other."""
    path = os.fsdecode(path)
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise VideoError("video.not_a_file", f"{path} is {kind}; expected a video or image file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise VideoError("video.unreadable", f"{path} is empty (0 bytes): copy or record it again")
    except FileNotFoundError:
        raise VideoError("video.not_found", f"{path or repr(path)}: no such file (in {os.getcwd()})") from None
    except PermissionError:
        raise VideoError("video.no_permission", f"{path}: no permission to read it; change its permissions") from None
    except (OSError, ValueError) as error:
        raise VideoError("video.unreadable", f"{path!r} cannot be opened: {error}; expected a video or image") from None
    return path


class Decoder:
    """A video file that is open for decoding. What the file does not say is None."""

    def __init__(self, path: str) -> None:
        self._av = load_package("av", "av")
        self._path = path
        self.damaged = False  # whether something could not be decoded so far
        try:
            # With the prefix, a colon in the name is no protocol, and playlists cannot open connections.
            options = dict(_codec_options)
            self._container = self._av.open(f"file:{path}", options=options, metadata_errors="replace")
        except (self._av.FFmpegError, OSError, ValueError) as error:
            text = f"{path} is not a video or image, or it is truncated ({getattr(error, 'strerror', None) or error})"
            raise VideoError("video.unreadable", f"{text}; copy, record or convert it again") from error
        try:
            self._stream = self._moving_stream()
        except BaseException:
            self._container.close()
            raise
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.options = options
        self.time_base: Fraction = self._stream.time_base or Fraction(1, 1000)  # seconds per tick of the clock
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.frame_s = 1 / rate if rate else None  # nominal seconds per frame
        length = self._container.duration
        self.duration_s = length / self._av.time_base if length and length > 0 else None

    def _moving_stream(self) -> Any:
        disposition = self._av.stream.Disposition
        # FFmpeg's "tty" demuxer reads text files as a terminal's screen.
        streams = [] if self._container.format.name == "tty" else list(self._container.streams)
        videos = [stream for stream in streams if stream.type == "video"]
        moving = [stream for stream in videos if not stream.disposition & disposition.attached_pic]
        if not moving:
            kinds = sorted({stream.type for stream in streams} - {"video"}) + (["cover picture"] if videos else [])
            text = f"{self._path} has no video stream (found: {', '.join(kinds) or 'none of any kind'})"
            raise VideoError("video.no_stream", f"{text}; expected a video or image file")
        best = next((stream for stream in moving if stream.disposition & disposition.default), moving[0])
        if best.codec_context is None:
            raise VideoError("video.unsupported_codec", f"{self._path}: PyAV has no decoder; convert it to H.264")
        return best

    def frames(self) -> Iterator[Any]:
        """Yield the remaining `av.VideoFrame`s in presentation order, skipping those that cannot be decoded."""
        try:
            for packet in self._container.demux(self._stream):  # the last packet is empty and flushes the decoder
                try:
                    yield from packet.decode()
                except self._av.FFmpegError:
                    self.damaged = True
            return
        except self._av.FFmpegError:  # a container error: nothing after this point can be found
            self.damaged = True
        with suppress(self._av.FFmpegError):
            yield from self._stream.codec_context.decode(None)

    def frames_from(self, pts: int) -> Iterator[Any]:
        """Seek to the key frame at `pts` ticks, and yield frames from there; it may land earlier or later."""
        try:
            self._container.seek(pts, stream=self._stream)
        except self._av.FFmpegError:
            return
        yield from self.frames()

    def no_frames(self) -> VideoError:
        """Return the error for a video without a decodable frame."""
        text = f"{self._path}: no frame of its {self._stream.codec_context.name} stream can be decoded; copy it again"
        return VideoError("video.no_frames", text)

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class Timeline:
    """Turns any time stamps of one pass into strictly increasing seconds from the first frame.

    Each frame has its seconds in `times`, its time stamp in ticks (0: none) in `pts` and a checksum in `prints`.
    """

    def __init__(self, time_base: Fraction, frame_s: Fraction | None) -> None:
        self.times, self.pts, self.prints = array("d"), array("q"), array("I")
        self.regular = True  # whether every frame has a time stamp and these increase, so that they identify frames
        self.tolerance_s = max(min(0.49 * float(time_base), MAX_TOLERANCE_S), 1e-6)  # largest rounding error
        self._time_base, self._frame_s = time_base, frame_s
        self._origin: Fraction | None = None

    def add(self, frame: Any) -> float:
        """Append a frame and return its time."""
        stamp = None if frame.pts is None else frame.pts * self._time_base
        time: float | None = None
        if not self.times:
            time, self._origin = 0.0, stamp
        elif stamp is not None and self._origin is not None:
            before, time = self.times[-1], float(stamp - self._origin)
            if time <= before:
                self.regular = False
                time = None if time < before - DISCONTINUITY_S else before + 2 * self.tolerance_s
        if time is None:
            time = self.times[-1] + float(self._frame_s or DEFAULT_FRAME_S)
            self._origin = self._origin if stamp is None else stamp - Fraction(time)
        self.regular = self.regular and stamp is not None
        self.times.append(time)
        self.pts.append(frame.pts or 0)
        self.prints.append(fingerprint(frame))
        return time

    def length_of_last(self, frame: Any) -> float:
        """Return how long the last frame is shown, in seconds: its own duration, else the nominal or median one."""
        duration = getattr(frame, "duration", None)  # PyAV before 15 does not have it
        if duration and duration > 0:
            return float(duration * self._time_base)
        if self._frame_s is None and len(self.times) > 1:
            return float(np.median(np.diff(np.frombuffer(self.times, np.float64))))
        return float(self._frame_s or DEFAULT_FRAME_S)


def shown_size(frame: Any) -> tuple[int, int]:
    """Return (height, width) of a frame as shown, with its rotation applied."""
    turned = _display(frame)[0]
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def shown_rgb(frame: Any) -> np.ndarray:
    """Return a frame as shown, uint8 [height, width, 3]: in RGB, rotated and mirrored, blended with white."""
    alpha = not frame.format.has_palette and any(component.is_alpha for component in frame.format.components)
    try:
        rgb = frame.to_ndarray(format="rgba" if alpha else "rgb24")
    except (load_package("av", "av").FFmpegError, ValueError, OSError) as error:
        text = f"pixel format {frame.format.name} cannot be converted to RGB ({error})"
        raise VideoError("video.unsupported_codec", f"{text}; convert the video to H.264") from error
    rgb = over_white(rgb) if alpha else rgb
    transposed, flip_rows, flip_columns = _display(frame)
    rgb = rgb.transpose(1, 0, 2) if transposed else rgb
    return rgb[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Blend an image with transparency, uint8 [H, W, 4], with white: uint8 [H, W, 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _display(frame: Any) -> tuple[bool, bool, bool]:
    """Return (transpose, then flip rows, then flip columns) of a frame's display matrix, to the nearest right angle.

    The matrix [[a, b, u], [c, d, v], [x, y, w]], 9 int32, takes a pixel (p, q) to (ap + cq + x, bp + dq + y): FFmpeg's
    libavutil/display.h.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def fingerprint(frame: Any) -> int:
    """Return a checksum of a sample of a frame's pixels (some thousand bytes of its first plane)."""
    plane = frame.planes[0]
    width = min(plane.width, plane.line_size)
    if width <= 0:  # stored bottom up
        return 0
    rows = np.frombuffer(plane, np.uint8)[: plane.height * plane.line_size].reshape(plane.height, plane.line_size)
    return zlib.crc32(rows[:: 1 + plane.height // 64, : width : 1 + width // 64].tobytes())
