"""Keys, hosts, origins, paths and headers."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from PIL import Image

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.server.settings import Settings
from tests.bridge_stg.server.conftest import Running, ask, ended, http_error, small_clip, until, upload

KEY = "a-key-of-the-operator-32-characters"
ROUTES = [
    ("POST", "/v1/videos"), ("GET", "/v1/videos/a"), ("DELETE", "/v1/videos/a"), ("GET", "/v1/videos/a/content"),
    ("GET", "/v1/videos/a/frame"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/a"), ("DELETE", "/v1/jobs/a"),
    ("GET", "/v1/jobs/a/events"), ("GET", "/v1/jobs/a/annotated.mp4"), ("POST", "/v1/ground"), ("GET", "/v1/live"),
    ("GET", "/v1/live/a/events?query=a"), ("GET", "/v1/live/a/video.mjpg?query=a"), ("GET", "/metrics"),
    ("GET", "/v1/nothing"), ("GET", "/anything"),
]  # fmt: skip


@pytest.mark.parametrize(
    "given",
    [
        {}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"}, {"X-API-Key": KEY.upper()},
        {"X-API-Key": ""}, {"Cookie": f"key={KEY}"},
    ],
)  # fmt: skip
def test_without_the_key_nothing_but_the_page_is_there(given: dict[str, str], served: Callable[..., Running]) -> None:
    with served(api_key=KEY).client(headers=given) as client:
        for method, path in ROUTES:
            answer = client.request(method, path, params={"key": KEY} if "?" not in path else None)
            assert http_error(answer) == (401, "server.unauthorized"), (method, path)
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/health", "/health/live", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path


@pytest.mark.parametrize(
    "given", [{"Authorization": f"Bearer {KEY}"}, {"X-API-Key": KEY}, {"Authorization": f"bearer {KEY}"}]
)
def test_with_the_key_everything_works_and_no_log_holds_it(
    given: dict[str, str], served: Callable[..., Running], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    running = served(api_key=KEY)
    with running.client(headers=given) as client:
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        assert ended(client, ask(client, video, ["the car"]).json()["id"])["status"] == "done"
        texts = [client.get(path).text for path in ("/metrics", "/health", "/openapi.json", "/docs", "/v1/nothing")]
    assert KEY not in caplog.text.replace("authorization", "") and not any(KEY in text for text in texts)
    assert KEY not in repr(running.service.settings)


def test_another_machines_address_needs_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(BridgeError, match="no API key is set: pass --api-key-env NAME, or --insecure"):
            Settings(host=host)
        Settings(host=host, api_key=KEY)
        Settings(host=host, insecure=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        Settings(host=host)
    for key in ("short", "", "schlüssel-mit-umlaut-und-lang"):
        with pytest.raises(BridgeError, match="API key"):
            Settings(api_key=key)


def test_a_page_that_rebinds_its_name_does_not_reach_a_server_without_key(served: Callable[..., Running]) -> None:
    running = served(allow_hosts=("grounding.example",))
    with running.client() as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"):
            assert http_error(client.get("/v1/live", headers={"Host": host})) == (400, "server.unknown_host"), host
            assert client.get("/health", headers={"Host": host}).status_code == 400
        for host in ("localhost", "localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST", "grounding.example"):
            assert client.get("/v1/live", headers={"Host": host}).status_code == 200, host
    with served(api_key=KEY).client(headers={"X-API-Key": KEY}) as client:
        assert client.get("/v1/live", headers={"Host": "anything.example"}).status_code == 200


def test_pages_of_other_origins_change_nothing(served: Callable[..., Running], tmp_path: Path) -> None:
    running, content = served(), small_clip(tmp_path / "a.mp4").read_bytes()
    with running.client() as client:
        for origin in ("http://evil.example", "null", "http://localhost:1", running.url.replace("127.0.0.1", "evil")):
            for path in ("/v1/videos", "/v1/ground"):
                answer = client.post(path, files={"file": content}, headers={"Origin": origin})
                assert http_error(answer) == (403, "server.foreign_origin"), origin
            assert client.delete("/v1/videos/a", headers={"Origin": origin}).status_code == 403
        assert client.post("/v1/videos", files={"file": content}, headers={"Origin": running.url}).status_code == 201
        for method in ("OPTIONS", "GET", "POST"):
            answer = client.request(method, "/v1/jobs", headers={"Origin": "http://evil.example"})
            assert not any(name.startswith("access-control") for name in answer.headers)
    assert len(list(running.service.store.folder.iterdir())) == 1


@pytest.mark.parametrize("name", ["events", "video.mjpg"])
def test_pages_of_other_origins_start_no_live_source(served: Callable[..., Running], name: str) -> None:
    path = f"/v1/live/nothing/{name}?query=a"
    with served().client() as client:
        for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
            assert http_error(client.get(path, headers=headers)) == (403, "server.foreign_origin"), headers
        for headers in ({}, {"Sec-Fetch-Site": "same-origin"}):
            assert http_error(client.get(path, headers=headers)) == (404, "server.source_not_found"), headers


def test_the_log_of_requests_names_routes(
    served: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "bridge_stg.server.requests")
    log = logging.getLogger("bridge_stg.server.requests")
    for name, value in (("handlers", [caplog.handler]), ("propagate", False), ("disabled", False)):
        monkeypatch.setattr(log, name, value)  # an earlier test may have configured it
    with served().client() as client:
        client.get("/v1/videos/secret")
        until(lambda: caplog.text)  # the line is written after the answer is sent
    assert "127.0.0.1 GET /v1/videos/{video} 404" in caplog.text and "secret" not in caplog.text


def test_every_answer_carries_the_headers(served: Callable[..., Running]) -> None:
    with served().client() as client:
        for path in ("/", "/docs", "/health", "/v1/nothing", "/openapi.json", "/metrics"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
            assert headers["cache-control"] in ("no-store", "no-cache") and "server" not in headers


PATHS = [
    "/../../etc/passwd", "/page/../../../etc/passwd", "/page/%2e%2e/%2e%2e/run.py", "/page/..%2f..%2fcli.py",
    "/page/....//run.py", "/page//etc/passwd", "//etc/passwd", "/page/%2fetc%2fpasswd", "/page/index.html%00.js",
    "/v1/videos/../../etc/passwd/content", "/v1/videos/..%2f..%2fetc%2fpasswd/content", "/v1/videos/%2e/content",
    "/v1/jobs/..%2f..%2fa/annotated.mp4", "/v1/live/..%2fa/events?query=a", "/page/__init__.py", "/page/.",
    "/file:///etc/passwd", "/page/~root", "/page/C:%5cwindows%5cwin.ini", "/static/index.html", "/.git/config",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_path_of_the_server_is_readable(path: str, served: Callable[..., Running], tmp_path: Path) -> None:
    running = served(media=tmp_path)
    host, port = running.url.removeprefix("http://").split(":")
    import http.client

    connection = http.client.HTTPConnection(host, int(port), timeout=30)  # sends the path as it is
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    assert answer.status in (400, 404, 405), text[:200]
    assert "root:" not in text and "import " not in text and "Traceback" not in text
    connection.close()


def test_ids_cannot_be_guessed_and_one_client_does_not_learn_of_another(
    served: Callable[..., Running], tmp_path: Path
) -> None:
    with served().client() as client:
        path = small_clip(tmp_path / "a.mp4")
        made = [upload(client, path) for _ in range(20)]
        ids = {video["id"] for video in made}
        assert len(ids) == 20 and all(len(one) == 24 for one in ids)
        assert len({one[:4] for one in ids}) > 15
        for path in ("/v1/videos", "/v1/videos/", "/v1/jobs", "/v1/jobs/"):
            assert client.get(path, follow_redirects=True).status_code in (404, 405)
        client.delete(f"/v1/videos/{made[0]['id']}")
        assert client.get(f"/v1/videos/{made[1]['id']}/content").status_code == 200


def test_a_body_of_json_is_bounded_too(served: Callable[..., Running]) -> None:
    with served().client() as client:
        for path in ("/v1/jobs", "/v1/videos", "/v1/ground"):
            body = b'{"source": "' + b"a" * 2_000_000 + b'"}'
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert http_error(answer) == (413, "server.body_too_large")


def test_a_request_that_is_no_http_is_rejected(served: Callable[..., Running]) -> None:
    import socket

    running = served()
    host, port = running.url.removeprefix("http://").split(":")
    for raw in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000, b"GET /\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 400")
    assert httpx.get(f"{running.url}/health/live", trust_env=False).status_code == 200


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/ground"])
def test_a_rejected_upload_gets_its_answer_though_it_is_still_sending(
    path: str, served: Callable[..., Running]
) -> None:
    with served(api_key=KEY).client() as client:
        for _ in range(3):
            assert http_error(client.post(path, files={"file": bytes(3_000_000)})) == (401, "server.unauthorized")


def test_too_many_requests_at_a_time_are_rejected(served: Callable[..., Running]) -> None:
    from tests.bridge_stg.server.jobs.test_scheduler import gated

    grounder, gate = gated()
    running = served(grounder, max_connections=3)
    with running.client() as client, running.client() as other:
        video = client.post("/v1/videos", files={"file": small_gif()}).json()["id"]
        job = ask(client, video, ["the car"]).json()["id"]
        streams = [other.stream("GET", f"/v1/jobs/{job}/events") for _ in range(3)]
        try:
            for stream in streams:
                stream.__enter__()
            answer = client.get("/health")
            assert http_error(answer) == (503, "server.too_many_connections") and answer.headers["retry-after"]
        finally:
            gate.open.set()
            for stream in streams:
                stream.__exit__(None, None, None)
        until(lambda: client.get("/health").status_code == 200)
        assert ended(client, job)["status"] == "done"


def small_gif() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 60)).save(file, "GIF")
    return file.getvalue()
