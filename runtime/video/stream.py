"""Frames from an iterator, which is read once, so fine frames are kept while it is read."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array import DeviceArray
from bridge_stg.runtime.device.array_ops import accept
from bridge_stg.runtime.device.context import DeviceContext
from bridge_stg.runtime.device.dlpack import is_on_gpu
from bridge_stg.runtime.errors import EngineError, VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.parse import is_count
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.sampling import CoarseSampler, GridSampler
from bridge_stg.runtime.video.source import Samples, VideoSource
from bridge_stg.runtime.video.token_budget import Budget

STREAM = "the stream of frames"  # name of a stream in messages


def check_frame(frame: Any, what: str, device: DeviceContext | None = None) -> Any:
    """Return a frame if it is an array, uint8 [H, W, 3], on the host or on `device`; else raise VideoError.

    Messages begin with `what`.
    """
    expected = "expected a uint8 array [height, width, 3] in RGB"
    if is_on_gpu(frame):
        if device is None:
            raise VideoError("video.wrong_device", f"{what} is on a GPU, but graphs run on CPU; copy it to the host")
        try:
            frame = accept(frame, device)
        except EngineError as error:
            raise VideoError("video.wrong_device", f"{what}: {error}") from error
    elif not hasattr(frame, "__array__"):
        raise VideoError("video.bad_frame", f"{what} is a {type(frame).__name__}; {expected}")
    else:
        frame = np.asarray(frame)
    if frame.dtype != np.uint8:
        raise VideoError("video.bad_frame", f"{what} has dtype {frame.dtype}; {expected}, values 0 to 255")
    if frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        hint = "; pass several frames as an iterator of (time, frame)" if frame.ndim == 4 else ""
        raise VideoError("video.bad_frame", f"{what} has shape {list(frame.shape)}; {expected}{hint}")
    return frame


class FrameStream(VideoSource):
    """An iterator of (time in seconds, RGB frame), read in one pass.

    Frames of the fine grid are kept at fine size. Beyond `buffer_frames`, every second one is dropped, so that the kept
    frames are evenly spaced, and `fine` returns the latest kept frame at or before a time.
    """

    def __init__(
        self,
        frames: Iterable[tuple[float, np.ndarray]],
        spec: ModelSpec,
        *,
        buffer_frames: int,
        budget: Budget | None = None,
        name: str = STREAM,
        device: DeviceContext | None = None,
    ) -> None:
        if not is_count(buffer_frames):
            raise VideoError("video.bad_option", f"buffer_frames={buffer_frames!r}: expected a number, 1 or more")
        self._given = frames
        self._frames: Iterator[tuple[float, np.ndarray]] | None = checked_frames(frames, name, device)
        self._first = next(self._frames, None)
        if self._first is None:
            raise VideoError("video.no_frames", f"{name} has no frames: expected at least one (time, RGB frame)")
        height, width = self._first[1].shape[:2]
        super().__init__(spec, width=width, height=height, name=name, budget=budget)
        self._kept: GridSampler[tuple[float, np.ndarray]] = GridSampler(spec.frames.fine_fps, capacity=buffer_frames)

    def close(self) -> None:
        """Drop the kept frames and the rest of the stream."""
        self._frames = self._first = None
        self._kept.items = []

    def _scan(self, limits: Limits) -> CoarseSampler:
        frames, first, sampler = self._frames, self._first, self._sampler()
        if frames is None or first is None:
            raise VideoError("video.closed", f"{self.name} has been read or closed; open a new one")
        self._frames = self._first = None
        (origin, shown), times = first, [0.0]
        del first  # keep one frame at full size in memory, not two

        def keep(until: float) -> None:
            time, frame = times[-1], shown
            sampler.fill(until, lambda: resize(frame, sampler.size))
            self._kept.fill(until, lambda: (time, resize(frame, self.fine_size)))

        limits.check()
        for time, frame in frames:
            limits.check()
            keep(time - origin - self.tolerance_s)
            times.append(time - origin)
            shown = frame
            limits.report(times[-1], None)
        gap = float(np.median(np.diff(times))) if len(times) > 1 else 1 / self._spec.frames.coarse_fps
        end_s = getattr(self._given, "end_s", None)  # known for animations
        self._times, self._duration_s = np.asarray(times), end_s or times[-1] + gap
        keep(max(self._duration_s - self.tolerance_s, self.tolerance_s))
        return sampler

    def _fetch(self, times: np.ndarray, limits: Limits) -> Samples:
        if not self._kept.items:
            raise VideoError("video.closed", f"{self.name} is closed; open it again to read frames from it")
        places = np.floor((times + self.tolerance_s) / self._kept.interval_s)
        kept = [self._kept.items[int(place)] for place in places.clip(0, len(self._kept.items) - 1)]
        return Samples(frames=arrays.stack([frame for _, frame in kept]), times=np.asarray([time for time, _ in kept]))


def checked_frames(
    frames: Iterable[tuple[float, Any]], name: str, device: DeviceContext | None = None
) -> Iterator[tuple[float, Any]]:
    """Yield the frames of a caller's iterator, checked and copied, since the caller may reuse its buffer."""
    size: tuple[int, ...] = ()
    before = -math.inf
    for index, item in enumerate(frames):
        what = f"{name}: frame {index}"
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise VideoError("video.bad_frame", f"{what} is a {type(item).__name__}; expected (seconds, RGB frame)")
        if isinstance(item[0], bool) or not isinstance(item[0], numbers.Real):
            raise VideoError("video.bad_time", f"{what} has a {type(item[0]).__name__} as its time; expected seconds")
        time = float(item[0])
        if not math.isfinite(time) or time < 0:
            raise VideoError("video.bad_time", f"{what} has the time {time}; expected finite seconds, 0 or more")
        if time <= before:
            raise VideoError("video.bad_time", f"{what} has the time {time} s after {before} s; times must increase")
        frame = check_frame(item[1], what, device)
        size = size or frame.shape
        if frame.shape != size:
            sizes = f"{frame.shape[1]} × {frame.shape[0]} pixels after frames of {size[1]} × {size[0]}"
            raise VideoError("video.size_changed", f"{what} has {sizes}; resize them or pass two streams")
        before = time
        yield time, frame.copy().wait() if isinstance(frame, DeviceArray) else frame.copy()
