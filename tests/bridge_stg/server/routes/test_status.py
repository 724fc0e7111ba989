"""Health, metrics, the OpenAPI document and the page's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from bridge_stg.evaluation import schema
from bridge_stg.runtime.bundle.spec import KnowsSpec
from tests.bridge_stg.server.conftest import ROOT, Running, ask, ended, http_error, small_clip, upload
from tests.fakes.chain import fake_grounder, fake_spec


def test_health_says_what_runs(demo_server: Running) -> None:
    with demo_server.client() as client:
        value = client.get("/health").json()
        assert value["status"] == "ok" and value["verified"] and "onnxruntime" in value["backend"]
        assert value["queue"]["most_waiting"] == 64 and value["limits"]["queries"] == 16
        assert client.get("/health/live").json() == {"status": "ok"}
        for path in ("/", "/health", "/docs", "/metrics"):  # what watches a server often asks so
            answer = client.head(path)
            assert answer.status_code == 200 and answer.content == b"", path
        assert client.head("/v1/live/gate/events").status_code == 405


def test_health_says_what_the_model_knows_and_whether_it_was_trained(
    served: Callable[..., Running], tmp_path: Path
) -> None:
    with served().client() as client:
        value = client.get("/health").json()
        assert value["trained"] and value["knows"] is None
    knows = KnowsSpec("It knows dogs.", ("the", "dog"))
    spec = dataclasses.replace(fake_spec(), trained=False, knows=knows)
    with served(fake_grounder(spec)).client() as client:
        value = client.get("/health").json()
        assert value["trained"] is False and value["knows"] == "It knows dogs."
        video = upload(client, small_clip(tmp_path / "a.mp4"))["id"]
        results = ended(client, ask(client, video, ["the dog", "the Man"]).json()["id"])["results"]
        assert [result["unknown_words"] for result in results] == [[], ["man"]]


def test_a_sample_is_offered_with_its_query(served: Callable[..., Running], tmp_path: Path) -> None:
    clip = small_clip(tmp_path / "a.mp4")
    with served().client() as client:
        assert client.get("/health").json()["sample"] is None
        assert http_error(client.get("/v1/sample")) == (404, "server.not_found")
    with served(sample=clip).client() as client:
        assert client.get("/health").json()["sample"] == {"name": "a.mp4", "query": None}
        (tmp_path / "a.txt").write_text("the red square\n")
        assert client.get("/health").json()["sample"]["query"] == "the red square"
        answer = client.get("/v1/sample")
        assert answer.content == clip.read_bytes() and answer.headers["content-type"] == "video/mp4"


def test_metrics_parse_and_count(served: Callable[..., Running], tmp_path: Path) -> None:
    with served().client() as client:
        path = small_clip(tmp_path / "a.mp4")
        video = upload(client, path)["id"]
        ended(client, ask(client, video, ["the car", "the dog"], allow_none=False).json()["id"])
        client.post("/v1/videos", files={"file": b"no video"})
        client.get("/v1/nothing/here")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        samples = {
            (sample.name.removeprefix("bridge_stg_"), *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    assert samples["requests_total", "/v1/videos", "201", "POST"] == 1
    assert samples["requests_total", "/v1/videos", "415", "POST"] == 1
    assert samples["requests_total", "404", "GET", "other"] == 1
    assert samples["errors_total", "video.unsupported_format"] == 1 and samples["jobs_total", "done"] == 1
    assert samples["uploaded_bytes_total",] == path.stat().st_size + 8
    assert samples["stored_bytes",] == path.stat().st_size and samples["videos",] == 1
    assert samples["queue_length",] == 0 and samples["open_videos",] == 1 and samples["open_video_bytes",] > 0
    assert samples["batch_queries_sum",] == 2 and samples["job_seconds_count",] == 1
    for stage in ("decode_video", "vision_coarse", "prefill", "answer", "spatial"):
        assert samples["stage_seconds_count", stage] == 1, stage
    names = {name for name, *_ in samples}
    assert {"live_watches", "live_clients", "build_info", "process_resident_memory_bytes"} <= names


def test_the_openapi_document_is_valid_and_complete(served: Callable[..., Running]) -> None:
    from openapi_spec_validator import validate

    with served().client() as client:
        document = client.get("/openapi.json").json()
        docs = client.get("/docs")
    validate(document)
    assert (
        document["components"]["schemas"]["Result"]["properties"].keys() == {**schema.RESULT, **schema.SEARCHED}.keys()
    )
    routes = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert routes == {
        ("POST", "/v1/videos"), ("GET", "/v1/videos/{video}"), ("DELETE", "/v1/videos/{video}"),
        ("GET", "/v1/videos/{video}/content"), ("GET", "/v1/videos/{video}/frame"),
        ("POST", "/v1/jobs"), ("GET", "/v1/jobs/{job}"), ("DELETE", "/v1/jobs/{job}"),
        ("GET", "/v1/jobs/{job}/events"), ("GET", "/v1/jobs/{job}/annotated.mp4"), ("POST", "/v1/ground"),
        ("GET", "/v1/live"), ("GET", "/v1/live/{name}/events"),
        ("GET", "/v1/live/{name}/frame"), ("GET", "/v1/live/{name}/video.mjpg"),
        ("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
        ("GET", "/health"), ("GET", "/health/live"), ("GET", "/metrics"),
    }  # fmt: skip
    answers = [one["responses"] for path in document["paths"].values() for one in path.values()]
    errors = [answer for found in answers for code, answer in found.items() if int(code) >= 400]
    assert len(errors) > 100 and all(set(error["content"]) == {"application/json"} for error in errors)
    upload_body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(upload_body) == {"multipart/form-data", "application/json"}
    for _, path in routes:
        assert path in docs.text
    assert "<script" not in docs.text and "http" not in docs.text.replace("http.response", "")


def test_the_pages_files_and_nothing_beside_them(served: Callable[..., Running]) -> None:
    folder = ROOT / "bridge_stg" / "server" / "page"
    with served().client() as client:
        front = client.get("/")
        assert front.status_code == 200 and front.content == (folder / "index.html").read_bytes()
        for path in folder.iterdir():
            if path.is_file() and path.suffix in (".js", ".css", ".html", ".svg"):
                answer = client.get(f"/page/{path.name}")
                assert answer.content == path.read_bytes() and answer.headers["x-content-type-options"] == "nosniff"
                assert "text/" in answer.headers["content-type"] or path.suffix == ".svg"
        for name in ("../settings.py", "..%2fsettings.py", "%2e%2e/app.py", ".", "", "none.js", "../page/../app.py"):
            answer = client.get(f"/page/{name}")
            assert answer.status_code == 404, name
            http_error(answer)
