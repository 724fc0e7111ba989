"""A whole calibration on the tiny model, whose answers are noise: it runs, resumes, and checks its inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bridge_stg import cli
from bridge_stg.calibration import calibrate as steps
from bridge_stg.calibration.calibrate import Options, calibrate
from bridge_stg.calibration.overrides import read_overrides
from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.calibration.scoring.scores import Scores
from bridge_stg.calibration.search import trials as recipe_trials
from bridge_stg.calibration.search.float_blocks import choose_float_blocks
from bridge_stg.calibration.work_folder import working_in
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.packages import install_command
from tests.calibration.chain_samples import write_samples
from tests.errors import raises
from tests.evaluation.validation import validate
from tests.fakes.clips import pictures, write

FORCED = ("vision_encoder", "language_model")
LOOSE = {"max_drop": 100.0, "max_changed": 100.0, "confirm": 2, "threads": 1, "force_int8": FORCED}
"""Limits above any noise, and graphs that are quantized however busy the machine is."""


def labelled(folder: Path, name: str, shade: int, count: int = 3) -> Path:
    """Write labelled tubes of one clip."""
    frames = pictures(20, 32 + 8 * shade, 48)
    write(folder / f"{name}.mp4", frames, rate=10)
    boxes = [{"time": 0.0, "box": [4, 4, 30, 30]}, {"time": 1.0, "box": [6, 4, 32, 30]}]
    lines = [
        {"id": f"{name} {i}", "video": f"{name}.mp4", "query": f"car {i}", "span": [0.0, 1.5], "boxes": boxes}
        for i in range(count)
    ]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Path]:
    """The three files of samples."""
    (tmp_path / "in").mkdir()
    return {
        "samples": write_samples(tmp_path / "in"),
        "select": labelled(tmp_path / "in", "select", 1),
        "evaluate": labelled(tmp_path / "in", "held-out", 2),
    }


@pytest.mark.slow
def test_calibrate(exported: Bundle, given: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "b8"
    stages: list[str] = []
    report: Callable[..., Any] = lambda stage, done, total: stages.append(stage)  # noqa: E731
    found = calibrate(exported.path, out, **given, options=Options(**LOOSE), progress=report)
    bundle = Bundle.load(out, check="all")
    assert {g.precision for g in bundle.manifest.graphs["vision_encoder"].values()} == {"int8 w8a8"}
    assert bundle.manifest.graphs["spatial_decoder"]["standard"].precision == "fp32"
    about = bundle.manifest.calibration
    assert about is not None and about["samples"]["count"] == 6 and about["recipe"]["name"] == "w8a8"
    values = read_report(out, "calibration")
    validate(values, "calibration_report")
    assert (out / "reports" / "calibration.html").is_file()
    assert values["evaluation"]["samples"] == 3 and values["choice"]["judged_on"] == "select"
    assert {"m_tIoU", "m_vIoU"} <= set(values["evaluation"]["judgement"]["drops"])
    assert {row["tensor"] for row in values["drift"]} >= {"visual_tokens", "logits", "taps"}
    assert [one["drop"] is None for one in values["sensitivity"]][:3] == [False, False, True]
    assert "at least 16" in " ".join(values["warnings"])
    graphs = {row["graph"]: row for row in values["graphs"]}
    assert graphs["language_model"]["int8"] and graphs["language_model"]["forced"]
    assert graphs["spatial_decoder"]["why"] == "the recipe leaves it in float"
    assert graphs["vision_encoder"]["bytes"]["int8"] < graphs["vision_encoder"]["bytes"]["float"]
    assert read_overrides(tmp_path / "b8.calibration" / "overrides.yaml").keep_float == ()
    assert found.recipe["kept"] == {}

    # Without --overwrite nothing is replaced; with it, all results are reused, and the bytes are equal.
    with raises("output.exists", "--overwrite"):
        calibrate(exported.path, out, **given, options=Options(**LOOSE))
    stages.clear()
    calibrate(exported.path, out, **given, options=Options(**LOOSE), overwrite=True, progress=report)
    assert Bundle.load(out).manifest.fingerprint == bundle.manifest.fingerprint
    assert not {"smoothing", "errors of ranges"} & set(stages)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_killed_calibration_resumes(
    exported: Bundle, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before some of its steps: --out does not exist until the end, and no bundle is made twice."""
    out, options = tmp_path / "b8", Options(**LOOSE)
    made: list[str] = []
    quantize = recipe_trials.quantize_bundle

    def counted(source: Bundle, path: Path, **rest: Any) -> Path:
        made.append(str(path))
        return quantize(source, path, **rest)

    monkeypatch.setattr(recipe_trials, "quantize_bundle", counted)
    for step in ("record_calls", "without_slow_graphs", "write_bundle", "measure_stages", "evaluate_bundles"):
        with monkeypatch.context() as patch:
            patch.setattr(steps, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                calibrate(exported.path, out, **given, options=options)
        assert not out.exists()
    calibrate(exported.path, out, **given, options=options)
    assert len(made) == len(set(made)) >= 4
    fresh = calibrate(exported.path, tmp_path / "again", **given, options=options)
    assert Bundle.load(out).manifest.fingerprint == Bundle.load(tmp_path / "again").manifest.fingerprint
    assert fresh.trials[0]["within"]


@pytest.mark.slow
def test_without_labels_in_subprocesses(
    exported: Bundle, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float bundle's own tubes are the truth, which the report says; large bundles run in subprocesses."""
    monkeypatch.setattr(steps, "LARGE_BYTES", 0)
    options = Options(**{**LOOSE, "recipe": "w4", "int8_cache": True, "confirm": 0})
    found = calibrate(
        exported.path, tmp_path / "b4", samples=given["samples"], evaluate=given["evaluate"], own_tubes=True,
        options=options,
    )  # fmt: skip
    assert found.choice["labelled"] is False and found.choice["judged_on"] == "calibration"
    assert {m["value"] for m in found.choice["float"]["metrics"].values()} == {1.0}
    assert any("no --select was given" in warning for warning in found.warnings)
    assert found.peak_bytes["float"] and found.peak_bytes["int8"]
    graphs = Bundle.load(tmp_path / "b4").manifest.graphs["language_model"]
    assert {graph.precision for graph in graphs.values()} == {"int4 w4-kv8"}


def test_limits_that_no_trial_meets(exported: Bundle, given: dict[str, Path], tmp_path: Path) -> None:
    tight = Options(
        **{**LOOSE, "max_drop": 1e-9, "max_changed": 1e-9, "int8_cache": True, "confirm": 0, "max_trials": 8}
    )

    def lost(self: Any, recipe: Any, reference: Scores, **rest: Any) -> Scores:
        return dataclasses.replace(reference, answer_agreement=0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_trials.RecipeTrials, "trial", lost)
        with raises("calibration.limit_exceeded", "50.0 %", "--kv8"):
            calibrate(exported.path, tmp_path / "b8", **given, options=tight)
    assert not (tmp_path / "b8").exists()


def test_changes_up_to_the_limit_are_within_it() -> None:
    """3 of 100 are 3 % in spite of rounding, and one answer may always change."""
    values: dict[str, Any] = {"label": "int8", "failed": 0, "labelled": True, "metrics": {}}
    for samples, changed, within in ((100, 3, True), (100, 4, False), (20, 1, True), (20, 2, False)):
        scores = Scores(samples=samples, answer_agreement=(samples - changed) / samples, **values)
        trials: Any = SimpleNamespace(trial=lambda *_, scores=scores, **__: scores)
        if within:
            choice, tried = choose_float_blocks(trials, RECIPES["w8a8"], [], scores, Options())
            assert choice.within and tried[0]["within"]
        else:
            with raises("calibration.limit_exceeded"):
                choose_float_blocks(trials, RECIPES["w8a8"], [], scores, Options())


def run(*arguments: object) -> int:
    return cli.run(["calibrate", *map(str, arguments)])


def test_misuse(exported: Bundle, given: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error is one paragraph with exit code 2, before anything is written."""
    out = tmp_path / "b8"
    good: list[object] = [exported.path, "--samples", given["samples"], "--out", out]
    quantized = tmp_path / "quantized"
    quantize_bundle(exported, quantized, recipe=RECIPES["w8"].with_graph("vision_encoder", "float"), ranges={})
    (tmp_path / "unknown.yaml").write_text("keep_float: [vision_encoder.blocks.99.mlp]\n")
    (tmp_path / "broken.yaml").write_text("keep: [")
    (tmp_path / "other.yaml").write_text("keep_float: [nothing.at.all]")
    (tmp_path / "in" / "none.jsonl").write_text("\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "z.png")
    (tmp_path / "in" / "gone.jsonl").write_text('{"video": "gone.mp4", "query": "a"}\n')
    cases: list[tuple[list[object], list[str]]] = [
        ([exported.path, "--samples", tmp_path / "none.jsonl", "--out", out], ["none.jsonl"]),
        ([exported.path, "--samples", tmp_path / "in", "--out", out], ["is a folder"]),
        ([exported.path, "--samples", tmp_path / "in" / "gone.jsonl", "--out", out], ["gone.jsonl", "--media"]),
        ([*good, "--select", given["samples"]], ["samples.jsonl", "--own-tubes"]),
        ([*good, "--select", given["select"], "--evaluate", given["select"]], ["3 samples", "select.jsonl"]),
        ([*good, "--overrides", tmp_path / "unknown.yaml"], ["'vision_encoder.blocks.99.mlp'", "blocks.0.mlp"]),
        ([exported.path, "--samples", tmp_path / "in" / "none.jsonl", "--out", out], ["none.jsonl: has no samples"]),
        ([*good[:3], "--out", exported.path / "b8"], ["in the bundle"]),
        ([*good, "--overrides", tmp_path / "other.yaml"], ["other.yaml", "'nothing.at.all'"]),
        ([*good, "--overrides", tmp_path / "broken.yaml"], ["broken.yaml", "YAML"]),
        ([*good, "--force-int8", "spatial_decoder"], ["--force-int8 spatial_decoder"]),
        ([*good, "--max-drop", "0"], ["max-drop"]),
        ([*good, "--recipe", "w3"], ["w3"]),
        ([*good, "--heads", "text"], ["--heads text"]),
        ([tmp_path / "nowhere", *good[1:]], ["nowhere"]),
        ([quantized, *good[1:]], ["quantized", "int8"]),
        ([*good[:3], "--out", exported.path], ["--out"]),
        ([*good[:3], "--out", quantized], ["--overwrite"]),
        ([*good[:3], "--out", tmp_path / "taken"], ["taken"]),
        ([*good, "--kv8", "--target", "tensorrt-rtx", "--spatial", "w9"], ["w9"]),
    ]
    for arguments, values in cases:
        assert run(*arguments) == 2, values
        error = capsys.readouterr().err
        assert all(value in " ".join(error.split()) for value in values), (values, error)
        assert "Traceback" not in error
        assert not out.exists() and not (tmp_path / "b8.calibration").exists()


def test_missing_packages_are_named(
    exported: Bundle, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("onnx", "onnx_ir") else find_spec(name)
    )
    assert run(exported.path, "--samples", given["samples"], "--out", tmp_path / "b8") == 2
    error = capsys.readouterr().err
    assert "onnx" in error and install_command("calibrate") in error


def test_disk(
    exported: Bundle, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = (exported.path, "--samples", given["samples"], "--out", tmp_path / "b8")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert run(*arguments) == 2
    assert "[output.disk_full]" in capsys.readouterr().err

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(steps, "collect", full)
    assert run(*arguments) == 2
    assert "[output.disk_full]" in capsys.readouterr().err and not (tmp_path / "b8").exists()


def test_one_calibration_per_folder(tmp_path: Path) -> None:
    with working_in(tmp_path / "work"), raises("output.in_use", "work"):
        with working_in(tmp_path / "work"):
            pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with raises("calibration.not_a_work_folder", "mine"), working_in(tmp_path / "mine"):
        pass


def test_export_int8_needs_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = ["export", str(tmp_path), "--out", str(tmp_path / "b")]
    assert cli.run([*export, "--int8"]) == 2
    assert "--int8 needs --samples" in capsys.readouterr().err
    assert cli.run([*export, "--samples", "a.jsonl"]) == 2
    assert "add --int8" in capsys.readouterr().err
    assert cli.run([*export, "--int8", "--samples", "a.jsonl", "--dtype", "bf16"]) == 2
    assert "not bf16" in capsys.readouterr().err
    assert cli.run([*export, "--int8", "--samples", str(tmp_path / "a.jsonl")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_export_int8_calibrates_what_it_exported(
    exported: Bundle, given: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float bundle exists while it is calibrated, and is removed afterwards, with and without an error."""
    from bridge_stg.commands import export as export_command
    from bridge_stg.export import export_bundle as onnx_export
    from bridge_stg.export.parity import parity

    seen: list[Path] = []

    def exporting(checkpoint: Path, out: Path, **options: Any) -> Path:
        return Path(shutil.copytree(exported.path, out, dirs_exist_ok=True))

    def calibrating(bundle: Path, out: Path, **options: Any) -> str:
        assert Bundle.load(bundle).manifest.fingerprint == exported.manifest.fingerprint
        assert options["samples"] == given["samples"] and options["evaluate"] == given["evaluate"]
        seen.append(bundle)
        if len(seen) == 2:
            raise BridgeError("calibration.no_gain", "no")
        return "done"

    monkeypatch.setattr(onnx_export, "export_bundle", exporting)
    monkeypatch.setattr(parity, "parity_table", lambda bundle: "")
    monkeypatch.setattr(export_command, "calibrate_bundle", calibrating)
    command = ["export", "checkpoint", "--out", str(tmp_path / "b"), "--int8", "--samples", str(given["samples"])]
    command += ["--select", str(given["select"]), "--evaluate", str(given["evaluate"])]
    assert cli.run(command) == 0 and cli.run(command) == 2
    assert len(seen) == 2 and not seen[0].exists()
    assert not [path for path in tmp_path.iterdir() if path.name != "in"]
