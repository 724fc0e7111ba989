"""The samples that a bundle is calibrated on: which they are, byte by byte, and whether they will do.

The file is of the project's own format (`evaluation.jsonl`), except that a line may go without labels:
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
from bridge_stg.evaluation.samples import Dataset, Sample, Truth, span_truth
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.errors import AnnotationError

LEAST = 16
"""Fewer samples are too few to know the range of an activation by."""


@dataclass(frozen=True)
class Entry:
    """One sample of a set.

    Attributes:
        id: the line's `id`, else its number.
        kind: its task: tube, span, image or track; `absent` where the target is not there.
        media: its medium, as the file names it.
        sha256: of the medium's bytes.
    """

    id: str
    kind: str
    media: str
    sha256: str


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples in the order of their file.

    Attributes:
        file: that was read.
        sha256: of the file.
        dataset: the samples whose medium was found. The truth of a line without labels is that nothing is there.
        entries: one a sample.
        labelled: whether every line says what is true.
        missing: ids of the lines whose medium was not found.
    """

    file: Path
    sha256: str
    dataset: Dataset
    entries: tuple[Entry, ...]
    labelled: bool
    missing: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A SHA-256 of what is asked of which media, in this order; the same wherever the files lie."""
        asked = [[e.id, e.kind, e.sha256, s.query] for e, s in zip(self.entries, self.dataset.samples, strict=True)]
        return hashlib.sha256(json.dumps([self.sha256, asked]).encode()).hexdigest()

    @property
    def kinds(self) -> dict[str, int]:
        """How many samples there are of each kind."""
        return dict(sorted(Counter(entry.kind for entry in self.entries).items()))

    def to_dict(self) -> dict[str, Any]:
        """Return what a report says of the set, as JSON values."""
        return {
            "file": self.file.name,
            "sha256": self.sha256,
            "count": len(self.entries),
            "kinds": self.kinds,
            "labelled": self.labelled,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }


def read_samples(path: Path, media: Path | None = None, *, limit: int | None = None) -> CalibrationSet:
    """Read a file of samples, and hash their media.

    Args:
        path: JSON lines.
        media: the folder that media are named in; None: that of the file.
        limit: only the first so many lines.

    Raises:
        AnnotationError: a line is not as the format says, or no medium was found.
    """
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
    if not samples:
        raise AnnotationError(
            f"{path}: none of the media of its {len(missing)} samples was found in {folder.root}"
            + (f"; the first is that of sample {missing[0]!r}" if missing else "")
            + ". Give the folder that holds them with --media."
        )
    sha256 = digest(path)
    dataset = Dataset("jsonl", path.stem, tuple(samples), sha256, allow_none=absent)
    return CalibrationSet(path, sha256, dataset, tuple(entries), labelled, tuple(missing))


def warnings_of(samples: CalibrationSet, others: Mapping[str, CalibrationSet] | None = None) -> list[str]:
    """Return what is wrong with calibrating on these samples, as sentences; empty if nothing is.

    Args:
        samples: to calibrate on.
        others: sets that judge the result, by what they are called.
    """
    found, count = [], len(samples.entries)
    if count < LEAST:
        found.append(f"{samples.file.name} holds {count} samples, which is too few; give {LEAST} at least, better 64")
    if len(samples.kinds) == 1 and count > 1:
        (kind,) = samples.kinds
        found.append(
            f"all {count} samples of {samples.file.name} are of one kind, {kind!r}; add others (tube, span, image, "
            "track, and some whose target is absent), since activations differ between them"
        )
    if samples.missing:
        found.append(f"{samples.file.name}: the media of {len(samples.missing)} samples were not found and left out")
    for name, other in (others or {}).items():
        if shared := overlap(samples.entries, other.entries):
            what = ", ".join(map(repr, shared[:3])) + (" …" if len(shared) > 3 else "")
            found.append(
                f"{len(shared)} of the {count} calibration samples are in the {name} set too ({what}): what it says of "
                "the result is too good; use other media"
            )
    return found


def overlap(samples: Sequence[Entry], others: Sequence[Entry]) -> list[str]:
    """Return ids of samples that are in another set too: the same bytes, or the same id of the same medium's name."""
    hashes = {entry.sha256 for entry in others}
    named = {(entry.id, Path(entry.media).stem) for entry in others}
    return [e.id for e in samples if e.sha256 in hashes or (e.id, Path(e.media).stem) in named]


def media_sha256(path: Path) -> str:
    """Hash a file, or the names and bytes of a folder's pictures in their order."""
    if path.is_file():
        return file_sha256(path)
    parts = [[file.name, file_sha256(file)] for file in frame_files(path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _sample(record: Record, folder: MediaFolder) -> tuple[Sample, Truth | None]:
    """Return a line's sample, and its truth if the line has labels."""
    values = record.values
    if {"span", "boxes", "task"} & values.keys():
        a = annotation_from(record)
        truth, read = truth_of(a), partial(truth_of, a)
    else:
        placeholder = {"boxes": [{"box": [0, 0, 1, 1]}]} if "image" in values else {"span": None}
        a = annotation_from(Record(record.where, {**values, **placeholder}))
        truth, read = None, partial(span_truth, None)
    sample = Sample(a.id, a.task, folder.at(a.media), a.media, a.query, read, group=a.group)
    return sample, truth
