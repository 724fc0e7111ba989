"""The happy path through real HTTP: what the server answers is what `Grounder` answers."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from bridge_stg.server.jobs import render as annotated
from tests.bridge_stg.server.conftest import (
    CLIPS,
    Running,
    answer_of,
    ask,
    ended,
    events,
    http_error,
    metric,
    small_clip,
    until,
    upload,
)
from tests.evaluation.validation import validate
from tests.fakes.chain import fake_grounder, fake_spec
from tests.fakes.clips import two_streams, write

QUERIES = ["where is the blue bird", "the bus"]


def test_an_uploaded_video_is_answered_as_by_the_runtime(demo_server: Running) -> None:
    with demo_server.client() as client:
        video = upload(client, CLIPS[0])
        assert (video["kind"], video["duration_s"], video["frames"]) == ("video", 9.0, 72)
        assert (video["width"], video["height"], video["name"]) == (640, 360, CLIPS[0].name)
        asked = ask(client, video["id"], QUERIES[:1])
        assert asked.status_code == 202 and asked.json()["status"] in ("queued", "running")
        done = ended(client, asked.json()["id"])
    alone = demo_server.grounder.ground(CLIPS[0], QUERIES[0])
    assert alone.found and [answer_of(result) for result in done["results"]] == [answer_of(alone)]


def test_one_call_waits_for_its_answers(demo_server: Running) -> None:
    with demo_server.client() as client:
        answer = client.post(
            "/v1/ground",
            files=[("file", ("a.mp4", CLIPS[1].read_bytes())), *(("queries", (None, query)) for query in QUERIES)],
        )
    assert answer.status_code == 200, answer.text
    with demo_server.grounder.open(CLIPS[1]) as video:
        together = video.ground_many(QUERIES)
    assert [answer_of(result) for result in answer.json()["results"]] == [answer_of(one) for one in together]
    for result, query in zip(answer.json()["results"], QUERIES, strict=True):
        alone = answer_of(demo_server.grounder.ground(CLIPS[1], query))
        assert (result["answer"], result["span"]) == (alone["answer"], alone["span"])
        if alone["boxes"]:
            np.testing.assert_allclose(
                [box["box"] for box in result["boxes"]], [box["box"] for box in alone["boxes"]], atol=0.05
            )


def test_events_report_progress_and_each_connection_begins_with_the_state(demo_server: Running) -> None:
    with demo_server.client() as client:
        job = ask(client, upload(client, CLIPS[2])["id"], QUERIES).json()["id"]
        with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            first = next(events(stream.iter_lines()))  # then the connection breaks
        assert first[0] in ("queued", "progress")
        with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
            received = list(events(stream.iter_lines()))
        assert [name for name, _ in received[:-1]] == ["progress"] * (len(received) - 1) and received[-1][0] == "done"
        assert {"stage", "done", "total"} == set(received[0][1]) if len(received) > 1 else True
        with client.stream("GET", f"/v1/jobs/{job}/events") as stream:
            again = list(events(stream.iter_lines()))
        assert again == [received[-1]] and len(again[0][1]["results"]) == 2


def test_only_when_it_happens(demo_server: Running) -> None:
    with demo_server.client() as client:
        job = ask(client, upload(client, CLIPS[0])["id"], QUERIES, task="span", allow_none=False).json()["id"]
        done = ended(client, job)
    for result, query in zip(done["results"], QUERIES, strict=True):
        alone = demo_server.grounder.span(CLIPS[0], query, allow_none=False)
        assert result["boxes"] is None and result["task"] == "span"
        assert (result["answer"], result["span"]) == (alone.answer, alone.to_json()["span"])


def test_the_annotated_video_shows_every_query(demo_server: Running) -> None:
    with demo_server.client() as client:
        video = upload(client, CLIPS[0])
        job = ask(client, video["id"], QUERIES, allow_none=False).json()["id"]
        answer = client.get(f"/v1/jobs/{job}/annotated.mp4")
        assert answer.status_code == 200 or http_error(answer) == (409, "server.job_not_done")
        results = ended(client, job)["results"]
        answer = client.get(f"/v1/jobs/{job}/annotated.mp4")
        assert answer.headers["content-type"] == "video/mp4" and "annotated" in answer.headers["content-disposition"]
        with av.open(io.BytesIO(answer.content)) as file, av.open(str(CLIPS[0])) as plain:
            drawn = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(video=0)]
            shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in plain.decode(video=0)]
        assert len(drawn) == len(shown) == 72
        for result in results:  # where a box's left side lies, the image has changed
            box = result["boxes"][len(result["boxes"]) // 2]
            index, (left, top, _, bottom) = round(box["time_s"] * 8), map(round, box["box"])
            row, column = (top + bottom) // 2, max(left - 2, 0)
            change = np.abs(drawn[index] - shown[index])[row, max(column - 2, 0) : column + 4].max()
            assert change > 60, result["query"]


def test_a_job_that_is_deleted_while_it_is_drawn(
    served: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, going = threading.Event(), threading.Event()

    def slow(*arguments: Any, progress: Callable[..., None]) -> Iterator[Any]:
        came.set()
        assert going.wait(20)
        progress("annotate", 0, None)
        yield from ()

    monkeypatch.setattr(annotated, "paint_frames", slow)
    running = served()
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        job = ask(client, video, ["the car"]).json()["id"]
        ended(client, job)
        with ThreadPoolExecutor(1) as threads:
            drawn = threads.submit(running.client().get, f"/v1/jobs/{job}/annotated.mp4")
            assert came.wait(20)
            assert client.delete(f"/v1/jobs/{job}").status_code == 204
            going.set()
            assert http_error(drawn.result()) == (404, "server.job_not_found")


def test_the_file_comes_back_whole_and_in_parts(served: Callable[..., Running], tmp_path: Path) -> None:
    path = small_clip(tmp_path / "a clip.mp4")
    running = served()
    with running.client() as client:
        video = upload(client, path)
        whole = client.get(f"/v1/videos/{video['id']}/content")
        part = client.get(f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=10-19"})
        assert whole.content == path.read_bytes() and whole.headers["content-type"] == "video/mp4"
        assert (part.status_code, part.content) == (206, path.read_bytes()[10:20])
        head = client.head(f"/v1/videos/{video['id']}/content")
        assert head.headers["content-length"] == str(len(whole.content)) and head.content == b""
        assert whole.headers["content-disposition"].startswith("inline")
        assert client.get(f"/v1/videos/{video['id']}").json()["name"] == "a clip.mp4"
        assert client.delete(f"/v1/videos/{video['id']}").status_code == 204
        assert http_error(client.get(f"/v1/videos/{video['id']}")) == (404, "server.video_not_found")
        assert http_error(client.get(f"/v1/videos/{video['id']}/content")) == (404, "server.video_not_found")
    assert not list(running.service.store.folder.iterdir())


@pytest.mark.parametrize("time_s", [0, 0.3, 2.0, 3.49, 3.5, 100])
def test_one_frame_as_jpeg(time_s: float, served: Callable[..., Running], tmp_path: Path) -> None:
    path = small_clip(tmp_path / "a.mp4", seconds=4)
    with served().client() as client, av.open(str(path)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        answer = client.get(f"/v1/videos/{upload(client, path)['id']}/frame", params={"time": time_s})
    index = min(int(time_s * 8 + 1e-6), len(frames) - 1)
    assert answer.headers["content-type"] == "image/jpeg" and float(answer.headers["x-frame-time"]) == index / 8
    image = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
    assert np.abs(image - frames[index]).mean() < 6


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_is_a_video_of_one_frame(form: str, served: Callable[..., Running]) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), (200, 30, 60), np.uint8)).save(file, form)
    running = served()
    with running.client() as client:
        made = client.post("/v1/videos", files={"file": ("a.mp4", file.getvalue())})
        assert made.status_code == 201, made.text
        video = made.json()
        assert (video["kind"], video["frames"], video["duration_s"]) == ("image", 1, 0)
        done = ended(client, ask(client, video["id"], ["the cup"], allow_none=False).json()["id"])
        assert len(done["results"][0]["boxes"]) == 1
        still = client.get(f"/v1/videos/{video['id']}/frame")
        done = ended(client, ask(client, video["id"], ["the cup"], task="image").json()["id"])
        assert done["task"] == done["results"][0]["task"] == "image" and done["results"][0]["found"]
    assert Image.open(io.BytesIO(still.content)).size == (64, 48)


def test_every_task_has_the_name_of_its_results(served: Callable[..., Running], tmp_path: Path) -> None:
    content = small_clip(tmp_path / "a.mp4").read_bytes()
    with served().client() as client:
        video = upload(client, tmp_path / "a.mp4")["id"]
        for task, options in (("tube", {}), ("span", {}), ("track", {"first_box": [1, 2, 30, 40]})):
            done = ended(client, ask(client, video, ["the car"], task=task, **options).json()["id"])
            assert done["task"] == done["results"][0]["task"] == task
            validate(done["results"][0], "result")
        former = ended(client, ask(client, video, ["the car"], task="ground").json()["id"])
        assert former["task"] == former["results"][0]["task"] == "tube"
        form = {"queries": "the car", "task": "track", "first_box": "1,2,30,40"}
        answer = client.post("/v1/ground", files={"file": content}, data=form)
        assert answer.json()["results"][0]["task"] == "track", answer.text
        failed = ended(client, ask(client, video, ["the car"], task="image").json()["id"])
        assert (failed["status"], failed["code"]) == ("failed", "video.not_an_image")


@pytest.mark.parametrize(
    ("form", "frame_ms", "duration_s"), [("GIF", 200, 2), ("WEBP", 200, 2), ("PNG", 200, 2), ("GIF", 10, 1)]
)
def test_an_animated_image_is_a_video(
    form: str, frame_ms: int, duration_s: float, served: Callable[..., Running]
) -> None:
    file = io.BytesIO()
    images = [Image.fromarray(np.full((48, 64, 3), 20 * i, np.uint8)) for i in range(10)]
    images[0].save(file, form, save_all=True, append_images=images[1:], duration=frame_ms)
    with served().client() as client:
        video = client.post("/v1/videos", files={"file": (f"a.{form}", file.getvalue())}).json()
        assert (video["kind"], video["frames"], video["duration_s"]) == ("video", 10, duration_s)
        done = ended(client, ask(client, video["id"], ["the cup"], allow_none=False).json()["id"])
        assert done["results"][0]["boxes"] and done["results"][0]["span"]["end_s"] <= duration_s


def test_an_avi_with_pauses_is_whole(served: Callable[..., Running], tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(10)]
    path = write(
        tmp_path / "a.avi", frames, codec="mjpeg", pixels="yuvj420p", rate=100,
        ticks=[7 * i for i in range(10)], time_base=Fraction(1, 100),
    )  # fmt: skip
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames > 60
    with served().client() as client:
        assert upload(client, path)["frames"] == 10


def test_another_video_stream_of_the_file(served: Callable[..., Running], tmp_path: Path) -> None:
    path = two_streams(tmp_path / "a.mkv", default=0)
    with served().client() as client:
        video = upload(client, path)
        assert (video["width"], video["frames"]) == (64, 12)
        jobs = [ask(client, video["id"], ["the car"], stream=stream).json()["id"] for stream in (None, 1, 0, 7)]
        values = [ended(client, job) for job in jobs]
        found = [(value["results"][0]["stream"], value["results"][0]["size"]["width"]) for value in values[:3]]
        assert found == [(0, 64), (1, 96), (0, 64)] and values[3]["code"] == "video.bad_stream"
        for job, width in zip(jobs, (64, 96, 64)):
            with av.open(io.BytesIO(client.get(f"/v1/jobs/{job}/annotated.mp4").content)) as drawn:
                assert drawn.streams.video[0].width == width
        still = client.get(f"/v1/videos/{video['id']}/frame", params={"time": 0.2, "stream": 1})
        assert Image.open(io.BytesIO(still.content)).size == (96, 64)
        with path.open("rb") as file:
            answer = client.post("/v1/ground", files={"file": file}, data={"queries": "the car", "stream": "1"})
        assert answer.json()["results"][0]["stream"] == 1


def test_a_file_of_the_media_folder_and_no_other(served: Callable[..., Running], tmp_path: Path) -> None:
    media = tmp_path / "media"
    (media / "deep").mkdir(parents=True)
    small_clip(media / "deep" / "a.mp4")
    outside = small_clip(tmp_path / "outside.mp4")
    (media / "link.mp4").symlink_to(outside)
    (media / "inside.mp4").symlink_to(media / "deep" / "a.mp4")
    running = served(media=media)
    with running.client() as client:

        def refer(name: str) -> object:
            answer = client.post("/v1/videos", json={"source": name})
            return answer.json()["name"] if answer.status_code == 201 else http_error(answer)

        assert refer("deep/a.mp4") == "a.mp4" and refer("inside.mp4") == "a.mp4"
        for name in (
            "../outside.mp4",
            "link.mp4",
            str(outside),
            "deep",
            "",
            ".",
            "a\0.mp4",
            "none.mp4",
            "deep/../../outside.mp4",
            "file:deep/a.mp4",
        ):
            assert refer(name) == (404, "video.not_found"), name
        video = client.post("/v1/videos", json={"source": "deep/a.mp4"}).json()
        client.delete(f"/v1/videos/{video['id']}")
        assert (media / "deep" / "a.mp4").exists()
    with served().client() as client:
        assert http_error(client.post("/v1/videos", json={"source": "deep/a.mp4"})) == (404, "server.no_media_folder")


def test_unused_videos_and_jobs_are_deleted(served: Callable[..., Running], tmp_path: Path) -> None:
    running = served(keep_s=0.4)
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))
        job = ask(client, video["id"], ["the car"]).json()["id"]
        ended(client, job)
        until(lambda: not list(running.service.store.folder.iterdir()))
        assert http_error(client.get(f"/v1/videos/{video['id']}")) == (404, "server.video_not_found")
        assert http_error(client.get(f"/v1/jobs/{job}")) == (404, "server.job_not_found")
    assert len(running.service.opened) == 0


def test_codes_of_invalid_requests(served: Callable[..., Running], tmp_path: Path) -> None:
    with served(max_queries=2, max_query_chars=40).client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        for body, expected in (
            ({"video": "none", "queries": ["the car"]}, (404, "server.video_not_found")),
            ({"video": video, "queries": []}, (422, "query.empty")),
            ({"video": video, "queries": [" "]}, (422, "query.empty")),
            ({"video": video, "queries": ["a"] * 3}, (422, "query.too_many")),
            ({"video": video, "queries": ["a" * 41]}, (422, "query.too_long")),
            ({"video": video, "queries": "the car"}, (422, "server.invalid_request")),
            ({"video": video, "queries": ["the car"], "task": "dance"}, (422, "server.invalid_request")),
            ({"video": video, "queries": ["the car"], "task": "track"}, (422, "server.invalid_request")),
            (
                {"video": video, "queries": ["the car"], "task": "track", "first_box": [9, 9, 1, 1]},
                (422, "query.bad_box"),
            ),
            ({"video": video, "queries": ["the car"], "first_box": [1, 2, 3, 4]}, (422, "server.invalid_request")),
            ({"video": video, "queries": ["the car"], "deadline_s": -1}, (422, "server.invalid_request")),
            ({"video": video, "queries": ["the car"], "path": "/etc/passwd"}, (422, "server.invalid_request")),
            ({"queries": ["the car"]}, (422, "server.invalid_request")),
        ):
            assert http_error(client.post("/v1/jobs", json=body)) == expected, body
        assert http_error(client.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"}))[0] == 422
        deep = client.post("/v1/jobs", content=b"[" * 100_000, headers={"Content-Type": "application/json"})
        assert http_error(deep) == (422, "server.invalid_request")
        assert http_error(client.post("/v1/jobs", json={"queries": ["a" * 300_000]})) == (413, "server.body_too_large")
        assert http_error(client.post("/v1/videos", files={"other": b"a"})) == (422, "server.invalid_request")
        assert http_error(client.post("/v1/ground", files={"queries": (None, "a")})) == (400, "server.no_file")
        assert http_error(client.post("/v1/videos", data={"file": "a"})) == (415, "server.unsupported_content_type")
        answer = client.post("/v1/ground", files={"file": small_clip(tmp_path / "b.mp4").read_bytes()})
        assert http_error(answer) == (422, "query.empty")
        assert http_error(client.get("/v1/nothing")) == (404, "server.not_found")
        refused = client.put("/v1/jobs")
        assert http_error(refused) == (405, "server.method_not_allowed") and "POST" in refused.headers["allow"]
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        for content in (b"no form", b"--b\r\n", b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nabc"):
            assert http_error(client.post("/v1/videos", content=content, headers=form))[1] in (
                "server.bad_form",
                "server.no_file",
            )


def test_an_invalid_query_fails_no_other(served: Callable[..., Running], tmp_path: Path) -> None:
    spec = fake_spec()
    spec = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=500))
    running, hold = served(fake_grounder(spec), workers=1), threading.Event()
    session: Any = running.grounder.sessions["language_model"]
    session.before = lambda feeds: hold.wait(20)
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        queries = (
            "first",
            "the car",
            "a" * 450,
            "the dog",
        )  # the third is not too long by itself, but behind this video
        jobs = [ask(client, video, [query]).json()["id"] for query in queries]
        hold.set()
        values = [ended(client, job) for job in jobs]
    assert [value["status"] for value in values] == ["done", "done", "failed", "done"]
    assert values[2]["code"] == "query.too_long" and metric(running, "batch_queries_sum") == 4
