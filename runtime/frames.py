"""Which frames of a video are read, at which size, and what a source of frames is.

The sampling grid and the interface; the sources themselves are in video.py (files), stream.py (iterators) and images.py
(pictures). Knows nothing of prompts and graphs.
"""

from __future__ import annotations

import importlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np

from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.sizes import frame_sizes
from bridge_stg.runtime.spec import ChainSpec

Check = Callable[[], Any]
"""Called for every decoded frame; stops the reading by raising."""
Progress = Callable[[float, "float | None"], Any]
"""Called as progress(seconds read, seconds in all), the latter None where it is not known."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Samples:
    """N frames of a video.

    Attributes:
        frames: uint8 [N, h, w, 3], RGB.
        times: float64 [N], seconds from the first frame of the video: the own time of each of these frames.
    """

    frames: np.ndarray
    times: np.ndarray


@dataclass(frozen=True, eq=False)
class CoarseFrames:
    """The whole video, sampled evenly: G groups of P consecutive samples.

    Attributes:
        frames: uint8 [G, P, h, w, 3], RGB. The last group is filled up by repeating its last sample.
        times: float64 [G, P], seconds from the first frame: the places on the sampling grid.
        interval_s: seconds between two samples.
        duration_s: length of the video.
    """

    frames: np.ndarray
    times: np.ndarray
    interval_s: float
    duration_s: float

    @property
    def group_times(self) -> np.ndarray:
        """The time of each group, float64 [G]: the mean of its samples' times."""
        return self.times.mean(axis=1)


