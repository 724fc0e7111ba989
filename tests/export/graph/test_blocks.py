"""Matmuls are found by their weights, and named by modules."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from bridge_stg.calibration.quantize.smoothing_groups import smoothing_groups
from bridge_stg.export.graph.blocks import block_of, find_matmuls, find_tables

GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
g (float[N, 4] x, int64[N] ids) => (float[N, 6] y, float[N, 4] logits, float[N, N] scores) <float[6, 4] up = {U},
    float[6, 4] gate = {U}, float[6, 6] down = {D}, float[6, 4] merge = {U}, float[6] bias = {1, 2, 3, 4, 5, 6},
    float[4] scale = {1, 2, 3, 4}, float[4, 4] table = {T}> {
    row = Gather (table, ids)
    normed = RMSNormalization <axis = -1> (x, scale)
    upt = Transpose <perm = [1, 0]> (up)
    u = MatMul (normed, upt)
    gatet = Transpose <perm = [1, 0]> (gate)
    g0 = MatMul (normed, gatet)
    s = Sigmoid (g0)
    silu = Mul (g0, s)
    hidden = Mul (silu, u)
    downt = Transpose <perm = [1, 0]> (down)
    d = MatMul (hidden, downt)
    m = Gemm <transB = 1> (row, merge, bias)
    y = Add (d, m)
    turned = Transpose <perm = [1, 0]> (x)
    scores = MatMul (x, turned)
    headt = Transpose <perm = [1, 0]> (table)
    logits = MatMul (x, headt)
}
"""
LANGUAGE = "model.language_model"
NAMES = [
    f"{LANGUAGE}.embed_tokens/Gather", f"{LANGUAGE}.layers.0.norm/RMSNormalization",
    f"{LANGUAGE}.layers.0.mlp.up_proj/Transpose", f"{LANGUAGE}.layers.0.mlp.up_proj/MatMul",
    f"{LANGUAGE}.layers.0.mlp.gate_proj/Transpose", f"{LANGUAGE}.layers.0.mlp.gate_proj/MatMul",
    f"{LANGUAGE}.layers.0.mlp.act_fn/Sigmoid", f"{LANGUAGE}.layers.0.mlp.act_fn/Mul",
    f"{LANGUAGE}.layers.0.mlp/Mul", f"{LANGUAGE}.layers.0.mlp.down_proj/Transpose",
    f"{LANGUAGE}.layers.0.mlp.down_proj/MatMul", "model.visual.merger.linear_fc1/Gemm", f"{LANGUAGE}.layers.0/Add",
    "attention/Transpose", "attention/MatMul", "lm_head/Transpose", "lm_head/MatMul",
]  # fmt: skip


def numbers(count: int) -> str:
    return ", ".join(f"{(7 * i % 23 - 11) / 8}" for i in range(count))


def small_model(text: str = GRAPH) -> ir.Model:
    """An MLP between a norm and a merger, a tied head, and attention, which has no weight."""
    for mark, count in (("{U}", 24), ("{D}", 36), ("{T}", 16)):
        text = text.replace(mark, "{" + numbers(count) + "}")
    proto = onnx.parser.parse_model(text)
    for node, name in zip(proto.graph.node, NAMES, strict=True):
        node.name = name
    onnx.checker.check_model(proto, full_check=True)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def test_matmuls_are_those_by_stored_weights() -> None:
    found = find_matmuls(small_model(), "language_model")
    assert [(p.node.split(".")[-1], p.k, p.n, p.weight, p.activation) for p in found] == [
        ("up_proj/MatMul", 4, 6, "up", "normed"),
        ("gate_proj/MatMul", 4, 6, "gate", "normed"),
        ("down_proj/MatMul", 6, 6, "down", "hidden"),
        ("linear_fc1/Gemm", 4, 6, "merge", "row"),
        ("lm_head/MatMul", 4, 4, "table", "x"),
    ]
    assert {p.form for p in found} == {"float"} and {p.graph for p in found} == {"language_model"}
    blocks = ["language_model.layers.0.mlp", "vision_encoder.merger", "language_model.lm_head"]
    assert list(dict.fromkeys(matmul.block for matmul in found)) == blocks


def test_tables_are_looked_up_by_token_ids() -> None:
    (table,) = find_tables(small_model(), "language_model")
    assert (table.weight, table.rows, table.width, table.block) == ("table", 4, 4, "language_model.embed_tokens")


def test_what_can_be_smoothed() -> None:
    """The readers of a norm together, and those of an element-wise Mul; never a table or a value with other readers."""
    norm, mlp = smoothing_groups(small_model(), "language_model")
    assert [node.split(".")[-1] for node in norm.nodes] == ["up_proj/MatMul", "gate_proj/MatMul"]
    assert norm.divided == ("scale",)
    assert [node.split(".")[-1] for node in mlp.nodes] == ["down_proj/MatMul"] and mlp.divided == ("up",)


def test_what_others_see_is_not_smoothed() -> None:
    """Here the residual reads the norm too."""
    text = GRAPH.replace("turned = Transpose <perm = [1, 0]> (x)", "turned = Transpose <perm = [1, 0]> (normed)")
    groups = smoothing_groups(small_model(text), "language_model")
    assert [group.divided for group in groups] == [("up",)]


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("model.visual.blocks.3.mlp.linear_fc1/MatMul", "vision_encoder.blocks.3.mlp"),
        ("model.visual.blocks.3.attn.qkv/MatMul", "vision_encoder.blocks.3.attn"),
        ("model.visual.deepstack_merger_list.0.linear_fc2/Gemm", "vision_encoder.deepstack_merger_list.0"),
        ("model.language_model.layers.11.self_attn.q_proj/MatMul", "language_model.layers.11.self_attn"),
        ("model.language_model.embed_tokens/Gather", "language_model.embed_tokens"),
        ("lm_head/MatMul", "language_model.lm_head"),
        ("spatial_decoder.layers.0.feed_forward.2/MatMul", "spatial_decoder.layers.0.feed_forward"),
        ("spatial_decoder.reference.0/MatMul_2", "spatial_decoder.reference"),
        ("spatial_decoder.heat_query/MatMul", "spatial_decoder.heat_query"),
        ("model.language_model.layers.11.input_layernorm", "language_model.layers.11.input_layernorm"),
        ("model.language_model.layers.11.mlp", "language_model.layers.11.mlp"),
        ("bridging.queries/Add", "language_model.bridging"),
    ],
)
def test_names_of_blocks(node: str, block: str) -> None:
    assert block_of(node) == block


def test_names_of_modules() -> None:
    assert block_of("model.visualizer") == "model.visualizer"
    assert block_of("model.visual.merger") == "vision_encoder.merger"
