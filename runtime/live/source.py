"""Sources of live frames: a file, a network stream, a camera, or the caller's own iterator.

A source yields (time in seconds, function that returns the RGB frame), so that frames are converted only if they are
sampled. Knows nothing of sampling.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias
from urllib.parse import urlsplit

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.packages import load_package
from bridge_stg.runtime.video.decoder import CLOCKS, check_path, moving_streams
from bridge_stg.runtime.video.frame import FrameConverter
from bridge_stg.runtime.video.playback import play
from bridge_stg.runtime.video.stream import STREAM, checked_frames

Frames: TypeAlias = Iterator[tuple[float, Callable[[], np.ndarray]]]
PROTOCOLS = ("rtsp", "rtsps", "http", "https", "rtp", "udp", "srt", "tcp")
DISCONTINUITY_S = 10.0  # if the time stamps jump by more, the source's clock was reset: the local time counts instead


@dataclass
class TimesFrom:
    """Where the times of a file come from; complete once it has been read.

    Attributes:
        clock: one of `bridge_stg.runtime.video.decoder.CLOCKS`.
        stream: index of the video stream; None if the file has only one.
    """

    clock: str = CLOCKS[0]
    stream: int | None = None


@dataclass(frozen=True)
class LiveSource:
    """Frames that are read once. `open_live` makes one; nothing is opened before the first frame is read.

    `name` is without the password of an address. If the source `keeps_pace`, frames arrive at their own pace, and a
    slow reader drops some; otherwise the source waits.
    """

    name: str
    keeps_pace: bool
    frames: Callable[[threading.Event], Frames]  # yields until the source ends or the event is set
    length_s: float | None = None  # seconds of the whole source, if they are known
    times_from: TimesFrom = field(default_factory=TimesFrom)


def open_live(
    source: str | int | os.PathLike[str] | Iterable[tuple[float, np.ndarray]] | LiveSource,
    *,
    realtime: bool = False,
    latest_wins: bool | None = None,
    timeout_s: float = 10.0,
    stream: int | None = None,
) -> LiveSource:
    """Make a live source. Raises VideoError if it is of no known kind, or the file does not exist.

    Args:
        source: the path of a video file; an address such as rtsp://camera/stream; a camera's number or device file,
            such as 0 or /dev/video0; an iterable of (time in seconds, RGB uint8 [H, W, 3]); or a `LiveSource`.
        realtime: play a file at its own pace instead of as fast as possible.
        latest_wins: see `LiveSource.keeps_pace`; None: False for files and iterables, True otherwise.
        timeout_s: longest time for a network stream to connect, and longest silence, in seconds.
        stream: video stream of a file, see `CallOptions`.
    """
    if isinstance(source, LiveSource):
        return source
    if isinstance(source, (str, os.PathLike, int)) and not isinstance(source, bool):
        text = os.fspath(source) if not isinstance(source, int) else str(source)
        keeps_pace = latest_wins is not False
        if scheme := re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE):
            if scheme[1].lower() not in PROTOCOLS:
                raise VideoError("live.bad_source", f"{shown_address(text)}: expected one of: {', '.join(PROTOCOLS)}")
            options = {"rtsp_transport": "tcp"} if text.lower().startswith("rtsp") else {}
            read = partial(_captured, text, None, options, timeout_s)
            return LiveSource(shown_address(text), keeps_pace, read)
        if text.isdecimal() or text.startswith("/dev/"):
            return LiveSource(text, keeps_pace, partial(_camera, text, timeout_s))
        path = check_path(text)
        keeps_pace = realtime if latest_wins is None else latest_wins
        times_from = TimesFrom()
        return LiveSource(path, keeps_pace, partial(_file, path, realtime, stream, times_from), times_from=times_from)
    if isinstance(source, Iterable) and not isinstance(source, (bytes, dict, np.ndarray)):
        return LiveSource(STREAM, bool(latest_wins), partial(_iterable, source))
    expected = "a path, an address, a camera's number, or an iterator of (time in seconds, uint8 [height, width, 3])"
    raise VideoError("live.bad_source", f"cannot watch a {type(source).__name__}: expected {expected}")


def _iterable(frames: Iterable[tuple[float, np.ndarray]], stop: threading.Event) -> Frames:
    iterator = iter(frames)
    try:
        for time_s, frame in checked_frames(iterator, STREAM):
            if stop.is_set():
                return
            yield time_s, partial(np.asarray, frame)
    finally:
        close = getattr(iterator, "close", None)
        if callable(close):
            close()


def _file(
    path: str, realtime: bool, stream: int | None, times_from: TimesFrom, stop: threading.Event
) -> Frames:  # fmt: skip
    began = time.monotonic()
    with play(path, stream) as source:
        times_from.stream = source.stream
        for time_s, picture in source.pictures:
            times_from.clock = source.clock()
            if stop.wait(max(0.0, began + time_s - time.monotonic()) if realtime else 0.0):
                return
            yield time_s, picture


def _camera(device: str, timeout_s: float, stop: threading.Event) -> Frames:
    if sys.platform == "darwin":
        return _captured(device, "avfoundation", {"framerate": "30"}, timeout_s, stop)
    if sys.platform != "linux":
        raise VideoError("live.bad_source", f"{device}: cameras need Linux or macOS; pass an iterator of frames")
    path = f"/dev/video{device}" if device.isdecimal() else device
    if not os.path.exists(path):
        raise VideoError("live.no_camera", f"{path}: no such camera; is it plugged in, and visible in this container?")
    if not os.access(path, os.R_OK):
        raise VideoError("live.no_camera", f"{path}: no permission to read; add your user to the group `video`")
    return _captured(path, "v4l2", {}, timeout_s, stop)


def _captured(
    address: str, form: str | None, options: dict[str, str], timeout_s: float, stop: threading.Event
) -> Frames:
    """Yield the frames that FFmpeg captures; packets that cannot be decoded are skipped."""
    av, name = load_package("av", "av"), shown_address(address)
    try:
        container = av.open(address, format=form, options=options, timeout=timeout_s)
    except (av.FFmpegError, OSError, ValueError) as error:
        text = f"{name} cannot be opened ({_reason(error, timeout_s)}); is it running, and reachable?"
        raise host_error(error) or VideoError("live.not_reachable", text) from None
    try:
        stream = next(iter(moving_streams(container)), None)
        if stream is None:
            raise VideoError("video.no_stream", f"{name} has no video stream; expected a camera or a video")
        clock, converter = StreamClock(float(stream.time_base or 0.001)), FrameConverter(stream)
        for packet in container.demux(stream):
            if stop.is_set():
                return
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                if (found := host_error(error)) is not None:
                    raise found from error
                continue  # a damaged packet; decoding recovers at the next key frame
            for frame in frames:
                yield clock.add(frame.pts), partial(converter.rgb, frame)
    except av.FFmpegError as error:
        text = f"{name} was interrupted ({_reason(error, timeout_s)}); watch it again once it is available"
        raise VideoError("live.connection_lost", text) from None
    finally:
        container.close()


class StreamClock:
    """Turns any time stamps of a live source into strictly increasing seconds from its first frame.

    Local time replaces missing or wrong time stamps.
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._origin: float | None = None
        self._before = -1.0
        self._arrived = 0.0

    def add(self, pts: int | None) -> float:
        """Return the time of the next frame, whose time stamp is `pts` ticks or unknown."""
        now = time.monotonic()
        stamp = None if pts is None else pts * self._tick_s
        if self._before < 0:
            seconds, self._origin = 0.0, stamp
        else:
            passed = max(now - self._arrived, 1e-3)
            seconds = self._before + passed
            if stamp is not None and self._origin is not None:
                step = stamp - self._origin - self._before
                if 0 < step < DISCONTINUITY_S + passed:
                    seconds = self._before + step
            self._origin = self._origin if stamp is None else stamp - seconds
        self._before, self._arrived = seconds, now
        return seconds


def shown_address(address: str) -> str:
    """Return an address without user name and password."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address.partition("://")[0] + "://…"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.scheme and parts.netloc else address


def _reason(error: Exception, timeout_s: float) -> str:
    if type(error).__name__ == "ExitError":  # raised if PyAV's timeout stopped the call
        return f"nothing came for {timeout_s:g} s"
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
