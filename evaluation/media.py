"""Where a sample's medium lies, and how it is shown to a model: a path, a part of a video, or a folder of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime.errors import AnnotationError, VideoError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEXTS = (".json", ".jsonl", ".txt", ".csv", ".md", ".label", ".ini")
"""Annotations are often named like the medium that they describe."""


class MediaFolder:
    """A folder in which media are found by path, by name, or by name without suffix, however deep they lie.

    Publishers' packages unfold into numbered sub-folders, and containers are converted: the name is what stays. The
    folder is read once, when the first medium does not lie at the path asked for.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise AnnotationError(f"{root} {found}; expected the folder that holds the videos or images. Give --media.")
        self.root = root
        self._names: dict[str, Path] | None = None
        self._stems: dict[str, Path] = {}

    def at(self, path: str) -> Path | None:
        """Return the file at a path in the folder, None if there is none."""
        return self.root / path if (self.root / path).is_file() else None

    def find(self, *candidates: str) -> Path | None:
        """Return the file of the first candidate that is found: a path in the folder, else a name, else a stem."""
        for candidate in candidates:
            path = self.at(candidate)
            if path is not None:
                return path
        self._index()
        assert self._names is not None
        for candidate in candidates:
            name = Path(candidate).name
            found = self._names.get(name) or self._stems.get(Path(name).stem)
            if found is not None:
                return found
        return None

    def _index(self) -> None:
        if self._names is None:
            self._names = {}
            for folder, below, files in os.walk(self.root):
                below.sort()
                for name in sorted(files):
                    path = Path(folder) / name
                    if path.suffix.lower() in TEXTS:
                        continue
                    self._names.setdefault(name, path)
                    self._stems.setdefault(path.stem, path)


def shown(sample: Sample) -> str | Iterator[tuple[float, np.ndarray]]:
    """Return what a Grounder takes for a sample: a path, or (time in seconds, RGB frame) from the clip's start on.

    Raises:
        VideoError: the medium is missing, or cannot be read.
    """
    if sample.media is None:
        raise VideoError(f"{sample.sought}: was not found in the folder of media")
    if sample.frame_rate is not None:
        return folder_frames(sample.media, sample.frame_rate)
    if sample.clip is not None:
        return clip_frames(sample.media, *sample.clip)
    return os.fspath(sample.media)


def clip_frames(path: Path, start_s: float, end_s: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the frames of a part of a video, their times counted from its start; decoding stops at its end."""
    from bridge_stg.runtime.video.decoder import Decoder, Timeline, check_path, shown_rgb

    with closing(Decoder(check_path(os.fspath(path)))) as decoder:
        timeline = Timeline(decoder.time_base, decoder.frame_s)
        some = False
        for frame in decoder.frames():
            time = timeline.add(frame)
            if time >= end_s - timeline.tolerance_s:
                break
            if time >= start_s - timeline.tolerance_s:
                some = True
                yield max(0.0, time - start_s), shown_rgb(frame)
        if not some:
            raise VideoError(
                f"{path}: has no frame between {start_s:.2f} s and {end_s:.2f} s, the part that the annotation asks "
                "for; it is shorter than the published video, so fetch it again"
            )


def frame_files(folder: Path) -> list[Path]:
    """Return a folder's pictures in the order of their numbers: 2.jpg before 10.jpg."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted(files, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))


def folder_frames(folder: Path, frame_rate: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the pictures of a folder as frames of a video."""
    from bridge_stg.runtime.video.image import open_image, read_rgb

    for index, path in enumerate(frame_files(folder)):
        picture = open_image(os.fspath(path))
        if picture is None:
            raise VideoError(f"{path}: is no picture that can be read; fetch the sequence again")
        yield index / frame_rate, read_rgb(picture, os.fspath(path))
