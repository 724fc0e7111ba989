"""VidSTG: spatio-temporal grounding of declarative and interrogative sentences (Zhang et al., arXiv 2001.06891).

Files: `test_annotations.json` (or `val_…`, `train_…`) of github.com/Guaranteer/VidSTG-Dataset, whose README describes
the fields, and the folder of VidOR's own annotations (xdshang.github.io/docs/vidor.html), one JSON per video, with the
boxes. Quirks of the published files:

- A sentence refers to `used_segment` of the video, not to all of it.
- `temporal_gt.end_fid` is exclusive; it may be one frame after `used_segment.end_fid`, which at the end of a video is
  its last frame's number.
- `questions` are the interrogative sentences, `captions` the declarative ones; both are reported separately.
- Trajectories are lists with one entry per frame, each a list of {tid, bbox: {xmin, ymin, xmax, ymax}, …}.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from bridge_stg.evaluation.datasets.fields import Record, digest, fault, read_json_file, records
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, tube_truth
from bridge_stg.runtime.errors import AnnotationError

GROUPS = {"captions": "declarative", "questions": "interrogative"}


def read_vidstg(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the sentences of an annotation file; `annotations` are that file and the folder of VidOR's annotations."""
    files = [path for path in annotations if not path.is_dir()]
    folders = [path for path in annotations if path.is_dir()]
    if len(files) != 1 or len(folders) != 1:
        what = "vidstg takes two --annotations, test_annotations.json and the folder of VidOR's annotations"
        raise AnnotationError("annotation.wrong_files", f"{what}; found {len(files)} files, {len(folders)} folders.")
    path, folder = files[0], MediaFolder(media)
    trajectories = {file.stem: file for file in sorted(folders[0].rglob("*.json"))}
    values = read_json_file(path, list, "the annotations of VidSTG")
    samples: list[Sample] = []
    used: dict[str, Path] = {}
    for index, record in enumerate(records(f"{path}: ", values)):
        video = record.name("vid")
        if video not in trajectories:
            what = f"{folders[0]} has no {video}.json, which {record.where} needs; download VidOR's same split."
            raise AnnotationError("annotation.not_found", what)
        used[video] = trajectories[video]
        samples += _sentences(record, index, video, used[video], folder)
    if not samples:
        raise fault(path, "has no sentences", code="annotation.empty")
    # Hashing VidOR's gigabytes would take longer than many runs: names and sizes identify them.
    sizes = [f"{name} {file.stat().st_size}" for name, file in sorted(used.items())]
    return Dataset("vidstg", path.stem.removesuffix("_annotations"), tuple(samples), digest(path, *sizes))


def _sentences(record: Record, index: int, video: str, boxes_file: Path, folder: MediaFolder) -> list[Sample]:
    fps = record.number("fps", above=0)
    frames = record.whole("frame_count", least=1)
    size = record.size()
    segment, truth = record.child("used_segment"), record.child("temporal_gt")
    begin, end = segment.whole("begin_fid"), segment.whole("end_fid", least=1)
    true_begin, true_end = truth.whole("begin_fid"), truth.whole("end_fid", least=1)
    if true_begin >= true_end or true_begin < begin:
        raise truth.fault("begin_fid", f"a frame from {begin}, where the segment begins, to {true_end - 1}")
    end = max(end, true_end)
    whole = begin == 0 and end >= frames - 1
    media, name = folder.find(f"{video}.mp4"), f"{video}.mp4"
    samples = []
    for field, group in GROUPS.items():
        for place, sentence in enumerate(record.children(field)):
            read_truth = partial(
                _truth, boxes_file, sentence.whole("target_id"), fps=fps, clip=(begin, frames if whole else end),
                tube=(true_begin, true_end), size=size,
            )  # fmt: skip
            samples.append(
                Sample(
                    id=f"{index}/{field}/{place}", task="tube", media=media, media_name=name,
                    query=sentence.text("description"), read_truth=read_truth, group=group,
                    clip=None if whole else (begin / fps, end / fps), where=sentence.where,
                )
            )  # fmt: skip
    return samples


def _truth(
    file: Path, target: int, *, fps: float, clip: tuple[int, int], tube: tuple[int, int], size: tuple[int, int]
) -> Truth:
    """Read a target's boxes; a frame of the tube without one gets the interpolation of its neighbours' boxes."""
    known = trajectories_of(file).get(target, {})
    annotated = np.asarray([frame for frame in range(*tube) if frame in known])
    if not len(annotated):
        what = f"{file}: trajectories have no box of tid {target} in the frames {tube[0]} to {tube[1] - 1}"
        raise AnnotationError("annotation.mismatch", f"{what}; download it and VidSTG in the same release.")
    frames = np.arange(clip[0], max(clip[1], tube[1]))
    inside = (frames >= tube[0]) & (frames < tube[1])
    sides = np.asarray([known[frame] for frame in annotated], np.float64)
    boxes = np.stack([np.interp(frames, annotated, sides[:, side]) for side in range(4)], -1)
    times = (frames - clip[0]) / fps
    span = ((tube[0] - clip[0]) / fps, (tube[1] - clip[0]) / fps)
    return tube_truth(times, inside, boxes, span=span, size=size)


@lru_cache(maxsize=4)
def trajectories_of(file: Path) -> dict[int, dict[int, tuple[float, ...]]]:
    """Return the boxes of a VidOR annotation: by target, then by frame, xyxy in pixels."""
    values = read_json_file(file, dict, "an annotation of VidOR")
    found: dict[int, dict[int, tuple[float, ...]]] = {}
    for frame, entries in enumerate(Record(f"{file}", values).items("trajectories")):
        where = f"{file}: trajectories[{frame}]"
        if not isinstance(entries, list):
            raise fault(where, "is not a list; expected the boxes of this frame")
        for entry in records(where, entries):
            box = entry.child("bbox")
            sides = tuple(box.number(side) for side in ("xmin", "ymin", "xmax", "ymax"))
            found.setdefault(entry.whole("tid"), {})[frame] = sides
    return found
