"""The datasets that can be evaluated: the files that each takes, and its reader, imported when it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge_stg.runtime.errors import AnnotationError

if TYPE_CHECKING:
    from bridge_stg.evaluation.samples import Dataset


@dataclass(frozen=True)
class DatasetFormat:
    """The published form of a dataset.

    Attributes:
        reader: module in this folder and function, as in `vidstg:read_vidstg`.
        annotations: description of what `--annotations` takes.
        splits: names of its splits; empty if the annotation file is the split.
        options: further arguments of the reader.
    """

    reader: str
    annotations: str
    splits: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def _referring_expressions(name: str, *splits: str) -> DatasetFormat:
    files = "the refs as JSON and instances.json, or the folder of both"
    return DatasetFormat("refcoco:read_refcoco", files, splits, {"name": name})


DATASETS: Mapping[str, DatasetFormat] = {
    "vidstg": DatasetFormat("vidstg:read_vidstg", "test_annotations.json, and the folder of VidOR's annotations"),
    "hc-stvg-v1": DatasetFormat("hc_stvg:read_hc_stvg", "test.json", (), {"name": "hc-stvg-v1"}),
    "hc-stvg-v2": DatasetFormat("hc_stvg:read_hc_stvg", "val_v2.json", (), {"name": "hc-stvg-v2"}),
    "charades-sta": DatasetFormat("charades_sta:read_charades_sta", "charades_sta_test.txt"),
    "refcoco": _referring_expressions("refcoco", "train", "val", "testA", "testB"),
    "refcoco+": _referring_expressions("refcoco+", "train", "val", "testA", "testB"),
    "refcocog": _referring_expressions("refcocog", "train", "val", "test"),
    "got-10k": DatasetFormat("got10k:read_got10k", "the root folder, with val and test", ("train", "val", "test")),
    "jsonl": DatasetFormat("jsonl:read_jsonl", "a file of the project's own format"),
}


def read_dataset(
    name: str, annotations: Sequence[Path], media: Path | None = None, *, split: str | None = None
) -> Dataset:
    """Read a dataset's annotation files, as published.

    Args:
        name: one of `DATASETS`.
        annotations: the files or folders that its entry there describes.
        media: the folder of the videos or images; that of the first annotation file if None.
        split: the split of files with several; the dataset's own default if None.

    Raises:
        AnnotationError: a file, line or field is not as published, or the split is unknown.
    """
    if name not in DATASETS:
        what = f"the dataset {name!r} is unknown; known: {', '.join(DATASETS)}."
        raise AnnotationError("annotation.unknown_dataset", what)
    entry = DATASETS[name]
    if not annotations:
        raise AnnotationError("annotation.wrong_files", f"{name} takes --annotations: {entry.annotations}.")
    if split is not None and split not in entry.splits:
        known = f"has: {', '.join(entry.splits)}" if entry.splits else "has none: the annotation file is the split"
        raise AnnotationError("annotation.unknown_split", f"{name} has no split {split!r}; it {known}.")
    if absent := next((path for path in annotations if not path.exists()), None):
        what = f"{absent}: no such file or folder; {name} takes --annotations: {entry.annotations}."
        raise AnnotationError("annotation.not_found", what)
    if media is None:
        media = annotations[0] if annotations[0].is_dir() else annotations[0].parent
    name, _, function = entry.reader.partition(":")
    module = importlib.import_module(f"bridge_stg.evaluation.datasets.{name}")
    reader: Callable[..., Dataset] = getattr(module, function)
    return reader(annotations, media, split=split, **entry.options)
