"""Inference over many (video, query): a row for each, in JSON lines that a later run resumes, or in Parquet.

The queries of one video are one unit of work, so that they share its decoding and the video part of the prompt.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.run.evaluate import Model, check_finite
from bridge_stg.evaluation.run.executor import Answers, Executor, LocalExecutor, Lost
from bridge_stg.evaluation.run.queries import Query
from bridge_stg.evaluation.run.results import START_AGAIN, ResultFile
from bridge_stg.evaluation.sources.reading import Reading
from bridge_stg.evaluation.sources.sources import Source, is_address
from bridge_stg.runtime.chain.results import program_json
from bridge_stg.runtime.errors import BridgeError, VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.live.plan import window_groups
from bridge_stg.runtime.search.options import is_searched

UNIT = 16
"""Queries of one unit: a video with hundreds is spread over workers, and a stopped run loses few answers."""
KEPT = ("id", "video", "query", "first_box", "error")
SEARCHED = ("tube", "span")
"""The tasks for which long videos are searched."""
STATE = ".search.jsonl"


@dataclass(frozen=True)
class Inferred:
    """Numbers of queries with an answer, and with an error instead; the first error, with the query's id."""

    answered: int
    failed: int
    first_error: str | None


def infer_many(
    queries: Sequence[Query], model: Model, out: Path, *, task: str = "tube", allow_none: bool = True,
    max_visual_tokens: int | None = None, stream: int | None = None, window: float | str = "auto",
    cuts: bool = True, top: int | None = None, executor: Executor | None = None,
    overwrite: bool = False, retry_failed: bool = False, progress: Callable[[str, int, int], Any] | None = None,
) -> Inferred:  # fmt: skip
    """Answer every query and write a row for each, in the order in which they are finished; failures are rows too.

    A row has the query's `id`, `index` and `video`, of a track its `first_box`, and either what `to_json` of the result
    gives or `error`. A video that is longer than a window is searched (see `Grounder.search`).

    Args:
        queries: queries with different ids.
        model: the model.
        out: a `.jsonl` file, whose finished rows are kept and whose first line has the options and the model; or a
            `.parquet` file, which is written when everything is finished, from such a file next to it.
        task: one of `bridge_stg.runtime.chain.tasks.TASKS`; a track begins with the `first_box` of its query.
        allow_none: whether "not there" is a possible answer; never for an image or a track.
        max_visual_tokens: see `CallOptions`.
        stream: see `CallOptions`.
        window: seconds of a window in which every video is searched; `auto`: search those longer than a window of the
            bundle; `whole`: search none.
        cuts: whether a search finds hard cuts, so that no window crosses one.
        top: most occurrences of a query; every video is searched for them. None: all, of videos that are searched.
        executor: runs the model; None: in this process.
        overwrite: discard finished rows.
        retry_failed: retry queries that failed in an earlier run. If two rows have one id, the last counts.
        progress: called as progress(label, done, total) before the first and after each unit.

    Raises:
        BridgeError: `out` has results of another run, the window is out of range, or the model cannot be opened.
        ImportError: a package is missing.
    """
    parquet = out.suffix.lower() == ".parquet"
    if parquet:
        import pyarrow.parquet  # noqa: F401 - a missing package fails now, not after the work

        if out.exists() and not overwrite:
            raise BridgeError("output.exists", f"{out} exists. Pass --overwrite to replace it, or another --out.")
    lines = out.with_name(f"{out.name}.partial.jsonl") if parquet else out
    options: dict[str, Any] = {
        "task": task, "allow_none": allow_none, "max_visual_tokens": max_visual_tokens, "stream": stream,
        **_search_options(model, task, window, cuts=cuts, top=top),
    }  # fmt: skip
    report = progress or (lambda label, done, total: None)
    identity, facts = {**options, "model": dict(model.identity)}, {"program": program_json(), "bundle": model.label}
    with ResultFile(lines, identity, overwrite=overwrite, kept=KEPT, facts=facts) as results:
        if overwrite:
            _remove_states(lines)
        left = [query for query in queries if _is_left(query, results, retry_failed)]
        done = len(queries) - len(left)
        report(model.label, done, len(queries))
        if left:
            units = units_of(left)
            answer = partial(answer_unit, results=lines.resolve(), **options)
            with closing((executor or LocalExecutor()).answers(model.open, answer, units)) as answers:
                for rows in _rows_of(answers, units, task):
                    results.add(*rows)
                    done += len(rows)
                    report(model.label, done, len(queries))
        found = [results.rows[query.id] for query in queries]
        if parquet:
            from bridge_stg.evaluation.run.parquet import write_parquet

            write_parquet(lines, [query.id for query in queries], out)
    if parquet:
        lines.unlink()
    errors = [f"{row['id']}: {row['error']}" for row in found if "error" in row]
    if not errors:
        _remove_states(lines)
    return Inferred(len(found) - len(errors), len(errors), errors[0] if errors else None)


def _search_options(model: Model, task: str, window: float | str, *, cuts: bool, top: int | None) -> dict[str, Any]:
    """Return the options of searches, empty for the default ones. Raises VideoError if the window is out of range."""
    if not isinstance(window, str) and model.spec is not None:
        window_groups(model.spec, window)
    searched = task in SEARCHED and (window, cuts, top) != ("auto", True, None)
    return {"window": window, "cuts": cuts, "top": top} if searched else {}


