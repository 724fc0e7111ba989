"""`ort-cpu` of the float graphs: fused attention that gives the numbers of `standard`, whatever the call's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bridge_stg.export.graph.fuse_attention import fuse_attention, group_heads
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.bundle.bundle import Bundle

Sessions = tuple[OnnxRuntimeSession, OnnxRuntimeSession, OnnxRuntimeSession]


def operators(bundle: Bundle, graph: str) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(bundle.graph_path(graph, "ort-cpu")).graph)


@pytest.fixture(scope="module")
def language_models(exported: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    """`standard` and `ort-cpu` of the tiny language model, and `ort-cpu` with grouped heads."""
    name = "language_model"
    files = [exported.graph_path(name, variant) for variant in ("standard", "ort-cpu")]
    files.append(tmp_path_factory.mktemp("grouped") / "g.onnx")
    model = ir.load(files[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge_stg.export.graph.fuse_attention.LEAST_GROUP", 2)  # the model has two heads per key head
        assert group_heads(model) and not group_heads(model)
    ir.save(model, files[2])
    spec = exported.graph(name, "ort-cpu")
    standard = OnnxRuntimeSession(files[0], exported.graph(name, "standard"), threads=1)
    fused, grouped = (OnnxRuntimeSession(file, spec, threads=1, weights=files[0].parent) for file in files[1:])
    yield standard, fused, grouped
    for session in (standard, fused, grouped):
        session.close()


def feeds_of(bundle: Bundle, starts: list[int], length: int, seed: int) -> dict[str, np.ndarray]:
    """A call with rows that begin at different positions of their caches, half of the tokens visual."""
    random, spec = np.random.default_rng(seed), bundle.manifest.spec
    rows, levels = len(starts), 1 + spec.vision.deepstack_levels
    tokens = random.standard_normal((levels, length + 1, spec.language.hidden_size), np.float32)
    tokens[:, 0] = 0
    positions = np.array(starts)[:, None] + np.arange(length) + random.integers(0, 9, (3, rows, length))
    return {
        "input_ids": random.integers(0, 60, (rows, length)),
        "visual_index": random.integers(0, 2, (rows, length)) * np.arange(1, length + 1),
        "visual_tokens": tokens,
        "positions": positions.astype(np.int64),
        "cache_position": np.array(starts, np.int64),
        "output_index": random.integers(0, length, (rows, 2)),
    }


def test_what_is_fused(exported: Bundle) -> None:
    language, vision = operators(exported, "language_model"), operators(exported, "vision_encoder")
    assert (language["GroupQueryAttention"], language["RotaryEmbedding"]) == (3, 6)
    assert not language.keys() & {"Attention", "TensorScatter", "Neg", "LessOrEqual"}  # nor is a mask left
    assert (vision["MultiHeadAttention"], vision["RotaryEmbedding"]) == (2, 4)
    assert not vision.keys() & {"Attention", "Neg"}
    chosen = choose(exported.manifest)
    assert set(chosen.variants.values()) == {"ort-cpu"} and chosen.backend == "onnxruntime"
    assert {exported.graph(name, "ort-cpu").derived_from for name in chosen.variants} == {"standard"}


@pytest.mark.parametrize(
    ("starts", "length"),
    [([0], 9), ([0], 1), ([13], 1), ([13], 7), ([0, 0], 6), ([9, 2, 0], 5), ([9, 2, 30], 1), ([31, 0], 33)],
)
def test_the_language_model_gives_the_same(
    exported: Bundle, language_models: Sessions, starts: list[int], length: int
) -> None:
    """Prefill, a token after a prefix, many rows of several tokens at positions of their own: outputs and caches."""
    feeds = feeds_of(exported, starts, length, seed=len(starts) * 100 + length)
    noise = np.random.default_rng(1)
    found = []
    caches = [session.allocate_cache(batch=len(starts), capacity=64) for session in language_models]
    values = {name: noise.standard_normal(buffer.shape, np.float32) for name, buffer in caches[0].read().items()}
    for session, cache in zip(language_models, caches, strict=True):
        cache.write(values)
        found.append({**session.infer(feeds, cache=cache), **cache.read()})
    for actual in found[1:]:
        for name, expected in found[0].items():
            np.testing.assert_allclose(
                actual[name], expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max(), err_msg=name
            )
        past, before = actual["past_key_1"], values["past_key_1"]
        for row, start in enumerate(starts):  # nothing but the new positions is written
            end = start + length
            np.testing.assert_array_equal(past[row, :, :start], before[row, :, :start])
            np.testing.assert_array_equal(past[row, :, end:], before[row, :, end:])
            assert np.abs(past[row, :, start:end] - before[row, :, start:end]).min(axis=(0, 2)).all()


def test_fp16_is_left_alone(exported_fp16: Bundle) -> None:
    """onnxruntime on CPU computes fp16 by casting to fp32; what is fused here is fp32."""
    assert {graph.variant for graph in exported_fp16.manifest.all_graphs()} == {"standard", "primitive"}


def test_what_does_not_fit_stays(exported: Bundle, tmp_path: Path) -> None:
    """A rotation of another form, a graph of the other lowering: unchanged, and the pass returns False."""
    model = ir.load(exported.graph_path("language_model", "standard"))
    for node in [node for node in model.graph if node.op_type == "Neg"]:
        node.outputs[0].replace_all_uses_with(node.inputs[0])  # [x₂, x₁] is no rotation
    before = [node.op_type for node in model.graph]
    assert not fuse_attention(model) and [node.op_type for node in model.graph] == before
    assert not fuse_attention(ir.load(exported.graph_path("language_model", "primitive")))


@pytest.mark.parametrize("sizes", [(1, 1, 4, 6), (1, 5, 4, 6), (3, 4, 6, 2), (9, 2, 2, 2)])
def test_the_spatial_decoder_gives_the_same(exported: Bundle, sizes: tuple[int, int, int, int]) -> None:
    """One query and many, each in frames of its own, over patches that no layer projects."""
    rows, frames, height, width = sizes
    random, spec = np.random.default_rng(rows), exported.manifest.spec
    taps, name = (len(spec.language.tapped_layers), rows, spec.language.num_bridging_queries), "spatial_decoder"
    mask = random.random((rows, frames)) < 0.6
    mask[:, 0] = True
    feeds = {
        "feature_map": random.standard_normal((frames, height, width, spec.vision.hidden_size), np.float32),
        "taps": random.standard_normal((*taps, spec.language.hidden_size), np.float32),
        "frame_times": np.arange(frames, dtype=np.float32) / 4,
        "frame_mask": mask,
    }
    found = []
    for variant in ("standard", "ort-cpu"):
        path = exported.graph_path(name, variant)
        with OnnxRuntimeSession(path, exported.graph(name, variant), threads=1) as session:
            found.append(session.infer(feeds))
    for tensor, expected in found[0].items():
        np.testing.assert_allclose(found[1][tensor], expected, rtol=1e-4, atol=1e-5, err_msg=tensor)
    products = [node for node in ir.load(path).graph if node.op_type == "MatMul"]
    assert not any(node.name.endswith((".space.key/MatMul", ".space.value/MatMul")) for node in products)
    assert operators(exported, name)["MultiHeadAttention"] >= 2
