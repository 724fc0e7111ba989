"""Many clients: shared prefixes, batches, a bounded queue, deadlines, and cancellation."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import pytest

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.index.index import VisualIndex
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
from tests.fakes.chain import fake_grounder
from tests.fakes.live_chain import live_grounder, stream


class Gate:
    """Blocks every call of a session until it is opened, and counts the calls."""

    def __init__(self, session: Any) -> None:
        self.session, self.open, self.came = session, threading.Event(), 0
        session.before = self.pass_through

    def pass_through(self, feeds: Any) -> None:
        self.came += 1
        assert self.open.wait(30)


def gated(session: str = "language_model") -> tuple[Grounder, Gate]:
    grounder = fake_grounder()
    return grounder, Gate(grounder.sessions[session])


@pytest.mark.parametrize("same_upload", [True, False])
def test_the_same_bytes_are_read_once_and_share_a_batch(
    same_upload: bool, served: Callable[..., Running], tmp_path: Path
) -> None:
    grounder, gate = gated("vision_encoder")
    running, path = served(grounder), small_clip(tmp_path / "a.mp4")
    queries = [f"thing number {number}" for number in range(7)]
    with running.client() as client:
        videos = [upload(client, path)["id"]] * 7 if same_upload else [upload(client, path)["id"] for _ in queries]
        assert len(set(videos)) == (1 if same_upload else 7)
        assert len(list(running.service.store.folder.iterdir())) == 1  # one file for all of them
        first = ask(client, videos[0], queries[:1]).json()["id"]
        until(lambda: gate.came)
        rest = [ask(client, video, [query]).json() for video, query in zip(videos[1:], queries[1:], strict=True)]
        assert [job["position"] for job in rest] == [0, 1, 2, 3, 4, 5]
        gate.open.set()
        values = [ended(client, first), *(ended(client, job["id"]) for job in rest)]
    assert metric(running, "videos_opened_total") == 1 and metric(running, "videos_reused_total") == 1
    assert metric(running, "batch_queries_count") == 2 and metric(running, "batch_queries_sum") == 7
    expected = fake_grounder()
    for value, query in zip(values, queries, strict=True):
        assert [answer_of(result) for result in value["results"]] == [answer_of(expected.ground(path, query))]


def test_videos_stay_open_within_bounds(served: Callable[..., Running], tmp_path: Path) -> None:
    running = served(open_videos=2)
    with running.client() as client:
        videos = [upload(client, small_clip(tmp_path / f"{i}.mp4", number=i))["id"] for i in range(4)]
        for video in (*videos, videos[3], videos[0]):
            ended(client, ask(client, video, ["the car"]).json()["id"])
        assert len(running.service.opened) == 2 and running.service.opened.nbytes > 0
        assert metric(running, "videos_opened_total") == 5 and metric(running, "videos_reused_total") == 1
        client.delete(f"/v1/videos/{videos[0]}")
        assert len(running.service.opened) == 1
    small = served(open_bytes=1)
    with small.client() as client:
        ended(client, ask(client, upload(client, small_clip(tmp_path / "a.mp4"))["id"], ["the car"]).json()["id"])
        until(lambda: len(small.service.opened) == 0)


def test_a_full_queue_answers_429_with_retry_after(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running, path = served(grounder, workers=1, max_queue=2), small_clip(tmp_path / "a.mp4")
    with running.client() as client:
        video = upload(client, path)["id"]
        jobs = [ask(client, video, [f"thing {i}"]).json()["id"] for i in range(1)]
        until(lambda: gate.came)
        jobs += [ask(client, video, [f"thing {i}"]).json()["id"] for i in (1, 2)]
        answer = ask(client, video, ["one more"])
        assert http_error(answer) == (429, "server.busy") and int(answer.headers["retry-after"]) >= 1
        whole = client.post("/v1/ground", files={"file": path.read_bytes()}, data={"queries": "one more"})
        assert http_error(whole) == (429, "server.busy")
        assert client.get("/health").json()["queue"] == {"waiting": 2, "running": 1, "most_waiting": 2}
        gate.open.set()
        assert [ended(client, job)["status"] for job in jobs] == ["done"] * 3
        assert ask(client, video, ["one more"]).status_code == 202
    assert metric(running, "errors_total", code="server.busy") == 2


def test_sixty_four_clients_get_their_own_right_answers(served: Callable[..., Running], tmp_path: Path) -> None:
    paths = [small_clip(tmp_path / f"{i}.mp4", number=i, seconds=2 + i % 3) for i in range(16)]
    expected = fake_grounder()
    running = served(workers=2, max_queue=64, open_videos=4)

    def run(number: int) -> tuple[Any, Any]:
        path, query = paths[number % 16], f"the thing of client {number}"
        with running.client() as client:
            if number % 2:
                form = {"queries": query, "allow_none": "false"}
                answer = client.post("/v1/ground", files={"file": path.read_bytes()}, data=form)
                assert answer.status_code == 200, answer.text
                result = answer.json()["results"]
            else:
                job = ask(client, upload(client, path)["id"], [query], allow_none=False)
                assert job.status_code == 202, job.text
                result = ended(client, job.json()["id"])["results"]
        return [answer_of(one) for one in result], (path, query)

    with ThreadPoolExecutor(64) as clients:
        received = list(clients.map(run, range(64)))
    boxes = set()
    for result, (path, query) in received:
        assert result == [answer_of(expected.ground(path, query, allow_none=False))]
        boxes.add(str(result[0]["boxes"]))
    assert len(boxes) > 60  # so that another client's answer would have been noticed
    assert metric(running, "videos_opened_total") < 64
    assert running.service.scheduler.waiting == 0 and metric(running, "jobs_total", outcome="done") == 64


def test_sixty_four_clients_on_a_small_queue_get_an_answer_or_429(
    served: Callable[..., Running], tmp_path: Path
) -> None:
    path, expected = small_clip(tmp_path / "a.mp4"), fake_grounder()
    grounder, gate = gated()
    running = served(grounder, workers=1, max_queue=8)
    with running.client() as client:
        video = upload(client, path)["id"]

    def run(number: int) -> str:
        with running.client() as client:
            answer = client.post("/v1/ground", json={"video": video, "queries": [f"client {number}"]})
        if answer.status_code == 200:
            assert answer_of(answer.json()["results"][0]) == answer_of(expected.ground(path, f"client {number}"))
            return "answered"
        assert http_error(answer) == (429, "server.busy") and answer.headers["retry-after"]
        return "busy"

    with ThreadPoolExecutor(64) as clients:
        received = clients.map(run, range(64))
        until(lambda: metric(running, "errors_total", code="server.busy") == 55)
        gate.open.set()
        assert sorted(received) == ["answered"] * 9 + ["busy"] * 55


@pytest.mark.slow
def test_sixty_four_clients_on_a_real_model(demo_server: Running) -> None:
    queries = ["the blue bird", "the bus", "the red ball", "a cup", "the dog"]
    expected = {}
    for clip in CLIPS:
        with demo_server.grounder.open(clip) as video:
            for query in queries:
                expected[clip, query] = answer_of(video.ground(query))

    def run(number: int) -> float:
        clip, query = CLIPS[number % 3], queries[number % 5]
        with demo_server.client() as client:
            form = {"file": (clip.name, clip.read_bytes())}
            answer = client.post("/v1/ground", files=form, data={"queries": query}, timeout=300)
        if answer.status_code == 429:
            http_error(answer)
            return 0.0
        assert answer.status_code == 200, answer.text
        received, alone = answer_of(answer.json()["results"][0]), expected[clip, query]
        assert (received["answer"], received["span"], received["found"]) == (
            alone["answer"],
            alone["span"],
            alone["found"],
        )
        pairs = zip(received["boxes"] or [], alone["boxes"] or [], strict=True)
        return max((abs(a - b) for one, two in pairs for a, b in zip(one["box"], two["box"], strict=True)), default=0.0)

    with ThreadPoolExecutor(64) as clients:
        assert max(clients.map(run, range(64))) <= 0.05  # pixels


def leave_while_waiting(running: Running, path: Path, query: str, came: Callable[[], Any]) -> None:
    """Send `/v1/ground`, wait until it is worked on, and close the connection."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="queries"\r\n\r\n' + query.encode() + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        + path.read_bytes()
        + b"\r\n--b--\r\n"
    )
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/ground HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        until(came)


