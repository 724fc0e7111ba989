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
from itertools import chain, islice
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.packages import load_package

MAX_TOLERANCE_S = 1e-3
DEFAULT_FRAME_S = Fraction(1, 25)
FFMPEG_PIXELS = 2**31 - 1
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS: time stamps of such a format are invented
PACKETS_LOOKED_AT = 64  # enough to see whether a video with B-frames has the time stamps of its coded order
REFERENCES = {"concat", "dash", "hls", "image2", "imf", "lavfi", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"}
"""FFmpeg's demuxers that open other files or addresses, which the file names."""
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


def _not_opened(path: str, error: Exception) -> VideoError:
    with open(path, "rb") as file:
        head = file.read(4096).lstrip()
    if head.startswith((b"#EXTM3U", b"ffconcat", b"v=0")) or b"<MPD" in head or "%" in os.path.basename(path):
        text = f"{path} names other files (a playlist, or a pattern of file names), which are not opened"
        return VideoError("video.playlist", f"{text}; pass the video itself")
    text = f"{path} is not a video or image, or it is truncated ({getattr(error, 'strerror', None) or error})"
    return VideoError("video.unreadable", f"{text}; copy, record or convert it again")


def moving_streams(container: Any) -> list[Any]:
    """Return the video streams of a file without attached pictures, the one first that FFmpeg takes as the best."""
    attached, best = load_package("av", "av").stream.Disposition.attached_pic, container.streams.best("video")
    moving = [stream for stream in container.streams.video if not stream.disposition & attached]
    return sorted(moving, key=lambda stream: (stream is not best, stream.index))


def _described(stream: Any) -> str:
    codec = stream.codec_context
    return f"{stream.index}" if codec is None else f"{stream.index} ({codec.name}, {codec.width} × {codec.height})"


class Decoder:
    """A video file that is open for decoding. What the file does not say is None."""

    def __init__(self, path: str, stream: int | None = None) -> None:
        self._av = load_package("av", "av")
        self._path = path
        self.damaged = False  # whether something could not be decoded so far
        options = {**_codec_options, "format_whitelist": ",".join(sorted(self._av.formats_available - REFERENCES))}
        try:
            # With the prefix, a colon in the name is no protocol.
            self._container = self._av.open(f"file:{path}", options=options, metadata_errors="replace")
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise _not_opened(path, error) from error
        try:
            self._stream = self._chosen_stream(stream)
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.options = dict(_codec_options)
            self._packets: Iterator[Any] = self._container.demux(self._stream)  # the last one flushes the decoder
            self._find_clock()
        except BaseException:
            self._container.close()
            raise
        length = self._container.duration
        self.duration_s = length / self._av.time_base if length and length > 0 else None

    def _chosen_stream(self, index: int | None) -> Any:
        # FFmpeg's "tty" demuxer reads text files as a terminal's screen.
        streams = [] if self._container.format.name == "tty" else list(self._container.streams)
        moving = moving_streams(self._container) if streams else []
        if not moving:
            kinds = {"cover picture" if stream.type == "video" else stream.type for stream in streams}
            text = f"{self._path} has no video stream (found: {', '.join(sorted(kinds)) or 'none of any kind'})"
            raise VideoError("video.no_stream", f"{text}; expected a video or image file")
        chosen = moving[0] if index is None else next((one for one in moving if one.index == index), None)
        if chosen is None:
            found = ", ".join(_described(one) for one in sorted(moving, key=lambda one: one.index))
            raise VideoError("video.bad_stream", f"{self._path} has no video stream {index}; choose one of: {found}")
        if chosen.codec_context is None:
            raise VideoError("video.unsupported_codec", f"{self._path}: PyAV has no decoder; convert it to H.264")
        self.stream: int | None = chosen.index if len(moving) > 1 else None  # None: there is no choice
        return chosen

    def _find_clock(self) -> None:
        """Find out which time stamps and which frame rate are to be trusted."""
        stream, form = self._stream, self._container.format
        self.time_base: Fraction = stream.time_base or Fraction(1, 1000)  # seconds per tick of the clock
        self._untimed = bool(form.flags & NO_TIMESTAMPS) or form.name.endswith("_pipe")
        rate = stream.codec_context.framerate if self._untimed else stream.average_rate or stream.guessed_rate
        self.frame_s = 1 / rate if rate else None  # nominal seconds per frame
        # AVI has one time stamp per packet, in the order of the file; FFmpeg guesses presentation times from them.
        self._coded_order = form.name == "avi" and stream.codec_context.name in ("h264", "hevc")
        if stream.codec_context.has_b_frames and not self._untimed and not self._coded_order:
            ahead: list[Any] = []
            try:
                ahead += islice(self._packets, PACKETS_LOOKED_AT)
            except self._av.FFmpegError:
                self.damaged = True
            self._packets = chain(ahead, self._packets)
            stamps = [packet.pts for packet in ahead if packet.pts is not None]
            # Files that were copied from AVI, and ASF, have such times as presentation times.
            self._coded_order = not stamps or (stamps == sorted(stamps) and self._goes_back(ahead))
        # Frames get the decoding time of a later packet, by a delay that may differ after a seek.
        self.seekable = not (self._coded_order and stream.codec_context.has_b_frames)

    def _goes_back(self, packets: list[Any]) -> bool:
        """Return whether the time stamps of frames go back, though decoders return them in presentation order."""
        context, before = self._av.CodecContext.create(self._stream.codec_context.codec, "r"), None
        context.extradata, context.thread_count = self._stream.codec_context.extradata, 1
        context.options = dict(_codec_options)
        for packet in packets:
            with suppress(self._av.FFmpegError):
                for frame in context.decode(packet):
                    if None not in (before, frame.pts) and frame.pts < before:
                        return True
                    before = frame.pts
        return False

    def timeline(self) -> Timeline:
        """Return a clock for one pass over the frames."""
        return Timeline(self.time_base, self.frame_s)

    def frames(self) -> Iterator[Any]:
        """Yield the remaining `av.VideoFrame`s in presentation order, skipping those that cannot be decoded.

        `pts` of a frame is its time stamp in ticks of `time_base`, None where the file has none.
        """
        for frame in self._decoded():
            frame.pts = None if self._untimed else frame.dts if self._coded_order else frame.pts
            yield frame

    def _decoded(self) -> Iterator[Any]:
        try:
            for packet in self._packets:
                try:
                    yield from packet.decode()
                except self._av.FFmpegError:
                    self.damaged = True
        except self._av.FFmpegError:  # a container error: nothing after this point can be found
            self.damaged = True
        with suppress(self._av.FFmpegError):  # if an error came before the packet that flushes the decoder
            yield from self._stream.codec_context.decode(None)

    def frames_from(self, pts: int) -> Iterator[Any]:
        """Seek to the key frame at `pts` ticks, and yield frames from there; it may land earlier or later."""
        try:
            self._container.seek(pts, stream=self._stream)
            self._packets = self._container.demux(self._stream)
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


CLOCKS = ("timestamps", "frame_rate", "guessed")
"""Where the times of a video come from: from time stamps only; some from the frame rate that the file states; some from
neither, so 25 frames per second were assumed, or time stamps that go back were corrected."""


class Timeline:
    """Turns any time stamps of one pass into strictly increasing seconds from the first frame.

    Each frame has its seconds in `times` and its time stamp in ticks (0: none) in `pts`.
    """

    def __init__(self, time_base: Fraction, frame_s: Fraction | None) -> None:
        self.times, self.pts = array("d"), array("q")
        self.regular = True  # whether every frame has a time stamp and these increase, so that they identify frames
        self.clock = "timestamps"  # where the times come from, see CLOCKS
        self.tolerance_s = max(min(0.49 * float(time_base), MAX_TOLERANCE_S), 1e-6)  # largest rounding error
        self._time_base, self._frame_s = time_base, frame_s
        self._origin: Fraction | None = None
        self._length_s = 0.0  # of the newest frame, if the file says it

    def add(self, frame: Any) -> float:
        """Append a frame and return its time."""
        stamp = None if frame.pts is None else frame.pts * self._time_base
        time: float | None = None
        if not self.times:
            time, self._origin = 0.0, stamp
        elif stamp is not None and self._origin is not None:
            before, time = self.times[-1], float(stamp - self._origin)
            if time <= before:
                self.regular, self.clock = False, "guessed"
                time = None if time < before - DISCONTINUITY_S else before + 2 * self.tolerance_s
        if time is None:  # the frame starts where the one before it ends
            time = self.times[-1] + (self._length_s or float(self._frame_s or DEFAULT_FRAME_S))
            self._origin = self._origin if stamp is None else stamp - Fraction(time)
        if stamp is None:
            self.regular = False
            self.clock = "frame_rate" if self._frame_s and self.clock != "guessed" else "guessed"
        self.times.append(time)
        self.pts.append(frame.pts or 0)
        duration = getattr(frame, "duration", None)  # PyAV before 15 does not have it
        self._length_s = float(max(duration or 0, 0) * self._time_base)
        return time

    @property
    def end_s(self) -> float:
        """The end of the newest frame in seconds, by its own duration, else the nominal or the median one."""
        if not self._length_s and self._frame_s is None and len(self.times) > 1:
            return self.times[-1] + float(np.median(np.diff(np.frombuffer(self.times, np.float64))))
        return self.times[-1] + (self._length_s or float(self._frame_s or DEFAULT_FRAME_S))


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
