"""Sources of `infer`: folders, patterns, addresses, live streams, standard input; queries from files; JSON lines."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bridge_stg import cli
from bridge_stg.evaluation.run.infer_many import answer_unit
from bridge_stg.evaluation.run.queries import Query
from bridge_stg.evaluation.sources import download, sources
from bridge_stg.runtime.errors import HostError
from bridge_stg.runtime.live import source as live
from bridge_stg.runtime.video.decoder import check_path
from bridge_stg.runtime.video.playback import play
from tests.bridge_stg.commands.fake_grounder import FakeGrounder, FakeVideo, complaint
from tests.evaluation.validation import validate


@pytest.fixture
def files(fake: list[Any], monkeypatch: pytest.MonkeyPatch, clip: Path) -> dict[str, bytes]:
    """The name and content of every file that the grounder opened, which must be there."""
    opened: dict[str, bytes] = {}

    def read(self: FakeGrounder, video: str, **options: Any) -> FakeVideo:
        opened[video] = Path(check_path(video)).read_bytes()
        return FakeVideo()

    monkeypatch.setattr(FakeGrounder, "open", read)
    monkeypatch.chdir(clip.parent)
    return opened


@pytest.fixture
def folder(clip: Path) -> Path:
    """A folder with two videos, one in a subfolder, a broken one, and a text."""
    (clip.parent / "videos/more").mkdir(parents=True)
    for name in ("a.mp4", "more/b.MP4"):
        (clip.parent / "videos" / name).write_bytes(clip.read_bytes())
    (clip.parent / "videos/broken.mp4").touch()
    (clip.parent / "videos/notes.txt").write_text("the dog\n\n the ghost \r\n")
    return clip.parent / "videos"


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def infer(*arguments: object) -> int:
    return cli.run(["infer", *map(str, arguments), "--bundle", "b"])


def test_a_broken_file_of_a_folder_is_reported_and_the_others_are_answered(
    files: dict[str, bytes], fake: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("videos", "--queries", "videos/notes.txt", "--query", "the cat")
    assert infer(*arguments, "--jsonl", "r.jsonl") == 2
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        *(
            f'videos/{name}  "{query}"  {answer}'
            for name in ("a.mp4", "more/b.MP4")
            for query, answer in (
                ("the cat", "0.40 s to 1.60 s"),
                ("the dog", "0.40 s to 1.60 s"),
                ("the ghost", "not found (probability 0.25)"),
            )
        ),
        "wrote r.jsonl",
    ]
    assert "broken.mp4" in shown.err and "[video.empty]" in shown.err and "1 of 3 sources failed" in shown.err
    assert len([path for path, _ in fake if path == Path("b")]) == 1  # the model is loaded once
    rows = lines(Path("r.jsonl").read_text())
    for row in rows:
        validate(row, "line")
    assert [(row["video"], row["query"]) for row in rows[:3]] == [
        ("videos/a.mp4", query) for query in ("the cat", "the dog", "the ghost")
    ]
    assert len(rows) == 9 and {row["error"]["code"] for row in rows if "error" in row} == {"video.empty"}
    with open("r.jsonl", "a") as file:
        file.write('{"cut')
    assert infer("videos/a.mp4", "the dog", "--jsonl", "r.jsonl") == 0  # appends, after what a killed process left
    assert "incomplete line" in capsys.readouterr().err
    assert [row.get("query") for row in lines(Path("r.jsonl").read_text())[8:]] == ["the ghost", "the dog"]
    arguments = ["infer", "videos/a.mp4", "the dog", "--bundle", "b", "--jsonl"]
    Path("text.jsonl").write_text("a text")
    complaint([*arguments, "text.jsonl"], capsys, code="output.exists")
    assert Path("text.jsonl").read_text() == "a text"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["videos/*.mp4", "q"], ["videos/a.mp4"]),
        (["videos/**/*.[mM]*4", "q"], ["videos/a.mp4", "videos/more/b.MP4"]),
        (["videos/a.mp4", "clip.mp4", "videos/a.mp4", "--query", "q"], ["videos/a.mp4", "clip.mp4"]),
    ],
)
def test_patterns_and_lists(
    arguments: list[str], names: list[str], files: dict[str, bytes], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.mp4").unlink()
    assert infer(*arguments, "--jsonl", "-") == 0
    assert [row["video"] for row in lines(capsys.readouterr().out)] == names == list(files)


def test_an_error_of_the_system_ends_all(
    files: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise HostError("host.out_of_memory", "no memory")

    monkeypatch.setattr(FakeGrounder, "open", fail)
    assert infer("videos", "q") == 2 and capsys.readouterr().err.count("[host.out_of_memory]") == 1


def test_standard_input_and_standard_output(
    files: dict[str, bytes], clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = clip.read_bytes()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(content)))
    assert infer("-", "the dog", "--json", "-", "--annotate", "a.mp4", "--sheet", "s.png") == 0
    document = json.loads(capsys.readouterr().out)  # and nothing else
    assert document["source"] == "-" and document["results"][0]["query"] == "the dog"
    assert list(files.values()) == [content] and not Path(*files).exists()
    assert Path("a.mp4").exists() and Path("s.png").exists()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO()))
    assert "standard input" in complaint(["infer", "-", "q", "--bundle", "b"], capsys, code="video.empty")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    complaint(["infer", "-", "q", "--bundle", "b"], capsys, code="options.invalid")


def test_the_exit_code_says_whether_something_was_found(files: dict[str, bytes], folder: Path) -> None:
    assert infer("clip.mp4", "the ghost") == 0
    assert infer("clip.mp4", "the ghost", "--exit-code") == 3
    assert infer("clip.mp4", "the ghost", "the dog", "--exit-code") == 0
    assert infer("videos", "the ghost", "--exit-code") == 2  # one of them is broken


class Answer(BaseHTTPRequestHandler):
    """Answers by path."""

    content = b""
    seen: dict[str, str | None] = {}  # noqa: RUF012 - set by the fixture
    ranges: list[tuple[str | None, str | None]] = []  # noqa: RUF012 - of requests for /dropped

    def do_GET(self) -> None:
        self.seen[self.path] = self.headers["Authorization"]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/clip.mp4?token=1")
            self.end_headers()
            return
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/clip.mp4")
            self.end_headers()
            return
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/slow":
            threading.Event().wait(0.5)
        if self.path.startswith("/dropped"):
            self.send_part(self.path.partition("?")[2])
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace" if self.path == "/live" else "video/mp4")
        content = b"no video" if self.path == "/text" else self.content
        size = {"/cut": 10**6, "/huge": 2**40}.get(self.path, len(content))
        if self.path != "/unsized":
            self.send_header("Content-Length", str(size))
        self.end_headers()
        with suppress(ConnectionError):  # of a reader that has given up
            self.wfile.write(content)

    def send_part(self, kind: str) -> None:
        """Send at most a third of the content, from where it is requested, and drop the connection."""
        given = self.headers["Range"]
        self.ranges.append((given, self.headers["If-Range"]))
        content = self.content + bytes(99) if kind == "changed" and len(self.ranges) > 1 else self.content
        if kind == "busy" and len(self.ranges) == 2:
            self.send_error(503)
            return
        known = given is not None and kind != "changed"
        start = int(given[6:-1]) if known else 0
        self.send_response(206 if known else 200)
        if kind != "plain":
            self.send_header("ETag", f'"{len(content)}"')
        if known:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        whole = kind in ("plain", "changed") and len(self.ranges) == 3
        self.wfile.write(content[start:] if whole else content[start : start + len(content) // 3 + 1])

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(clip: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Answer, "content", clip.read_bytes())
    monkeypatch.setattr(Answer, "seen", {})
    monkeypatch.setattr(Answer, "ranges", [])
    monkeypatch.setattr(download, "PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()


def test_an_address_is_downloaded(
    server: str, files: dict[str, bytes], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in ("clip.mp4", "moved", "unsized"):
        assert infer(f"http://me:a%20b@{server}/{path}", "q", "--json", "-", "--sheet", "s.png") == 0
        assert json.loads(capsys.readouterr().out)["source"] == f"http://{server}/{path}"  # without the password
    assert list(files.values()) == [clip.read_bytes()] * 3 and not any(map(Path.exists, map(Path, files)))
    assert Answer.seen["/clip.mp4"] == "Basic bWU6YSBi" and Answer.seen["/clip.mp4?token=1"] is None


@pytest.mark.parametrize("kind", ["tagged", "busy", "changed", "plain"])
def test_a_download_goes_on_after_an_interruption(
    kind: str, server: str, files: dict[str, bytes], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer(f"http://{server}/dropped?{kind}", "q") == 0
    content = clip.read_bytes()
    size, third = len(content), len(content) // 3 + 1
    assert list(files.values()) == [content + bytes(99) if kind == "changed" else content]
    assert not any(map(Path.exists, map(Path, files)))
    first, second, last = (None, None), (f"bytes={third}-", f'"{size}"'), (f"bytes={2 * third}-", f'"{size}"')
    expected = {
        "tagged": [first, second, last],
        "busy": [first, second, second, last],
        "changed": [first, second, (f"bytes={(size + 99) // 3 + 1}-", f'"{size + 99}"')],
        "plain": [first] * 3,  # without a tag the rest cannot be requested
    }
    assert Answer.ranges == expected[kind]


def test_other_commands_take_addresses(
    server: str, files: dict[str, bytes], fake: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["ask", f"http://{server}/clip.mp4", "What?", "--bundle", "b"]) == 0
    assert capsys.readouterr().out and Path(fake[-1][0]).name == "video.mp4" and not Path(fake[-1][0]).exists()
    complaint(["ask", "videos", "What?", "--bundle", "b"], capsys, code="options.conflict")
    queries = [Query(str(i), i, None, f"http://{server}/{name}", "the dog") for i, name in enumerate(("a", "missing"))]
    found, missing = (answer_unit(FakeGrounder(), [query], task="tube", allow_none=True)[0] for query in queries)
    assert found["found"] and found["video"] == queries[0].video and "error" in missing and len(files) == 1


@pytest.mark.parametrize(
    ("path", "code", "options"),
    [
        ("missing", "video.download_failed", []),
        ("away", "video.download_failed", []),
        ("cut", "video.download_failed", []),
        ("slow", "video.download_failed", ["--stall", "0.1"]),
        ("slow", "call.deadline", ["--deadline", "0.3"]),
        ("huge", "video.too_large", []),
        ("live", "video.is_stream", []),
    ],
)
@pytest.mark.usefixtures("fake")
def test_a_download_that_fails(
    path: str, code: str, options: list[str], server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = complaint(["infer", f"http://{server}/{path}", "q", "--bundle", "b", *options], capsys, code=code)
    assert ("--deadline 0.3" if code == "call.deadline" else f"{server}/{path}") in line
    assert all(path == Path("b") for path, _ in FakeGrounder.calls)  # no video was opened


def test_no_server_and_no_host(files: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    for address in ("http://127.0.0.1:1/v.mp4", "https://", "http://[::/v.mp4", "http://127.0.0.1:x/v.mp4"):
        complaint(["infer", address, "q", "--bundle", "b"], capsys, code="video.download_failed")


def test_errors_name_the_address_instead_of_the_copy(
    server: str, fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeGrounder, "open", lambda self, video, **options: play(video).__enter__())
    line = complaint(["infer", f"http://{server}/text", "q", "--bundle", "b"], capsys, code="video.unreadable")
    assert line.startswith(f"Error: http://{server}/text ") and "/video" not in line


@pytest.mark.parametrize("word", ["0", "rtsp://me:secret@camera/1"])
def test_a_camera_is_read_for_some_seconds(
    word: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def frames(stop: threading.Event) -> Iterator[tuple[float, Any]]:
        for i in range(100):
            yield i / 10, lambda i=i: np.full((48, 64, 3), 10 + i, np.uint8)

    opened = live.LiveSource("camera", True, frames)
    monkeypatch.setattr(live, "open_live", lambda word, **options: opened)
    assert infer(word, "the dog", "--seconds", "2", "--json", "-", "--annotate", "a.mp4") == 0
    assert json.loads(capsys.readouterr().out)["source"] == word.replace("me:secret@", "")
    with play("a.mp4") as played:
        assert len(list(played.frames)) == 21
    assert len(files) == 1


def test_sources_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").touch()
    (tmp_path / "a[1].mp4").touch()
    found = sources.find_sources(["1", "2", "a[1].mp4", "HTTPS://x/y", "-", "nowhere.mp4", "1"])
    assert [one.kind for one in found] == ["file", "live", "file", "address", "stdin", "file"]
    assert not any(one.listed for one in found)