def test_a_client_that_goes_away_frees_its_work(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running, path = served(grounder, workers=1), small_clip(tmp_path / "a.mp4")
    leave_while_waiting(running, path, "the bus", lambda: gate.came)
    until(lambda: metric(running, "jobs_total", outcome="cancelled") == 1)
    gate.open.set()
    until(lambda: metric(running, "running_batches") == 0)
    assert gate.came == 1  # the call under way was the last
    assert not list(running.service.store.folder.iterdir()) and len(running.service.opened) == 0
    with running.client() as client:
        answer = client.post("/v1/ground", files={"file": path.read_bytes()}, data={"queries": "the bus"})
    assert answer.status_code == 200 and gate.came > 4
    assert [answer_of(one) for one in answer.json()["results"]] == [answer_of(fake_grounder().ground(path, "the bus"))]


def test_a_client_that_goes_away_during_its_upload_leaves_nothing(
    served: Callable[..., Running], tmp_path: Path
) -> None:
    running = served()
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/videos HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9999999\r\n"
        start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        connection.sendall(
            f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + start + bytes(3_000_000)
        )
        until(lambda: running.service.store.stored_bytes > 1_000_000)
        assert list(running.service.store.folder.iterdir())
    until(lambda: not list(running.service.store.folder.iterdir()))
    assert running.service.store.stored_bytes == 0


@pytest.mark.parametrize("when", ["queued", "running"])
def test_a_job_that_is_deleted_frees_its_work(when: str, served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running = served(grounder, workers=1)
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        jobs = [ask(client, video, ["first"]).json()["id"]]
        until(lambda: gate.came)
        jobs.append(ask(client, video, ["second"]).json()["id"])
        deleted = jobs[when == "queued"]
        with client.stream("GET", f"/v1/jobs/{deleted}/events") as stream:
            received = events(stream.iter_lines())
            assert next(received)[0] == ("queued" if when == "queued" else "progress")
            with running.client() as other:
                assert other.delete(f"/v1/jobs/{deleted}").status_code == 204
            assert list(received)[-1] == ("cancelled", {})
        assert http_error(client.get(f"/v1/jobs/{deleted}")) == (404, "server.job_not_found")
        calls = gate.came
        gate.open.set()
        assert ended(client, jobs[when == "running"])["status"] == "done"
        until(lambda: metric(running, "running_batches") == 0)
    assert metric(running, "jobs_total", outcome="cancelled") == 1 and calls == 1
    asked = [seen for batch in gate.session.seen for seen in batch]
    assert not any("Find second" in text for text in asked) or when == "running"
    assert not any("Find first" in text for text in asked) or when == "queued"


def test_a_video_that_is_deleted_takes_its_jobs_along(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running = served(grounder, workers=1)
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        job = ask(client, video, ["first"]).json()["id"]
        until(lambda: gate.came)
        client.delete(f"/v1/videos/{video}")
        gate.open.set()
        assert http_error(client.get(f"/v1/jobs/{job}")) == (410, "server.job_deleted")
        until(lambda: not list(running.service.store.folder.iterdir()))
        assert len(running.service.opened) == 0


def test_a_deadline_counts_the_waiting(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running = served(grounder, workers=1, max_seconds=0.6)
    with running.client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        began = time.monotonic()
        jobs = [ask(client, video, ["first"], deadline_s=1000).json()["id"]]
        until(lambda: gate.came)
        jobs.append(ask(client, video, ["second"], deadline_s=0.2).json()["id"])
        values = [ended(client, job) for job in jobs]
        assert 0.5 < time.monotonic() - began < 10
        answer = client.post("/v1/ground", json={"video": video, "queries": ["third"], "deadline_s": 0.1})
        assert http_error(answer) == (408, "call.deadline")
        gate.open.set()
        until(lambda: metric(running, "running_batches") == 0)
    assert [(value["status"], value["code"]) for value in values] == [("failed", "call.deadline")] * 2
    assert "0.2 s" in values[1]["error"] and gate.came == 1


def test_the_event_loop_stays_free_while_a_model_runs(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running = served(grounder)
    with running.client() as client:
        ask(client, upload(client, small_clip(tmp_path / "a.mp4"))["id"], ["first"])
        until(lambda: gate.came)
        began = time.monotonic()
        for _ in range(20):
            assert client.get("/health/live").status_code == 200
        assert time.monotonic() - began < 5
        gate.open.set()


def test_the_error_of_a_failed_engine_hides_its_message(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder = fake_grounder()
    session: Any = grounder.sessions["language_model"]

    def fail(feeds: Any) -> None:
        raise RuntimeError("/secret/path of the engine")

    session.before = fail
    with served(grounder).client() as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        value = ended(client, ask(client, video, ["the car"]).json()["id"])
        assert (value["status"], value["code"]) == ("failed", "server.internal") and "secret" not in value["error"]
        session.before = lambda feeds: None
        assert ended(client, ask(client, video, ["the car"]).json()["id"])["status"] == "done"


def test_shutdown_finishes_running_jobs_and_fails_waiting_ones(served: Callable[..., Running], tmp_path: Path) -> None:
    grounder, gate = gated()
    running = served(grounder, workers=1, drain_s=20)
    with running.client() as client, ThreadPoolExecutor(2) as clients:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]

        def ground(query: str) -> httpx.Response:
            with running.client() as own:
                return own.post("/v1/ground", json={"video": video, "queries": [query]})

        first = clients.submit(ground, "first")
        until(lambda: gate.came)
        second = clients.submit(ground, "second")
        until(lambda: running.service.scheduler.waiting == 1)
        running.call(running.service.begin_stop)
        assert http_error(second.result()) == (503, "server.stopping")
        assert http_error(ask(client, video, ["third"])) == (503, "server.stopping")
        assert client.get("/health").status_code == 503
        gate.open.set()
        assert first.result().status_code == 200
    running.stop()


def test_a_long_video_is_searched_and_its_tokens_are_kept(served: Callable[..., Running], tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for _, frame in stream(70, bright=((10.0, 14.0), (50.0, 53.0))):
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
    grounder = live_grounder(index=VisualIndex(tmp_path / "index", {}))
    sessions: Any = grounder.sessions
    running = served(grounder)
    with running.client() as client:
        first = ended(client, ask(client, upload(client, path)["id"], ["the car", "a dog"]).json()["id"])
        encoded = sessions["vision_encoder"].frames
        video = upload(client, path.rename(tmp_path / "other.mp4"))["id"]  # the same content
        job = ended(client, ask(client, video, ["the car", "a dog"]).json()["id"])
        assert job["status"] == "done" and sessions["vision_encoder"].frames == encoded > 0
        for before, after in zip(first["results"], job["results"], strict=True):
            assert {**before, "timings_s": None} == {**after, "timings_s": None}
        for lost in sorted((tmp_path / "index").rglob("groups-*"))[::2]:
            lost.unlink()
        again = ended(client, ask(client, video, ["the car", "a dog"]).json()["id"])
        assert again["results"][0]["occurrences"] == job["results"][0]["occurrences"]
        for result in job["results"]:  # a window of this model is 64 s long
            spans = [(one["span"]["start_s"], one["span"]["end_s"]) for one in result["occurrences"]]
            assert sorted(spans) == [(10.0, 14.0), (50.0, 53.0)] and result["windows"]["shots"] == 5
        drawn = client.get(f"/v1/jobs/{job['id']}/annotated.mp4")
        assert drawn.status_code == 200
