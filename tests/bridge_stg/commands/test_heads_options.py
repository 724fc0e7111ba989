"""The options of text heads: every command that answers queries has them and passes them on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge_stg.calibration.options import Options, load_arguments
from bridge_stg.runtime import TextOptions
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder
from tests.bridge_stg.commands.fake_grounder import complaint
from tests.fakes.chain import fake_spec, text_spec

GIVEN = ["--heads", "text", "--mode", "two-step", "--no-grammar", "--max-tokens", "99"]
TEXT = TextOptions(mode="two-step", grammar=False, max_tokens=99)


class Stopped(BridgeError):
    """Ends a command where the options have arrived."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a model was loaded with; loading stops the command."""
    calls: list[dict[str, Any]] = []

    def stop(*arguments: Any, **options: Any) -> None:
        calls.append(options)
        raise Stopped("bundle.not_found", "stopped here")

    monkeypatch.setattr(Grounder, "load", stop)
    monkeypatch.setattr("bridge_stg.runtime.loading.load_grounder", stop)
    monkeypatch.setattr("bridge_stg.evaluation.run.evaluate.bundle_model", stop)
    monkeypatch.setattr("bridge_stg.server.run.serve", stop)
    monkeypatch.setattr("bridge_stg.demo.bundle.demo_sample", lambda bundle: None)
    monkeypatch.setattr("bridge_stg.triton.repository.write_repository", lambda bundle, out, s, **_: stop(**vars(s)))
    monkeypatch.setattr("bridge_stg.evaluation.datasets.registry.read_dataset", lambda *_, **__: NoDataset())
    return calls


class NoDataset:
    """Stands for the samples of `evaluate`, which are not read."""

    def with_stream(self, stream: int | None) -> NoDataset:
        return self


def commands(folder: Path) -> dict[str, list[str]]:
    table, bundle = folder / "table.jsonl", folder / "bundle"
    table.write_text(json.dumps({"video": "a.mp4", "query": "the car"}))
    (folder / "a.mp4").touch()
    bundle.mkdir()
    (bundle / "manifest.json").touch()
    return {
        "infer": ["a.mp4", "q", "--bundle", str(bundle)],
        "infer-many": [str(table), "--bundle", str(bundle), "--out", str(folder / "r.jsonl")],
        "evaluate": ["vidstg", "--annotations", "a", "--model", str(bundle), "--out", str(folder / "out")],
        "watch": ["a.mp4", "q", "--bundle", str(bundle)],
        "serve": [str(bundle), "--port", "0"],
        "triton": [str(bundle), "--out", str(folder / "models")],
    }


@pytest.mark.parametrize("name", ["infer", "infer-many", "evaluate", "watch", "serve", "triton"])
def test_each_command_passes_them_on(
    name: str, loaded: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = commands(tmp_path)[name]
    for given, expected in (([], (None, TextOptions())), (GIVEN, ("text", TEXT))):
        complaint([name, *words, *given], capsys, code="bundle.not_found")
        assert (loaded[-1]["heads"], loaded[-1]["text"]) == expected


def test_calibrate_passes_on_what_differs_from_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[dict[str, Any]] = []

    def stop(bundle: Path, out: Path, *, options: Options, **_: Any) -> None:
        found.append(options.head_options)
        raise Stopped("bundle.not_found", "stopped here")

    monkeypatch.setattr("bridge_stg.calibration.calibrate.calibrate", stop)
    manifest = SimpleNamespace(spec=fake_spec())
    monkeypatch.setattr("bridge_stg.runtime.bundle.bundle.read_manifest", lambda path: manifest)
    for given in ([], GIVEN):
        words = ["calibrate", "bundle", "--samples", "a.jsonl", "--out", str(tmp_path / "out"), *given]
        complaint(words, capsys, code="bundle.not_found")
    assert found[0] == {} and load_arguments(found[1]) == {"heads": "text", "text": TEXT}


@pytest.mark.parametrize("wrong", [["--heads", "none"], ["--mode", "all"], ["--max-tokens", "0"]])
def test_wrong_values(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    complaint(["watch", "a.mp4", "q", *wrong], capsys, code="options.invalid")


def test_results_of_other_options_are_not_resumed() -> None:
    from bridge_stg.evaluation.run.evaluate import text_identity

    spec = text_spec(heads="bridge")
    assert text_identity(spec, None, TEXT) == {}  # bridge heads: their results do not depend on it
    assert text_identity(spec, "text", TEXT) != text_identity(spec, "text", None) != {}
