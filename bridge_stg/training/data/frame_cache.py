"""Decoded frames of a clip, coarse and fine, kept in a folder on disk without loss.

An entry is a zip file of PNG images, one per different frame, with their times in `meta.json`. Nothing is ever removed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from bridge_stg.evaluation.media import frame_files
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import BridgeError, HostError, VideoError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.video.source import Samples, VideoSource
from bridge_stg.training.data.sources import Clip

VERSION = 1  # of the entries; others are not read
MOST_FINE_FRAMES = 2048  # a longer clip is decoded every time: an entry has all fine frames
WRITTEN_BYTES = 64 * 2**20  # fine frames in memory while an entry is written
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, IndexError, TypeError, ValueError, SyntaxError)


@dataclass(frozen=True, eq=False)
class ClipFrames:
    """The frames of a clip that a batch has.

    Attributes:
        coarse: uint8 [G, P, height, width, 3].
        times: float64 [G, P], the times of their samples in seconds from the first frame.
        fine: the fine frames that were chosen.
    """

    coarse: np.ndarray
    times: np.ndarray
    fine: Samples


class Choose(Protocol):
    """Chooses fine times: from a grid of them float64 [K], the seconds of the clip, and whether it is an image."""

    def __call__(self, grid: np.ndarray, duration_s: float, *, is_image: bool) -> np.ndarray:
        """Return times of the grid [F]."""


def read_frames(source: VideoSource, choose: Choose) -> ClipFrames:
    """Return the coarse frames of a source, and the chosen ones of its fine frames."""
    coarse = source.coarse()
    times = choose(source.fine_grid(), source.duration_s, is_image=source.is_image)
    return ClipFrames(np.asarray(coarse.frames), coarse.times, source.fine(times))


class FrameCache:
    """A folder of entries, which several processes may use at once.

    An entry belongs to a medium (its path, size and time of change, part and stream) and to the rules of sizes and
    times: `spec`, and `budget`, any value that stands for the budget of coarse frames. Raises HostError if the folder
    cannot be written.
    """

    def __init__(self, folder: Path, spec: ModelSpec, budget: object) -> None:
        self.folder = folder
        parts = {name: asdict(getattr(spec, name)) for name in ("frames", "vision", "prompt", "language")}
        self._rule = json.dumps([VERSION, parts, budget], default=str, sort_keys=True)

    def read(self, clip: Clip, open_source: Callable[[], VideoSource], choose: Choose) -> ClipFrames:
        """Return a clip's frames from its entry, which is made first if it is missing or damaged."""
        entry = self.entry(clip)
        for _ in range(2):
            try:
                return _read(entry, choose)
            except FileNotFoundError:
                pass
            except DAMAGE:  # the entry is replaced
                pass
            except OSError as error:
                if error.errno is not None:  # Pillow's errors for damaged images have none
                    raise self._host_error(error) from error
            with open_source() as source:
                if len(source.fine_grid()) > MOST_FINE_FRAMES:
                    return read_frames(source, choose)
                try:
                    _write(entry, source)
                except OSError as error:
                    raise self._host_error(error) from error
        with open_source() as source:
            return read_frames(source, choose)

    def _host_error(self, error: OSError) -> BridgeError:
        message = f"{self.folder}: decoded frames cannot be kept there ({error}); choose another `frame_cache`"
        return host_error(error) or HostError("output.not_writable", message)

    def entry(self, clip: Clip) -> Path:
        """Return the path of a clip's entry."""
        assert clip.media is not None
        files = frame_files(clip.media) if clip.frame_rate is not None else [clip.media]
        states = [(os.fspath(file.resolve()), *_state(file)) for file in files]
        key = json.dumps([self._rule, states, clip.part, clip.frame_rate, clip.stream])
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.zip"


def _state(file: Path) -> tuple[int, int]:
    try:
        state = file.stat()
    except OSError as error:
        raise VideoError("video.not_found", f"{file}: cannot be read ({error.strerror})") from None
    return state.st_size, state.st_mtime_ns


def _write(entry: Path, source: VideoSource) -> None:
    """Write the frames of a source as an entry, completely or not at all."""
    coarse, grid = source.coarse(), source.fine_grid()
    fine_times: list[float] = []
    entry.parent.mkdir(parents=True, exist_ok=True)
    with replacing(entry) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for index, frame in enumerate(np.asarray(coarse.frames).reshape(-1, *coarse.frames.shape[2:])):
            archive.writestr(f"coarse/{index}.png", _png(frame))
        together = max(1, WRITTEN_BYTES // (3 * source.fine_size[0] * source.fine_size[1]))
        for first in range(0, len(grid), together):
            samples = source.fine(grid[first : first + together])
            for time, frame in zip(samples.times.tolist(), np.asarray(samples.frames)):
                if not fine_times or time != fine_times[-1]:
                    archive.writestr(f"fine/{len(fine_times)}.png", _png(frame))
                fine_times.append(time)
        meta = {
            "times": coarse.times.tolist(), "grid": grid.tolist(), "fine_times": fine_times,
            "duration_s": source.duration_s, "is_image": source.is_image,
        }  # fmt: skip
        archive.writestr("meta.json", json.dumps(meta))


def _read(entry: Path, choose: Choose) -> ClipFrames:
    with zipfile.ZipFile(entry) as archive:
        meta: dict[str, Any] = json.loads(archive.read("meta.json"))
        times, grid, fine_times = (np.asarray(meta[name], np.float64) for name in ("times", "grid", "fine_times"))
        coarse = np.stack([_image(archive, f"coarse/{index}.png") for index in range(times.size)])
        chosen = choose(grid, float(meta["duration_s"]), is_image=bool(meta["is_image"]))
        indices = np.searchsorted(grid, chosen)
        # Points of the grid at which the same frame is shown have one image, at the first of them.
        named = np.searchsorted(fine_times, fine_times[indices])
        fine = np.stack([_image(archive, f"fine/{index}.png") for index in named])
    return ClipFrames(coarse.reshape(*times.shape, *coarse.shape[1:]), times, Samples(fine, fine_times[indices]))


def _png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _image(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with Image.open(io.BytesIO(archive.read(name)), formats=["PNG"]) as image:
        return np.array(image)
