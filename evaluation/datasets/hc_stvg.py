"""HC-STVG, versions 1 and 2: spatio-temporal grounding of people (Tang et al., arXiv 2011.05049).

Format: github.com/tzhhhh123/HC-STVG, whose README shows an entry, and the preprocessing of github.com/antoyang/TubeDETR
(preproc_hcstvg.py, preproc_hcstvgv2.py). One JSON object, video name → annotation. The quirks of the published files:

- Version 1 calls the sentence `caption` and the size `width`, `height`; version 2 calls them `English` and `img_size`,
  which is [height, width].
- All clips last 20 s: the frame rate is img_num / 20.
- `st_frame` counts from 1; `bbox` holds one [x, y, width, height] per frame from that one on, and is the tube's length.
  `st_time` and `ed_time` say the same in seconds, less exactly, and are ignored.
- Names end in .mp4 or .mkv, the videos come in numbered packages, and some mirrors converted them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bridge_stg.evaluation.datasets.fields import BOX, Record, digest, read_json_file
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, tube_truth, xyxy_from_xywh
from bridge_stg.runtime.errors import AnnotationError

DURATION_S = 20.0


def read_hc_stvg_v1(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the clips of a file of version 1, such as test.json."""
    return _read("hc-stvg-v1", annotations[0], media, sentence="caption", size_of=Record.size)


def read_hc_stvg_v2(annotations: Sequence[Path], media: Path, *, split: str | None = None) -> Dataset:
    """Return the clips of a file of version 2, such as val_v2.json; the test split has no public truth."""
    return _read("hc-stvg-v2", annotations[0], media, sentence="English", size_of=_img_size)


def _read(
    name: str, path: Path, media: Path, *, sentence: str, size_of: Callable[[Record], tuple[int, int]]
) -> Dataset:
    folder = MediaFolder(media)
    values = read_json_file(path, dict, f"video names and the annotations of {name}")
    samples = []
    for video in values:
        record = Record(str(path), values).child(video)
        _check(record, name)
        samples.append(
            Sample(
                id=video, task="tube", media=folder.find(video), media_name=video, query=record.text(sentence),
                read_truth=partial(_truth, record, size_of(record)),
            )
        )  # fmt: skip
    return Dataset(name, path.stem, tuple(samples), digest(path))


def _check(record: Record, name: str) -> None:
    fields = {"hc-stvg-v1": "caption", "hc-stvg-v2": "English"}
    mine = fields.pop(name)
    ((rest, other),) = fields.items()
    if mine not in record.values and other in record.values:
        what = f"{record.where}: has {other!r} where {name} has {mine!r}: this is the other version. Evaluate {rest}."
        raise AnnotationError("annotation.wrong_version", what)
    record.whole("img_num", least=1)
    record.whole("st_frame", least=1)
    for i, box in enumerate(record.items("bbox")):
        Record(f"{record.where}.bbox[{i}]", {"bbox": box}).numbers("bbox", 4, BOX)
    if not record.values["bbox"]:
        raise record.fault("bbox", "a box for every frame of the tube")


def _truth(record: Record, size: tuple[int, int]) -> Truth:
    first, boxes = record.whole("st_frame", least=1) - 1, xyxy_from_xywh(record.values["bbox"])
    fps = record.whole("img_num", least=1) / DURATION_S
    frames = np.arange(max(record.whole("img_num"), first + len(boxes)))
    inside = (frames >= first) & (frames < first + len(boxes))
    placed = np.zeros((len(frames), 4))
    placed[inside] = boxes
    return tube_truth(frames / fps, inside, placed, span=(first / fps, (first + len(boxes)) / fps), size=size)


def _img_size(record: Record) -> tuple[int, int]:
    height, width = record.numbers("img_size", 2, "[height, width] in pixels")
    if height < 1 or width < 1:
        raise record.fault("img_size", "[height, width] in pixels")
    return int(width), int(height)
