"""Exported graphs against torch: every free dim at several sizes, on outputs that depend on their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge_stg.export import export_bundle as onnx_export
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.parity.golden_cases import random_cases, record_reference
from bridge_stg.export.parity.parity import Parity, measure, parity_table, require
from bridge_stg.export.parity.probes import PROBE_SIZES, feeds_of, run
from bridge_stg.model.model import BridgeSTG
from bridge_stg.model.torch_session import TorchSession
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.parity.compare import compare, replay
from tests.errors import raises

pytestmark = pytest.mark.slow
Sessions = dict[str, dict[str, Session]]
each_variant = pytest.mark.parametrize("variant", ["standard", "primitive", "ort-cpu"])
BOUNDARIES = {
    "vision_encoder": {"visual_tokens", "feature_map"},
    "language_model": {"logits", "taps", "kv"},
    "spatial_decoder": {"boxes", "presence"},
}


@pytest.fixture(scope="module")
def parity(model: BridgeSTG, sessions: Sessions) -> Parity:
    found = Parity((), {})
    for name, variants in sessions.items():
        found += measure(random_cases(name, model), variants)
    return found


def test_reference_depends_on_its_inputs(model: BridgeSTG, parity: Parity) -> None:
    """Without this, agreement would be free: another query or other frames move a box by more than 0.1."""
    assert set(parity.dependence) == {f"{name}.{tensor}" for name, tensors in BOUNDARIES.items() for tensor in tensors}
    assert all(moved > 0.1 for moved in parity.dependence.values()), parity.dependence
    session = TorchSession("spatial_decoder", model)
    feeds, _ = feeds_of("spatial_decoder", model.spec, PROBE_SIZES["spatial_decoder"][2], np.random.default_rng(0))
    boxes = session.infer(feeds)["boxes"]
    for name in ("taps", "feature_map"):
        other = session.infer({**feeds, name: np.ascontiguousarray(np.roll(feeds[name], 1, axis=-1))})["boxes"]
        assert np.abs(other - boxes).max() > 0.1, name


def test_every_free_dim_has_three_sizes(exported: Bundle) -> None:
    """Height and width follow from rows and columns, N from both."""
    for name, variants in exported.manifest.graphs.items():
        dims = {d for tensor in variants["standard"].inputs for d in tensor.dims if isinstance(d, str)}
        renamed = {"height": "rows", "width": "columns", "N": "rows"}
        for dim in {renamed.get(d, d) for d in dims}:
            assert len({sizes[dim] for sizes in PROBE_SIZES[name]}) >= 3, (name, dim)


@pytest.mark.parametrize("name", GRAPHS)
@each_variant
def test_graphs_agree_with_torch(parity: Parity, name: str, variant: str) -> None:
    mine = [b for b in parity.boundaries if b.name.startswith(f"{name}.") and f"({variant};" in b.name]
    assert {b.name.split(".")[1].split(" ")[0] for b in mine} == BOUNDARIES[name]
    assert len(mine) == len(PROBE_SIZES[name]) * len(BOUNDARIES[name])
    for boundary in mine:
        assert boundary.passed and boundary.rel_l2 < 2e-5, boundary


@pytest.mark.parametrize("name", GRAPHS)
def test_variants_agree(model: BridgeSTG, sessions: Sessions, name: str) -> None:
    for index, sizes in enumerate(PROBE_SIZES[name]):
        feeds, past = feeds_of(name, model.spec, sizes, np.random.default_rng([7, index]))
        first, second = (run(sessions[name][variant], feeds, past) for variant in ("standard", "primitive"))
        assert set(first) == set(second) == BOUNDARIES[name]
        for tensor, values in first.items():
            assert compare(tensor, values, second[tensor]).passed, (tensor, sizes)


@each_variant
def test_chunked_prefill_and_decode_equal_one_call(model: BridgeSTG, sessions: Sessions, variant: str) -> None:
    """12 tokens in one call, and as 7 + 4 + 1 in the same cache."""
    session = sessions["language_model"][variant]
    sizes = {"B": 2, "L": 12, "K": 1, "S": 20, "V": 5}
    feeds, _ = feeds_of("language_model", model.spec, sizes, np.random.default_rng(3))
    feeds |= {"cache_position": np.array([0, 3]), "output_index": np.full((2, 1), 11)}
    whole, parts = session.allocate_cache(batch=2, capacity=20), session.allocate_cache(batch=2, capacity=20)
    expected = session.infer(feeds, cache=whole)
    for start, stop in ((0, 7), (7, 11), (11, 12)):
        part = {n: np.ascontiguousarray(feeds[n][..., start:stop]) for n in ("input_ids", "visual_index", "positions")}
        part |= {"cache_position": feeds["cache_position"] + start, "output_index": np.full((2, 1), stop - start - 1)}
        found = session.infer({**feeds, **part}, cache=parts)
    for tensor in ("logits", "taps"):
        np.testing.assert_allclose(found[tensor], expected[tensor], rtol=0, atol=2e-5)
    for name, values in whole.read().items():
        np.testing.assert_allclose(parts.read()[name], values, rtol=0, atol=2e-5)


@each_variant
def test_a_batched_row_equals_the_same_query_alone(model: BridgeSTG, sessions: Sessions, variant: str) -> None:
    session = sessions["spatial_decoder"][variant]
    feeds, _ = feeds_of("spatial_decoder", model.spec, {"B": 2, "F": 8, "h": 4, "w": 6}, np.random.default_rng(5))
    feeds["frame_mask"] = np.array([[True] * 8, [False] * 3 + [True] * 5])
    batch = session.infer(feeds)
    alone = session.infer({
        "feature_map": feeds["feature_map"][3:], "taps": np.ascontiguousarray(feeds["taps"][:, 1:]),
        "frame_times": feeds["frame_times"][3:], "frame_mask": np.ones((1, 5), bool),
    })  # fmt: skip
    np.testing.assert_allclose(batch["boxes"][1, 3:], alone["boxes"][0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(batch["presence"][1, 3:], alone["presence"][0], rtol=0, atol=2e-5)


@each_variant
def test_golden_cases_replay(exported: Bundle, sessions: Sessions, variant: str) -> None:
    found = replay(exported, {name: variants[variant] for name, variants in sessions.items()})
    cases = {b.name.split("/")[0] for b in found}
    assert cases == {"clip", "batch", "image"} and all(b.passed for b in found)
    tensors = {b.name.rsplit(".")[-1] for b in found if b.name.startswith("batch/")}
    assert tensors == {"visual_tokens", "feature_map", "logits", "taps", "boxes", "presence"}
    assert any(b.shape[0] == 2 for b in found if b.name.startswith("batch/spatial_decoder"))


PERTURBED: dict[str, Callable[[BridgeSTG], torch.Tensor]] = {
    "vision_encoder.visual_tokens": lambda m: m.vision_encoder.model.merger.linear_fc2.weight,
    "vision_encoder.feature_map": lambda m: m.vision_encoder.model.blocks[1].attn.proj.weight,
    "language_model.logits": lambda m: m.language_model.model.norm.weight,
    "language_model.taps": lambda m: m.language_model.model.layers[2].mlp.down_proj.weight,
    "language_model.kv": lambda m: m.language_model.model.layers[0].self_attn.v_proj.weight,
    "spatial_decoder.boxes": lambda m: m.spatial_decoder.box_heads[1][-1].weight,
    "spatial_decoder.presence": lambda m: m.spatial_decoder.presence_heads[1][-1].weight,
}


@pytest.mark.parametrize("boundary", PERTURBED)
def test_a_difference_is_found_and_named(model: BridgeSTG, sessions: Sessions, boundary: str) -> None:
    """One weight of the reference 1 % larger is more than any boundary lets through."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        PERTURBED[boundary](changed).mul_(1.01)
    name = boundary.partition(".")[0]
    parity = measure(random_cases(name, changed), sessions[name])
    assert any(failure.name.startswith(boundary) for failure in parity.failures)
    with raises("export.parity", parity.failures[0].name, kind=EngineError):
        require(parity)


