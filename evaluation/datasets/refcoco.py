"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions in COCO images (Yu et al., arXiv 1608.00272; Mao et al.).

Files of github.com/lichengunc/refer: `refs(unc).p` (RefCOCOg: `refs(umd).p` or `refs(google).p`) and `instances.json`.
The former is a pickle, which is never loaded here: convert it to JSON first, see refcoco_pickle.py. Quirks:

- A ref names its annotation (`ann_id`); the box, [x, y, width, height], stands in instances.json only.
- Every ref has several `sentences`; each is a sample. `sent` is the cleaned text, as published results use it.
- A ref's `file_name` (COCO_train2014_000000581857_16.jpg) is no file of COCO: the name stands in instances.json.
- Splits are train, val, testA, testB (RefCOCO, RefCOCO+), test (RefCOCOg, umd); google's RefCOCOg has train and val.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.datasets.fields import ADVICE, Record, digest, read_json_file, records
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, image_truth, xyxy_from_xywh
from bridge_stg.runtime.errors import AnnotationError

PICKLE = "is a pickle, which can run code when it is loaded and is never read. Convert it: python cli.py convert-refs"


def read_refcoco(
    annotations: Sequence[Path], media: Path, *, split: str | None = None, name: str = "refcoco"
) -> Dataset:
    """Return the sentences of one split; `annotations` are the refs as JSON and instances.json, in any order.

    Args:
        annotations: both files; or the folder that holds them, with one refs*.json.
        media: the folder of COCO's train2014 images.
        split: val if not given.
        name: of the benchmark: the three differ in their files, not in their format.

    Raises:
        AnnotationError: a file or field is not as published, or there is no such split.
    """
    refs_path, instances_path = _files(annotations)
    split, folder = split or "val", MediaFolder(media)
    values = read_json_file(refs_path)
    if not isinstance(values, list):
        raise AnnotationError(f"{refs_path}: is no list; expected the refs of {name} as JSON. {ADVICE}.")
    images, boxes = _instances(instances_path)
    samples: list[Sample] = []
    splits: set[str] = set()
    for record in records(f"{refs_path}: ", values):
        splits.add(record.text("split"))
        if record.values["split"] != split:
            continue
        image, box = _looked_up(record, "image_id", images), _looked_up(record, "ann_id", boxes)
        file_name = image.text("file_name")
        size = (image.whole("width", least=1), image.whole("height", least=1))
        truth = image_truth(xyxy_from_xywh(box.numbers("bbox", 4, "[x, y, width, height]")), size=size)
        samples += [
            Sample(
                id=sentence.name("sent_id"),
                task="image",
                media=folder.find(file_name, f"{file_name.rpartition('_')[2]}"),  # COCO 2017 left the prefix out
                sought=file_name,
                query=sentence.text("sent" if str(sentence.values.get("sent", "")).strip() else "raw"),
                read_truth=partial(_same, truth),
            )
            for sentence in record.children("sentences")
        ]
    if not samples:
        known = ", ".join(sorted(splits)) or "none"
        raise AnnotationError(f"{refs_path}: has no split {split!r}; it has: {known}. Give one of them with --split.")
    return Dataset(name, split, tuple(samples), digest(refs_path, instances_path))


def _files(annotations: Sequence[Path]) -> tuple[Path, Path]:
    if len(annotations) == 1 and annotations[0].is_dir():
        folder = annotations[0]
        refs = sorted(folder.glob("refs*.json"))
        if not refs and (pickles := sorted(folder.glob("refs*.p"))):
            raise AnnotationError(f"{pickles[0]} {PICKLE} '{pickles[0]}' '{pickles[0].with_suffix('.json')}'")
        if len(refs) != 1:
            found = ", ".join(path.name for path in refs) or "none"
            raise AnnotationError(
                f"{folder}: expected one refs*.json beside instances.json, found {found}. Name the refs and "
                "instances.json, each with --annotations."
            )
        return refs[0], folder / "instances.json"
    if len(annotations) == 2:
        first, second = annotations
        refs_path, instances = (second, first) if first.name.startswith("instances") else (first, second)
        if refs_path.suffix in (".p", ".pkl", ".pickle"):
            raise AnnotationError(f"{refs_path} {PICKLE} '{refs_path}' '{refs_path.with_suffix('.json')}'")
        return refs_path, instances
    raise AnnotationError(
        f"referring expressions take two --annotations, the refs as JSON and instances.json (or the folder of both); "
        f"found {len(annotations)}."
    )


def _instances(path: Path) -> tuple[dict[int, Record], dict[int, Record]]:
    """Return COCO's images and annotations by their ids."""
    values = read_json_file(path)
    if not isinstance(values, dict):
        raise AnnotationError(f"{path}: is no object; expected COCO's instances. {ADVICE}.")
    whole = Record(f"{path}", values)
    images = {record.whole("id"): record for record in whole.children("images")}
    return images, {record.whole("id"): record for record in whole.children("annotations")}


def _looked_up(record: Record, field: str, known: Mapping[int, Record]) -> Record:
    key = record.whole(field)
    if key not in known:
        raise AnnotationError(
            f"{record.where}: the field {field!r} is {key}, which instances.json does not hold; expected both files of "
            "the same dataset (RefCOCO, RefCOCO+ and RefCOCOg each have their own)."
        )
    return known[key]


def _same(truth: Any) -> Any:
    return truth