def units_of(queries: Iterable[Query]) -> list[list[Query]]:
    """Return the queries by video, at most `UNIT` in a unit, videos in the order of their first query."""
    by_video: dict[str, list[Query]] = {}
    for query in sorted(queries, key=lambda query: query.index):
        by_video.setdefault(query.video, []).append(query)
    return [group[start : start + UNIT] for group in by_video.values() for start in range(0, len(group), UNIT)]


def _rows_of(answers: Answers, units: Sequence[Sequence[Query]], task: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each unit, also of those that are lost."""
    for place, rows in answers:
        lost = rows.error if isinstance(rows, Lost) else None
        yield rows if lost is None else [_described(query, task) | {"error": lost} for query in units[place]]


def answer_unit(
    grounder: Any, queries: Sequence[Query], *, task: str, allow_none: bool, window: float | str = "auto",
    cuts: bool = True, top: int | None = None, results: Path | None = None, **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer the queries of one video and return a row per query. A missing package, which fails all, is raised.

    Beside the file `results`, if this machine has its folder, finished windows of a search are kept until all are.
    """
    try:
        with _file(queries[0]) as path:
            if task in SEARCHED and is_searched(
                path, grounder.spec, window=window, top=top, stream=options.get("stream")
            ):
                window_s = None if isinstance(window, str) else window
                searched = {"task": task, "allow_none": allow_none, "window_s": window_s, "cuts": cuts, "top": top}
                state = results and queries[0].media and _state(results, queries)
                return _searched(grounder, path, queries, state, {**options, **searched})
            with grounder.open(path, **options, **({"image_only": True} if task == "image" else {})) as video:
                return [_answer(video, query, task, allow_none) for query in queries]
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - any failure becomes rows, and the other videos continue
        return [_failed(query, task, error) for query in queries]


@contextmanager
def _file(query: Query) -> Iterator[str | os.PathLike[str]]:
    if query.media is not None:
        yield query.media
    elif is_address(query.video):
        with Source(query.video, "address").open(Reading(), Limits()) as path:
            yield path
    else:
        raise VideoError("video.not_found", f"{query.video}: was not found in the folder of media")


def _searched(
    grounder: Any, path: str | os.PathLike[str], queries: Sequence[Query], state: Path | None, options: dict[str, Any]
) -> list[dict[str, Any]]:  # fmt: skip
    """Search one video for all queries, and return a row per query; a bad query fails alone."""
    rows: dict[str, dict[str, Any]] = {}
    task = options["task"]
    for query in queries:
        try:
            grounder.check_query(query.text)
        except BridgeError as error:
            rows[query.id] = _failed(query, task, error)
    good = [query for query in queries if query.id not in rows]
    search = partial(grounder.search, path, [query.text for query in good], state=state, **options)
    try:
        results = search() if good else []
    except VideoError as error:
        if error.code != "search.other_state" or state is None:
            raise
        state.unlink()  # of a file that has changed
        results = search()
    for query, result in zip(good, results, strict=True):
        rows[query.id] = _described(query, task) | result.to_json()
        check_finite(rows[query.id])
    return [rows[query.id] for query in queries]


def _state(results: Path, queries: Sequence[Query]) -> Path | None:
    """Return the file for the search of a unit; None on a machine without the folder of the results."""
    names = "\0".join([queries[0].video, *(part for query in queries for part in (query.id, query.text))])
    digest = hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()[:16]
    return results.with_name(f"{results.name}.{digest}{STATE}") if results.parent.is_dir() else None


def _remove_states(results: Path) -> None:
    for state in results.parent.glob(f"{glob.escape(results.name)}.{'?' * 16}{STATE}"):
        state.unlink(missing_ok=True)


def _answer(video: Any, query: Query, task: str, allow_none: bool) -> dict[str, Any]:
    try:
        if task == "image":
            result = video.locate(query.text)
        elif task == "track":
            result = video.track(query.first_box, query=query.text)
        else:
            result = (video.span if task == "span" else video.ground)(query.text, allow_none=allow_none)
        row: dict[str, Any] = _described(query, task) | result.to_json()
        check_finite(row)
        return row
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 - any failure becomes a row, and the other queries continue
        return _failed(query, task, error)


def _failed(query: Query, task: str, error: Exception) -> dict[str, Any]:
    return _described(query, task) | {"error": f"{type(error).__name__}: {error}"}


def _described(query: Query, task: str) -> dict[str, Any]:
    row = {"id": query.id, "index": query.index, "video": query.video, "task": task, "query": query.text}
    return row | ({"first_box": list(query.first_box)} if task == "track" and query.first_box else {})


def _named(text: str, video: str, box: Sequence[float] | None) -> str:
    return f"{text!r} in {video}" + ("" if box is None else f" from the box {list(box)}")


def _is_left(query: Query, results: ResultFile, retry_failed: bool) -> bool:
    row = results.rows.get(query.id)
    if row is None:
        return True
    box = None if query.first_box is None else list(query.first_box)
    if (row["video"], row["query"], row.get("first_box")) != (query.video, query.text, box):
        found, now = _named(row["query"], row["video"], row.get("first_box")), _named(query.text, query.video, box)
        what = f"{results.path} has another query with the id {query.id!r}: {found}, now it is {now}. {START_AGAIN}"
        raise BridgeError("evaluation.other_results", what)
    return retry_failed and "error" in row
