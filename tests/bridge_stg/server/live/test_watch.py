"""Live sources over HTTP: shared by clients, each with its own queries, ended with the last client."""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.bridge_stg.server.conftest import Running, events, http_error, metric, until
from tests.fakes.clips import write
from tests.fakes.live_chain import live_grounder, stream

OPTIONS = {"window_s": 8, "every_s": 0.5}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A video of a minute that is white from second 1 to 2."""
    frames = [np.full((48, 64, 3), 255 if 10 <= i < 20 else 0, np.uint8) for i in range(600)]
    return str(write(tmp_path / "gate.mp4", frames, rate=10, options={"preset": "ultrafast"}))


@pytest.fixture
def short(tmp_path: Path) -> str:
    frames = [np.full((48, 64, 3), 255 if 10 <= i < 20 else 0, np.uint8) for i in range(40)]
    return str(write(tmp_path / "short.mp4", frames, rate=10))


def live(served: Callable[..., Running], **sources: str) -> Running:
    return served(live_grounder(), live=sources, live_options=OPTIONS)


def received(client: httpx.Client, name: str, *queries: str) -> Any:
    return client.stream("GET", f"/v1/live/{name}/events", params={"query": list(queries)})


def test_updates_and_events_come_until_the_source_ends(served: Callable[..., Running], short: str) -> None:
    running = live(served, gate=short)
    with running.client() as client:
        assert client.get("/v1/live").json() == {"live": [{"name": "gate", "watched": False, "queries": []}]}
        with received(client, "gate", "the car") as stream:
            all_told = list(events(stream.iter_lines()))
    updates = [value for name, value in all_told if name == "update"]
    happened = [(value["event"], value["time_s"]) for name, value in all_told if name == "event"]
    assert [update["known_s"] for update in updates] == sorted(update["known_s"] for update in updates)
    assert happened == [("appeared", 1), ("left", 2)] and all_told[-1] == ("end", {"ended": "source"})
    assert updates[0]["groundings"][0]["query"] == "the car" and "window" in updates[0]
    assert metric(running, "live_updates_total", source="gate") == len(updates)
    assert metric(running, "live_latency_seconds_count", source="gate") == len(updates)
    until(lambda: metric(running, "live_watches") == 0)


def test_clients_share_one_watch_and_the_last_one_ends_it(served: Callable[..., Running], source: str) -> None:
    running = live(served, gate=source)
    encoder: Any = running.grounder.sessions["vision_encoder"]

    def read(received: Iterator[Any], count: int) -> list[Any]:
        updates = (value for name, value in received if name == "update")
        return [next(updates) for _ in range(count)]

    with running.client() as one, running.client() as two:
        with received(one, "gate", "the car") as stream:
            first = events(stream.iter_lines())
            read(first, 1)
            with received(two, "gate", "the dog", "the car") as other:
                second = events(other.iter_lines())
                assert [grounding["query"] for grounding in read(second, 2)[-1]["groundings"]] == ["the dog", "the car"]
                assert {g["query"] for update in read(first, 2) for g in update["groundings"]} == {"the car"}
                assert metric(running, "live_watches") == 1 and metric(running, "live_clients") == 2
                value = one.get("/v1/live").json()["live"][0]
                assert value["watched"] and set(value["queries"]) == {"the car", "the dog"}
                threads = [thread for thread in threading.enumerate() if thread.name == "bridge-stg live gate"]
                assert len(threads) == 1
            until(lambda: metric(running, "live_clients") == 1)
            until(lambda: one.get("/v1/live").json()["live"][0]["queries"] == ["the car"])
            read(first, 1)
    until(lambda: metric(running, "live_watches") == 0)
    until(lambda: not [thread for thread in threading.enumerate() if "live" in thread.name])
    calls = encoder.calls
    time.sleep(0.7)
    assert encoder.calls == calls  # nobody looks, so nothing is computed


def test_the_newest_frame_of_a_watched_source(served: Callable[..., Running], source: str) -> None:
    running = live(served, gate=source)
    with running.client() as client, running.client() as other:
        assert http_error(other.get("/v1/live/gate/frame")) == (404, "server.frame_not_found")
        assert http_error(other.get("/v1/live/none/frame")) == (404, "server.frame_not_found")
        with received(client, "gate", "the car") as stream:
            told_events = events(stream.iter_lines())
            times = []
            while not times or times[-1] < 1.5:
                next(told_events)
                answer = other.get("/v1/live/gate/frame")
                assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
                times.append(float(answer.headers["x-frame-time"]))
                level = np.asarray(Image.open(io.BytesIO(answer.content))).mean()
                assert (level > 128) == (1 <= times[-1] < 2)
        assert times == sorted(times)


def test_motion_jpeg_shows_the_boxes_until_the_source_ends(served: Callable[..., Running], short: str) -> None:
    running = live(served, gate=short)
    with running.client() as client:
        answer = client.get("/v1/live/gate/video.mjpg", params={"query": ["the car", "the dog"]})
        assert http_error(client.get("/v1/live/none/video.mjpg", params={"query": "a"}))[0] == 404
        assert http_error(client.get("/v1/live/gate/video.mjpg"))[0] == 422
    kind, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/x-mixed-replace" and answer.content.endswith(f"--{boundary}--\r\n".encode())
    parts = [part.partition(b"\r\n\r\n")[2][:-2] for part in answer.content.split(f"--{boundary}\r\n".encode())[1:]]
    pictures = [np.asarray(Image.open(io.BytesIO(part.split(b"\r\n--")[0]))).astype(int) for part in parts]
    assert len(pictures) > 3 and all(picture.shape == (48, 64, 3) for picture in pictures)
    bright = [picture[:30].mean() > 100 for picture in pictures]
    boxed = [(picture[:30, :, 0] - picture[:30, :, 1] > 60).any() for picture in pictures]  # magenta, or its label
    assert any(bright) and not all(bright) and boxed == bright
    until(lambda: metric(running, "live_watches") == 0)


def test_a_client_that_is_killed_leaves_too(served: Callable[..., Running], source: str) -> None:
    running = live(served, gate=source)
    with running.client() as client:
        with received(client, "gate", "the car") as stream:
            told_events = events(stream.iter_lines())
            next(told_events)
            assert metric(running, "live_watches") == 1
            stream.close()  # as if the process had been killed
        until(lambda: metric(running, "live_watches") == 0)
        until(lambda: not [thread for thread in threading.enumerate() if "live" in thread.name])
        with received(client, "gate", "the car") as stream:  # and it can be watched anew
            assert next(events(stream.iter_lines()))[0] == "update"


def test_sources_that_cannot_be_watched(served: Callable[..., Running], source: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 100)
    gone = Path(source).with_name("gone.mp4")
    shutil.copy(source, gone)
    sources = {"broken": str(broken), "cam": "rtsp://user:word@127.0.0.1:1/a", "video97": "/dev/video97"}
    running = live(served, gate=source, gone=str(gone), **sources)
    gone.unlink()
    with running.client() as client:
        assert http_error(client.get("/v1/live/none/events", params={"query": "a"})) == (404, "server.source_not_found")
        assert http_error(client.get("/v1/live/gate/events")) == (422, "server.invalid_request")
        assert http_error(client.get("/v1/live/gate/events", params={"query": " "})) == (422, "query.empty")
        many = {"query": [f"thing {i}" for i in range(17)]}
        assert http_error(client.get("/v1/live/gate/events", params=many))[0] in (422, 429)
        for path in ("/etc/passwd", "..", "file:///etc/passwd", source):
            assert client.get(f"/v1/live/{path}/events", params={"query": "a"}).status_code == 404
        assert http_error(client.get("/v1/live/gone/events", params={"query": "a"})) == (404, "server.source_not_found")
        for name, address in sources.items():
            with received(client, name, "the car") as stream:
                last = list(events(stream.iter_lines()))[-1]
            assert last[0] == "failed" and f"The source {name}" in last[1]["error"], last
            assert address not in last[1]["error"] and "127.0.0.1" not in last[1]["error"], last
            until(lambda: metric(running, "live_watches") == 0)


def test_a_server_that_ends_ends_its_streams(served: Callable[..., Running], source: str) -> None:
    running = live(served, gate=source)
    with running.client() as client, received(client, "gate", "the car") as stream:
        told_events: Iterator[Any] = events(stream.iter_lines())
        next(told_events)
        began = time.monotonic()
        running.server.stop()
        assert list(told_events)[-1] == ("end", {"ended": "stopping"})
        assert time.monotonic() - began < 10


def test_a_source_that_had_to_wait_was_not_silent() -> None:
    paused, slow_s = threading.Event(), [1.0]

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for time_s, frame in stream(8.0):
            if paused.is_set() and slow_s:
                time.sleep(slow_s.pop())  # longer than it takes to empty the queue
            yield time_s, frame

    with live_grounder().watch(frames(), ["the car"], stall_s=2.0, **OPTIONS) as watch:
        for _ in watch:
            if not paused.is_set():
                time.sleep(2.2)  # the queue is full meanwhile
                paused.set()
    assert watch.stats.ended == "source"


def test_a_watch_that_is_stopped_does_not_complain_of_its_source() -> None:
    came, going = threading.Event(), threading.Event()

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        came.set()
        going.wait(20)
        yield from ()

    with live_grounder().watch(frames(), ["the car"], **OPTIONS) as watch, ThreadPoolExecutor(1) as threads:
        received = threads.submit(list, watch)
        assert came.wait(20)
        watch.stop()
        going.set()
        assert received.result() == [] and watch.stats.ended == "stopped"
