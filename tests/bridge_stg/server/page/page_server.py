"""A stand-in for the server, for tests of the page: it takes videos and answers with boxes that are known beforehand.

A script makes it require a key, be busy, lose the connection of events, or be slow.
"""

from __future__ import annotations

import io
import json
import mimetypes
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.video.playback import play

PAGE = Path(__file__).resolve().parents[4] / "bridge_stg/server/page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
STAGES = ("decode_video", "vision_coarse", "prefill", "answer", "decode_fine", "vision_fine", "spatial")


@dataclass
class Script:
    """What the stand-in does, and what it has seen.

    Attributes:
        key: what it wants as API key.
        busy: how many jobs it answers with 429 first.
        lose: how many connections of events it drops.
        stage_s: how long a stage takes.
        about: what its health says about the model.
        sample: its video to try.
        occurrences: spans of further occurrences of the first query, in seconds.
        fail: what a job ends with instead of an answer.
        live: events of a live source that is called "door".
        image: returns its image at a time; None: there is none.
        ahead_s: by how much the image is newer than what is known.
        seen: method and path of every request.
        cancelled: jobs that were.
    """

    key: str | None = None
    busy: int = 0
    lose: int = 0
    stage_s: float = 0.02
    about: dict[str, Any] = field(default_factory=dict)
    sample: Path | None = None
    occurrences: tuple[tuple[float, float], ...] = ()
    fail: str | None = None
    live: list[dict[str, Any]] = field(default_factory=list)
    image: Callable[[float], np.ndarray] | None = None
    ahead_s: float = 0.0
    known_s: float = 0.0
    seen: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)


@dataclass
class Upload:
    """A video that was taken: its frames in memory."""

    name: str
    data: bytes
    times: list[float]
    frames: list[np.ndarray]
    duration_s: float

    @property
    def record(self) -> dict[str, Any]:
        height, width = self.frames[0].shape[:2]
        return {
            "name": self.name,
            "duration_s": self.duration_s,
            "width": width,
            "height": height,
            "frames": len(self.times),
        }


def true_box(query: int, time_s: float, width: int, height: int) -> list[float]:
    """Where the answer to a query is: each moves along its own line."""
    left, top = width * (0.05 + 0.15 * time_s), height * (0.15 + 0.3 * query)
    return [round(left, 2), round(top, 2), round(left + 0.2 * width, 2), round(top + 0.2 * height, 2)]


def occurrence(upload: Upload, start_s: float, end_s: float) -> dict[str, Any]:
    """A further occurrence of the first query's target."""
    width, height = upload.record["width"], upload.record["height"]
    sure = {"presence": 0.9, "visible": True, "interpolated": False}
    boxes = [
        {"time_s": round(t, 6), "box": true_box(0, t, width, height), **sure}
        for t in upload.times
        if start_s <= t < end_s
    ]
    return {"score": 0.5, "span": {"start_s": start_s, "end_s": end_s}, "boxes": boxes}


def answer(upload: Upload, index: int, query: str, task: str) -> dict[str, Any]:
    """A grounding of a made up target, as the server's JSON has it; queries with "absent" find nothing.

    Words that begin with "unknown" are not known. Queries with "text" are answered by text heads.
    """
    width, height = upload.record["width"], upload.record["height"]
    found = "absent" not in query
    still = upload.duration_s == 0
    start, end = (0.0, 0.0) if still else ((0.2 + 0.05 * index) * upload.duration_s, 0.75 * upload.duration_s)
    times = [t for t in upload.times if start <= t < end or still]
    boxes = [
        {
            "time_s": round(t, 6),
            "box": true_box(index, t, width, height),
            "presence": 0.9,
            "visible": t < 0.6 * upload.duration_s or still,
            "interpolated": False,
        }
        for t in times
    ]
    return {
        "query": query,
        "unknown_words": [word for word in query.split() if word.startswith("unknown")],
        "found": found,
        "span": {"start_s": round(start, 6), "end_s": round(end, 6)} if found else None,
        "size": {"width": width, "height": height},
        "scores": {"absent": 0.02 if found else 0.97, "answer": 0.91, "presence": 0.9 if found else 0.0},
        "boxes": boxes if found and task != "span" else None,
        "heads": "text" if "text" in query else "bridge",
        "mode": "joint" if "text" in query else "",
        "decoding": {"calls": 7} if "text" in query else {},
    }


