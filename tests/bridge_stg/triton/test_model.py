"""The Triton model and its repository: config against Triton's schema, batches through a stand-in for its API."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format

from bridge_stg.cli import run
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError, QueryError, VideoError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.triton.model import GroundingModel, outputs
from bridge_stg.triton.repository import KINDS, Serving, model_config, write_repository
from tests.bridge_stg.commands.fake_grounder import FakeVideo
from tests.errors import raises
from tests.fakes import triton as fake_triton


def schema() -> ModuleType:
    """Triton's model_config.proto as its client package compiled it, without gRPC, which that package imports first."""
    home = importlib.util.find_spec("tritonclient")
    assert home is not None and home.submodule_search_locations
    file = Path(home.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    return text_format.Parse(text, schema().ModelConfig())


def as_json(text: str) -> dict[str, Any]:
    """What Triton hands to `initialize`."""
    return dict(json_format.MessageToDict(parsed(text), preserving_proto_field_name=True))


class Video(FakeVideo):
    """Counts its calls; rejects an empty query, and fails at the query "break"."""

    def __init__(self, owner: Chain, path: str) -> None:
        self.owner, self.path, self.closed = owner, path, False

    def ground_many(self, queries: Sequence[str], **options: Any) -> list[Any]:
        self.owner.calls.append((self.path, list(queries), options["allow_none"]))
        return [self.ground(query) for query in queries]

    def ground(self, query: str, **options: Any) -> Any:
        if options.get("cancel") is not None:
            assert not options["cancel"]()
        if not query:
            raise QueryError("query.empty", "the query is empty")
        if query == "break":
            raise ZeroDivisionError("a fault of ours")
        return super().ground(query)

    def close(self) -> None:
        self.closed = True


class Chain:
    """In place of a Grounder."""

    target = None

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.opened: list[Video] = []
        self.closed = False

    def open(self, path: str, **options: Any) -> Video:
        if not Path(path).exists():
            raise VideoError("video.not_found", f"{path}: does not exist")
        self.opened.append(Video(self, path))
        return self.opened[-1]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Chain:
    made = Chain()
    monkeypatch.setattr(Grounder, "load", lambda *arguments, **options: made)
    return made


@pytest.fixture
def server(chain: Chain, tmp_path: Path) -> fake_triton.Server:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (media / name).write_bytes(name.encode())

    class Model(GroundingModel):
        utils = fake_triton.as_module()
        folder = tmp_path

    config = as_json(model_config(Serving(media=str(media), open_videos=2)))
    return fake_triton.Server(Model, config, str(tmp_path))


@pytest.fixture
def bundle_path(exported: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.path, tmp_path / "bundle"))


def test_config_follows_the_schema() -> None:
    for kind, name in KINDS.items():
        serving = Serving(name="find.it-2", media='/srv/"odd" ü', kind=kind, max_batch=8, instances=3, deadline_s=2.5)
        config = parsed(model_config(serving))
        assert (config.name, config.backend, config.max_batch_size) == ("find.it-2", "python", 8)
        assert config.dynamic_batching.max_queue_delay_microseconds == 5000
        group = config.instance_group[0]
        assert group.count == 3 and group.Kind.Name(group.kind) == name
        assert {i.name for i in config.input if not i.optional} == {"QUERY"}
        assert list(config.output[3].dims) == [-1, 6]
        assert config.parameters["media"].string_value == '/srv/"odd" ü'
        assert config.parameters["deadline_s"].string_value == "2.5"
    with pytest.raises(text_format.ParseError):
        parsed(model_config(Serving()).replace("dynamic_batching", "dynamic_batch"))


