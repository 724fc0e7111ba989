"""Index many video files: each is one unit of work, which an executor spreads over devices and machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.media import VIDEOS
from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.evaluation.run.executor import Executor, LocalExecutor, Lost
from bridge_stg.runtime.errors import HostError, VideoError
from bridge_stg.runtime.index.read import Indexed

ANIMATIONS = (".gif",)
"""Suffixes of `VIDEOS` that are not indexed: they are read like images."""


@dataclass(frozen=True)
class IndexedFile:
    """What became of one file: what the index has of it, or an error; and the seconds that it took."""

    file: Path
    indexed: Indexed | None
    error: str | None
    seconds: float = 0.0


def video_files(paths: Sequence[Path]) -> list[Path]:
    """Return files as they are, and the video files below folders, sorted; each once.

    Raises:
        VideoError: a path does not exist, or a folder has no videos.
    """
    suffixes, files = tuple(suffix for suffix in VIDEOS if suffix not in ANIMATIONS), []
    for path in paths:
        if not path.exists():
            raise VideoError("video.not_found", f"{path}: no such file or folder")
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        if not found:
            raise VideoError("video.not_found", f"{path} has no videos; expected {', '.join(suffixes)}")
        files += found
    return list(dict.fromkeys(files))


def index_files(
    files: Sequence[Path], model: Model, *, executor: Executor | None = None,
    progress: Callable[[str, int, int], Any] | None = None, **options: Any,
) -> Iterator[IndexedFile]:  # fmt: skip
    """Yield each file when it is indexed, in the order in which they are finished; a failure has its error.

    Args:
        files: video files.
        model: a model that was opened with an index.
        executor: runs the model; None: in this process.
        progress: called as progress(label, done, total) before the first and after each file.
        options: the arguments of `Grounder.index`.

    Raises:
        HostError: the disk is full, or the index cannot be written.
        BridgeError: the model cannot be opened.
    """
    report = progress or (lambda label, done, total: None)
    report(model.label, 0, len(files))
    index = partial(index_file, **options)
    with closing((executor or LocalExecutor()).answers(model.open, index, files)) as answers:
        for done, (place, answer) in enumerate(answers, start=1):
            report(model.label, done, len(files))
            yield IndexedFile(files[place], None, answer.error) if isinstance(answer, Lost) else answer


def index_file(grounder: Any, file: Path, **options: Any) -> IndexedFile:
    """Index one file. A failure of the machine, which fails all files, is raised."""
    began = time.perf_counter()
    try:
        indexed = grounder.index(file, **options)
        return IndexedFile(file, indexed, None, time.perf_counter() - began)
    except (HostError, ImportError):
        raise
    except Exception as error:  # noqa: BLE001 - the other files are indexed
        return IndexedFile(file, None, f"{type(error).__name__}: {error}")
