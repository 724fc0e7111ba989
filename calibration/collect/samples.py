"""Read calibration samples, hash their media, and warn about sets that are too small or too uniform.

The file has the project's own format (`evaluation/datasets/jsonl.py`), except that a line may have no labels:
{"video": "a.mp4", "query": "the red car"}. Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.datasets.fields import Record, digest, json_lines
from bridge_stg.evaluation.datasets.jsonl import annotation_from, truth_of
from bridge_stg.evaluation.media import MediaFolder, frame_files
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, check_ids, span_truth
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.errors import AnnotationError

LEAST = 16
"""Smallest number of samples without a warning."""


@dataclass(frozen=True)
class Entry:
    """One sample of a set.

    Attributes:
        id: `id` of the line, else its number.
        kind: task (tube, span, image or track), or `absent` if the target is not in the video.
        media: path of the video or image, as in the file.
        sha256: SHA-256 of the video or image.
    """

    id: str
    kind: str
    media: str
    sha256: str


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples in the order of their file.

    Attributes:
        file: file of the samples.
        sha256: SHA-256 of the file.
        dataset: samples whose media exist. A line without labels has an absent target as ground truth.
        entries: one entry per sample.
        labelled: whether every line has labels.
        missing: ids of the lines whose media do not exist.
    """

    file: Path
    sha256: str
    dataset: Dataset
    entries: tuple[Entry, ...]
    labelled: bool
    missing: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of queries and media in their order; independent of the folder."""
        asked = [[e.id, e.kind, e.sha256, s.query] for e, s in zip(self.entries, self.dataset.samples, strict=True)]
        return hashlib.sha256(json.dumps([self.sha256, asked]).encode()).hexdigest()

    @property
    def kinds(self) -> dict[str, int]:
        """Number of samples by kind."""
        return dict(sorted(Counter(entry.kind for entry in self.entries).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values for the report."""
        return {
            "file": self.file.name,
            "sha256": self.sha256,
            "count": len(self.entries),
            "kinds": self.kinds,
            "labelled": self.labelled,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }


def read_samples(path: Path, media: Path | None = None, *, limit: int | None = None) -> CalibrationSet:
    """Read a file of at most `limit` samples, and hash their media in the folder `media` (None: that of the file)."""
    folder = MediaFolder(media or path.parent)
    hashes: dict[Path, str] = {}
    samples, entries, missing, labelled, absent = [], [], [], True, False
    for record in islice(json_lines(path), limit):
        sample, truth = _sample(record, folder)
        labelled &= truth is not None
        if sample.media is None:
            missing.append(sample.id)
            continue
        if sample.media not in hashes:
            hashes[sample.media] = media_sha256(sample.media)
        gone = truth is not None and not truth.present
        absent |= gone or truth is None
        samples.append(sample)
        entries.append(Entry(sample.id, "absent" if gone else sample.task, sample.media_name, hashes[sample.media]))
    if not samples and not missing:
        what = f"{path}: has no samples; expected one JSON object per line (docs/annotations.md)."
        raise AnnotationError("annotation.empty", what)
    if not samples:
        first = f"; the first is that of sample {missing[0]!r}" if missing else ""
        what = f"none of the media of its {len(missing)} samples exists in {folder.root}{first}"
        raise AnnotationError("annotation.no_media", f"{path}: {what}. Give their folder with --media.")
    sha256 = digest(path)
    check_ids(str(path), samples)
    dataset = Dataset("jsonl", path.stem, tuple(samples), sha256, allow_none=absent)
    return CalibrationSet(path, sha256, dataset, tuple(entries), labelled, tuple(missing))


def warnings_of(samples: CalibrationSet, others: Mapping[str, CalibrationSet] | None = None) -> list[str]:
    """Return warnings about calibration samples, and about `others` (by name) that the result is scored on."""
    found, count = [], len(samples.entries)
    if count < LEAST:
        found.append(f"{samples.file.name} has {count} samples, which is too few; give at least {LEAST}, better 64")
    if len(samples.kinds) == 1 and count > 1:
        (kind,) = samples.kinds
        found.append(
            f"all {count} samples of {samples.file.name} are of the kind {kind!r}; add others (tube, span, image, "
            "track, and some with an absent target), since activations differ between them"
        )
    if samples.missing:
        found.append(f"{samples.file.name}: the media of {len(samples.missing)} samples were not found and left out")
    for name, other in (others or {}).items():
        if shared := overlap(samples.entries, other.entries):
            what = ", ".join(map(repr, shared[:3])) + (" …" if len(shared) > 3 else "")
            found.append(
                f"{len(shared)} of the {count} calibration samples are also in the {name} set ({what}): its scores are "
                "too optimistic; use other media"
            )
    return found


def overlap(samples: Sequence[Entry], others: Sequence[Entry]) -> list[str]:
    """Return ids of samples that are also in another set: with equal media, or with equal id and name of the media."""
    hashes = {entry.sha256 for entry in others}
    named = {(entry.id, Path(entry.media).stem) for entry in others}
    return [e.id for e in samples if e.sha256 in hashes or (e.id, Path(e.media).stem) in named]


def media_sha256(path: Path) -> str:
    """Hash a file, or the names and content of a folder's images in their order."""
    if path.is_file():
        return file_sha256(path)
    parts = [[file.name, file_sha256(file)] for file in frame_files(path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sample(record: Record, folder: MediaFolder) -> tuple[Sample, Truth | None]:
    """Return the sample of a line, and its truth if the line has labels."""
    values = record.values
    if {"span", "boxes", "task"} & values.keys():
        a = annotation_from(record)
        truth, read = truth_of(a), partial(truth_of, a)
    else:
        placeholder = {"boxes": [{"box": [0, 0, 1, 1]}]} if "image" in values else {"span": None}
        a = annotation_from(Record(record.where, {**values, **placeholder}))
        truth, read = None, partial(span_truth, None)
    return Sample(a.id, a.task, folder.at(a.media), a.media, a.query, read, group=a.group), truth
