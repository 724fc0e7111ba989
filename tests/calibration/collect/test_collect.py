from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from bridge_stg.calibration.collect.activation_recorder import ActivationRecorder
from bridge_stg.calibration.collect.collect import collect
from bridge_stg.calibration.collect.instrument import PLACES, instrument
from bridge_stg.calibration.collect.samples import CalibrationSet, read_samples
from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.evaluation.run.evaluate import run_task
from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.errors import BridgeError
from tests.calibration.chain_samples import write_samples
from tests.errors import raises


def matmuls_of(bundle: Bundle, graph: str, variant: str = "standard") -> list[str]:
    return [matmul.node for matmul in find_matmuls(ir.load(bundle.graph_path(graph, variant)), graph)]


def vision_feeds(bundle: Bundle) -> dict[str, np.ndarray]:
    vision = bundle.manifest.spec.vision
    rows, columns = 4, 6
    size = (3, vision.temporal_patch_size, rows * vision.patch_size, columns * vision.patch_size, 3)
    frames = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    return {"frames": frames, **vision_tables(vision, rows, columns)}


def test_statistics_outputs_are_those_of_whole_activations(exported: Bundle, tmp_path: Path) -> None:
    """Compare with the whole activations, as plain extra outputs of the graph."""
    made = instrument(exported, "vision_encoder", "standard", tmp_path / "instrumented")
    path = exported.graph_path("vision_encoder", "standard")
    shutil.copytree(path.parent, tmp_path / "plain")
    model = onnx.load(path, load_external_data=False)
    activation = {p.node: p.activation for p in find_matmuls(ir.load(path), "vision_encoder")}
    whole = [activation[observed.names[0]] for observed in made.activations]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in whole)
    onnx.save(model, tmp_path / "plain" / "whole.onnx")
    feeds = vision_feeds(exported)
    reference = onnxruntime.InferenceSession(tmp_path / "plain" / "whole.onnx").run(whole, feeds)
    places = np.array([0, 0.3, 0.999], np.float32)
    with made.open() as session:
        outputs = session.infer({**feeds, PLACES: places})
    assert len(made.activations) == len(set(activation.values()))
    for observed, values in zip(made.activations, reference, strict=True):
        flat = values.reshape(-1, observed.k)
        index = outputs[f"{observed.stem}.index"]
        np.testing.assert_allclose(outputs[f"{observed.stem}.absmax"], np.abs(flat).max(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(outputs[f"{observed.stem}.rows"], flat[index], rtol=1e-4, atol=1e-5)
        assert index[:-1].tolist() == [0, int(np.float32(0.3) * len(flat)), int(np.float32(0.999) * len(flat))]
        assert outputs[f"{observed.stem}.count"].tolist() == [len(flat)]
        assert np.abs(flat[index[-1]]).max() == pytest.approx(np.abs(flat).max(), rel=1e-5)


@pytest.mark.parametrize("variant", ["standard", "primitive"])
def test_keys_and_values_are_those_of_the_cache(exported: Bundle, variant: str, tmp_path: Path) -> None:
    made = instrument(exported, "language_model", variant, tmp_path)
    inner = made.open()
    graph = exported.graph("language_model", variant)
    session = ActivationRecorder(inner, graph, made.activations, number=0, kind=lambda feeds: "all", quota=50, seed=0)
    cache = session.allocate_cache(batch=1, capacity=16)
    spec = exported.manifest.spec
    levels = next(t for t in graph.inputs if t.name == "visual_tokens").dims[0]
    for start, new in ((0, 6), (6, 1)):
        feeds = {
            "input_ids": np.arange(new, dtype=np.int64)[None] + 5,
            "visual_index": np.zeros((1, new), np.int64),
            "visual_tokens": np.zeros((levels, 2, spec.language.hidden_size), np.float32),
            "positions": np.broadcast_to(np.arange(start, start + new), (3, 1, new)).astype(np.int64),
            "cache_position": np.array([start], np.int64),
            "output_index": np.array([[new - 1]], np.int64),
        }
        assert set(session.infer(feeds, cache=cache)) == {"logits", "taps"}
    kept = cache.read()
    for observed in made.activations:
        if observed.names[0] in kept:
            flat = kept[observed.names[0]][0, :, :7].transpose(1, 0, 2).reshape(7, -1)  # [L, heads · head_dim]
            seen = session.seen[observed.stem]
            np.testing.assert_allclose(seen.absmax, np.abs(flat).max(0), rtol=1e-6)
            assert seen.count == 7
            assert {row.tobytes() for row in seen.rows()} <= {row.tobytes() for row in flat}
            assert len(seen.rows()) == 7  # six stratified positions in six rows, and one of the second call
    assert {name for observed in made.activations for name in observed.names if name in kept} == set(kept)
    session.close()


def test_all_matmuls_of_the_chain_are_observed(exported: Bundle, statistics: Statistics) -> None:
    assert statistics.warnings == []
    for graph in GRAPHS:
        names = matmuls_of(exported, graph)
        assert set(statistics.tensors[graph]) - set(statistics.caches(graph)) == set(names)
        for name in statistics.tensors[graph]:
            rows, absmax = statistics.rows(graph, name), statistics.absmax(graph, name)
            assert 0 < len(rows) <= 96 and rows.dtype == absmax.dtype == np.float32
            assert (np.abs(rows) <= absmax * (1 + 1e-6)).all(), name
            # The row with the largest magnitude is always kept.
            assert np.abs(rows).max() == absmax.max(), name
    assert len(statistics.caches("language_model")) == 2 * exported.manifest.spec.language.num_layers
    kinds = [sample["calls"] for sample in statistics.samples]
    assert {kind for calls in kinds for kind in calls["language_model"]} == {"video", "answer", "bridging"}
    assert {kind for calls in kinds for kind in calls["vision_encoder"]} == {"coarse", "fine"}
    assert any(calls["spatial_decoder"] for calls in kinds)


def test_answers_do_not_change(exported: Bundle, samples: CalibrationSet, statistics: Statistics) -> None:
    with Grounder.load(exported.path, backend="onnxruntime", threads=1) as grounder:
        for sample, seen in zip(samples.dataset.samples, statistics.samples, strict=True):
            result = run_task(grounder, sample, sample.read_truth(), allow_none=samples.dataset.allow_none)
            assert (seen["id"], seen["answer"]) == (sample.id, result.answer)


def test_a_killed_collection_resumes_with_the_same_bytes(
    exported: Bundle, samples: CalibrationSet, statistics: Statistics, tmp_path: Path
) -> None:
    reported: list[int] = []

    def kill(stage: str, done: int, total: int) -> None:
        reported.append(done)
        if done == 2 and len(reported) < 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(exported, samples, folder=tmp_path / "s", rows=96, threads=1, progress=kill)
    # The bundle's own files have no hard links: loaders reject those.
    assert {path.stat().st_nlink for path in exported.path.rglob("*") if path.is_file()} == {1}
    reported.clear()
    again = collect(
        exported, samples, folder=tmp_path / "s", rows=96, threads=1, progress=lambda *step: reported.append(step[1])
    )
    assert reported == [2, 3, 4, 5, 6]
    assert contents(again.folder) == contents(statistics.folder)
    # A finished collection is returned at once.
    reported.clear()
    collect(exported, samples, folder=tmp_path / "s", rows=96, progress=lambda *step: reported.append(step[1]))
    assert reported == []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_collection_does_not_mix(exported: Bundle, samples: CalibrationSet, statistics: Statistics) -> None:
    with pytest.raises(BridgeError) as caught:
        collect(exported, samples, folder=statistics.folder, rows=96, seed=1)
    assert "seed" in str(caught.value)


def test_statistics_of_another_bundle(statistics: Statistics, exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(statistics.folder, tmp_path / "s")
    file = tmp_path / "s" / "statistics.json"
    values: Mapping[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "fingerprint": "0" * 64}))
    with raises("calibration.bad_statistics", "000000"):
        Statistics.load(tmp_path / "s", exported.path)
    file.unlink()
    with raises("calibration.bad_statistics", "statistics.json"):
        Statistics.load(tmp_path / "s", exported.path)
    with raises("calibration.bad_statistics", "x/MatMul"):
        statistics.rows("vision_encoder", "x/MatMul")


def test_damaged_statistics_are_named(statistics: Statistics, exported: Bundle, tmp_path: Path) -> None:
    shutil.copytree(statistics.folder, tmp_path / "s")
    found = Statistics.load(tmp_path / "s", exported.path)
    node = next(iter(found.tensors["vision_encoder"]))
    tensor = found.tensors["vision_encoder"][node]
    for name in (tensor.rows, tensor.absmax):
        file, whole = tmp_path / "s" / name, (tmp_path / "s" / name).read_bytes()
        for damaged in (b"", whole[:40], whole[:-4], b"text", (tmp_path / "s/statistics.json").read_bytes(), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with raises("calibration.bad_statistics", file.name):
                found.rows("vision_encoder", node)
        file.write_bytes(whole)
    file = tmp_path / "s" / "statistics.json"
    values = json.loads(file.read_text())
    for name in ("fingerprint", "variants", "asked", "tensors"):
        for value in (None, 3, [3], {"a": 1}, {"a": {"b": {"rows": "c"}}}):
            file.write_text(json.dumps({**values, name: value}))
            with raises("calibration.bad_statistics", name, "Delete"):
                Statistics.load(tmp_path / "s", exported.path)


def test_a_damaged_sample_is_collected_again(
    exported: Bundle, samples: CalibrationSet, statistics: Statistics, tmp_path: Path
) -> None:
    class Stop(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stop

    folder, done = tmp_path / "s", []
    with pytest.raises(Stop):
        collect(exported, samples, folder=folder, rows=96, threads=1, progress=stop)
    shard = sorted((folder / "samples").iterdir())[0]
    shard.write_bytes(shard.read_bytes()[:-9])
    collect(exported, samples, folder=folder, rows=96, threads=1, progress=lambda _, now, total: done.append(now))
    assert done[0] == 1 and contents(folder) == contents(statistics.folder)
    (folder / "collection.json").write_text("[")
    with raises("calibration.bad_statistics", "collection.json"):
        collect(exported, samples, folder=folder, rows=96, threads=1)


def test_unreadable_samples_are_left_out_with_a_warning(exported: Bundle, tmp_path: Path) -> None:
    file = write_samples(tmp_path)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    found = collect(exported, read_samples(file), folder=tmp_path / "s", rows=16, threads=1)
    assert [sample["id"] for sample in found.samples if "skipped" in sample] == ["2", "3"]
    assert "2 of 6" in found.warnings[0]
    for name in ("a.mp4", "c.png"):
        (tmp_path / name).write_bytes(b"nothing")
    with raises("calibration.all_samples_failed", 6):
        collect(exported, read_samples(file), folder=tmp_path / "t", rows=16, threads=1)


def test_statistics_of_fp16_graphs_are_fp32(exported_fp16: Bundle, samples: CalibrationSet, tmp_path: Path) -> None:
    found = collect(exported_fp16, samples, folder=tmp_path / "s", rows=16, threads=1)
    for graph in GRAPHS:
        assert set(matmuls_of(exported_fp16, graph)) <= set(found.tensors[graph])
        for name in found.tensors[graph]:
            rows = found.rows(graph, name)
            assert rows.dtype == np.float32 and len(rows) and np.isfinite(rows).all()
