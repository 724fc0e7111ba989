"""Inference over tables and folders: one row per query, failures kept, unfinished runs resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridge_stg import cli
from bridge_stg.evaluation.run import evaluate as evaluate_module
from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.evaluation.run.executor import LocalExecutor, Lost, open_executor
from bridge_stg.evaluation.run.infer_many import UNIT, infer_many, units_of
from bridge_stg.evaluation.run.queries import Query, read_queries
from bridge_stg.runtime.host.packages import install_command
from tests.errors import raises
from tests.evaluation.official import video
from tests.evaluation.validation import validate
from tests.fakes.chain import fake_grounder, fake_spec
from tests.fakes.clips import two_streams

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
    answered = [
        ("a.mp4", "the red square"), ("sub/b.mp4", "the red square"), ("broken.mp4", "it"), ("a.mp4", "nothing"),
        ("gone.mp4", "it"), ("a.mp4", "x" * 5000),
    ]  # fmt: skip
    path = tmp_path / "table.jsonl"
    path.write_text("".join(json.dumps({"video": name, "query": query}) + "\n" for name, query in answered))
    return path


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: row for row in lines[1:]}


def test_a_row_for_every_query(table: Path, tmp_path: Path) -> None:
    queries, out = read_queries(table, tmp_path / "media"), tmp_path / "out.jsonl"
    calls: list[tuple[int, int]] = []
    found = infer_many(queries, fake(), out, progress=lambda label, done, total: calls.append((done, total)))
    assert (found.answered, found.failed) == (3, 3) and calls == [(0, 6), (3, 6), (4, 6), (5, 6), (6, 6)]
    header, *lines = map(json.loads, out.read_text().splitlines())
    validate(header, "table_header")
    for line in lines:
        validate(line, "table_row")
    rows = rows_of(out)
    assert [rows[str(i)]["index"] for i in range(1, 7)] == list(range(6))
    with open_fake() as grounder:
        expected = grounder.ground(tmp_path / "media/a.mp4", "the red square").to_json()
    got = {name: value for name, value in rows["1"].items() if name in expected and name != "timings_s"}
    assert got == {name: value for name, value in expected.items() if name != "timings_s"} and got["found"]
    assert rows["4"]["found"] is False and rows["4"]["video"] == "a.mp4" and rows["4"]["boxes"] is None
    assert rows["3"]["error"].startswith("VideoError") and "gone.mp4: was not found" in rows["5"]["error"]
    assert rows["6"]["error"].startswith("QueryError") and found.first_error == f"3: {rows['3']['error']}"


def test_another_video_stream(tmp_path: Path) -> None:
    query = Query("1", 0, two_streams(tmp_path / "a.mkv", default=0), "a.mkv", "the red square")
    for stream, width in ((0, 64), (1, 96)):
        assert infer_many([query], fake(), tmp_path / f"{stream}.jsonl", stream=stream).answered == 1
        row = rows_of(tmp_path / f"{stream}.jsonl")["1"]
        assert (row["stream"], row["size"]["width"], row["clock"]) == (stream, width, "timestamps")


def test_an_unfinished_run_is_resumed_and_only_failed_rows_are_run_again(table: Path, tmp_path: Path) -> None:
    queries, out, answered = read_queries(table, tmp_path / "media"), tmp_path / "out.jsonl", []

    class Counting(LocalExecutor):
        def answers(self, open_model: Any, answer: Callable[..., Any], units: Any) -> Any:
            answered.extend(query.id for unit in units for query in unit)
            return super().answers(open_model, answer, units)

    infer_many(queries, fake(), out, executor=Counting())
    data = out.read_bytes()
    out.write_bytes(b"".join(data.splitlines(keepends=True)[:3])[:-7])  # killed while the second row was written
    answered.clear()
    infer_many(queries, fake(), out, executor=Counting())
    assert sorted(answered) == ["2", "3", "4", "5", "6"] and set(rows_of(out)) == {"1", "2", "3", "4", "5", "6"}
    video(tmp_path / "media/gone.mp4", 3, 8)
    answered.clear()
    again = read_queries(table, tmp_path / "media")
    found = infer_many(again, fake(), out, executor=Counting(), retry_failed=True)
    assert sorted(answered) == ["3", "5", "6"] and found.answered == 4 and "error" not in rows_of(out)["5"]
    with table.open("a") as file:
        file.write('{"video": "a.mp4", "query": "the red square", "id": "later"}\n')  # a table may grow
    answered.clear()
    infer_many(read_queries(table, tmp_path / "media"), fake(), out, executor=Counting())
    assert answered == ["later"]
    with raises("evaluation.other_results", "model.fingerprint", "'a'", "'b'"):
        infer_many(queries, fake(fingerprint="b"), out)
    with raises("evaluation.other_results", "task", "'tube'", "'span'"):
        infer_many(queries, fake(), out, task="span")
    with raises("evaluation.other_results", "stream"):
        infer_many(queries, fake(), out, stream=1)
    changed = [Query("1", 0, None, "a.mp4", "something else")]
    with raises("evaluation.other_results", "'1'", "'the red square'", "a.mp4"):
        infer_many(changed, fake(), out)


def test_names_that_are_no_unicode(table: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff.mp4")
    answered = [Query("1", 0, tmp_path / "media/a.mp4", name, "the red square"), Query("2", 1, None, name, "\ud800")]
    infer_many(answered, fake(), tmp_path / "out.jsonl")
    assert rows_of(tmp_path / "out.jsonl")["1"]["video"] == name
    infer_many(answered, fake(), tmp_path / "out.jsonl")  # and it can be resumed
    parquet = pytest.importorskip("pyarrow.parquet")
    infer_many(answered, fake(), tmp_path / "out.parquet")
    assert parquet.read_table(tmp_path / "out.parquet")["video"].to_pylist() == ["a?.mp4"] * 2


def test_a_full_disk_names_the_file(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*out\.jsonl"):
        infer_many(read_queries(table, tmp_path / "media"), fake(), tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_results_that_were_removed_meanwhile_are_an_error(table: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    queries, out = read_queries(table, tmp_path / "media"), tmp_path / "out" / name

    def remove(label: str, done: int, total: int) -> None:
        if done == 3:
            shutil.rmtree(out.parent)

    with raises("output.not_writable", out.parent):
        infer_many(queries, fake(), out, progress=remove)


def test_units_that_are_lost_are_rows_too(table: Path, tmp_path: Path) -> None:
    class Losing(LocalExecutor):
        def answers(self, open_model: Any, answer: Any, units: Any) -> Any:
            for place, row in super().answers(open_model, answer, units):
                yield place, Lost("EngineError: gone") if place == 0 else row

    found = infer_many(read_queries(table, tmp_path / "media"), fake(), tmp_path / "out.jsonl", executor=Losing())
    rows = rows_of(tmp_path / "out.jsonl")
    assert found.failed == 5 and [rows[i]["error"] for i in ("1", "4", "6")] == ["EngineError: gone"] * 3
    assert rows["1"]["query"] == "the red square" and "found" in rows["2"]


def test_queries_of_one_video_are_one_unit() -> None:
    queries = [Query(str(i), i, None, f"{i % 2}.mp4", "it") for i in range(2 * UNIT + 2)]
    units = units_of(queries)
    assert [len(unit) for unit in units] == [UNIT, 1, UNIT, 1]
    assert all(len({query.video for query in unit}) == 1 for unit in units)
    assert sorted(query.index for unit in units for query in unit) == list(range(2 * UNIT + 2))


def test_parquet_holds_what_the_lines_hold(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    for package in ("ray", "pandas"):
        monkeypatch.setitem(sys.modules, package, None)
    queries = read_queries(table, tmp_path / "media")
    infer_many(queries, fake(), tmp_path / "out.jsonl")
    infer_many(queries, fake(), tmp_path / "out.parquet")
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
    with raises("output.exists", "out.parquet", "--overwrite"):
        infer_many(queries, fake(), tmp_path / "out.parquet")


def test_tables_and_folders_are_read(table: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    path = media / "t.csv"
    path.write_text('\ufeffquery,id,video\n"the man, who sits\ndown",first,a.mp4\r\nit,,sub/b.mp4\n', encoding="utf-8")
    first, second = read_queries(path)
    assert (first.id, first.text, first.media) == ("first", "the man, who sits\ndown", media / "a.mp4")
    assert (second.id, second.index, second.video, second.media) == ("4", 1, "sub/b.mp4", media / "sub/b.mp4")
    found = read_queries(media, texts=["the dog", "it"])
    assert [(q.id, q.text) for q in found][:3] == [
        ("a.mp4#1", "the dog"),
        ("a.mp4#2", "it"),
        ("broken.mp4#1", "the dog"),
    ]
    assert found[-1].media == media / "sub/b.mp4" and len(found) == 6


@pytest.mark.parametrize(
    ("name", "text", "code", "values"),
    [
        ("a.jsonl", '{"video": "a.mp4"}\n', "annotation.bad_field", ("a.jsonl:1", "'query'")),
        ("a.jsonl", '\n{"query": "it"}\n', "annotation.bad_field", ("a.jsonl:2", "'video'")),
        ("a.jsonl", "{\n", "annotation.bad_line", ("a.jsonl:1",)),
        ("a.jsonl", "[]\n", "annotation.bad_line", ("a.jsonl:1",)),
        ("a.jsonl", "\n", "annotation.empty", ("a.jsonl",)),
        ("a.jsonl", '{"video": "a", "query": "b", "id": 2}\n' * 2, "annotation.duplicate_id", ("a.jsonl", "'2'")),
        ("a.csv", "video;query\n", "annotation.bad_line", ("a.csv:1", "video;query")),
        ("a.csv", "video,query,video\na.mp4,it,b.mp4\n", "annotation.bad_line", ("a.csv:1", "video, query, video")),
        ("a.csv", "video,query\na.mp4\n", "annotation.bad_field", ("a.csv:2", "'query'", "null")),
        ("a.csv", 'video,query\na.mp4,"it\n', "annotation.bad_line", ("a.csv:",)),
        ("a.txt", "", "annotation.bad_file", ("a.txt", ".jsonl", ".csv")),
    ],
)
def test_faults_of_tables(tmp_path: Path, name: str, text: str, code: str, values: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text)
    with raises(code, *values):
        read_queries(tmp_path / name)


def test_faults_of_folders(tmp_path: Path) -> None:
    with raises("options.conflict", "--media"):
        read_queries(tmp_path, tmp_path, texts=["it"])
    with raises("options.missing", "--query"):
        read_queries(tmp_path)
    with raises("annotation.empty", tmp_path, ".mp4"):
        read_queries(tmp_path, texts=["it"])
    with raises("annotation.not_found", "nowhere"):
        read_queries(tmp_path / "nowhere")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate_module, "bundle_model", lambda path, label, **options: fake())
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
    ("changed", "code", "values"),
    [
        (["--out", "out.txt"], "output.bad_suffix", (".jsonl", ".parquet")),
        (["--out", "nowhere/out.jsonl"], "output.no_folder", ("nowhere",)),
        (["--out", "TABLE"], "output.is_input", ("table.jsonl",)),
        (["--query", "it"], "options.conflict", ("--query",)),
        (["--media", "nowhere"], "annotation.no_media_folder", ("nowhere",)),
        (["--executor", "spark"], "options.invalid", ("'spark'", "'local', 'ray'")),
        (["--engine", "spark"], "options.invalid", ("'spark'",)),
        (["--workers", "2"], "options.conflict", ("--executor ray",)),
    ],
)
def test_faults_of_the_user(
    *, table: Path, bundle: Path, tmp_path: Path, changed: list[str], code: str, values: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = [str(table) if value == "TABLE" else value for value in changed]
    before = table.read_bytes()
    command = ["infer-many", str(table), "--media", str(tmp_path / "media"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.run([*command, "--bundle", str(bundle), *changed]) == 2
    output = capsys.readouterr()
    assert output.err.endswith(f" [{code}]\n") and all(value in output.err for value in values)
    assert output.out == "" and "Traceback" not in output.err
    assert not (tmp_path / "out.jsonl").exists() and table.read_bytes() == before


def test_a_missing_package_is_named_with_its_extra(
    table: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = (("ray", "ray", ["--executor", "ray"], "out.jsonl"), ("pyarrow", "parquet", [], "out.parquet"))
    for package, extra, options, out in runs:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            command = ["infer-many", str(table), "--media", str(tmp_path / "media"), "--bundle", str(bundle)]
            assert cli.run([*command, *options, "--out", str(tmp_path / out)]) == 2
            assert install_command(extra) in capsys.readouterr().err


@pytest.mark.slow
def test_ray_gives_the_same_rows(table: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    queries = read_queries(table, tmp_path / "media")
    infer_many(queries, fake(), tmp_path / "local.jsonl")
    with open_executor("ray", workers=2, threads=1) as executor:
        infer_many(queries, fake(), tmp_path / "ray.jsonl", executor=executor)
    local, spread = rows_of(tmp_path / "local.jsonl"), rows_of(tmp_path / "ray.jsonl")
    for row in (*local.values(), *spread.values()):
        row.pop("timings_s", None)
    assert spread == local


def test_videos_are_searched_in_windows(table: Path, tmp_path: Path) -> None:
    queries = read_queries(table, tmp_path / "media")
    found = infer_many(queries, fake(), tmp_path / "out.jsonl", window=2.0, top=1)
    assert (found.answered, found.failed) == (3, 3)
    for row in rows_of(tmp_path / "out.jsonl").values():
        if "error" not in row:
            assert row["windows"]["count"] == 2 and len(row["occurrences"]) == row["found"]
    infer_many(queries, fake(), tmp_path / "top.jsonl", top=1)  # as in `infer`, it searches short videos too
    with raises("evaluation.other_results", "top"):  # not even without options of a search
        infer_many(queries, fake(), tmp_path / "top.jsonl")
    searched = [row for row in rows_of(tmp_path / "top.jsonl").values() if "error" not in row]
    assert len(searched) == 3 and all("occurrences" in row for row in searched)
    infer_many(queries, fake(), tmp_path / "out.parquet", window=2.0)
    with raises("evaluation.other_results", "top"):
        infer_many(queries, fake(), tmp_path / "out.jsonl", window=2.0)
    with raises("options.out_of_range", "window_s=1000.0"):
        infer_many(queries, replace(fake(), spec=fake_spec()), tmp_path / "new.jsonl", window=1000.0)
    assert not (tmp_path / "new.jsonl").exists()


def test_finished_windows_of_a_search_that_was_stopped_are_kept(tmp_path: Path) -> None:
    media, out, calls = tmp_path / "a.mp4", tmp_path / "out.jsonl", []

    def opened(stop_after: float = math.inf) -> Any:
        """Return a grounder that the user stops after so many calls of the language model."""

        def before(feeds: object) -> None:
            calls.append(feeds)
            if len(calls) > stop_after:
                raise KeyboardInterrupt

        grounder = open_fake()
        grounder.sessions["language_model"].before = before
        return grounder

    def run(stop_after: float = math.inf, **options: Any) -> int:
        calls.clear()
        model = Model("fake", {}, lambda: opened(stop_after))
        infer_many([Query("1", 0, media, "a.mp4", "the red square")], model, out, window=2.0, **options)
        return len(calls)

    video(media, 9, 8)
    whole = run()
    rows = rows_of(out)
    with pytest.raises(KeyboardInterrupt):
        run(whole - 2, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} > {"a.mp4", "out.jsonl"} and not rows_of(out)
    assert 0 < run() < whole / 2
    again = rows_of(out)
    assert again["1"]["occurrences"] == rows["1"]["occurrences"] and again["1"]["windows"] == rows["1"]["windows"]
    with pytest.raises(KeyboardInterrupt):
        run(whole - 2, overwrite=True)
    video(media, 8.5, 8)  # another file: nothing of the first one is used
    assert run() > whole / 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "out.jsonl"}


def test_tracks_begin_with_the_box_of_a_row_or_the_option(bundle: Path, tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 3, 8)
    table = tmp_path / "table.csv"
    table.write_text('video,query,first_box\na.mp4,,"2,3,20,21"\na.mp4,the red square,\n')
    first, second = read_queries(table, task="track", first_box=(1, 2, 10, 12))
    assert (first.first_box, second.first_box) == ((2, 3, 20, 21), (1, 2, 10, 12)) and first.text == "the object"
    out = tmp_path / "out.jsonl"
    command = ["infer-many", str(table), "--bundle", str(bundle), "--out", str(out)]
    assert cli.run([*command, "--task", "track", "--first-box", "1,2,10,12"]) == 0
    for row, box in zip(rows_of(out).values(), ([2, 3, 20, 21], [1, 2, 10, 12])):
        validate(row, "table_row")
        assert row["task"] == "track" and row["boxes"][0]["box"] == row["first_box"] == box
    assert cli.run([*command, "--task", "track", "--first-box", "1,2,10,13"]) == 2  # of another box
    with raises("annotation.bad_field", "table.csv:3", "first_box"):
        read_queries(table, task="track")
    with raises("options.missing", "--first-box"):
        read_queries(tmp_path, task="track")
    assert cli.run([*command, "--task", "span", "--first-box", "1,2,10,12"]) == 2
