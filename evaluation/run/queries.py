"""Questions without a truth: a table of (video, query) in JSON lines or CSV, or a folder and queries for all in it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from bridge_stg.evaluation.datasets.fields import ADVICE, Record, json_lines, read_text
from bridge_stg.evaluation.media import PICTURES, MediaFolder
from bridge_stg.runtime.errors import AnnotationError

VIDEOS = (".mp4", ".m4v", ".mkv", ".mov", ".avi", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp", ".gif")


@dataclass(frozen=True)
class Question:
    """One line of a table.

    Attributes:
        id: the line's `id`, else its number; in a folder, the file's path and the query's number.
        index: its place among the questions.
        media: the video or image; None where it was not found.
        video: the name under which it was sought.
        query: what to find.
    """

    id: str
    index: int
    media: Path | None
    video: str
    query: str


def read_questions(
    table: Path, media: Path | None = None, *, queries: Sequence[str] = (), pictures: bool = False
) -> list[Question]:
    """Read a table, or list a folder.

    Args:
        table: a `.jsonl` or `.csv` file with `video` (or `image`), `query` and, if wanted, `id`; other fields are left
            alone. Or a folder.
        media: the folder that the table's paths start from; that of the table if not given.
        queries: what to find in each medium of a folder; a table has its own.
        pictures: list the pictures of a folder instead of its videos.

    Raises:
        AnnotationError: there is no such file, a line or field is not as above, or nothing is in it.
    """
    if table.is_dir():
        questions = _of_folder(table, media, queries, PICTURES if pictures else VIDEOS)
    else:
        questions = _of_table(table, media, queries)
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise AnnotationError(f"{table}: the id {question.id!r} stands there twice; expected each once. {ADVICE}.")
        seen.add(question.id)
    return questions


def _of_folder(folder: Path, media: Path | None, queries: Sequence[str], suffixes: tuple[str, ...]) -> list[Question]:
    if media is not None:
        raise AnnotationError(f"{folder} is a folder, which holds its media itself; leave out --media.")
    if not queries or not all(query.strip() for query in queries):
        raise AnnotationError(f"{folder} is a folder; say what to find in its files with --query.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not files:
        raise AnnotationError(f"{folder} holds none of the files asked about; expected {', '.join(suffixes)}.")
    names = [path.relative_to(folder).as_posix() for path in files]
    pairs = [(path, name, number, query) for path, name in zip(files, names) for number, query in enumerate(queries, 1)]
    return [
        Question(f"{name}#{number}", index, path, name, query)
        for index, (path, name, number, query) in enumerate(pairs)
    ]


def _of_table(table: Path, media: Path | None, queries: Sequence[str]) -> list[Question]:
    readers = {".jsonl": json_lines, ".csv": _csv_lines}
    if not table.exists():
        raise AnnotationError(
            f"{table}: no such file or folder; expected a table (.jsonl, .csv) or a folder of videos."
        )
    if table.suffix.lower() not in readers:
        raise AnnotationError(f"{table} is no table that is known; expected {' or '.join(readers)}, or a folder.")
    if queries:
        raise AnnotationError(f"{table} has a query in every line; leave out --query, which is for a folder of videos.")
    folder = MediaFolder(media or table.parent)
    questions = []
    for index, record in enumerate(readers[table.suffix.lower()](table)):
        video = record.text("image" if record.values.get("image") and not record.values.get("video") else "video")
        number = record.where.rpartition(":")[2]
        name = record.name("id") if record.values.get("id") not in (None, "") else number
        questions.append(Question(name, index, folder.at(video), video, record.text("query")))
    if not questions:
        raise AnnotationError(f"{table} holds no question; expected one (video, query) a line.")
    return questions


def _csv_lines(table: Path) -> Iterator[Record]:
    reader = csv.DictReader(StringIO(read_text(table), newline=""), strict=True)
    try:
        if not {"video", "query"} <= set(reader.fieldnames or ()):
            found = ", ".join(reader.fieldnames or ()) or "nothing"
            raise AnnotationError(f"{table}:1: the header names {found}; expected the columns video and query.")
        for values in reader:
            yield Record(f"{table}:{reader.line_num}", values)
    except csv.Error as error:
        raise AnnotationError(f"{table}:{reader.line_num}: is no CSV ({error}). {ADVICE}.") from None
