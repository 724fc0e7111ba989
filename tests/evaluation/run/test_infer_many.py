"""Plain inference over tables and folders: one row a question, failures kept, unfinished runs go on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge_stg import cli
from bridge_stg.evaluation.run import bundle_model as bundle_models
from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.evaluation.run.executor import LocalEngine, Lost, open_engine
from bridge_stg.evaluation.run.infer_many import UNIT, infer_many, units_of
from bridge_stg.evaluation.run.queries import Question, read_questions
from bridge_stg.runtime.errors import AnnotationError, BridgeError
from tests.evaluation.official import video
from tests.fakes.chain import fake_grounder

ANSWERS = {"the red square": "<1.2 seconds> to <1.2 seconds>", "nothing": "none"}


def open_fake() -> Any:
    return fake_grounder(script=ANSWERS)


def fake(**identity: Any) -> Model:
    return Model("fake", {"fingerprint": "a", **identity}, open_fake)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two videos, one of them under two queries, one that is broken, and one that is not there."""
    media = tmp_path / "media"
    for name in ("a.mp4", "sub/b.mp4"):
        video(media / name, 3, 8)
    (media / "broken.mp4").write_bytes(b"no video")
    asked = [
        ("a.mp4", "the red square"), ("sub/b.mp4", "the red square"), ("broken.mp4", "it"), ("a.mp4", "nothing"),
        ("gone.mp4", "it"), ("a.mp4", "x" * 5000),
    ]  # fmt: skip
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"video": name, "query": query}) + "\n" for name, query in asked))
    return path


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row for row in lines[1:]}


