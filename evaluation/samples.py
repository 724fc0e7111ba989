"""The samples of a dataset: each has a task, a media file, a query and the annotated ground truth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bridge_stg.runtime.errors import AnnotationError


@dataclass(frozen=True, eq=False)
class Truth:
    """The annotation of one sample. Times are seconds from the first frame that the model gets.

    Attributes:
        present: whether the target is in the video.
        span: start and end, half-open; None for images and absent targets.
        times: float64 [N], the annotation's own frames: all of the clip, unless `interval_s` is given.
        inside: bool [N], the frames of the true tube.
        boxes: float32 [N, 4], left, top, right, bottom in pixels; read where `inside`.
        counted: bool [N], the frames that are scored (tracking: the target is visible, and it is not the first frame).
        size: width and height that the boxes refer to, None if they are those of the media file.
        interval_s: seconds between frames of a clip whose length is unknown: scoring adds frames at this distance on
            both sides.
    """

    present: bool
    span: tuple[float, float] | None
    times: np.ndarray
    inside: np.ndarray
    boxes: np.ndarray
    counted: np.ndarray
    size: tuple[int, int] | None = None
    interval_s: float | None = None


@dataclass(frozen=True, eq=False)
class Sample:
    """One query of a dataset.

    Attributes:
        id: unique in the dataset, the same on every machine.
        task: one of `bridge_stg.runtime.chain.tasks.TASKS`.
        media: the video, image, or folder of frames; None if it was not found.
        media_name: the name by which the media file was searched for.
        query: what to find; "the object" for a tracking sample without words.
        read_truth: reads the ground truth when it is needed; raises AnnotationError.
        group: a part of the dataset that has separate metrics, such as "declarative".
        clip: start and end in seconds of the part of the video to use; None for all of it.
        frame_rate: frames per second of a folder of frames.
        stream: video stream of the file to use, see `CallOptions`.
        where: the place of the annotation, such as `file:line`, for messages.
    """

    id: str
    task: str
    media: Path | None
    media_name: str
    query: str
    read_truth: Callable[[], Truth]
    group: str = ""
    clip: tuple[float, float] | None = None
    frame_rate: float | None = None
    stream: int | None = None
    where: str = ""


def check_ids(name: str, samples: Sequence[Sample]) -> None:
    """Raise AnnotationError if samples of a file or dataset of this name have the same id."""
    (most, count), *_ = Counter(sample.id for sample in samples).most_common(1) or [("", 0)]
    if count > 1:
        what = f"{name}: {count} samples have the id {most!r}; remove all but one, or give them different ids."
        raise AnnotationError("annotation.duplicate_id", what)


@dataclass(frozen=True, eq=False)
class Dataset:
    """All samples of a dataset in the order of its files, and the SHA-256 of what was read (`annotations`).

    `allow_none` is whether "not there" is a possible answer; published datasets guarantee presence.
    """

    name: str
    split: str
    samples: tuple[Sample, ...]
    annotations: str
    allow_none: bool = False
    stream: int | None = None

    def __post_init__(self) -> None:
        check_ids(self.name, self.samples)

    def chosen(self, *, limit: int | None = None, shard: tuple[int, int] = (1, 1)) -> list[Sample]:
        """Return every n-th of the first `limit` samples, starting with the i-th, for shard (i, n)."""
        index, count = shard
        return list(self.samples[:limit])[index - 1 :: count]

    def with_stream(self, stream: int | None) -> Dataset:
        """Return the dataset with this video stream of every file, see `CallOptions`."""
        return replace(self, stream=stream, samples=tuple(replace(sample, stream=stream) for sample in self.samples))

    def only(self, ids: Sequence[str] | None) -> Dataset:
        """Return the dataset with only the samples of these ids, in their order; None: all."""
        if ids is None:
            return self
        wanted = set(ids)
        return replace(self, samples=tuple(sample for sample in self.samples if sample.id in wanted))


def tube_truth(
    times: np.ndarray, inside: np.ndarray, boxes: np.ndarray, *, span: tuple[float, float],
    size: tuple[int, int] | None = None, interval_s: float | None = None,
) -> Truth:  # fmt: skip
    """Return the ground truth of a target that is in the video: its tube on the annotation's frames; see `Truth`."""
    return Truth(
        present=True, span=span, times=np.asarray(times, np.float64), inside=np.asarray(inside, bool),
        boxes=np.asarray(boxes, np.float32).reshape(-1, 4), counted=np.ones(len(times), bool), size=size,
        interval_s=interval_s,
    )  # fmt: skip


def span_truth(span: tuple[float, float] | None) -> Truth:
    """Return the ground truth of a span without boxes, or of an absent target."""
    nothing = np.zeros(0)
    return Truth(span is not None, span, nothing, nothing.astype(bool), np.zeros((0, 4), np.float32), nothing > 0)


def image_truth(box: Sequence[float] | np.ndarray, *, size: tuple[int, int] | None = None) -> Truth:
    """Return the ground truth of an image: one frame at time 0 with one box, xyxy in pixels."""
    one = np.ones(1, bool)
    return Truth(True, None, np.zeros(1), one, np.asarray(box, np.float32).reshape(1, 4), one, size)


def xyxy_from_xywh(boxes: np.ndarray | Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    """Turn boxes [..., 4] from left, top, width, height into corners, float64 (float32 would round x + w)."""
    boxes = np.asarray(boxes, np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)
