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

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bridge_stg.evaluation.datasets.fields import BOX, Record, digest, read_json_file
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, tube_truth, xyxy_from_xywh
from bridge_stg.runtime.errors import AnnotationError

DURATION_S = 20.0


SENTENCES = {"hc-stvg-v1": "caption", "hc-stvg-v2": "English"}
"""Version → field of the sentence."""


def read_hc_stvg(annotations: Sequence[Path], media: Path, *, split: str | None = None, name: str) -> Dataset:
    """Return the clips of a file of the version `name`; the test split of version 2 has no public truth."""
    path, folder = annotations[0], MediaFolder(media)
    values = read_json_file(path, dict, f"video names and the annotations of {name}")
    samples = []
    for video in values:
        record = Record(str(path), values).child(video)
        _check(record, name)
        samples.append(
            Sample(
                id=video, task="tube", media=folder.find(video), media_name=video, query=record.text(SENTENCES[name]),
                read_truth=partial(_truth, record, record.size() if name == "hc-stvg-v1" else _img_size(record)),
                where=record.where,
            )
        )  # fmt: skip
    return Dataset(name, path.stem, tuple(samples), digest(path))


def _check(record: Record, name: str) -> None:
    mine = SENTENCES[name]
    ((rest, other),) = SENTENCES.items() - {(name, mine)}
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
