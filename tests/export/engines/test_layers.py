"""The report on an engine's program: matmuls and their types, attention, by block."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from bridge_stg.export.engines.layers import (
    Node,
    graph_nodes,
    plan_summary,
    plan_table,
    read_programs,
    report_by_block,
)
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises

ATTN, MLP = "model.visual.blocks.0.attn", "model.visual.blocks.0.mlp"
DESCRIPTORS = """
descriptors {
  tensor={ alignment=128 dims={ 7 64 } name="x" offset=0 stride_order={ 1 0 } type=half }
  tensor={ alignment=128 dims={ 7 64 } name="xq" offset=0 stride_order={ 1 0 } type=int8 }
  sub_tensor={ base="x" const_offset=64 dims={ 1 64 } name="part^deref" offset=0 stride_order={ 1 0 } type=half }
  tensor={ alignment=128 dims={ 7 64 } name="residual" offset=0 stride_order={ 1 0 } type=float }
  tensor={ alignment=128 const_payload_size=8192 dims={ 64 64 } name="w" offset=0 stride_order={ 1 0 } type=half }
  tensor={ alignment=128 const_payload_size=4096 dims={ 64 64 } name="wq" offset=0 stride_order={ 1 0 } type=int8 }
  tensor={ alignment=128 const_payload_size=2048 dims={ 64 64 } name="w4" offset=0 stride_order={ 1 0 } type=int4 }
  tensor={ alignment=128 const_payload_size=4 dims={ 1 } name="alpha" offset=0 stride_order={ 0 } type=float }
}
"""


def layers(*names: str) -> str:
    return 'layers="' + "\x1e".join(f"[ONNX Layer: {name}]" for name in names) + '"'


def program(*statements: str) -> bytes:
    body = "\n".join(f"  {statement}" for statement in statements)
    return f"\0\0NLYM header {{\n}}{DESCRIPTORS}main {{\n label bb1:\n{body}\n}}\n\0".encode("latin-1")


def product(node: str, *inputs: str) -> str:
    listed = " ".join(f'"{name}"' for name in inputs)
    return f'fully_connected={{ name="{node}" output={{"y" }} input={{{listed} "alpha" }} stream=0 {layers(node)} }}'


def fusion(node: str, *inputs: str) -> str:
    listed = " ".join(f'"{name}"' for name in inputs)
    return f"runtime_fusion={{ name=__myl_FcAdd input_args={{ {listed} }} output_args={{ }} {layers(node)} }}"


FUSED = f"function={{ name=_gemm_mha_v2 args={{ }} {layers(f'{ATTN}/Attention')} }}"
TAKEN_APART = f"function={{ name=__myl_MaxrSubExpSum args={{ }} {layers(f'{ATTN}/Attention')} }}"
NODES = [
    Node(f"{ATTN}/Attention", "Attention", "vision_encoder.blocks.0.attn"),
    Node(f"{ATTN}.proj/MatMul", "MatMul", "vision_encoder.blocks.0.attn"),
    Node(f"{MLP}.fc/MatMul", "MatMul", "vision_encoder.blocks.0.mlp"),
]


def write(path: Path, *programs: bytes) -> Path:
    path.write_bytes(b"ftrt" + b"".join(programs))
    return path


@pytest.mark.parametrize(
    ("statement", "word"),
    [
        (product(f"{MLP}.fc/MatMul", "x", "w"), "fp16"),
        (product(f"{MLP}.fc/MatMul", "unlisted^deref", "w"), "fp16"),
        (product(f"{MLP}.fc/MatMul", "xq^deref", "wq"), "int8"),
        (fusion(f"{MLP}.fc/MatMul", "residual", "alpha", "x", "w"), "fp16"),
        (fusion(f"{MLP}.fc/MatMul", "residual", "xq", "wq"), "int8"),
        (product(f"{MLP}.fc/MatMul", "x", "w4"), "fp16 × int4"),
        (product(f"{MLP}.fc/MatMul", "part^deref", "wq"), "fp16 × int8"),
        (product("another/MatMul", "x", "w"), "unknown"),
    ],
)  # fmt: skip
def test_a_product_is_known_by_what_it_reads(tmp_path: Path, statement: str, word: str) -> None:
    plan = write(tmp_path / "p", program(FUSED, statement, product(f"{ATTN}.proj/MatMul", "x", "w")))
    report = report_by_block(read_programs(plan), NODES)
    assert report["vision_encoder.blocks.0.mlp"] == {"products": {word: 1}}
    assert report["vision_encoder.blocks.0.attn"] == {"attention": {"fused": 1}, "products": {"fp16": 1}}


def test_the_worst_profile_counts(tmp_path: Path) -> None:
    good = program(FUSED, product(f"{ATTN}.proj/MatMul", "xq", "wq"), product(f"{MLP}.fc/MatMul", "xq", "wq"))
    bad = program(TAKEN_APART, product(f"{ATTN}.proj/MatMul", "xq", "wq"), product(f"{MLP}.fc/MatMul", "x", "w"))
    inner = program(product("__one", "x", "w"), fusion("__one", "x", "w"))  # a part of a kernel, of one node
    programs = read_programs(write(tmp_path / "p", good, inner, bad))
    assert len(programs) == 2
    report = report_by_block(programs, NODES)
    assert plan_summary(report) == {"attention": {"unfused": 1}, "products": {"int8": 1, "fp16": 1}}


def test_equal_blocks_share_a_line() -> None:
    one = {"products": {"int8": 2}, "attention": {"unfused": 1}}
    table = plan_table({"a.blocks.0.attn": one, "a.blocks.1.attn": one, "a.blocks.2.attn": {"products": {"fp16": 2}}})
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "a.blocks.*.attn matmuls 2 int8 attention 1 unfused (2 blocks)",
        "a.blocks.*.attn matmuls 2 fp16 attention none",
    ]


def test_a_plan_without_a_program(tmp_path: Path) -> None:
    with raises("engine.no_layers", tmp_path / "p", kind=EngineError):
        read_programs(write(tmp_path / "p", b"binary alone"))


GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[1, 4] x, float[1, 4] z) => (float[1, 4] y)
<float[4, 4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, float s = {1.0},
 int8[4, 4] q = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{
  wt = Transpose (w)
  a = MatMul (x, wt)
  dq = DequantizeLinear (q, s)
  b = MatMul (a, dq)
  scores = MatMul (b, z)
  y = Softmax (scores)
}
"""


def test_matmuls_by_weights_and_attentions_count(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(GRAPH.replace("float[1, 4] z", "float[4, 4] z"))
    names = ("t", f"{ATTN}.qkv/MatMul", "d", f"{ATTN}.proj/MatMul", "vision_encoder/MatMul", "vision_encoder/Softmax")
    for node, name in zip(model.graph.node, names, strict=True):
        node.name = name
    onnx.save(model, tmp_path / "g.onnx")
    assert graph_nodes(tmp_path / "g.onnx") == [
        Node(f"{ATTN}.qkv/MatMul", "MatMul", "vision_encoder.blocks.0.attn"),
        Node(f"{ATTN}.proj/MatMul", "MatMul", "vision_encoder.blocks.0.attn"),
        Node("vision_encoder/Softmax", "Softmax", "vision_encoder.blocks.0.attn"),
    ]
