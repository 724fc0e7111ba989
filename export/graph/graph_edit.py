"""Edits of an onnx_ir graph that the passes of this folder and quantization share."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain, count
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.export.graph.blocks import FP8, INT4, INT8, NVFP4

STORED = {
    INT8: ir.DataType.INT8, INT4: ir.DataType.INT4, FP8: ir.DataType.FLOAT8E4M3FN, NVFP4: ir.DataType.FLOAT4E2M1,
}  # fmt: skip
"""Type of the stored values by form."""

NVFP4_BLOCK = 16
TENSORRT_DOMAIN = "trt"
"""Domain of the operators that only TensorRT has."""

HEADS_FIRST = [0, 2, 1, 3]
"""Axes of a Transpose between [B, L, heads, head_dim] and [B, heads, L, head_dim]."""


class Edit:
    """Edits of one graph, whose `nodes` are kept by name; what several callers need is inserted once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = {str(node.name): node for node in graph}
        self._activations: dict[tuple[ir.Value, float, ir.DataType], ir.Value] = {}
        self._weights: dict[tuple[str, str], ir.Value] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._scales: dict[tuple[ir.Value, float], ir.Value] = {}
        self._names = {*graph.initializers, *(str(value.name) for node in graph for value in node.outputs)}

    def quantized(self, value: ir.Value, scale: float, dtype: ir.DataType, form: str = INT8) -> ir.Value:
        """Return a value after it was quantized to `int8`, `fp8` or `nvfp4`, and dequantized."""
        key = value, scale, dtype
        if key not in self._activations and form == NVFP4:
            self._activations[key] = self._through_nvfp4(value, scale, dtype)
        elif key not in self._activations:
            levels = self.quantize(value, scale, dtype, form)
            self._activations[key] = self.dequantize(levels, value, scale, dtype, form)
        return self._activations[key]

    def quantize(self, value: ir.Value, scale: float, dtype: ir.DataType, form: str = INT8) -> ir.Value:
        """Insert QuantizeLinear after a value and return the int8 or fp8 values."""
        inputs = [value, self._scale_of(value, scale, dtype), self._zero(form)]
        return self.insert_after("QuantizeLinear", inputs, value, f"{value.name}_{form}", dtype=STORED[form])

    def dequantize(
        self, integers: ir.Value, value: ir.Value, scale: float, dtype: ir.DataType, form: str = INT8
    ) -> ir.Value:
        """Insert DequantizeLinear after integers, with scale and name of `value`, and return the floats."""
        inputs = [integers, self._scale_of(value, scale, dtype), self._zero(form)]
        return self.insert_after("DequantizeLinear", inputs, integers, f"{value.name}_dequantized", dtype=dtype)

    def _through_nvfp4(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """Insert TensorRT's operator that quantizes to nvfp4 with computed scales of blocks, and dequantize."""
        shared, blocks = self._scale_of(value, scale, dtype), {"axis": -1, "block_size": NVFP4_BLOCK}
        source = value.producer()
        stem = f"{value.name if source is None else source.name}/TRT_FP4DynamicQuantize"
        attributes = {**blocks, "scale_type": int(STORED[FP8])}
        node = ir.node(
            "TRT_FP4DynamicQuantize", [value, shared], attributes, domain=TENSORRT_DOMAIN, num_outputs=2,
            name=self.free_node(stem),
        )  # fmt: skip
        insert_after(self.graph, value, node)
        self.nodes[str(node.name)] = node
        for output, form in zip(node.outputs, (NVFP4, FP8), strict=True):
            output.name, output.dtype = self.free_name(f"{value.name}_{form}"), STORED[form]
            output.shape = value.shape if form == NVFP4 else None
        scales = self.insert_after(
            "DequantizeLinear", [node.outputs[1], shared], node.outputs[1], f"{value.name}_scales", dtype=dtype
        )
        inputs, name = [node.outputs[0], scales], f"{value.name}_dequantized"
        return self.insert_after("DequantizeLinear", inputs, scales, name, blocks, dtype=dtype)

    def from_nvfp4(self, tensor: ir.TensorProtocol, scales: np.ndarray, scale: np.ndarray, name: str) -> ir.Value:
        """Return the floats [N, K] of the initializer `name`: nvfp4 values, fp8 scales [N, K / 16], and one of all."""
        if (name, NVFP4) not in self._weights:
            shared = self.constant(f"{name}_scale", scale)
            parts = [self.constant(f"{name}_scales", scales), shared]
            stem, attributes = f"{name}/DequantizeLinear", {"axis": -1, "block_size": NVFP4_BLOCK}
            before = self.graph[0]
            (wide,) = self.insert("DequantizeLinear", parts, before=before, name=f"{stem}_scales")
            parts = [self.initializer(str(tensor.name), tensor), wide]
            (floats,) = self.insert("DequantizeLinear", parts, attributes, before=before, name=stem)
            floats.name = self.free_name(f"{name}_dequantized")
            wide.dtype = floats.dtype = shared.dtype
            self._weights[name, NVFP4] = floats
        return self._weights[name, NVFP4]

    def dequantized(
        self,
        name: str,
        pack: Callable[[], tuple[ir.ExternalTensor, np.ndarray]],
        *,
        use: str,
        axis: int = 0,
        block_size: int = 0,
    ) -> ir.Value:
        """Return the floats of the float initializer `name`, which `pack` returns as integers and scales along `axis`.

        Each `use` has its own DequantizeLinear, since onnxruntime fuses one with one reader. A `block_size` of 0 is one
        scale per index of the axis.
        """
        if (name, use) in self._weights:
            return self._weights[name, use]
        tensor, scales = pack()
        integers, scale = self.initializer(str(tensor.name), tensor), self.constant(f"{name}_scale", scales)
        inputs = [integers, scale]
        if not block_size and tensor.dtype == ir.DataType.INT8:
            # Without a zero point onnxruntime 1.23 moves the node and takes its integers for uint8.
            inputs.append(self.constant(f"int8_zero_points_{len(scales)}", np.zeros(len(scales), np.int8)))
        attributes = {"axis": axis} | ({"block_size": block_size} if block_size else {})
        stem = f"{name}/DequantizeLinear"
        (floats,) = self.insert("DequantizeLinear", inputs, attributes, before=self.graph[0], name=stem)
        floats.name, floats.dtype = self.free_name(f"{name}_dequantized"), scale.dtype
        self._weights[name, use] = floats
        return floats

    def transposed(self, value: ir.Value) -> ir.Value:
        """Return a weight [N, K] as [K, N]; engines transpose the integers once, when they load them."""
        if value not in self._transposed:
            name, node = f"{value.name}_turned", f"{value.name}/Transpose"
            attributes = {"perm": [1, 0]}
            self._transposed[value] = self.insert_after("Transpose", [value], value, name, attributes, node=node)
        return self._transposed[value]

    def multiply(self, node: ir.Node, data: ir.Value, weight: ir.Value) -> None:
        """Replace the operands of a matmul. A Gemm becomes MatMul and Add: no engine fuses one with a float bias."""
        if node.op_type == "MatMul":
            node.replace_input_with(0, data)
            node.replace_input_with(1, weight)
            return
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        out = node.outputs[0]
        matmul = ir.node("MatMul", [data, weight], name=node.name)
        new = matmul.outputs[0]
        new.name, new.dtype = self.free_name(f"{out.name}_product"), out.dtype
        self.graph.insert_before(node, matmul)
        if bias is not None:
            add = ir.node("Add", [new, bias], name=f"{str(node.name).rpartition('/')[0]}/Add_bias")
            self.graph.insert_before(node, add)
            new = add.outputs[0]
        self.replace(out, new)
        self.graph.remove(node, safe=True)
        self.nodes[str(node.name)] = matmul

    def insert(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        before: ir.Node,
        name: str,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """Insert a node before another one, named `name` or with a number added, and return its outputs."""
        name = self.free_node(name)
        node = ir.node(operator, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        self.graph.insert_before(before, node)
        self.nodes[name] = node
        added: Sequence[ir.Value] = node.outputs
        for value in added:
            value.name = self.free_name(f"{name}_out")
        return added

    def insert_after(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        after: ir.Value,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
        node: str = "",
    ) -> ir.Value:
        """Insert a node after a value's, and return its output `name`, by default with the value's dtype."""
        source = after.producer()
        stem = node or f"{(after if source is None else source).name}/{operator}"
        if not node and source is not None and len(source.outputs) > 1:
            stem = f"{stem}_{after.index()}"
        added = ir.node(operator, inputs, attributes or {}, name=self.free_node(stem))
        insert_after(self.graph, after, added)
        added.outputs[0].name, added.outputs[0].dtype = self.free_name(name), dtype or after.dtype
        self.nodes[str(added.name)] = added
        return added.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Replace a value by another one, which takes over its name."""
        new.shape, new.dtype, name = old.shape, old.dtype, old.name
        for index, value in enumerate(self.graph.outputs):
            if value is old:
                self.graph.outputs[index] = new
        old.replace_all_uses_with(new)
        old.name, new.name = f"{name}_replaced", name

    def alias(self, value: ir.Value, name: str) -> ir.Value:
        """Return another initializer with the same bytes."""
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            place = tensor.location, tensor.offset, tensor.length, tensor.dtype
            tensor = ir.ExternalTensor(*place, shape=tensor.shape, name=name, base_dir=tensor.base_dir)
        else:
            tensor = ir.tensor(tensor.numpy(), name=name)
        return self.initializer(name, tensor)

    def drop_unused(self) -> None:
        """Remove nodes and initializers that nothing reads."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return the initializer of this name, made of `array` if the graph has none."""
        return self.initializer(name, ir.tensor(array, name=name))

    def initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """Return the initializer of this name, with `tensor` if the graph has none."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape))
            value.dtype = tensor.dtype
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def free_node(self, name: str) -> str:
        """Return `name`, or with a number added where a node has that name."""
        return _free(name, self.nodes)

    def free_name(self, name: str) -> str:
        """Return `name`, or with a number added where a value has that name; the result is reserved."""
        free = _free(name, self._names)
        self._names.add(free)
        return free

    def _scale_of(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        array = np.maximum(np.array(scale, dtype.numpy()), np.finfo(dtype.numpy()).smallest_subnormal)
        key = value, float(array)
        if key not in self._scales:  # blocks may have been given different ranges of one tensor
            self._scales[key] = self.constant(self.free_name(f"{value.name}_scale"), np.array(array, dtype.numpy()))
        return self._scales[key]

    def _zero(self, form: str) -> ir.Value:
        return self.constant(f"{form}_zero_point", np.zeros((), STORED[form].numpy()))


def _free(name: str, used: Container[str]) -> str:
    numbered = (f"{name}_{number}" for number in count(2))
    return next(free for free in chain([name], numbered) if free not in used)


def insert_after(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Insert a node after the one that computes a value; at the beginning for inputs and initializers."""
    source = value.producer()
    if source is not None:
        graph.insert_after(source, node)
    else:
        graph.insert_before(graph[0], node)


def rank(value: ir.Value) -> int:
    """Return the number of dims of a value; 0 if its shape is unknown."""
    return len(value.shape) if value.shape is not None else 0


def producer(value: ir.Value | None, operator: str, perm: Sequence[int] | None = None) -> ir.Node | None:
    """Return the node that computes a value, if it is this operator (with these axes, for a Transpose)."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != operator:
        return None
    return node if perm is None or list(node.attributes["perm"].as_ints()) == list(perm) else None


def only_reader(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the only node that reads a value, if it is this operator."""
    readers = [reader for reader, _ in value.uses()] if value is not None else []
    return readers[0] if len(readers) == 1 and readers[0].op_type == operator else None


def integers_of(value: ir.Value | None) -> list[int] | None:
    """Return the integers of a constant; None if the value is not one."""
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(size) for size in np.atleast_1d(tensor.numpy())]
