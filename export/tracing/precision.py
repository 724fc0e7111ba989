"""Lower the precision of a traced fp32 graph: weights and matmuls become fp16 or bf16, with explicit casts.

Norms, softmax, rotary embeddings, activations, the residual stream and the computation of boxes stay fp32. The graph
alone has the precision, since engines have no flags for it. Knows nothing of models except names of modules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.graph_edit import insert_after, rank
from bridge_stg.export.tracing.weights import StoredWeight
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.errors import CheckpointError

MATMULS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
"""Operators that compute in the low precision; engines accumulate them in fp32.

`Attention` includes a softmax. TensorRT's parser does not support `softmax_precision`, but its fused kernels keep the
softmax in fp32. In the variant `primitive` softmax is a separate node.
"""

BF16_CONV_SINCE = 22
"""First opset with bf16 convolutions."""

MOVES = frozenset({
    "Concat", "Expand", "Gather", "GatherElements", "Identity", "Reshape", "Slice", "Split", "Squeeze", "TensorScatter",
    "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that only move values, and so keep the precision of their input."""

FP32_PART = "spatial_decoder"
"""Module that computes boxes from features, where rounding would shift the boxes …"""

LOW_MODULES = re.compile(r"spatial_decoder\.(feature|layers\.\d+\.space)\.")
"""… except for its modules that process every patch of every frame, nearly all of its work."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of a bundle.

    Attributes:
        name: `fp32`, `fp16` or `bf16`.
        dtype: dtype of weights and matmuls.
        io_dtype: dtype of visual_tokens, feature_map and taps; float32 for bf16, which numpy does not have.
        cache_dtype: dtype of the KV buffers, float32 for bf16 too.
    """

    name: str
    dtype: ir.DataType
    io_dtype: str
    cache_dtype: str


FP32 = Precision("fp32", ir.DataType.FLOAT, "float32", "float32")
PRECISIONS = {
    "fp32": FP32,
    "fp16": Precision("fp16", ir.DataType.FLOAT16, "float16", "float16"),
    "bf16": Precision("bf16", ir.DataType.BFLOAT16, "float32", "float32"),
}


def lower_precision(model: ir.Model, contract: GraphSpec, precision: Precision) -> None:
    """Lower a simplified fp32 graph with nodes named `module/Operator` in place.

    Inputs and outputs get the dtypes of the contract. Raises CheckpointError if a constant does not fit.
    """
    if precision.dtype != ir.DataType.FLOAT:
        _Lowering(model.graph, contract, precision).run()


class _Lowering:
    """One pass over one graph; `low` are the values in the low precision."""

    def __init__(self, graph: ir.Graph, contract: GraphSpec, precision: Precision) -> None:
        self.graph, self.dtype = graph, precision.dtype
        old = precision.dtype == ir.DataType.BFLOAT16 and graph.opset_imports[""] < BF16_CONV_SINCE
        self.matmuls = MATMULS - {"Conv"} if old else MATMULS
        self.names = {t.name: t.dtype for t in (*contract.inputs, *contract.outputs)}
        self.low: set[ir.Value] = set()
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Lower inputs, weights and nodes, and cast where the precision changes."""
        for value in self.graph.inputs:
            if self.names[str(value.name)] == "float16":
                value.dtype = ir.DataType.FLOAT16
                self.low.add(value)
        nodes = list(self.graph)
        lowered = {node for node in nodes if self._computes_low(node)}
        for value in list(self.graph.initializers.values()):
            if _is_float(value) and any(node in lowered for node in value.consumers()):
                self._lower_weight(value)
        for node in nodes:
            self._cast_inputs(node, node in lowered)
        self._cast_outputs()

    def _cast_inputs(self, node: ir.Node, low: bool) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and (value in self.low) != low:
                node.replace_input_with(index, self._cast(value, self.dtype if low else ir.DataType.FLOAT))
        if low:
            for value in node.outputs:
                value.dtype = self.dtype

    def _cast_outputs(self) -> None:
        for index, value in enumerate(list(self.graph.outputs)):
            wanted = ir.DataType.FLOAT16 if self.names[str(value.name)] == "float16" else ir.DataType.FLOAT
            if _is_float(value) and value.dtype != wanted:
                name, value.name = value.name, f"{value.name}_{str(value.dtype).lower()}"
                cast = self._cast(value, wanted)
                cast.name, cast.shape = name, value.shape
                self.graph.outputs[index] = cast

    def _computes_low(self, node: ir.Node) -> bool:
        """Decide whether a node computes in the low precision, after its inputs, and add its outputs to `low`."""
        data = node.inputs[0] if node.inputs else None
        low = False
        if node.op_type in self.matmuls:
            low = not keeps_fp32(str(node.name))
        elif node.op_type == "Concat":
            low = all(value in self.low for value in node.inputs)
        elif node.op_type in MOVES and data is not None and _is_float(data):
            table = node.op_type == "Gather" and data.is_initializer() and rank(data) >= 2
            low = data in self.low or (data.is_initializer() and (table or self._reaches_matmul(node)))
        elif node.op_type == "Add":  # the bias of a matmul
            low = any(
                first in self.low and second is not None and second.is_initializer() and rank(second) == 1
                for first, second in (node.inputs, node.inputs[::-1])
            ) and not keeps_fp32(str(node.name))
        if low:
            self.low.update(value for value in node.outputs if _is_float(value))
        return low

    def _reaches_matmul(self, node: ir.Node) -> bool:
        """Return whether a moved weight ends in a matmul of low precision."""
        users = [user for value in node.outputs for user in value.consumers()]
        return any(
            (user.op_type in self.matmuls and not keeps_fp32(str(user.name)))
            or (user.op_type in MOVES and self._reaches_matmul(user))
            for user in users
        )

    def _lower_weight(self, value: ir.Value) -> None:
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, StoredWeight):
            value.const_value = tensor.cast(self.dtype)
        else:
            with np.errstate(over="ignore"):
                array = tensor.numpy().astype(self.dtype.numpy())
            if not np.isfinite(array.astype(np.float32)).all():
                message = f"{value.name}: a constant of the model does not fit {self.dtype}"
                raise CheckpointError("checkpoint.not_finite", message)
            value.const_value = ir.tensor(array, dtype=self.dtype, name=value.name)
        value.dtype = self.dtype
        self.low.add(value)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return the value in another dtype, from one cast for all readers."""
        if (value, dtype) not in self.casts:
            producer = value.producer()
            stem = producer.name if producer is not None else value.name
            node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{stem}_to_{str(dtype).lower()}")
            node.outputs[0].name = f"{value.name}_to_{str(dtype).lower()}"
            node.outputs[0].dtype = dtype
            if producer is not None and len(producer.outputs) > 1:
                node.name = f"{node.name}_{value.index()}"
            insert_after(self.graph, value, node)
            self.casts[value, dtype] = node.outputs[0]
        return self.casts[value, dtype]


def keeps_fp32(name: str) -> bool:
    """Return whether a matmul named `module/Operator` stays fp32."""
    module = name.rpartition("/")[0] + "."
    return module.startswith(f"{FP32_PART}.") and not LOW_MODULES.match(module)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()
