"""Counted sizes against published and measured ones; the command, its JSON, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridge_stg import cli
from bridge_stg.export.engines.devices import find_device
from bridge_stg.export.engines.profiles import Deployment
from bridge_stg.export.estimate.dry_run import dry_run
from bridge_stg.export.estimate.estimate import Request, estimate
from bridge_stg.export.estimate.known import KNOWN
from bridge_stg.export.estimate.memory import graph_weights, storages_of
from bridge_stg.export.estimate.shapes import ModelShape, plain_config, read_shape, shape_of_config
from bridge_stg.runtime.bundle.spec import FramesSpec
from tests.bridge_stg.commands.fake_grounder import complaint
from tests.errors import raises
from tests.evaluation.validation import validate

ROOT = Path(__file__).parents[2]
# Parameters of vision encoder and language model: https://huggingface.co/OpenExplorer/Qwen3-VL-2B-Instruct, and 4B, 8B.
PUBLISHED = {"qwen3-vl-2b": (407.0e6, 1.721e9), "qwen3-vl-4b": (415.3e6, 4.022e9), "qwen3-vl-8b": (576.4e6, 8.191e9)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counted_parameters_are_the_published_ones(name: str) -> None:
    shape = read_shape(name)
    vision = shape.patch_embed + shape.blocks + shape.mergers
    assert vision == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert shape.parameters - vision == pytest.approx(PUBLISHED[name][1], rel=0.001)


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
def test_counted_weights_are_those_of_an_export(dtype: str) -> None:
    file = ROOT / "benchmarks/results/calibrate_qwen3_vl_2b_fp16_w4.json"
    graphs = json.loads(file.read_text(encoding="utf-8"))["graphs"]
    measured = sum(graphs[name]["bytes"][dtype == "int4"] for name in ("vision_encoder", "language_model"))
    shape, device = read_shape("qwen3-vl-2b"), find_device("orin-nano-8g")
    counted = graph_weights(shape, storages_of(shape, device, dtype))
    assert sum(counted.values()) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("target", ["orin-nano-8g", "rtx4090"])
@pytest.mark.parametrize("dtype", ["fp16", "int8", "int4"])
def test_memory_of_engines_is_that_of_the_dry_run(target: str, dtype: str) -> None:
    shape, device = read_shape("qwen3-vl-2b", heads="bridge"), find_device(target)
    found = estimate(shape, device, Request(32, 4), dtype=dtype)
    counted = dry_run(shape, device, Deployment(32, 4), queries=4, dtype=dtype)
    assert (found.needed, found.verdict) == (counted.needed, counted.verdict(counted.needed))


def test_a_bundle_has_the_shape_of_its_checkpoint(demo_bundle: Path) -> None:
    config, bundle = read_shape(str(ROOT / "assets/demo/checkpoint")), read_shape(str(demo_bundle))
    fixed = ("spec", "dtypes", "stored")
    assert {k: v for k, v in vars(config).items() if k not in fixed} == {
        k: v for k, v in vars(bundle).items() if k not in fixed
    }
    device = find_device("orin-nano-8g")
    own, other = (estimate(shape, device, Request(16, size=(192, 192)), dtype="fp32") for shape in (bundle, config))
    assert own.seconds == other.seconds and own.needed == pytest.approx(other.needed, rel=0.1)


def test_estimates_grow_with_their_causes() -> None:
    shape = read_shape("qwen3-vl-2b", heads="bridge")
    nano, nx = find_device("orin-nano-8g"), find_device("orin-nx-16g")
    small, large = (
        estimate(shape, nano, Request(frames, queries), dtype="int4") for frames, queries in ((16, 1), (64, 8))
    )
    assert small.fits and small.needed < large.needed and small.seconds < large.seconds
    assert [stage.name for stage in small.stages] == ["vision_coarse", "prefill", "answer", "vision_fine", "spatial"]
    assert estimate(shape, nx, Request(16), dtype="int4").seconds < small.seconds
    assert small.token_s < estimate(shape, nano, Request(16), dtype="fp16").token_s
    assert not estimate(read_shape("qwen3-vl-8b"), nano, Request(), dtype="fp16").fits


def test_a_text_model_has_no_fine_stages() -> None:
    found = estimate(read_shape("qwen2.5-vl-3b"), find_device("agx-thor"), Request(), dtype="fp8")
    assert [stage.name for stage in found.stages] == ["vision_coarse", "prefill", "answer"] and found.fine is None


def test_windowed_attention_costs_less() -> None:
    shape = read_shape("qwen2.5-vl-3b")
    assert (shape.depth, shape.full_blocks) == (32, 4)
    whole = ModelShape(**{**vars(shape), "full_blocks": 32})
    device, request = find_device("a10"), Request()
    assert estimate(shape, device, request).stages[0].seconds < estimate(whole, device, request).stages[0].seconds


def test_refused_requests() -> None:
    shape = read_shape("qwen3-vl-2b")
    with raises("engine.unsupported_precision", "orin-nano-8g", "fp8"):
        estimate(shape, find_device("orin-nano-8g"), Request(), dtype="fp8")
    with raises("options.invalid", 200, 128):
        estimate(shape, find_device("a10"), Request(frames=200))
    with raises("options.invalid", "w4a4"):
        estimate(shape, find_device("a10"), Request(), dtype="w4a4")
    config = plain_config(KNOWN["qwen3-vl-2b"], "bridge")
    assert isinstance(config.frames, FramesSpec) and shape_of_config(config).spatial_layers == 6


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN["qwen3-vl-2b"]), encoding="utf-8")
    for model in ("qwen3-vl-2b", tmp_path, tmp_path / "config.json"):
        arguments = ["estimate", str(model), "--target", "orin-nano-8g", "--target", "a10", "--dtype", "int4", "--json"]
        assert cli.run(arguments) == 0
        document = json.loads(capsys.readouterr().out)
        validate(document, "estimates")
        assert [one["target"] for one in document["estimates"]] == ["orin-nano-8g", "a10"]
    assert cli.run(["estimate", "qwen3-vl-2b", "--target", "agx-thor", "--frames", "8", "--heads", "bridge"]) == 0
    shown = capsys.readouterr().out
    assert "vision_fine" in shown and "fits" in shown
    assert cli.run(["estimate", "--targets"]) == 0
    assert "orin-nx-16g-super" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code"), [
    (["no-such-model", "--target", "a10"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "no-such-device"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "a10", "--dtype", "int3"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "a10", "--frames", "0"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "a10", "--frames", "9999"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "a10", "--video-size", "0x10"], "options.invalid"),
    (["qwen3-vl-2b", "--target", "a10", "--video-size", "99999x1"], "video.bad_shape"),
    (["qwen3-vl-2b", "--target", "orin-nano-8g", "--dtype", "nvfp4", "--json"], "engine.unsupported_precision"),
    (["qwen3-vl-2b", "--target", "a10", "--queries", "1" + "0" * 400], "options.invalid"),
    (["qwen3-vl-2b"], "options.missing"),
    (["broken", "--target", "a10"], "checkpoint.bad_config"),
    (["other", "--target", "a10"], "checkpoint.wrong_model_type"),
    (["other/values.json", "--target", "a10"], "checkpoint.wrong_model_type"),
    (["sizes", "--target", "a10"], "checkpoint.bad_config"),
    (["sizes", "--target", "a10", "--heads", "bridge"], "checkpoint.bad_config"),
])  # fmt: skip
def test_bad_input_is_one_paragraph(
    arguments: list[str], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = json.dumps({**KNOWN["qwen3-vl-2b"], "text_config": 3})
    for name, text in {"broken": "{", "other": '{"model_type": "llama"}', "sizes": sizes}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text, encoding="utf-8")
    (tmp_path / "other" / "values.json").write_text("{}", encoding="utf-8")
    text = complaint(["estimate", *arguments], capsys, code=code)
    assert arguments[0] in text or not (tmp_path / arguments[0]).exists()


def test_a_bad_file_is_named_before_torch_is_imported(tmp_path: Path) -> None:
    good = KNOWN["qwen3-vl-2b"]
    files: dict[str, object] = {
        "missing": None, "list": [good], "other": {"model_type": "llama"}, "section": {**good, "text_config": 3},
        "huge": {**good, "text_config": {**good["text_config"], "hidden_size": 10**30}},
        "quantized": {**good, "quantization_config": [1]}, "own": {"model_type": "bridge_stg", "backbone": 1},
        "nested": {"model_type": "bridge_stg", "backbone": {**good, "vision_config": {"patch_size": 0}}},
    }  # fmt: skip
    for name, values in files.items():
        if values is not None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.json").write_text(json.dumps(values), encoding="utf-8")
    code = f"""
import sys
from bridge_stg import cli
for name in {list(files)!r}:  # nor is this machine measured
    assert cli.run(["estimate", name, "--target", "cpu"]) == 2
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(files) and all(name in line for name, line in zip(files, lines, strict=True))
