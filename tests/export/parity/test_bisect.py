"""Narrowing a drift to a block: one layer's weights are damaged in a copy of a bundle, and found again by name."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bridge_stg.cli import run
from bridge_stg.export.parity import bisect
from bridge_stg.export.parity.block_outputs import block_outputs, pair_outputs
from bridge_stg.runtime.backends.tensorrt.engine_cache import engine_folders
from bridge_stg.runtime.bundle.bundle import Bundle, file_sha256
from bridge_stg.runtime.bundle.manifest import canonical_sha256
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.parity.verify import DriftError, verify_bundle
from tests.errors import raises

DAMAGE = [
    ("vision_encoder", "model.visual.blocks.0.attn.qkv.weight", "vision_encoder.blocks.0.attn"),
    ("vision_encoder", "model.visual.blocks.1.mlp.linear_fc2.weight", "vision_encoder.blocks.1.mlp"),
    ("vision_encoder", "model.visual.merger.linear_fc1.weight", "vision_encoder.merger"),
    ("language_model", "model.language_model.layers.0.input_layernorm.weight",
     "language_model.layers.0.input_layernorm"),
    ("language_model", "model.language_model.layers.1.mlp.gate_proj.weight", "language_model.layers.1.mlp"),
    ("language_model", "model.language_model.layers.2.self_attn.o_proj.weight", "language_model.layers.2.self_attn"),
    ("spatial_decoder", "spatial_decoder.layers.0.feed_forward.0.weight", "spatial_decoder.layers.0.feed_forward"),
    ("spatial_decoder", "spatial_decoder.layers.1.time.value.weight", "spatial_decoder.layers.1.time"),
]  # fmt: skip


def damaged_copy(source: Path, out: Path, graph: str, weight: str, variants: Sequence[str]) -> Path:
    """Copy a bundle, disturb one weight in some variants of a graph, and make hashes and fingerprint fit again."""
    shutil.copytree(source, out)
    values = json.loads((out / "manifest.json").read_text())
    for variant in variants:
        entry = values["graphs"][graph][variant]
        file = out / entry["file"]
        damage(file, weight, file.parent)
        entry["size"], entry["sha256"] = file.stat().st_size, file_sha256(file)
    values["fingerprint"] = canonical_sha256(values, without="fingerprint")
    (out / "manifest.json").write_text(json.dumps(values))
    return out


@pytest.mark.parametrize(("graph", "weight", "block"), DAMAGE, ids=[block for _, _, block in DAMAGE])
def test_damaged_block_is_named(exported: Bundle, tmp_path: Path, graph: str, weight: str, block: str) -> None:
    damaged = damaged_copy(exported.path, tmp_path / "damaged", graph, weight, ["primitive"])
    with pytest.raises(DriftError) as drift:
        verify_bundle(damaged, threads=1)
    assert drift.value.variant == "primitive" and drift.value.graph == graph
    found = bisect.bisect(
        bisect.Side(drift.value.bundle, graph, "primitive"),
        bisect.find_reference(bisect.Side(drift.value.bundle, graph, "primitive"), threads=1),
        drift.value.boundary.name,
        threads=1,
    )
    assert found.block == block
    assert weight.removesuffix(".weight").endswith(found.module) or found.module.startswith(weight.rpartition(".")[0])
    assert found.begins is not None and found.begins.rel_l2 > 1e-3 and not found.vanished
    assert found.before is None or found.before.passed
    assert "(standard)" in found.reference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]  # no changed copy is left


def damage(file: Path, weight: str, data: Path) -> None:
    """Disturb one weight of a graph, whose data lie in a folder; it lies inside the .onnx afterwards."""
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == weight)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:  # onnx opens no file with a second name, which a copy with block outputs gives the weights
        raw = np.fromfile(data / place["location"], np.float32, int(np.prod(tensor.dims)), offset=int(place["offset"]))
        array = raw.reshape(tensor.dims)
    else:
        array = numpy_helper.to_array(tensor)
    noise = np.random.default_rng(0).standard_normal(array.shape).astype(array.dtype)
    tensor.CopyFrom(numpy_helper.from_array(array + noise * max(array.std(), 0.2), weight))
    file.write_bytes(model.SerializeToString())


def test_an_engine_that_is_built_for_the_changed_graph(
    exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    graph, weight, block = DAMAGE[5]
    built: list[tuple[str, str]] = []
    kept: list[Path] = []

    def build(side: bisect.Side, exposed: Bundle) -> None:
        (variant,) = exposed.manifest.graphs[graph]
        built.append((variant, side.backend))
        kept.append(engine_folders(exposed)[1] / "a provider's own")
        kept[-1].mkdir(parents=True)
        if variant == "primitive":  # compiled wrong
            damage(exposed.graph_path(graph, variant), weight, exported.graph_path(graph, variant).parent)

    suspect, reference = (bisect.Side(exported, graph, variant) for variant in ("primitive", "standard"))
    case = exported.golden_cases()[0].name
    found = bisect.bisect(suspect, reference, f"{case}/{graph}_0.logits", threads=1, prepare=build)
    assert found.block == block and found.begins is not None and not found.vanished
    assert set(built) == {("primitive", "onnxruntime"), ("standard", "onnxruntime")}
    assert len(kept) == 4 and not any(folder.parent.exists() for folder in kept)
    assert engine_folders(exported)[1] not in {folder.parent for folder in kept}  # the user's own stay


def test_all_variants_damaged_need_another_bundle(
    exported: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, weight, block = DAMAGE[4]
    damaged = damaged_copy(exported.path, tmp_path / "damaged", graph, weight, list(exported.manifest.graphs[graph]))
    assert run(["verify", str(damaged), "--bisect", "--threads", "1"]) == 2
    assert "--against BUNDLE" in capsys.readouterr().err
    options = ["--bisect", "--against", str(exported.path), "--threads", "1"]
    assert run(["verify", str(damaged), *options]) == 2
    shown = capsys.readouterr()
    assert f"begins in {block}" in shown.err and shown.err.count("\n") == 1
    assert f"{block}: {weight.removesuffix('.weight')}" in shown.out and "FAILED" in shown.out
    assert run(["verify", str(exported.path), "--bisect", "--threads", "1"]) == 0


def test_against_needs_bisect(exported: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(exported.path), "--against", str(exported.path)]) == 2
    assert "--bisect" in capsys.readouterr().err


def test_missing_onnx_is_reported_before_the_replay(exported: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    lines: list[str] = []
    with raises("host.missing_package", "pip install onnx", kind=EngineError):
        bisect.verify_and_bisect(exported.path, report=lines.append)
    assert not lines


def test_boundary_of_no_case(exported: Bundle) -> None:
    side = bisect.Side(exported, "language_model", "standard")
    with raises("bundle.bad_golden_case", "nowhere", kind=BundleError):
        bisect.bisect(side, side, "nowhere/language_model_0.logits")


def test_a_drift_of_no_block_names_the_steepest(exported: Bundle) -> None:
    case = exported.golden_cases()[0].name
    side = bisect.Side(exported, "language_model", "standard")
    found = bisect.bisect(side, side, f"{case}/language_model_0.logits", threads=1)
    assert found.begins is None and found.vanished
    assert found.block in str(found) and found.reference in str(found)


def test_both_variants_pair_their_outputs(exported: Bundle) -> None:
    for graph in exported.manifest.graphs:
        standard, primitive = (block_outputs(exported.graph_path(graph, v)) for v in ("standard", "primitive"))
        pairs = pair_outputs(standard, primitive)
        assert {first.block for first, _ in pairs} == {output.block for output in standard}
        assert all(first.module == second.module for first, second in pairs)
