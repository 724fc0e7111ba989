"""Find the media file of a sample, and open it for the runtime: a path, a part of a video, a folder of frames."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bridge_stg.runtime.errors import AnnotationError, VideoError

if TYPE_CHECKING:
    import numpy as np

    from bridge_stg.evaluation.samples import Sample

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif")
TEXTS = (".json", ".jsonl", ".txt", ".csv", ".md", ".label", ".ini")
"""Annotations are often named like the medium that they describe."""


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files with one of the suffixes in a folder, at any depth, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


class MediaFolder:
    """A folder in which media are found by path, by name, or by name without suffix, at any depth.

    Publishers' packages unpack into numbered sub-folders, and containers are converted; only the name stays. The
    folder is listed once, when the first media file is not at its path.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            what = f"{root} {found}; expected the folder of the videos or images. Pass --media."
            raise AnnotationError("annotation.no_media_folder", what)
        self.root = root

    def at(self, path: str) -> Path | None:
        """Return the file at a path in the folder, None if it does not exist."""
        try:
            return self.root / path if (self.root / path).is_file() else None
        except (OSError, ValueError):  # no name that a file can have
            return None

    def find(self, *candidates: str) -> Path | None:
        """Return the file of the first candidate that is found: a path in the folder, else a name, else a stem."""
        path = next(filter(None, map(self.at, candidates)), None)
        if path is not None:
            return path
        names, stems = self._index
        found = (names.get(Path(name).name) or stems.get(Path(name).stem) for name in candidates)
        return next(filter(None, found), None)

    @cached_property
    def _index(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return the files by name, and by name without suffix."""
        names: dict[str, Path] = {}
        stems: dict[str, Path] = {}
        for folder, subfolders, files in os.walk(self.root):
            subfolders.sort()
            for path in (Path(folder) / name for name in sorted(files)):
                if path.suffix.lower() not in TEXTS:
                    names.setdefault(path.name, path)
                    stems.setdefault(path.stem, path)
        return names, stems


def video_input(sample: Sample) -> str | Iterator[tuple[float, np.ndarray]]:
    """Return a sample's media file as input of `Grounder`: a path, or pairs (seconds from its start, RGB frame)."""
    if sample.media is None:
        raise VideoError("video.not_found", f"{sample.media_name}: was not found in the folder of media")
    if sample.frame_rate is not None:
        return folder_frames(sample.media, sample.frame_rate)
    if sample.clip is not None:
        return clip_frames(sample.media, *sample.clip, sample.stream)
    return os.fspath(sample.media)


def clip_frames(
    path: Path, start_s: float, end_s: float, stream: int | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the frames of a part of a video, their times counted from its start; decoding stops at its end."""
    from bridge_stg.runtime.video.decoder import Decoder, check_path

    with closing(Decoder(check_path(os.fspath(path)), stream)) as decoder:
        timeline = decoder.timeline()
        empty = True
        for frame in decoder.frames():
            time = timeline.add(frame)
            if time >= end_s - timeline.tolerance_s:
                break
            if time >= start_s - timeline.tolerance_s:
                empty = False
                yield max(0.0, time - start_s), decoder.converter.rgb(frame)
        if empty:
            what = f"{path}: has no frame between {start_s:.2f} s and {end_s:.2f} s, as annotated; download it again"
            raise VideoError("video.too_short", what)


def frame_files(folder: Path) -> list[Path]:
    """Return a folder's images in the order of their numbers: 2.jpg before 10.jpg."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES]
    return sorted(files, key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))


def folder_frames(folder: Path, frame_rate: float) -> Iterator[tuple[float, np.ndarray]]:
    """Yield the images of a folder as frames of a video. Raises VideoError if one cannot be read."""
    from bridge_stg.runtime.video.image import open_image, read_rgb

    for index, path in enumerate(frame_files(folder)):
        image = open_image(os.fspath(path))
        if image is None:
            raise VideoError("video.unreadable", f"{path}: is not a readable image; download the sequence again")
        yield index / frame_rate, read_rgb(image, os.fspath(path))