def test_a_failed_export_names_the_boundary_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def perturbed(model: BridgeSTG, *args: Any, **options: Any) -> list[Path]:
        with torch.no_grad():
            model.spatial_decoder.presence_heads[-1][-1].bias.add_(0.5)
        return record_reference(model, *args, **options)

    monkeypatch.setattr(onnx_export, "graphs_of", lambda spec: ("spatial_decoder",))
    monkeypatch.setattr(onnx_export, "record_reference", perturbed)
    with raises("export.parity", "spatial_decoder.presence (primitive; B 1, F 1", kind=EngineError):
        export_bundle(checkpoint, tmp_path / "bundle", variants=("primitive",))
    assert list(tmp_path.iterdir()) == []


def test_the_table_and_the_report_say_what_was_measured(exported: Bundle, parity: Parity) -> None:
    table = parity_table(exported.path)
    for name, tensors in BOUNDARIES.items():
        for tensor in tensors:
            assert f"{name}.{tensor} (standard)" in table and f"{name}.{tensor} (primitive)" in table
    assert "FAILED" not in table
    assert "other inputs change the reference" in table and "The smallest IoU of a box" in table
    reported = [boundary["name"] for boundary in read_report(exported.path, "parity")["boundaries"]]
    golden = [name for name in reported if "; golden " in name]
    assert set(reported) - set(golden) == {boundary.name for boundary in parity.boundaries}
    assert {name.split("golden ")[1].split("/")[0] for name in golden} == {"batch", "clip", "image"}
