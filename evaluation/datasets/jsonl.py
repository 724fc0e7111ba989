"""The project's own annotation format: JSON lines, one query per line, for evaluation and for training.

    {"video": "a.mp4", "query": "the red car", "span": [1.5, 4.0], "boxes": [{"time": 1.5, "box": [10, 20, 90, 70]}, …]}
    {"video": "a.mp4", "query": "the dog", "span": null}                          it is not in this video
    {"video": "b.mp4", "query": "the man sits down", "span": [0.0, 2.5]}          only when
    {"image": "c.png", "query": "the red car", "boxes": [{"box": [10, 20, 90, 70]}]}
    {"video": "d.mp4", "task": "track", "boxes": [{"time": 0.0, "box": [10, 20, 90, 70]}, …]}

Seconds count from the first frame; boxes are left, top, right, bottom in pixels of the video as it is shown. Boxes are
interpolated linearly; before the first and after the last, inside the span, the nearest one counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from bridge_stg.evaluation.datasets.fields import Record, digest, fault, json_lines, records
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, image_truth, span_truth, tube_truth
from bridge_stg.runtime.chain.tasks import TASKS, TRACKED
from bridge_stg.runtime.errors import AnnotationError

FIELDS = ("id", "group", "video", "image", "task", "query", "span", "boxes")
COARSEST_S = 0.1
"""Boxes may be keyframes one second apart; tubes are scored on at least ten frames per second."""


@dataclass(frozen=True, eq=False)
class Annotation:
    """One line of the file.

    Attributes:
        where: `file:line`.
        id: the line's `id`, else its number.
        task: `tube`, `span`, `image` or `track`.
        media: path of the video or image as written, relative to the folder of media.
        query: what to find.
        span: start and end in seconds; None for an image, and for an absent target.
        present: whether the target is in the video.
        times: float64 [N], seconds, strictly increasing.
        boxes: float32 [N, 4], left, top, right, bottom in pixels.
        group: a part of the file that has separate metrics.
    """

    where: str
    id: str
    task: str
    media: str
    query: str
    span: tuple[float, float] | None
    present: bool
    times: np.ndarray
    boxes: np.ndarray
    group: str = ""


def read_annotations(path: Path) -> list[Annotation]:
    """Read a file of annotations. Raises AnnotationError, which names file, line and field."""
    found = [annotation_from(record) for record in json_lines(path)]
    if not found:
        raise AnnotationError("annotation.empty", f"{path} has no lines; expected one object per line.")
    return found


def read_jsonl(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the annotations of one file as a dataset; "not there" is a possible answer if a line has it."""
    path = annotations[0]
    found = read_annotations(path)
    folder = MediaFolder(media)
    samples = tuple(
        Sample(
            id=a.id, task=a.task, media=folder.at(a.media), media_name=a.media, query=a.query,
            read_truth=partial(truth_of, a), group=a.group, where=a.where,
        )
        for a in found
    )  # fmt: skip
    return Dataset("jsonl", path.stem, samples, digest(path), allow_none=any(not a.present for a in found))


def truth_of(annotation: Annotation) -> Truth:
    """Return the ground truth of a line.

    A tube is scored at the median distance of its boxes, divided into equal parts of at most a tenth of a second. The
    length of the video is unknown: beyond the span, frames continue at that distance.
    """
    a = annotation
    if a.task == "image":
        return image_truth(a.boxes[0])
    if a.task == "span" or not a.present:
        return span_truth(a.span)
    assert a.span is not None
    start, end = (0.0 if a.task == "track" else a.span[0]), a.span[1]
    step = float(np.median(np.diff(a.times))) if len(a.times) > 1 else end - start
    step /= max(1, math.ceil(step / COARSEST_S - 1e-6))
    first, stop = (math.ceil((side - a.times[0]) / step - 1e-6) for side in (start, end))
    times = a.times[0] + step * np.arange(first, max(stop, first + 1))
    boxes = np.stack([np.interp(times, a.times, a.boxes[:, side]) for side in range(4)], -1)
    tracked = a.task == "track"
    truth = tube_truth(times, times < np.inf, boxes, span=a.span, interval_s=None if tracked else step)
    if tracked:
        truth.counted[0] = False  # the model is given this box
    return truth


def annotation_from(record: Record) -> Annotation:
    """Read one line of a file. Raises AnnotationError."""
    unknown = [name for name in record.values if name not in FIELDS]
    if unknown:
        what = f"the field {unknown[0]!r} is unknown; expected some of: {', '.join(FIELDS)}"
        raise fault(record.where, what, code="annotation.bad_field")
    if ("video" in record.values) == ("image" in record.values):
        what = "expected exactly one of the fields 'video' and 'image', each with the path of a file"
        raise fault(record.where, what, code="annotation.bad_field")
    image = "image" in record.values
    times, boxes = _boxes(record, image=image)
    absent = "span" in record.values and record.values["span"] is None
    task = _task(record, image=image, boxes=bool(len(times)), absent=absent)
    if task == "track" and times[0] != 0:
        raise record.fault("boxes", "a box of the first frame first, at time 0: the model is given it")
    span = None if image or absent else _span(record, times, optional=task == "track")
    if absent and (len(times) or task != "tube"):
        raise record.fault("span", "two numbers, since the line has boxes or a task")
    query = TRACKED if task == "track" and "query" not in record.values else record.text("query")
    return Annotation(
        where=record.where, id=record.name("id") if "id" in record.values else record.where.rpartition(":")[2],
        task=task, media=record.text("image" if image else "video"), query=query, span=span, present=not absent,
        times=times, boxes=boxes, group=record.text("group") if "group" in record.values else "",
    )  # fmt: skip


def _task(record: Record, *, image: bool, boxes: bool, absent: bool) -> str:
    task = "image" if image else "tube" if boxes or absent else "span"
    if "task" not in record.values:
        return task
    given: str = record.values["task"]
    possible = ("image",) if image else tuple(name for name in TASKS if name != "image")
    if given not in possible:
        raise record.fault("task", " or ".join(map(repr, possible)))
    if given in ("tube", "track") and not boxes and not absent:
        raise record.fault("boxes", f"boxes, which the task {given!r} needs")
    return given


def _span(record: Record, times: np.ndarray, *, optional: bool) -> tuple[float, float]:
    if optional and "span" not in record.values:
        return float(times[0]), float(times[-1] + np.median(np.diff(times)) if len(times) > 1 else times[-1] + 1)
    what = "[start, end] in seconds with 0 ≤ start < end, or null if the target is absent"
    start, end = record.numbers("span", 2, what)
    if not 0 <= start < end:
        raise record.fault("span", what)
    return start, end


def _boxes(record: Record, *, image: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return times [N] and boxes [N, 4] of a line."""
    if "boxes" not in record.values and not image:
        return np.zeros(0), np.zeros((0, 4), np.float32)
    times: list[float] = []
    boxes: list[tuple[float, ...]] = []
    for entry in records(f"{record.where}: boxes", record.items("boxes")):
        time = 0.0 if image and "time" not in entry.values else entry.number("time", least=0)
        if times and time <= times[-1]:
            raise entry.fault("time", f"a time after that of the previous box, {times[-1]:g} s")
        box = entry.numbers("box", 4, "[left, top, right, bottom] in pixels")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise entry.fault("box", "[left, top, right, bottom] with left < right and top < bottom")
        times.append(time)
        boxes.append(box)
    if image and len(boxes) != 1:
        raise record.fault("boxes", "exactly one box for an image")
    return np.asarray(times, np.float64), np.asarray(boxes, np.float32).reshape(-1, 4)
