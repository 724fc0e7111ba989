"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions in COCO images (Yu et al., arXiv 1608.00272; Mao et al.).

Files of github.com/lichengunc/refer: `refs(unc).p` (RefCOCOg: `refs(umd).p` or `refs(google).p`) and `instances.json`.
The former is a pickle, which `convert_refs` turns into JSON once. Quirks:

- A ref names its annotation (`ann_id`); the box, [x, y, width, height], is in instances.json only.
- Every ref has several `sentences`; each is a sample. `sent` is the cleaned text, as published results use it.
- A ref's `file_name` (COCO_train2014_000000581857_16.jpg) is not a file of COCO: the name is in instances.json.
- Splits are train, val, testA, testB (RefCOCO, RefCOCO+), test (RefCOCOg, umd); google's RefCOCOg has train and val.
"""

from __future__ import annotations

import codecs
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.datasets.fields import BOX, Record, digest, read_json_file, records
from bridge_stg.evaluation.media import MediaFolder
from bridge_stg.evaluation.samples import Dataset, Sample, image_truth, xyxy_from_xywh
from bridge_stg.runtime.errors import AnnotationError
from bridge_stg.runtime.host.files import replacing

GROWTH = 16
"""Most characters of JSON per byte of a pickle: shared values could make a small file fill the disk."""


def read_refcoco(
    annotations: Sequence[Path], media: Path, *, split: str | None = None, name: str = "refcoco"
) -> Dataset:
    """Return the sentences of one split, val by default; the datasets differ in their files, not in their format.

    `annotations` are the refs as JSON and instances.json, in any order, or the folder with both.
    """
    refs_path, instances_path = _files(annotations)
    split, folder = split or "val", MediaFolder(media)
    values = read_json_file(refs_path, list, f"the refs of {name} as JSON")
    instances = Record(f"{instances_path}", read_json_file(instances_path, dict, "COCO's instances"))
    images, boxes = (
        {record.whole("id"): record for record in instances.children(field)} for field in ("images", "annotations")
    )
    samples: list[Sample] = []
    splits: set[str] = set()
    for record in records(f"{refs_path}: ", values):
        splits.add(record.text("split"))
        if record.values["split"] != split:
            continue
        image, box = _looked_up(record, "image_id", images), _looked_up(record, "ann_id", boxes)
        file_name = image.text("file_name")
        read_truth = partial(image_truth, xyxy_from_xywh(box.numbers("bbox", 4, BOX)), size=image.size())
        samples += [
            Sample(
                id=sentence.name("sent_id"),
                task="image",
                media=folder.find(file_name, file_name.rpartition("_")[2]),  # COCO 2017 omits the prefix
                media_name=file_name,
                query=sentence.text("sent" if str(sentence.values.get("sent", "")).strip() else "raw"),
                read_truth=read_truth,
                where=sentence.where,
            )
            for sentence in record.children("sentences")
        ]
    if not samples:
        known = ", ".join(sorted(splits)) or "none"
        what = f"{refs_path}: has no split {split!r}; it has: {known}. Give one of them with --split."
        raise AnnotationError("annotation.unknown_split", what)
    return Dataset(name, split, tuple(samples), digest(refs_path, instances_path))


def _files(annotations: Sequence[Path]) -> tuple[Path, Path]:
    """Return the file of the refs and that of the instances."""
    if len(annotations) == 1 and annotations[0].is_dir():
        folder = annotations[0]
        refs = sorted(folder.glob("refs*.json")) or sorted(folder.glob("refs*.p"))[:1]
        instances = folder / "instances.json"
    else:
        *refs, instances = sorted(annotations, key=lambda path: path.name.startswith("instances"))
    if len(refs) != 1:
        found = ", ".join(path.name for path in refs) or "none"
        what = f"expected the refs as JSON and instances.json, or the folder of both; found these refs: {found}."
        raise AnnotationError("annotation.wrong_files", what)
    if refs[0].suffix in (".p", ".pkl", ".pickle"):
        command = f"python cli.py convert-refs '{refs[0]}' '{refs[0].with_suffix('.json')}'"
        raise AnnotationError("annotation.unsafe_pickle", f"{refs[0]} is a pickle. Convert it once: {command}")
    return refs[0], instances


def _looked_up(record: Record, field: str, known: Mapping[int, Record]) -> Record:
    key = record.whole(field)
    if key not in known:
        what = f"the field {field!r} is {key}, which is not in instances.json; give both files of the same dataset."
        raise AnnotationError("annotation.mismatch", f"{record.where}: {what}")
    return known[key]


def _read_latin_1(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


class _PlainUnpickler(pickle._Unpickler):  # noqa: SLF001 - in Python, its memo is a dict; C would allocate any index
    """Load lists, dictionaries, texts and numbers; nothing is imported or called."""

    def find_class(self, module: str, name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it imports {module}.{name}")


def convert_refs(pickle_file: Path, out: Path) -> int:
    """Write the refs of a pickle as JSON and return their number. Raises AnnotationError for all but plain values."""
    # Texts of Python 2 are bytes: UTF-8, and Latin-1 where they are not.
    codecs.register_error("latin-1", _read_latin_1)
    try:
        data = pickle_file.read_bytes()
    except OSError as error:
        message = f"{pickle_file}: cannot be read ({error.strerror}); expected a pickle of refs."
        raise AnnotationError("annotation.not_found", message) from None
    try:
        refs = _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="latin-1").load()
        if not isinstance(refs, list) or not all(isinstance(ref, dict) and "sentences" in ref for ref in refs):
            what = f"{pickle_file}: has no list of refs; expected a file such as refs(unc).p."
            raise AnnotationError("annotation.bad_file", what)
        with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
            size = 0
            for chunk in json.JSONEncoder(ensure_ascii=False).iterencode(refs):
                size += file.write(chunk)
                if size > GROWTH * len(data):
                    raise ValueError("its values contain a cycle")
    except (pickle.UnpicklingError, ArithmeticError, EOFError, LookupError, MemoryError, RecursionError, TypeError,
            ValueError, AttributeError) as error:  # fmt: skip
        what = f"{pickle_file}: is not a complete pickle of plain values ({error}). Download it again."
        raise AnnotationError("annotation.unsafe_pickle", what) from None
    return len(refs)