def resize(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an RGB picture, uint8 [H, W, 3], at (height, width) `size`, by Pillow's bicubic filter."""
    image = load_package("PIL.Image", "pillow")
    if rgb.shape[:2] == size:
        return np.array(rgb)
    picture = image.fromarray(np.ascontiguousarray(rgb))
    return np.array(picture.resize((size[1], size[0]), image.Resampling.BICUBIC))


def load_package(module: str, package: str) -> ModuleType:
    """Import what only the reading of videos needs, at first use: `import bridge_stg.runtime` stays fast."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BridgeError(
            f"reading videos and images needs the package {package!r}, which cannot be imported ({error}); "
            'install it with: pip install "bridge-stg[cpu]"'
        ) from error


class GridSampler(Generic[T]):
    """What a video shows at the times k / rate, in bounded memory and without knowing the video's length beforehand.

    Beyond `capacity` items every second one is dropped and the grid's stride doubles, so that what is left is even.
    """

    def __init__(self, rate: float, *, capacity: int, stride: int = 1) -> None:
        self.rate = rate
        self.capacity = capacity
        self.stride = stride
        self.items: list[T] = []

    @property
    def interval_s(self) -> float:
        """Seconds between two items."""
        return self.stride / self.rate

    @property
    def times(self) -> np.ndarray:
        """The place of every item on the grid, float64 [N], in seconds."""
        return np.arange(len(self.items)) * self.stride / self.rate

    def fill(self, until: float, make: Callable[[], T]) -> None:
        """Put one item on every free place before `until` seconds; `make` is called at most once."""
        made: list[T] = []
        while len(self.items) * self.stride / self.rate < until:
            made = made or [make()]
            self.items.append(made[0])
            if len(self.items) > self.capacity:
                self.thin()

    def thin(self) -> None:
        """Drop every second item."""
        self.items = self.items[::2]
        self.stride *= 2


class VideoSource(ABC):
    """One video, image or stream. A context manager; not for use by two threads at once.

    Attributes:
        width, height: of the picture as it is shown (rotation applied), in pixels.
        is_image: whether it is a single picture: one frame at time 0 that lasts one coarse sample interval.
    """

    is_image = False

    def __init__(self, spec: ChainSpec, *, width: int, height: int, name: str, check: Check | None = None) -> None:
        self.width, self.height = width, height
        self._spec, self._name = spec, name
        self._check: Check = check or ignore
        try:
            self._coarse_size, self._fine_size = frame_sizes(height, width, spec)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None
        self._coarse: CoarseFrames | None = None
        self._times = np.zeros(0)
        self._duration_s = 0.0
        self._tolerance_s = 1e-6
        """How much later than asked for a frame may be shown: times of files are rounded to their clock's ticks."""

    @abstractmethod
    def _scan(self) -> GridSampler[np.ndarray]:
        """Read everything once: return the coarse samples, set the times, the duration and the tolerance."""

    @abstractmethod
    def _fetch(self, times: np.ndarray, check: Check) -> Samples:
        """Return the frames shown at these times [N ≥ 1], at fine size."""

    @property
    def frame_times(self) -> np.ndarray:
        """The times of all frames, float64, strictly increasing from 0, in seconds; reads the video if need be."""
        self.coarse()
        return self._times

    @property
    def duration_s(self) -> float:
        """Seconds from the first frame to the end of the last one; reads the video if need be."""
        self.coarse()
        return self._duration_s

    def coarse(self) -> CoarseFrames:
        """Return the whole video at coarse rate and size: decoded once, kept for later calls.

        The samples lie at k / coarse_fps. Their interval doubles until there are at most `max_coarse_groups` groups,
        and until two groups never print as the same time.
        """
        if self._coarse is None:
            self._coarse = self._group(self._scan())
        return self._coarse

    def fine(self, times: Sequence[float] | np.ndarray, *, check: Check | None = None) -> Samples:
        """Return, in their order, the frames shown at `times` (seconds from the first frame), at fine size.

        Each is the last frame that starts at or before that time, give or take half a tick of the video's clock.
        `Samples.times` holds the frames' own times, so a slow video gives the same one several times. Times before the
        first and behind the last frame give that frame. `check` stands in for the source's own during this call.
        """
        asked = np.asarray(times, np.float64).reshape(-1)
        if not np.isfinite(asked).all():
            raise VideoError(f"{self._name}: cannot show the time {asked[~np.isfinite(asked)][0]}; expected seconds")
        self.coarse()
        if not asked.size:
            return Samples(frames=np.zeros((0, *self._fine_size, 3), np.uint8), times=np.zeros(0))
        return self._fetch(asked, check or self._check)

    def fine_grid(self) -> np.ndarray:
        """Return the times of the fine grid, float64: all k / fine_fps inside the video; an image has one."""
        rate = self._spec.frames.fine_fps
        places = 1 if self.is_image else max(1, math.ceil((self.duration_s - self._tolerance_s) * rate))
        return np.arange(places) / rate

    @abstractmethod
    def close(self) -> None:
        """Let go of files and buffers. What `coarse` has read stays available."""

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sampler(self) -> GridSampler[np.ndarray]:
        frames, group = self._spec.frames, self._spec.vision.temporal_patch_size
        stride = 1
        while stride * group / frames.coarse_fps < 10.0**-self._spec.prompt.time_decimals:
            stride *= 2
        return GridSampler(frames.coarse_fps, capacity=frames.max_coarse_groups * group, stride=stride)

    def _shown(self, times: np.ndarray) -> np.ndarray:
        """Return the index of the frame shown at each time, int64 [N]."""
        return np.maximum(np.searchsorted(self._times, times + self._tolerance_s, side="right") - 1, 0)

    def _group(self, sampler: GridSampler[np.ndarray]) -> CoarseFrames:
        group, decimals = self._spec.vision.temporal_patch_size, self._spec.prompt.time_decimals
        while True:
            places = np.arange(-(-len(sampler.items) // group) * group).clip(max=len(sampler.items) - 1)
            times = sampler.times[places].reshape(-1, group)
            printed = [f"{time:.{decimals}f}" for time in times.mean(axis=1)]
            if len(set(printed)) == len(printed):  # the filled-up last group may come close to the one before it
                break
            sampler.thin()
        frames = np.stack([sampler.items[place] for place in places])
        return CoarseFrames(
            frames=frames.reshape(*times.shape, *frames.shape[1:]),
            times=times,
            interval_s=sampler.interval_s,
            duration_s=self._duration_s,
        )


def open_source(
    video: str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]],
    spec: ChainSpec,
    *,
    buffer_frames: int = 256,
    progress: Progress | None = None,
    check: Check | None = None,
) -> VideoSource:
    """Open a video, an image or a stream of frames.

    Args:
        video: the path of a video or image; or a picture, uint8 [H, W, 3] in RGB; or an iterable of (time in seconds,
            such a picture), with strictly increasing times and one size, which is read once.
        spec: rates, sizes and limits of the model.
        buffer_frames: how many frames of an iterable are kept, at fine size.
        progress: told the seconds read so far and the seconds in all (None: not known), for every frame.
        check: called for every decoded frame; stops the reading by raising.

    Raises:
        VideoError: it cannot be read; the message says what was found and what to do.
    """
    from bridge_stg.runtime import container, images, stream
    from bridge_stg.runtime import video as files

    progress, check = progress or ignore, check or ignore
    if isinstance(video, (str, os.PathLike)):
        path = container.check_path(os.fspath(video))
        picture = images.open_image(path)
        if picture is None:
            return files.VideoFile(path, spec, progress=progress, check=check)
        if not images.is_animation(picture):
            return images.StillImage(images.read_rgb(picture, path), spec, name=path)
        frames = images.animation_frames(picture, path)
        return stream.FrameStream(frames, spec, buffer_frames=buffer_frames, progress=progress, check=check, name=path)
    if isinstance(video, np.ndarray):
        return images.StillImage(stream.check_picture(video, "the image"), spec, name="the image")
    if isinstance(video, Iterable) and not isinstance(video, (bytes, dict)):
        return stream.FrameStream(video, spec, buffer_frames=buffer_frames, progress=progress, check=check)
    raise VideoError(
        f"cannot read a video from a {type(video).__name__}: expected a path, a uint8 array [height, width, 3], or an "
        "iterator of (time in seconds, such an array)"
    )


def ignore(*values: object) -> None:
    """The callback of a caller who gave none."""
