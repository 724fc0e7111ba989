"""Write a twin of a bf16 graph for engines without bf16: fp32 arithmetic on values rounded to bf16.

onnxruntime on CPU has casts to bf16, but no other bf16 operators. In the twin every input and output of a matmul is
cast to bf16 and back, and the weights are the graph's own bytes, so it computes what an engine does that accumulates in
fp32.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

SUFFIX = ".twin.onnx"


def write_twin(file: Path) -> Path:
    """Write the twin of an .onnx file next to it and its external data. Return its path."""
    model = onnx.load(file, load_external_data=False)
    nodes: list[NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            name, tensor.name = tensor.name, f"{tensor.name}_bf16"
            nodes.append(_cast(tensor.name, name, TensorProto.FLOAT))
    rounding = _bf16_casts(model.graph)
    for node in model.graph.node:
        if node.output[0] not in rounding:
            nodes.append(node)
            continue
        between = f"{node.output[0]}_bf16"
        nodes.append(_cast(node.input[0], between, TensorProto.BFLOAT16))
        nodes.append(_cast(between, node.output[0], TensorProto.FLOAT))
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    twin = file.with_name(file.stem + SUFFIX)
    onnx.save(model, twin)
    return twin


def _bf16_casts(graph: onnx.GraphProto) -> set[str]:
    """Return the outputs of casts between fp32 and bf16, in either direction."""
    low: set[str] = {tensor.name.removesuffix("_bf16") for tensor in graph.initializer
                     if tensor.data_type == TensorProto.BFLOAT16}  # fmt: skip
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == "Cast":
            to = helper.get_node_attr_value(node, "to")
            if to == TensorProto.BFLOAT16:
                low.update(node.output)
                found.update(node.output)
            elif to == TensorProto.FLOAT and node.input[0] in low:
                found.update(node.output)
        elif node.input and node.op_type not in ("Shape", "Size") and node.input[0] in low:
            low.update(node.output)  # only a cast leaves bf16
    return found


def _cast(source: str, target: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=dtype)
