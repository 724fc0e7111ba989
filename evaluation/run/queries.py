"""Queries without labels: a table of (video, query) in JSON lines or CSV, or a folder and queries for its files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from bridge_stg.evaluation.datasets.fields import Record, fault, json_lines, read_text
from bridge_stg.evaluation.media import IMAGES, VIDEOS, MediaFolder, files_in
from bridge_stg.runtime.chain.tasks import TRACKED
from bridge_stg.runtime.errors import AnnotationError, BridgeError


@dataclass(frozen=True)
class Query:
    """One line of a table.

    Attributes:
        id: the line's `id`, else its number; in a folder, the file's path and the query's number.
        index: its place among the queries.
        media: the video or image; None if it was not found, or is downloaded from an address.
        video: the name by which the media file was searched for, or the address.
        text: what to find.
        first_box: left, top, right and bottom in pixels of the first frame, of what to track; None for other tasks.
    """

    id: str
    index: int
    media: Path | None
    video: str
    text: str
    first_box: tuple[float, ...] | None = None


def read_queries(
    table: Path, media: Path | None = None, *, texts: Sequence[str] = (), task: str = "tube",
    first_box: tuple[float, ...] | None = None,
) -> list[Query]:  # fmt: skip
    """Read a table, or list a folder.

    Args:
        table: a folder, or a `.jsonl` or `.csv` file with `video` (or `image`), `query` and optionally `id`; a track
            needs no `query`, but `first_box`: four numbers, in CSV with commas. Other fields are ignored.
        media: the folder that the table's paths start from; that of the table if None.
        texts: what to find in each file of a folder; a table has its own queries.
        task: one of `bridge_stg.runtime.chain.tasks.TASKS`; with `image`, a folder's images are listed.
        first_box: box to track where the table has none.

    Raises:
        AnnotationError: the file does not exist, a line or field is not as above, or it is empty.
        BridgeError: an option does not fit a table, or a folder.
    """
    if table.is_dir():
        if task == "track" and first_box is None:
            raise BridgeError("options.missing", f"{table} is a folder; --task track needs --first-box for its files.")
        texts = texts or ([TRACKED] if task == "track" else [])
        queries = _folder_queries(table, media, texts, IMAGES if task == "image" else VIDEOS, first_box)
    else:
        queries = _table_queries(table, media, texts, task == "track", first_box)
    (most, count), *_ = Counter(query.id for query in queries).most_common(1)
    if count > 1:
        raise fault(table, f"has the id {most!r} {count} times; expected each once", code="annotation.duplicate_id")
    return queries


def _folder_queries(
    folder: Path, media: Path | None, texts: Sequence[str], suffixes: tuple[str, ...],
    first_box: tuple[float, ...] | None,
) -> list[Query]:  # fmt: skip
    if media is not None:
        raise BridgeError("options.conflict", f"{folder} is a folder of media; leave out --media.")
    if not texts or not all(text.strip() for text in texts):
        raise BridgeError("options.missing", f"{folder} is a folder; pass a query for its files with --query.")
    files = files_in(folder, suffixes)
    if not files:
        raise AnnotationError("annotation.empty", f"{folder} has no files to query; expected {', '.join(suffixes)}.")
    pairs = [(path, path.relative_to(folder).as_posix(), number) for path in files for number in range(len(texts))]
    return [
        Query(f"{name}#{number + 1}", index, path, name, texts[number], first_box)
        for index, (path, name, number) in enumerate(pairs)
    ]


def _table_queries(
    table: Path, media: Path | None, texts: Sequence[str], tracks: bool, first_box: tuple[float, ...] | None
) -> list[Query]:
    readers = {".jsonl": json_lines, ".csv": _csv_lines}
    if not table.exists():
        what = f"{table}: no such file or folder; expected a table (.jsonl, .csv) or a folder of videos."
        raise AnnotationError("annotation.not_found", what)
    if table.suffix.lower() not in readers:
        what = f"{table} is not a table; expected {' or '.join(readers)}, or a folder."
        raise AnnotationError("annotation.bad_file", what)
    if texts:
        raise BridgeError("options.conflict", f"{table} has a query in every line; leave out --query.")
    folder = MediaFolder(media or table.parent)
    queries = []
    for index, record in enumerate(readers[table.suffix.lower()](table)):
        video = record.text("image" if record.values.get("image") and not record.values.get("video") else "video")
        number = record.where.rpartition(":")[2]
        name = record.name("id") if record.values.get("id") not in (None, "") else number
        text = TRACKED if tracks and not record.values.get("query") else record.text("query")
        box = _first_box(record, first_box) if tracks else None
        queries.append(Query(name, index, folder.at(video), video, text, box))
    if not queries:
        raise AnnotationError("annotation.empty", f"{table} has no queries; expected one (video, query) per line.")
    return queries


def _first_box(record: Record, default: tuple[float, ...] | None) -> tuple[float, ...]:
    value = record.values.get("first_box")
    if value in (None, "") and default is not None:
        return default
    if isinstance(value, str):  # of CSV
        with suppress(ValueError):
            record = Record(record.where, {"first_box": [float(side) for side in value.split(",")]})
    return record.numbers("first_box", 4, "left, top, right and bottom in pixels of the first frame")


def _csv_lines(table: Path) -> Iterator[Record]:
    reader = csv.DictReader(StringIO(read_text(table), newline=""), strict=True)
    try:
        names = list(reader.fieldnames or ())
        if not {"video", "query"} <= set(names) or len(set(names)) < len(names):
            what = f"the header names {', '.join(names) or 'nothing'}; expected video and query, and each column once"
            raise fault(f"{table}:1", what, code="annotation.bad_line")
        for values in reader:
            yield Record(f"{table}:{reader.line_num}", values)
    except csv.Error as error:
        raise fault(f"{table}:{reader.line_num}", f"is not CSV ({error})", code="annotation.bad_line") from None
