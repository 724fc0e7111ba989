"""A language model of a few nodes in both lowerings, and a whole bundle around it; made with the onnx package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import pytest

from bridge_stg.runtime.bundle.manifest import CacheSpec, GraphSpec, Manifest, TensorSpec
from bridge_stg.runtime.bundle.spec import LanguageSpec, ModelSpec, VisionSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.parity.golden import write_case
from tests.runtime.backends.lowerings import Lowerings

VOCABULARY, KV_HEADS, HEAD_DIM = 10, 2, 4

# One attention layer whose query, key and half value are the token's embedding; mask and cache as in the real graphs.
SHARED_NODES = """
    x = Gather(table, input_ids)
    heads = Constant<value_ints = [0, 0, 2, 4]>()
    x4 = Reshape(x, heads)
    k = Transpose<perm = [0, 2, 1, 3]>(x4)
    double = Constant<value_float = 2.0>()
    v = Mul(k, double)
    i0 = Constant<value_int = 0>()
    i1 = Constant<value_int = 1>()
    i2 = Constant<value_int = 2>()
    ids_shape = Shape(input_ids)
    length = Gather(ids_shape, i1)
    past_shape = Shape(past_key_0)
    capacity = Gather(past_shape, i2)
    rows = Range(i0, length, i1)
    columns = Range(i0, capacity, i1)
    axes = Constant<value_ints = [1, 2, 3]>()
    start = Unsqueeze(cache_position, axes)
"""
STANDARD = (
    """
<ir_version: 10, opset_import: ["" : 24]>
lm (int64[B,L] input_ids, int64[B] cache_position, float[B,2,S,4] past_key_0, float[B,2,S,4] past_value_0)
=> (float[B,2,L,4] logits, float[B,2,S,4] present_key_0, float[B,2,S,4] present_value_0) {
"""
    + SHARED_NODES
    + """
    last = Constant<value_ints = [1]>()
    row = Unsqueeze(rows, last)
    at = Add(start, row)
    mask = LessOrEqual(columns, at)
    present_key_0 = TensorScatter<axis = 2>(past_key_0, k, cache_position)
    present_value_0 = TensorScatter<axis = 2>(past_value_0, v, cache_position)
    logits = Attention(k, present_key_0, present_value_0, mask)
}"""
)
PRIMITIVE = (
    """
<ir_version: 8, opset_import: ["" : 18]>
lm (int64[B,L] input_ids, int64[B] cache_position, float[B,2,S,4] past_key_0, float[B,2,S,4] past_value_0)
=> (float[B,2,L,4] logits, float[B,2,L,4] new_key_0, float[B,2,L,4] new_value_0) {
"""
    + SHARED_NODES
    + """
    last = Constant<value_ints = [1]>()
    row = Unsqueeze(rows, last)
    causal = LessOrEqual(rows, row)
    seen = Less(columns, start)
    scale = Constant<value_float = 0.5>()
    fill = Constant<value_float = -10000.0>()
    q = Mul(k, scale)
    past_t = Transpose<perm = [0, 1, 3, 2]>(past_key_0)
    past_scores = MatMul(q, past_t)
    past_masked = Where(seen, past_scores, fill)
    new_t = Transpose<perm = [0, 1, 3, 2]>(k)
    new_scores = MatMul(q, new_t)
    new_masked = Where(causal, new_scores, fill)
    scores = Concat<axis = -1>(past_masked, new_masked)
    weights = Softmax<axis = -1>(scores)
    first = Constant<value_ints = [0]>()
    capacity1 = Unsqueeze(capacity, first)
    length1 = Unsqueeze(length, first)
    sizes = Concat<axis = 0>(capacity1, length1)
    past_weights, new_weights = Split<axis = -1>(weights, sizes)
    from_past = MatMul(past_weights, past_value_0)
    from_new = MatMul(new_weights, v)
    logits = Add(from_past, from_new)
    new_key_0 = Identity(k)
    new_value_0 = Identity(v)
}"""
)
UPDATES = {"standard": "in_place", "primitive": "append"}
TEXTS = {"standard": STANDARD, "primitive": PRIMITIVE}


def language_model_spec(variant: str) -> GraphSpec:
    past = [TensorSpec(f"past_{part}_0", "float32", ("B", KV_HEADS, "S", HEAD_DIM)) for part in ("key", "value")]
    dims = ("B", KV_HEADS, "S" if variant == "standard" else "L", HEAD_DIM)
    prefix = "present" if variant == "standard" else "new"
    return GraphSpec(
        name="language_model",
        variant=variant,
        inputs=(TensorSpec("input_ids", "int64", ("B", "L")), TensorSpec("cache_position", "int64", ("B",)), *past),
        outputs=(
            TensorSpec("logits", "float32", ("B", KV_HEADS, "L", HEAD_DIM)),
            *(TensorSpec(f"{prefix}_{part}_0", "float32", dims) for part in ("key", "value")),
        ),
        opset=24 if variant == "standard" else 18,
        ranges={"B": (1, 8), "L": (1, None), "S": (1, None)},
        cache=CacheSpec(UPDATES[variant], layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM),
    )


@dataclass(frozen=True)
class GraphFile:
    """An .onnx file beside its weights.data, and what the manifest says of it."""

    path: Path
    spec: GraphSpec


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Lowerings:
    """Both lowerings, each in a folder of its own with equal external data."""
    table = np.random.default_rng(0).standard_normal((VOCABULARY, KV_HEADS * HEAD_DIM)).astype(np.float32)
    files = Lowerings()
    for variant, text in TEXTS.items():
        model = onnx.parser.parse_model(text)
        model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
        onnx.checker.check_model(model)
        path = tmp_path_factory.mktemp(variant) / "model.onnx"
        onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
        files[variant] = GraphFile(path, language_model_spec(variant))
    return files


@pytest.fixture(scope="session")
def model_spec() -> ModelSpec:
    """Numbers of no particular model."""
    vision = VisionSpec(
        family="qwen3_vl", patch_size=16, merge_size=2, temporal_patch_size=2, hidden_size=8, head_dim=4,
        deepstack_levels=1, position_grid=4,
    )  # fmt: skip
    language = LanguageSpec(
        hidden_size=8, num_layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=VOCABULARY, max_positions=64,
        num_bridging_queries=2, tapped_layers=(0,),
    )  # fmt: skip
    return ModelSpec(vision=vision, language=language)


@pytest.fixture
def bundle_path(tmp_path: Path, language_models: dict[str, GraphFile], model_spec: ModelSpec) -> Path:
    """A complete bundle: one graph in two variants that share weights, a tokenizer, one golden case."""
    target = tmp_path / "bundle"
    with BundleWriter(target) as writer:
        for graph in language_models.values():
            writer.add_graph(replace(graph.spec), graph.path)
        writer.add_file("tokenizer.json", b"{}")
        inputs = {"input_ids": np.array([[1, 2]]), "cache_position": np.array([0])}
        outputs = {"logits": np.zeros((1, KV_HEADS, 2, HEAD_DIM), np.float32)}
        write_case(
            writer.folder / "golden" / "first", [("language_model", inputs, outputs)], kind="demo", cache_capacity=4
        )
        writer.finish(Manifest(spec=model_spec, model={"name": "tiny"}, tools={"onnx": onnx.__version__}))
    return target
