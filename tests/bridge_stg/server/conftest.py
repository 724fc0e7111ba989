"""Servers in a thread, reached through real HTTP: over fakes mostly, over the demo bundle where numbers count."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bridge_stg.runtime import Grounder
from bridge_stg.server.run import Server, bind, url_of
from bridge_stg.server.service import Service
from bridge_stg.server.settings import Settings
from tests.fakes.chain import fake_grounder
from tests.fakes.clips import write

ROOT = Path(__file__).parents[3]
CLIPS = sorted((ROOT / "assets" / "demo" / "clips").glob("*.mp4"))
TIMINGS = ("timings_s",)


class Running:
    """A server that runs in a thread.

    Attributes:
        url: where it is, without a slash at the end.
        service: what it shares with its routes.
        grounder: what answers.
    """

    def __init__(self, grounder: Grounder, *, live_options: dict[str, Any] | None = None, **settings: Any) -> None:
        self.grounder = grounder
        self.service = Service(grounder, Settings(port=0, **settings), bundle="test", live_options=live_options)
        self._socket = bind(self.service.settings.host, 0)
        self.url = url_of(self._socket).rstrip("/")
        ready = threading.Event()
        self.server = Server(self.service, ready=ready.set)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert ready.wait(30)

    def _serve(self) -> None:
        self.server.run(sockets=[self._socket])

    def client(self, **options: Any) -> httpx.Client:
        # Without TLS nothing is verified; reading the certificates would take longer than most requests.
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False, **options)

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def call(self, work: Callable[[], Any]) -> Any:
        """Run a function in the server's event loop."""
        result: Future[Any] = Future()
        self.server.call_soon(lambda: result.set_result(work()))
        return result.result(30)


@pytest.fixture
def served() -> Iterator[Callable[..., Running]]:
    """Start servers over fakes; options are those of `Settings`."""
    started: list[Running] = []

    def start(grounder: Grounder | None = None, **options: Any) -> Running:
        started.append(Running(grounder or fake_grounder(), **options))
        return started[-1]

    yield start
    for running in started:
        running.stop()
        assert not running.service.store.folder.exists()


@pytest.fixture(scope="session")
def demo_server(demo_bundle: Path) -> Iterator[Running]:
    """One server over the demo bundle for all."""
    with Grounder.load(demo_bundle) as grounder:
        running = Running(grounder)
        yield running
        running.stop()
        assert not running.service.store.folder.exists()


def small_clip(path: Path, *, number: int = 0, seconds: float = 4.0, rate: int = 8) -> Path:
    """Write a video that differs from those of other numbers; red in its middle."""
    random = np.random.default_rng(number)
    frames = []
    for i in range(int(seconds * rate)):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 0] = 230 if seconds / 4 <= i / rate < 3 * seconds / 4 else 20
        frame[..., 1] = random.integers(0, 255)
        frame[..., 2] = 200 * i / (seconds * rate)
        frames.append(frame)
    return write(path, frames, rate=rate)


def upload(client: httpx.Client, path: Path, **headers: str) -> dict[str, Any]:
    """Upload a file and return its description."""
    with path.open("rb") as file:
        answer = client.post("/v1/videos", files={"file": (path.name, file)}, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


def ask(client: httpx.Client, video: str, queries: list[str], **options: Any) -> httpx.Response:
    return client.post("/v1/jobs", json={"video": video, "queries": queries, **options})


def ended(client: httpx.Client, job: str, *, within_s: float = 60) -> dict[str, Any]:
    """Wait for a job's end."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        value = client.get(f"/v1/jobs/{job}").json()
        if value["status"] in ("done", "failed", "cancelled"):
            return value
        time.sleep(0.02)
    raise AssertionError(f"the job did not end: {value}")


def events(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield (name, data) of server-sent events."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def answer_of(grounding: Any) -> dict[str, Any]:
    """Return a grounding, an object of the runtime or JSON, without its timings."""
    value = grounding if isinstance(grounding, dict) else json.loads(json.dumps(grounding.to_json()))
    return {key: part for key, part in value.items() if key not in TIMINGS}


def http_error(answer: httpx.Response) -> tuple[int, str]:
    """Return status and code of a http_error, which is one paragraph and names no path of the server."""
    value = answer.json()
    assert set(value) == {"error", "code"}, value
    assert value["error"] and "\n" not in value["error"] and "Traceback" not in value["error"]
    assert "bridge-stg-serve" not in value["error"] and "/tmp/" not in value["error"], value
    return answer.status_code, value["code"]


def until(condition: Callable[[], Any], *, within_s: float = 20) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < end, "the condition stayed false"
        time.sleep(0.01)
    return value


def metric(running: Running, name: str, **labels: str) -> float:
    """Return a value of the metrics, 0 if it is missing."""
    return running.service.metrics.registry.get_sample_value(f"bridge_stg_{name}", labels) or 0.0