def test_a_row_for_every_question(table: Path, tmp_path: Path) -> None:
    questions, out = read_questions(table, tmp_path / "media"), tmp_path / "out.jsonl"
    told: list[tuple[int, int]] = []
    found = infer_many(questions, fake(), out, progress=lambda label, done, total: told.append((done, total)))
    assert (found.answered, found.failed) == (3, 3) and told == [(0, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    rows = rows_of(out)
    assert [rows[str(i)]["index"] for i in range(1, 7)] == list(range(6))
    with open_fake() as grounder:
        expected = grounder.ground(tmp_path / "media/a.mp4", "the red square").to_json()
    got = {name: value for name, value in rows["1"].items() if name in expected and name != "timings_s"}
    assert got == {name: value for name, value in expected.items() if name != "timings_s"} and got["found"]
    assert rows["4"]["found"] is False and rows["4"]["video"] == "a.mp4" and rows["4"]["boxes"] is None
    assert rows["3"]["error"].startswith("VideoError") and "gone.mp4: was not found" in rows["5"]["error"]
    assert rows["6"]["error"].startswith("QueryError") and found.first_error == f"3: {rows['3']['error']}"


def test_an_unfinished_run_goes_on_and_only_the_failed_are_asked_again(table: Path, tmp_path: Path) -> None:
    questions, out, asked = read_questions(table, tmp_path / "media"), tmp_path / "out.jsonl", []

    class Counting(LocalEngine):
        def answers(self, open_model: Any, ask: Callable[..., Any], units: Any) -> Any:
            asked.extend(question.id for unit in units for question in unit)
            return super().answers(open_model, ask, units)

    infer_many(questions, fake(), out, engine=Counting())
    data = out.read_bytes()
    out.write_bytes(b"".join(data.splitlines(keepends=True)[:3])[:-7])  # killed while the second row was written
    asked.clear()
    infer_many(questions, fake(), out, engine=Counting())
    assert sorted(asked) == ["2", "3", "4", "5", "6"] and set(rows_of(out)) == {"1", "2", "3", "4", "5", "6"}
    video(tmp_path / "media/gone.mp4", 3, 8)
    asked.clear()
    again = read_questions(table, tmp_path / "media")
    found = infer_many(again, fake(), out, engine=Counting(), retry_failed=True)
    assert sorted(asked) == ["3", "5", "6"] and found.answered == 4 and "error" not in rows_of(out)["5"]
    with table.open("a") as file:
        file.write('{"video": "a.mp4", "query": "the red square", "id": "later"}\n')  # a table may grow
    asked.clear()
    infer_many(read_questions(table, tmp_path / "media"), fake(), out, engine=Counting())
    assert asked == ["later"]
    with pytest.raises(BridgeError, match="model.fingerprint is 'a', now it is 'b'"):
        infer_many(questions, fake(fingerprint="b"), out)
    with pytest.raises(BridgeError, match="its task is 'tube', now it is 'span'"):
        infer_many(questions, fake(), out, task="span")
    changed = [Question("1", 0, None, "a.mp4", "something else")]
    with pytest.raises(BridgeError, match="holds another question under the id '1': 'the red square' about a.mp4"):
        infer_many(changed, fake(), out)


def test_names_that_are_no_unicode(table: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.mp4")
    asked = [Question("1", 0, tmp_path / "media/a.mp4", name, "the red square"), Question("2", 1, None, name, "\ud800")]
    infer_many(asked, fake(), tmp_path / "out.jsonl")
    assert rows_of(tmp_path / "out.jsonl")["1"]["video"] == name
    infer_many(asked, fake(), tmp_path / "out.jsonl")  # and it goes on
    parquet = pytest.importorskip("pyarrow.parquet")
    infer_many(asked, fake(), tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet")["video"].to_pylist() == ["a?.mp4"] * 2


def test_a_full_disk_names_the_file(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device: .*out.jsonl"):
        infer_many(read_questions(table, tmp_path / "media"), fake(), tmp_path / "out.jsonl")


def test_units_that_are_lost_are_rows_too(table: Path, tmp_path: Path) -> None:
    class Losing(LocalEngine):
        def answers(self, open_model: Any, ask: Any, units: Any) -> Any:
            for place, answer in super().answers(open_model, ask, units):
                yield place, Lost("EngineError: gone") if place == 0 else answer

    found = infer_many(read_questions(table, tmp_path / "media"), fake(), tmp_path / "out.jsonl", engine=Losing())
    rows = rows_of(tmp_path / "out.jsonl")
    assert found.failed == 5 and [rows[i]["error"] for i in ("1", "4", "6")] == ["EngineError: gone"] * 3
    assert rows["1"]["query"] == "the red square" and "found" in rows["2"]


def test_questions_of_one_video_are_one_unit() -> None:
    questions = [Question(str(i), i, None, f"{i % 2}.mp4", "it") for i in range(2 * UNIT + 2)]
    units = units_of(questions)
    assert [len(unit) for unit in units] == [UNIT, 1, UNIT, 1]
    assert all(len({question.video for question in unit}) == 1 for unit in units)
    assert sorted(question.index for unit in units for question in unit) == list(range(2 * UNIT + 2))


def test_parquet_holds_what_the_lines_hold(table: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    questions = read_questions(table, tmp_path / "media")
    infer_many(questions, fake(), tmp_path / "out.jsonl")
    infer_many(questions, fake(), tmp_path / "out.parquet")
    assert {path.name for path in tmp_path.iterdir()} == {"media", "table.jsonl", "out.jsonl", "out.parquet"}
    read = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in read] == ["1", "2", "3", "4", "5", "6"]
    rows = rows_of(tmp_path / "out.jsonl")
    for row in read:
        expected = rows[row["id"]]
        assert set(expected) <= set(row) and {name for name in row if row[name] is not None} <= {*expected, "timings_s"}
        for name in ("video", "query", "error", "found", "span", "scores", "size", "coarse", "answer", "tokens"):
            assert row[name] == expected.get(name), name
        for ours, theirs in zip(row["boxes"] or [], expected.get("boxes") or []):
            assert ours["time_s"] == theirs["time_s"] and ours["visible"] == theirs["visible"]
            assert ours["box"] == pytest.approx(theirs["box"])
        assert len(row["boxes"] or []) == len(expected.get("boxes") or [])
    with pytest.raises(BridgeError, match="out.parquet is there already. Give --overwrite"):
        infer_many(questions, fake(), tmp_path / "out.parquet")


def test_tables_and_folders_are_read(table: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    path = media / "t.csv"
    path.write_text('\ufeffquery,id,video\n"the man, who sits\ndown",first,a.mp4\r\nit,,sub/b.mp4\n', encoding="utf-8")
    first, second = read_questions(path)
    assert (first.id, first.query, first.media) == ("first", "the man, who sits\ndown", media / "a.mp4")
    assert (second.id, second.index, second.video, second.media) == ("4", 1, "sub/b.mp4", media / "sub/b.mp4")
    found = read_questions(media, queries=["the dog", "it"])
    assert [(q.id, q.query) for q in found][:3] == [
        ("a.mp4#1", "the dog"),
        ("a.mp4#2", "it"),
        ("broken.mp4#1", "the dog"),
    ]
    assert found[-1].media == media / "sub/b.mp4" and len(found) == 6


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("a.jsonl", '{"video": "a.mp4"}\n', r"a\.jsonl:1: the field 'query' is missing; expected a text"),
        ("a.jsonl", '\n{"query": "it"}\n', r"a\.jsonl:2: the field 'video' is missing"),
        ("a.jsonl", "{\n", r"a\.jsonl:1: is no JSON"),
        ("a.jsonl", "[]\n", r"a\.jsonl:1: is no object"),
        ("a.jsonl", "\n", r"holds no question"),
        ("a.jsonl", '{"video": "a", "query": "b", "id": 2}\n' * 2, "the id '2' stands there twice"),
        ("a.csv", "video;query\n", "the header names video;query; expected the columns video and query"),
        ("a.csv", "video,query\na.mp4\n", r"a\.csv:2: the field 'query' is null"),
        ("a.txt", "", r"expected \.jsonl or \.csv, or a folder"),
    ],
)
def test_faults_of_tables(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AnnotationError, match=part):
        read_questions(tmp_path / name)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bundle_models, "bundle_model", lambda path, label, **options: fake())
    return tmp_path / "bundle"


def test_the_command(table: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["infer-many", str(table), "--media", str(tmp_path / "media"), "--bundle", str(bundle)]
    assert cli.run([*command, "--out", str(tmp_path / "out.jsonl")]) == 1
    output = capsys.readouterr()
    assert "3 answered, 3 failed; the rows are in" in output.out and "3: VideoError" in output.err
    folder = ["infer-many", str(tmp_path / "media/sub"), "--query", "nothing", "--bundle", str(bundle)]
    assert cli.run([*folder, "--task", "span", "--out", str(tmp_path / "folder.jsonl")]) == 0
    assert rows_of(tmp_path / "folder.jsonl")["b.mp4#1"]["task"] == "span"


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (["--out", "out.txt"], "expected the name of a file in .jsonl or .parquet"),
        (["--out", "nowhere/out.jsonl"], "no folder 'nowhere' to write into"),
        (["--out", "TABLE"], "is the table itself"),
        (["--query", "it"], "leave out --query"),
        (["--media", "nowhere"], "nowhere does not exist"),
        (["--engine", "spark"], "'spark' is not one of 'local', 'ray'"),
        (["--workers", "2"], "add --engine ray"),
    ],
)
def test_faults_of_the_user(
    table: Path, bundle: Path, tmp_path: Path, changed: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = [str(table) if value == "TABLE" else value for value in changed]
    before = table.read_bytes()
    command = ["infer-many", str(table), "--media", str(tmp_path / "media"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.run([*command, "--bundle", str(bundle), *changed]) == 2
    output = capsys.readouterr()
    assert part in " ".join(output.err.split()) and output.out == "" and "Traceback" not in output.err
    assert not (tmp_path / "out.jsonl").exists() and table.read_bytes() == before


def test_a_missing_package_is_named_with_its_extra(
    table: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("ray", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            command = ["infer-many", str(table), "--media", str(tmp_path / "media"), "--bundle", str(bundle)]
            assert cli.run([*command, "--engine", "ray", "--out", str(tmp_path / "out.jsonl")]) == 2
            assert 'pip install "bridge-stg[ray]"' in capsys.readouterr().err


@pytest.mark.slow
def test_ray_gives_the_same_rows(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    questions = read_questions(table, tmp_path / "media")
    infer_many(questions, fake(), tmp_path / "local.jsonl")
    with open_engine("ray", workers=2, threads=1) as engine:
        infer_many(questions, fake(), tmp_path / "ray.jsonl", engine=engine)
    local, spread = rows_of(tmp_path / "local.jsonl"), rows_of(tmp_path / "ray.jsonl")
    for row in (*local.values(), *spread.values()):
        row.pop("timings_s", None)
    assert spread == local