class Handler(BaseHTTPRequestHandler):
    """Answers by the contract of the server's API, as far as the page uses it."""

    protocol_version = "HTTP/1.1"
    script: Script
    uploads: dict[str, Upload]
    jobs: dict[str, dict[str, Any]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = self._begin()
        if url.path == "/" or url.path.startswith("/page/"):
            self._send_file(PAGE / (url.path.removeprefix("/page/").strip("/") or "index.html"))
        elif self._allowed():
            for pattern, answer in ROUTES.items():
                if match := re.fullmatch(pattern, url.path):
                    return answer(self, *match.groups(), **parse_qs(url.query))
            self._json(404, {"error": "There is nothing here.", "code": "server.not_found"})
        return None

    def health(self) -> None:
        self._json(200, {"status": "ok", "bundle": {"name": "demo"}, "backend": "onnxruntime-cpu", **self.script.about})

    def sample(self) -> None:
        assert self.script.sample is not None
        self._bytes(200, self.script.sample.read_bytes(), "video/mp4")

    def sources(self) -> None:
        self._json(200, {"live": [{"name": "door"}] if self.script.live else []})

    def newest(self, **_: Any) -> None:
        if self.script.image is None:
            return self._json(404, {"error": "There is no frame.", "code": "server.frame_not_found"})
        time_s = self.script.known_s + self.script.ahead_s
        return self._jpeg(self.script.image(time_s), time_s)

    def annotated(self, job: str) -> None:
        self._bytes(200, self.uploads[self.jobs[job]["video"]].data, "video/mp4")

    def do_POST(self) -> None:
        url = self._begin()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._allowed():
            return None
        if url.path == "/v1/videos":
            return self._take(body)
        asked = json.loads(body)
        if asked["video"] not in self.uploads:
            return self._json(404, {"error": "There is no such video.", "code": "server.video_not_found"})
        if self.script.busy > 0:
            self.script.busy -= 1
            return self._json(429, {"error": "Three jobs wait already.", "code": "server.busy"}, {"Retry-After": "1"})
        self.script.asked.append(asked)
        job = {"id": f"job{len(self.jobs)}", "status": "queued", "position": 0, **asked}
        self.jobs[job["id"]] = job
        return self._json(202, job)

    def do_DELETE(self) -> None:
        url = self._begin()
        kind, name = url.path.split("/")[2:4]
        if kind == "jobs":
            self.script.cancelled.add(name)
        else:
            self.uploads.pop(name, None)
        self._bytes(204, b"", "text/plain")

    def _begin(self) -> Any:
        self.script.seen.append(f"{self.command} {self.path}")
        return urlsplit(self.path)

    def _allowed(self) -> bool:
        if self.script.key is None or self.headers.get("Authorization") == f"Bearer {self.script.key}":
            return True
        self._json(401, {"error": "This server wants a key.", "code": "server.unauthorized"})
        return False

    def _take(self, body: bytes) -> None:
        head, _, rest = body.partition(b"\r\n\r\n")
        name = re.search(rb'filename="([^"]*)"', head)
        data = rest[: rest.rindex(b"\r\n--")]
        assert name is not None
        try:
            upload = read_upload(name[1].decode(), data)
        except VideoError:
            return self._json(
                415,
                {"error": f"{name[1].decode()} is no video that can be read here.", "code": "video.unsupported_format"},
            )
        video = f"video{len(self.uploads)}"
        self.uploads[video] = upload
        return self._json(201, {"id": video, **upload.record})

    def frame(self, video: str, time: list[str]) -> None:
        upload, time_s = self.uploads[video], float(time[0])
        index = max(0, int(np.searchsorted(upload.times, time_s, side="right")) - 1)
        self._jpeg(upload.frames[index], upload.times[index])

    def _jpeg(self, image: np.ndarray, time_s: float) -> None:
        from PIL import Image

        out = io.BytesIO()
        Image.fromarray(image).save(out, "JPEG")
        self._bytes(200, out.getvalue(), "image/jpeg", {"X-Frame-Time": f"{time_s:.6f}"})

    def events(self, job_id: str) -> None:
        job = self.jobs[job_id]
        self._open_events()
        for position, stage in enumerate(STAGES):
            for done in (0, 1, 2):
                if job["id"] in self.script.cancelled:
                    return self._event("cancelled", {})
                self._event("progress", {"stage": stage, "done": done, "total": None if stage == "answer" else 2})
                time.sleep(self.script.stage_s / 3)
            if self.script.lose > 0 and position == 2:
                self.script.lose -= 1
                return None
        if self.script.fail is not None:
            return self._event("failed", {"error": self.script.fail, "code": "server.internal"})
        upload = self.uploads[job["video"]]
        results = [answer(upload, i, query, job["task"]) for i, query in enumerate(job["queries"])]
        if self.script.occurrences:
            best = {"score": 0.9, **{name: results[0][name] for name in ("span", "scores", "boxes")}}
            others = [best | occurrence(upload, *span) for span in self.script.occurrences]
            results[0] |= {"score": 0.9, "occurrences": [best, *others]}
        return self._event("done", {"id": job["id"], "status": "done", "results": results})

    def live(self, **_: Any) -> None:
        self._open_events()
        for update in self.script.live:
            self.script.known_s = update["known_s"]
            self._event("update", update)
            time.sleep(self.script.stage_s)
        self._event("end", {"ended": "source"})

    def _open_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def _event(self, name: str, data: Any) -> None:
        self.wfile.write(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode())
        self.wfile.flush()

    def _send_file(self, path: Path) -> None:
        kind = mimetypes.guess_type(path.name)[0] or "text/plain"
        self._bytes(200, path.read_bytes(), kind, {"Content-Security-Policy": CSP})

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), "application/json", headers)

    def _bytes(self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


ROUTES: dict[str, Callable[..., None]] = {
    "/health": Handler.health,
    "/v1/sample": Handler.sample,
    "/v1/live": Handler.sources,
    "/v1/live/door/events": Handler.live,
    "/v1/live/door/frame": Handler.newest,
    r"/v1/videos/(\w+)/frame": Handler.frame,
    r"/v1/jobs/(\w+)/events": Handler.events,
    r"/v1/jobs/(\w+)/annotated.mp4": Handler.annotated,
}


def read_upload(name: str, data: bytes) -> Upload:
    """Read all frames of a file as the runtime shows them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        with play(str(path)) as source:
            shown = [(time_s, np.array(frame)) for time_s, frame in source.frames]
            duration_s = 0.0 if source.is_image else float(source.duration_s or 0)
    return Upload(name, data, [time_s for time_s, _ in shown], [frame for _, frame in shown], duration_s)


class Quiet(ThreadingHTTPServer):
    """Says nothing of browsers that go away in the middle of an answer."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve the page with this stand-in; yields its address."""
    handler = type("Scripted", (Handler,), {"script": script, "uploads": {}, "jobs": {}})
    server = Quiet(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
