"""Every command that runs or describes an untrained bundle says so in one line, and names unknown words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge_stg import cli
from bridge_stg.checkpoint.checkpoint import load_checkpoint
from bridge_stg.checkpoint.init_checkpoint import init_checkpoint
from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.runtime.bundle.bundle import MANIFEST, Bundle
from bridge_stg.runtime.bundle.manifest import canonical_sha256
from tests.bridge_stg.commands.fake_grounder import complaint
from tests.bridge_stg.model.published import publish

QUERY = "the man"


@pytest.fixture(scope="module")
def bundle(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with the mark of `init`."""
    path = tmp_path_factory.mktemp("untrained") / "bundle"
    shutil.copytree(exported.path, path)
    values = json.loads((path / MANIFEST).read_text())
    values["spec"]["trained"] = False
    values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    (path / MANIFEST).write_text(json.dumps(values))
    return path


@pytest.fixture
def noted(bundle: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[list[Any]], str]:
    """Run a command that succeeds; return stderr after a check that it has the note once."""

    def run(arguments: list[Any], code: int = 0) -> str:
        assert cli.run([str(argument) for argument in arguments]) == code
        text = capsys.readouterr().err
        assert text.count("is untrained") == 1, text
        return text

    return run


def test_commands_about_a_bundle_say_it(
    bundle: Path, noted: Callable[[list[Any]], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted(["inspect", bundle])
    noted(["triton", bundle, "--out", tmp_path / "repository"])
    monkeypatch.setattr("bridge_stg.commands.calibrate.calibrate_bundle", lambda *_, **__: "")
    noted(["calibrate", bundle, "--samples", "s", "--out", tmp_path / "int8"])
    monkeypatch.setattr("bridge_stg.export.export_bundle.export_bundle", lambda *_, **__: bundle)
    noted(["export", "checkpoint", "--out", tmp_path / "again", "--no-verify"])
    monkeypatch.setattr("bridge_stg.server.run.serve", lambda *_, say, **__: say("http://127.0.0.1/"))
    noted(["serve", bundle])


def test_commands_that_ground_say_it(
    bundle: Path, noted: Callable[[list[Any]], str], clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complaint(["infer", clip, QUERY, "--bundle", bundle], capsys, code="bundle.untrained")
    infer = ["infer", clip, QUERY, "--bundle", bundle, "--untrained", "--json", tmp_path / "result.json"]
    assert "not know: man. This model knows 10" in noted(infer)
    (result,) = json.loads((tmp_path / "result.json").read_text())["results"]
    assert result["unknown_words"] == ["man"]
    many = ["infer-many", clip.parent, "--query", QUERY, "--query", "the dog", "--bundle", bundle]
    assert "not know: man." in noted([*many, "--out", tmp_path / "rows.jsonl"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()[1:]]
    assert {row["query"]: row["unknown_words"] for row in rows} == {QUERY: ["man"], "the dog": []}
    watch = ["watch", clip, QUERY, "--bundle", bundle, "--json", tmp_path / "events.jsonl", "--answers"]
    assert "not know: man." in noted(watch)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    answers = [answer for event in events if event["event"] == "answers" for answer in event["groundings"]]
    assert answers and all(answer["unknown_words"] == ["man"] for answer in answers)


def test_evaluate_says_it_of_bundles_and_checkpoints(
    bundle: Path, noted: Callable[[list[Any]], str], clip: Path, checkpoint: Path, tmp_path: Path
) -> None:
    line = {"video": clip.name, "query": "the dog", "span": [0.0, 1.0]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line) + "\n")
    evaluate = ["evaluate", "jsonl", "--annotations", tmp_path / "clips.jsonl", "--media", clip.parent]
    noted([*evaluate, "--model", bundle, "--out", tmp_path / "bundles"])
    copied = tmp_path / "copied"
    shutil.copytree(checkpoint, copied)
    dataclasses.replace(BridgeSTGConfig.load(copied), trained=False).save(copied)
    noted([*evaluate, "--model", checkpoint, "--model", copied, "--out", tmp_path / "checkpoints"])


def test_the_mark_of_init_is_in_the_spec_that_export_writes(tmp_path: Path) -> None:
    publish(tmp_path / "model", "qwen3_vl")
    spec = load_checkpoint(init_checkpoint(tmp_path / "model", tmp_path / "checkpoint")).spec
    assert not spec.trained and not spec.is_trained("bridge") and spec.is_trained("text")
