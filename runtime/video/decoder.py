"""Decode a video file with PyAV: one frame after the other, each with its time.

frame.py converts the frames to RGB. Knows nothing of sampling and sizes.
"""

from __future__ import annotations

import os
import stat
import threading
from array import array
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import chain, islice
from typing import Any

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.cpus import usable_cpus
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.video.frame import FrameConverter

MAX_TOLERANCE_S = 1e-3
DEFAULT_FRAME_S = Fraction(1, 25)
FFMPEG_PIXELS = 2**31 - 1
NO_TIMESTAMPS = 0x80  # FFmpeg's AVFMT_NOTIMESTAMPS: FFmpeg makes up the time stamps of such a format
PACKETS_LOOKED_AT = 64  # enough to detect decoding times that are stored as presentation times
REFERENCES = {"concat", "dash", "hls", "image2", "imf", "lavfi", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"}
"""FFmpeg's demuxers that open other files or addresses, which are named in the file."""
DISCONTINUITY_S = 1.0  # a time stamp that goes back by more starts a new clock (joined recordings)

_codec_options = {"max_pixels": str(FFMPEG_PIXELS)}


def limit_frames(pixels: int | None) -> None:
    """Limit the pixels per frame of all decoders opened later in this process; None: FFmpeg's own limit.

    Use this to read untrusted files: a frame may be larger than the file's header says. Such frames count as damaged.
    """
    _codec_options["max_pixels"] = str(FFMPEG_PIXELS if pixels is None else pixels)


def check_path(path: str | bytes) -> str:
    """Return a path as a string. Raises VideoError if it is not the path of a file that can be opened."""
    path = os.fsdecode(path)
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise VideoError("video.not_a_file", f"{path} is {kind}; expected a video or image file")
        with open(path, "rb") as file:
            if not file.read(1):
                raise VideoError("video.empty", f"{path} is empty (0 bytes): copy or record it again")
    except FileNotFoundError:
        hint = "; addresses are for `watch`, download the file" if "://" in path else f" (in {os.getcwd()})"
        raise VideoError("video.not_found", f"{path or repr(path)}: no such file{hint}") from None
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
    """Return the video streams of a file except attached pictures, beginning with the one that FFmpeg selects."""
    attached, best = load_package("av", "av").stream.Disposition.attached_pic, container.streams.best("video")
    moving = [stream for stream in container.streams.video if not stream.disposition & attached]
    return sorted(moving, key=lambda stream: (stream is not best, stream.index))


class _CodecThreads:
    """The codec threads of all open decoders, two per CPU. When all are taken, a decoder uses its caller's."""

    def __init__(self) -> None:
        self._lock, self._taken = threading.Lock(), 0

    def take(self) -> int:
        """Reserve threads for a new decoder, and return their number."""
        cpus = usable_cpus()
        with self._lock:
            count = max(1, min(cpus, 2 * cpus - self._taken))
            self._taken += count
        return count

    def give(self, count: int) -> None:
        """Release the threads of a closed decoder."""
        with self._lock:
            self._taken -= count


CODEC_THREADS = _CodecThreads()


class Decoder:
    """A video file, open for decoding; unknown attributes are None. Raises VideoError if it cannot be opened."""

    def __init__(self, path: str, stream: int | None = None) -> None:
        self._av = load_package("av", "av")
        self._path, self._threads = path, 0
        self.damaged = False  # whether anything could not be decoded so far
        options = {**_codec_options, "format_whitelist": ",".join(sorted(self._av.formats_available - REFERENCES))}
        try:
            # The prefix keeps FFmpeg from reading a colon in the name as a protocol.
            self._container = self._av.open(f"file:{path}", options=options, metadata_errors="replace")
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise _not_opened(path, error) from error
        try:
            self._stream = self._chosen_stream(stream)
            self.converter = FrameConverter(self._stream)
            self._threads = CODEC_THREADS.take()
            self._stream.thread_type, self._stream.thread_count = "AUTO", self._threads
            self._stream.codec_context.options = dict(_codec_options)
            self._packets: Iterator[Any] = self._container.demux(self._stream)  # the last packet flushes the decoder
            self._find_clock()
        except BaseException:
            self.close()
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
            codecs = {one.index: one.codec_context for one in sorted(moving, key=lambda one: one.index)}
            found = ", ".join(f"{i} ({c.name}, {c.width} × {c.height})" if c else f"{i}" for i, c in codecs.items())
            raise VideoError("video.bad_stream", f"{self._path} has no video stream {index}; choose one of: {found}")
        if chosen.codec_context is None:
            raise VideoError("video.unsupported_codec", f"{self._path}: PyAV has no decoder; convert it to H.264")
        self.stream: int | None = chosen.index if len(moving) > 1 else None  # None: it is the only one
        return chosen

    def _find_clock(self) -> None:
        """Find out which time stamps and which frame rate can be trusted."""
        stream, form = self._stream, self._container.format
        self.time_base: Fraction = stream.time_base or Fraction(1, 1000)  # seconds per tick of the clock
        self._untimed = bool(form.flags & NO_TIMESTAMPS) or form.name.endswith("_pipe")
        rate = stream.codec_context.framerate if self._untimed else stream.average_rate or stream.guessed_rate
        self.frame_s = 1 / rate if rate else None  # nominal seconds per frame
        # AVI has one time stamp per packet, in the order of the file; FFmpeg guesses presentation times from them.
        self._coded_order = form.name == "avi" and stream.codec_context.name in ("h264", "hevc", "mpeg4")
        if stream.codec_context.has_b_frames and not self._untimed and not self._coded_order:
            ahead: list[Any] = []
            try:
                ahead += islice(self._packets, PACKETS_LOOKED_AT)
            except self._av.FFmpegError as error:
                self._skip(error)
            self._packets = chain(ahead, self._packets)
            stamps = [packet.pts for packet in ahead if packet.pts is not None]
            # Files copied from AVI, and ASF files, store decoding times as presentation times.
            self._coded_order = not stamps or (stamps == sorted(stamps) and self._goes_back(ahead))
        # A frame gets the decoding time of a later packet; after a seek, the delay may differ.
        self.seekable = not (self._coded_order and stream.codec_context.has_b_frames)

    def _goes_back(self, packets: list[Any]) -> bool:
        """Return whether time stamps decrease between decoded frames, which are in presentation order."""
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

        `pts` of a frame is its time stamp in ticks of `time_base`, or None. Raises HostError if the system fails.
        """
        for frame in self._decoded():
            frame.pts = None if self._untimed else frame.dts if self._coded_order else frame.pts
            yield frame

    def _decoded(self) -> Iterator[Any]:
        try:
            for packet in self._packets:
                try:
                    yield from packet.decode()
                except self._av.FFmpegError as error:
                    self._skip(error, decoding=True)
        except self._av.FFmpegError as error:  # a container error: nothing after this point can be read
            self._skip(error)
        with suppress(self._av.FFmpegError):  # if an error came before the packet that flushes the decoder
            yield from self._stream.codec_context.decode(None)

    def _skip(self, error: Exception, *, decoding: bool = False) -> None:
        """Record that the file is damaged. Raises HostError if the system caused the error instead."""
        of_system = decoding or not isinstance(error, BlockingIOError)  # while decoding: threads cannot start
        if of_system and (found := host_error(error)) is not None and found.code.startswith("host."):
            raise found from error
        self.damaged = True

    def frames_from(self, pts: int) -> Iterator[Any]:
        """Seek to the key frame at `pts` ticks, and yield frames from there; the seek may land earlier or later."""
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
        """Close the file, and end the threads of its codec."""
        self._container.close()
        self._stream, self._packets = None, iter(())
        CODEC_THREADS.give(self._threads)
        self._threads = 0


CLOCKS = ("timestamps", "frame_rate", "guessed")
"""Source of a video's times. `timestamps`: time stamps only; `frame_rate`: partly the frame rate that the file states;
`guessed`: partly an assumed rate of 25 frames per second, or time stamps that went back and were corrected."""


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
        self._length_s = 0.0  # duration of the newest frame; 0: unknown

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
        self._length_s = float(max(frame.duration or 0, 0) * self._time_base)
        return time

    @property
    def end_s(self) -> float:
        """The end of the newest frame in seconds, by its own duration, else the nominal or the median one."""
        if not self._length_s and self._frame_s is None and len(self.times) > 1:
            return self.times[-1] + float(np.median(np.diff(np.frombuffer(self.times, np.float64))))
        return self.times[-1] + (self._length_s or float(self._frame_s or DEFAULT_FRAME_S))