@pytest.mark.parametrize("heads", [None, "text"])
def test_the_model_loads_with_the_heads_of_its_config(
    heads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(Grounder, "load", lambda path, **options: loaded.append(options) or Chain())
    text = TextOptions(mode="two-step", grammar=False, max_tokens=99)

    class Model(GroundingModel):
        utils = fake_triton.as_module()
        folder = tmp_path

    fake_triton.Server(Model, as_json(model_config(Serving(heads=heads, text=text))), str(tmp_path))
    assert loaded == [{"backend": "auto", "variant": None, "heads": heads, "text": text}]


def test_requests_are_grouped_by_video(server: fake_triton.Server, chain: Chain) -> None:
    responses = server.infer(
        server.request(VIDEO=["a.mp4"], QUERY=["the dog"]),
        server.request(VIDEO=["b.mp4", "a.mp4"], QUERY=["the cat", "the ghost"]),
        server.request(VIDEO=["a.mp4"], QUERY=["the car"], ALLOW_NONE=[False]),
    )
    assert not any(response.has_error() for response in responses)
    asked = [(Path(path).name, queries, allow) for path, queries, allow in chain.calls]
    assert asked == [
        ("a.mp4", ["the dog", "the ghost"], True),
        ("b.mp4", ["the cat"], True),
        ("a.mp4", ["the car"], False),
    ]
    assert [Path(video.path).name for video in chain.opened] == ["a.mp4", "b.mp4"]
    second = {tensor.name(): tensor.as_numpy() for tensor in responses[1].output_tensors()}
    assert [json.loads(text)["query"] for text in second["RESULT"][:, 0]] == ["the cat", "the ghost"]
    assert second["FOUND"][:, 0].tolist() == [True, False]
    np.testing.assert_allclose(second["SPAN"][0], [0.4, 1.6], rtol=1e-6)
    assert np.isnan(second["SPAN"][1]).all() and np.isnan(second["BOXES"][1]).all()
    np.testing.assert_allclose(second["BOXES"][0, 0], [0.4, 10, 10, 30, 30, 0.4], rtol=1e-6)


def test_errors_are_each_requests_own(server: fake_triton.Server, chain: Chain) -> None:
    kind = fake_triton.TritonError
    responses = server.infer(
        server.request(VIDEO=["a.mp4"], QUERY=["the dog"]),
        server.request(VIDEO=["a.mp4"], QUERY=[""]),
        server.request(VIDEO=["nowhere.mp4"], QUERY=["the dog"]),
        server.request(VIDEO=["../secret.mp4"], QUERY=["the dog"]),
        server.request(QUERY=["the dog"]),
        server.request(VIDEO=["a.mp4"], VIDEO_BYTES=[b"x"], QUERY=["the dog"]),
        server.request(VIDEO=["b.mp4"], QUERY=["break"]),
        server.request(VIDEO=["b.mp4"], QUERY=["the cat"]),
        server.request(VIDEO=["a.mp4"], QUERY=["the dog"], cancelled=True),
        server.request(VIDEO=["a.mp4"], QUERY=[b"\xff"]),
    )
    errors = [response.error() for response in responses]
    codes = [None if error is None else error.code() for error in errors]
    bad, ours, gone = kind.INVALID_ARG, kind.INTERNAL, kind.CANCELLED
    assert codes == [None, bad, bad, bad, bad, bad, ours, None, gone, bad]
    texts = [error.message() for error in errors if error is not None]
    expected = [
        "query.empty", "video.not_found", "video.outside_media", "video.bad_source", "video.bad_source",
        "ZeroDivisionError", "call.cancelled", "query.bad_characters",
    ]  # fmt: skip
    for text, code in zip(texts, expected, strict=True):
        assert code in text


def test_videos_stay_open_between_batches(server: fake_triton.Server, chain: Chain, tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mp4", "b.mp4", "c.mp4"):
        server.infer(server.request(VIDEO=[name], QUERY=["the dog"]))
    assert [Path(video.path).name for video in chain.opened] == ["a.mp4", "b.mp4", "c.mp4"]
    assert [video.closed for video in chain.opened] == [True, False, False]
    (tmp_path / "media" / "c.mp4").write_bytes(b"another film")
    server.infer(server.request(VIDEO=["c.mp4"], QUERY=["the dog"]))
    assert len(chain.opened) == 4
    server.model.finalize()
    assert chain.closed and all(video.closed for video in chain.opened)


def test_videos_as_bytes(server: fake_triton.Server, chain: Chain) -> None:
    content = b"a film"
    server.infer(
        server.request(VIDEO_BYTES=[content], QUERY=["the dog"]),
        server.request(VIDEO_BYTES=[content], QUERY=["the cat"]),
    )
    assert [queries for _, queries, _ in chain.calls] == [["the dog", "the cat"]]
    assert chain.opened[0].closed and not Path(chain.opened[0].path).exists()


def test_without_media_no_path_is_read(chain: Chain, tmp_path: Path) -> None:
    class Model(GroundingModel):
        utils = fake_triton.as_module()
        folder = tmp_path

    server = fake_triton.Server(Model, as_json(model_config(Serving())), str(tmp_path))
    error = server.infer(server.request(VIDEO=["/etc/hostname"], QUERY=["the dog"]))[0].error()
    assert error is not None and "server.no_media_folder" in error.message()


def test_one_gpu_per_instance(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(GroundingModel):
        utils = fake_triton.as_module()
        folder = tmp_path

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    fake_triton.Server(Model, as_json(model_config(Serving())), str(tmp_path), kind="GPU")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


def test_a_model_that_cannot_be_loaded_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(GroundingModel):
        utils = fake_triton.as_module()
        folder = tmp_path

    with raises("bundle.not_found"):
        fake_triton.Server(Model, as_json(model_config(Serving())), str(tmp_path))


def test_outputs_of_nothing() -> None:
    assert outputs([])["BOXES"].shape == (0, 1, 6)


class TestRepository:
    """What `triton BUNDLE --out` writes."""

    def test_it_is_complete(self, bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (bundle_path / "reports").mkdir(exist_ok=True)
        (bundle_path / "reports" / "r.json").write_text("{}")
        out = tmp_path / "repo"
        assert run(["triton", str(bundle_path), "--out", str(out), "--media", "/srv/videos", "--max-batch", "4"]) == 0
        assert "tritonserver --model-repository" in capsys.readouterr().out
        assert [path.name for path in out.iterdir()] == ["bridge_stg"]
        config = parsed((out / "bridge_stg/config.pbtxt").read_text())
        assert config.max_batch_size == 4 and config.parameters["media"].string_value == "/srv/videos"
        copied = {path.name for path in (out / "bridge_stg/1/bundle").iterdir()}
        assert "manifest.json" in copied and "reports" not in copied
        module = self.load(out / "bridge_stg/1/model.py")
        assert issubclass(module.TritonPythonModel, GroundingModel)
        assert module.TritonPythonModel.folder == out / "bridge_stg/1"

    @staticmethod
    def load(file: Path) -> Any:
        sys.modules["triton_python_backend_utils"] = fake_triton.as_module()
        try:
            spec = importlib.util.spec_from_file_location("model", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
        finally:
            del sys.modules["triton_python_backend_utils"]

    def test_existing_models_are_kept(self, bundle_path: Path, tmp_path: Path) -> None:
        out = tmp_path / "repo"
        (out / "other").mkdir(parents=True)
        write_repository(bundle_path, out)
        with raises("output.exists", out / "bridge_stg", "--overwrite"):
            write_repository(bundle_path, out)
        write_repository(bundle_path, out, Serving(max_batch=2), overwrite=True)
        assert "max_batch_size: 2" in (out / "bridge_stg/config.pbtxt").read_text()
        with raises("output.exists", out / "other", "--name"):
            write_repository(bundle_path, out, Serving(name="other"), overwrite=True)
        with raises("options.invalid", "../up"):
            write_repository(bundle_path, out, Serving(name="../up"))
        with raises("output.is_input", bundle_path):
            write_repository(bundle_path, bundle_path / "repo")
        assert sorted(path.name for path in out.iterdir()) == ["bridge_stg", "other"]

    def test_invalid_options_are_rejected(self, bundle_path: Path, tmp_path: Path) -> None:
        with raises("engine.unknown_backend", "tensor", "auto"):
            write_repository(bundle_path, tmp_path / "repo", Serving(backend="tensor"))
        with raises("bundle.no_variant", "std", "standard"):
            write_repository(bundle_path, tmp_path / "repo", Serving(variant="std"))
        assert not (tmp_path / "repo").exists()

    def test_a_failure_leaves_no_partial_model(
        self, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise EngineError("engine.not_finite", "stopped")

        monkeypatch.setattr("bridge_stg.triton.repository.model_config", fail)
        with raises("engine.not_finite"):
            write_repository(bundle_path, tmp_path / "repo")
        assert not list((tmp_path / "repo").iterdir())
