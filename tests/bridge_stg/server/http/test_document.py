"""The OpenAPI document against the server: methods, queries, forms, ranges and events are as it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from bridge_stg.runtime.chain.prompt import check_query
from bridge_stg.runtime.errors import QueryError
from bridge_stg.server.http.document import QUERY_PATTERN
from tests.bridge_stg.server.conftest import Running, ask, events, http_error, small_clip, upload
from tests.fakes.chain import fake_spec
from tests.fakes.live_chain import live_grounder, stream

JSON = {"Content-Type": "application/json"}
LIVE = "/v1/live/gate/events?query=the%20car"


def test_every_path_answers_other_methods_with_those_that_it_has(served: Callable[..., Running]) -> None:
    running = served(live={"gate": "rtsp://camera"})
    with running.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
        for path, operations in {
            **paths,
            "/": {"get": {}},
            "/page/{name}": {"get": {}},
            "/v1/sample": {"get": {}},
        }.items():
            url = path.replace("{name}", "gate" if "/live/" in path else "style.css").replace("{", "").replace("}", "")
            head = {"HEAD"} if "get" in operations and not path.endswith(("/events", "/video.mjpg")) else set()
            for method in ("OPTIONS", "TRACE", "PUT", "PROPFIND"):
                answer = client.request(method, url)
                assert (
                    http_error(answer) == (405, "server.method_not_allowed")
                    if "/v1/mod" not in path and "/chat/" not in path
                    else answer.status_code == 405
                )
                assert set(answer.headers["allow"].split(", ")) == {name.upper() for name in operations} | head, path
        assert client.request("TRACE", "/nothing").status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "the red car", "7", "é", "красная машина", "🚗", "ª", "a.", "", " ", "...", "«»", "×", "_", "　", "a\x00",
        "\x07car", "car\x85", "\tcar\n", "²", "。", "\x1f car",
    ],
)  # fmt: skip
def test_the_schema_of_a_query_is_what_the_runtime_accepts(query: str) -> None:
    try:
        accepted = bool(check_query(fake_spec().prompt, query))
    except QueryError:
        accepted = False
    assert bool(re.search(QUERY_PATTERN, query)) == accepted


def test_the_document_has_the_limits_of_the_server(served: Callable[..., Running]) -> None:
    with served(max_queries=3, max_query_chars=41).client() as client:
        document = client.get("/openapi.json").json()
    new = document["components"]["schemas"]["NewJob"]
    (query,) = (one["schema"] for one in parameters(document, "/v1/live/{name}/events") if one["name"] == "query")
    for queries in (new["properties"]["queries"], query):
        assert (queries["minItems"], queries["maxItems"], queries["items"]["maxLength"]) == (1, 3, 41)
    validator = jsonschema.Draft202012Validator(new)
    job: dict[str, Any] = {"video": "a", "queries": ["the car"]}
    tracked = {**job, "task": "track", "first_box": [1, 2, 3, 4]}
    assert all(map(validator.is_valid, [job, {**job, "task": "span", "first_box": None}, tracked]))
    wrong = [
        {**job, "queries": ["the car"] * 4}, {**job, "queries": []}, {**job, "first_box": [1, 2, 3, 4]},
        {**job, "task": "track"}, {**tracked, "queries": ["a", "b"]}, {**job, "colour": "red"},
    ]  # fmt: skip
    assert not any(map(validator.is_valid, wrong))


def parameters(document: dict[str, Any], path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document["paths"][path]["get"]["parameters"]
    return found


def test_forms_have_the_values_of_the_schema(served: Callable[..., Running], tmp_path: Path) -> None:
    clip = small_clip(tmp_path / "clip.mp4").read_bytes()
    with served().client() as client:

        def sent(*fields: tuple[str, str]) -> tuple[int, str]:
            files = [("file", ("a.mp4", clip)), *((name, (None, value)) for name, value in fields)]
            answer = client.post("/v1/ground", files=files)
            return (200, "") if answer.status_code == 200 else http_error(answer)

        query = ("queries", "the car")
        assert sent(query, ("allow_none", "false"), ("deadline_s", "60"), ("stream", "0")) == (200, "")
        assert sent(query, ("task", "track"), ("first_box", "1,2,30,40")) == (200, "")
        wrong = [("allow_none", "0"), ("stream", "null"), ("stream", "first"), ("deadline_s", "NaN"), ("video", "a")]
        for field in (*wrong, ("colour", "red"), ("first_box", "1,2,3,4")):
            assert sent(query, field) == (422, "server.invalid_request"), field
        assert sent(query, ("task", "tube"), ("task", "span")) == (422, "server.invalid_request")


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("bytes=0-9", 206), ("bytes=-5", 206), ("bytes=0-0,4-9", 206), ("bytes=10-", 206), ("bytes=0-99999999", 206),
        ("bytes=99999999-", 416), ("bytes=9-3", 400), ("bytes=a-b", 400), ("lines=1-2", 400), ("", 400),
    ],
)  # fmt: skip
def test_ranges(served: Callable[..., Running], tmp_path: Path, header: str, status: int) -> None:
    with served().client() as client:
        path = f"/v1/videos/{upload(client, small_clip(tmp_path / 'clip.mp4'))['id']}/content"
        answer = client.get(path, headers={"Range": header})
        assert answer.status_code == status
        if status == 416:
            assert answer.headers["content-range"].startswith("bytes */")
        if status >= 400:
            assert http_error(answer) == (status, {400: "server.bad_range", 416: "server.range_outside_file"}[status])
        assert client.get(path).status_code == 200


def test_events_are_as_the_document_says(served: Callable[..., Running], tmp_path: Path) -> None:
    sources = {"gate": stream(8, bright=((2.0, 6.0),))}
    running = served(live_grounder(), live=sources, live_options={"window_s": 8, "every_s": 0.5})
    with running.client() as client:
        document = client.get("/openapi.json").json()
        job = ask(client, upload(client, small_clip(tmp_path / "clip.mp4"))["id"], ["the car"]).json()["id"]
        for path, url in (("/v1/jobs/{job}/events", f"/v1/jobs/{job}/events"), ("/v1/live/{name}/events", LIVE)):
            content = document["paths"][path]["get"]["responses"]["200"]["content"]
            described = {
                one["properties"]["event"]["const"]: one["properties"]["data"]["contentSchema"]
                for one in content["text/event-stream"]["itemSchema"]["oneOf"]
            }
            with client.stream("GET", url) as answer:
                received = list(events(answer.iter_lines()))
            assert len(received) > 1
            for name, data in received:
                jsonschema.validate(data, {**described[name], "components": document["components"]})


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/videos", "/v1/ground", "/v1/chat/completions"])
@pytest.mark.parametrize("headers", [{"Content-Type": "text/plain"}, {}, {**JSON, "Content-Encoding": "gzip"}])
def test_bodies_of_other_types(
    served: Callable[..., Running], path: str, headers: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with served().client() as client:
        answer = client.post(path, content=b'{"video": "a", "queries": ["the car"]}', headers=headers)
        error = answer.json()["error"] if "/chat/" in path else answer.json()
        assert (answer.status_code, error["code"]) == (415, "server.unsupported_content_type")
        bad = {"Content-Type": "multipart/form-data; boundary=a"}
        assert http_error(client.post("/v1/videos", content=b"{}", headers=bad)) == (400, "server.bad_form")
        assert http_error(client.get("/docs/")) == (404, "server.not_found")
    assert not caplog.records  # clients cannot fill the log
