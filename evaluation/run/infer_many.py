"""Plain inference over many (video, query): a row for each, in JSON lines that survive a kill, or in Parquet.

The questions about one video are one unit of work, so that they share its decoding and the prompt's video part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.run.evaluate import Model, check_finite
from bridge_stg.evaluation.run.executor import Engine, LocalEngine, Lost
from bridge_stg.evaluation.run.queries import Question
from bridge_stg.evaluation.run.results import ResultFile
from bridge_stg.runtime.errors import BridgeError, VideoError

UNIT = 16
"""Questions of one unit: a video with hundreds is spread over workers, and a kill loses few answers."""
KEPT = ("id", "video", "query", "error")


@dataclass(frozen=True)
class Inferred:
    """What came of it.

    Attributes:
        answered: how many questions have an answer.
        failed: how many have an error instead.
        first_error: one of them, with the question's id.
    """

    answered: int
    failed: int
    first_error: str | None


def infer_many(
    questions: Sequence[Question],
    model: Model,
    out: Path,
    *,
    task: str = "tube",
    allow_none: bool = True,
    max_visual_tokens: int | None = None,
    engine: Engine | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Inferred:
    """Ask every question and write a row for each, in the order in which they are finished; failures are rows too.

    A row has the question's `id`, `index` and `video`, and either what `Grounding.to_json` gives or `error`.

    Args:
        questions: what to ask; ids must differ.
        model: who is asked.
        out: a `.jsonl` file, whose finished rows are kept and whose first line says what was asked of which model; or a
            `.parquet` file, which is written when all is finished, from such a file beside it.
        task: `tube`, `span`, or `image`.
        allow_none: whether "not there" is a possible answer; never of an image.
        max_visual_tokens: see `Grounder.open`.
        engine: who asks; this process if not given.
        overwrite: start again.
        retry_failed: ask again what failed in an earlier run. Of rows with one id the last counts.
        progress: called as progress(label, done, total) before the first and after each unit.

    Raises:
        BridgeError: `out` holds results of something else, or the model cannot be opened.
        ImportError: a package is missing.
    """
    parquet = out.suffix.lower() == ".parquet"
    if parquet:
        import pyarrow.parquet  # noqa: F401 - missing packages are named before the work

        if out.exists() and not overwrite:
            raise BridgeError(f"{out} is there already. Give --overwrite to replace it, or another --out.")
    lines = out.with_name(f"{out.name}.partial.jsonl") if parquet else out
    options: dict[str, Any] = {"task": task, "allow_none": allow_none, "max_visual_tokens": max_visual_tokens}
    report = progress or (lambda label, done, total: None)
    with ResultFile(lines, {**options, "model": dict(model.identity)}, overwrite=overwrite, kept=KEPT) as results:
        left = [question for question in questions if _is_left(question, results, retry_failed)]
        done = len(questions) - len(left)
        report(model.label, done, len(questions))
        if left:
            units = units_of(left)
            ask = partial(answer_unit, **options)
            with closing((engine or LocalEngine()).answers(model.open, ask, units)) as answers:
                for place, rows in answers:
                    if isinstance(rows, Lost):
                        rows = [_described(question, task) | {"error": rows.error} for question in units[place]]
                    for row in rows:
                        results.add(row)
                    done += len(rows)
                    report(model.label, done, len(questions))
        found = [results.rows[question.id] for question in questions]
        if parquet:
            from bridge_stg.evaluation.run.parquet import write_parquet

            write_parquet(lines, [question.id for question in questions], out)
    if parquet:
        lines.unlink()
    errors = [f"{row['id']}: {row['error']}" for row in found if "error" in row]
    return Inferred(len(found) - len(errors), len(errors), errors[0] if errors else None)


def units_of(questions: Iterable[Question]) -> list[list[Question]]:
    """Return the questions by video, `UNIT` at most in a unit, videos in the order of their first question."""
    first: dict[str, int] = {}
    for question in questions:
        first.setdefault(question.video, len(first))
    made = []
    for _, group in groupby(sorted(questions, key=lambda q: (first[q.video], q.index)), lambda q: q.video):
        asked = list(group)
        made += [asked[start : start + UNIT] for start in range(0, len(asked), UNIT)]
    return made


def answer_unit(
    grounder: Any, questions: Sequence[Question], *, task: str, allow_none: bool, max_visual_tokens: int | None
) -> list[dict[str, Any]]:
    """Ask what is to be known of one video and return a row a question.

    Raises:
        ImportError: a package is missing, which would fail every question.
    """
    try:
        if questions[0].media is None:
            raise VideoError(f"{questions[0].video}: was not found in the folder of media")
        with grounder.open(questions[0].media, max_visual_tokens=max_visual_tokens) as video:
            return [_answer(video, question, task, allow_none) for question in questions]
    except ImportError:
        raise
    except Exception as error:  # the video: whatever it is, the others go on
        return [_failed(question, task, error) for question in questions]


def _answer(video: Any, question: Question, task: str, allow_none: bool) -> dict[str, Any]:
    try:
        if task == "image":
            result = video.locate(question.query)
        else:
            result = (video.span if task == "span" else video.ground)(question.query, allow_none=allow_none)
        row = _described(question, task) | result.to_json()
        check_finite(row)
        return row
    except ImportError:
        raise
    except Exception as error:  # whatever it is, the other questions go on
        return _failed(question, task, error)


def _failed(question: Question, task: str, error: Exception) -> dict[str, Any]:
    return _described(question, task) | {"error": f"{type(error).__name__}: {error}"}


def _described(question: Question, task: str) -> dict[str, Any]:
    return {
        "id": question.id, "index": question.index, "video": question.video, "task": task, "query": question.query
    }  # fmt: skip


def _is_left(question: Question, results: ResultFile, retry_failed: bool) -> bool:
    row = results.rows.get(question.id)
    if row is None:
        return True
    if (row["video"], row["query"]) != (question.video, question.query):
        raise BridgeError(
            f"{results.path} holds another question under the id {question.id!r}: {row['query']!r} about "
            f"{row['video']}, now it is {question.query!r} about {question.video}. Give --overwrite to start again, or "
            "another --out."
        )
    return retry_failed and "error" in row
