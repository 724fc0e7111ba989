"""Changes to a graph that quantization is made of: Q and DQ behind activations, DQ before weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir


class Edit:
    """Changes to one graph; what several nodes ask for is made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes = {str(node.name): node for node in graph}
        self._activations: dict[tuple[ir.Value, float, ir.DataType], ir.Value] = {}
        self._weights: dict[tuple[str, str], ir.Value] = {}
        self._transposed: dict[ir.Value, ir.Value] = {}
        self._scales: dict[tuple[ir.Value, float], ir.Value] = {}
        self._names = {*graph.initializers, *(str(value.name) for node in graph for value in node.outputs)}

    def quantized(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """Return a value that went through int8."""
        key = value, scale, dtype
        if key not in self._activations:
            self._activations[key] = self.through_int8(value, scale, dtype)
        return self._activations[key]

    def through_int8(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """Insert Q and DQ behind a value, and return what comes out."""
        return self.dequantize(self.quantize(value, scale, dtype), value, scale, dtype)

    def quantize(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """Insert Q behind a value, and return the integers."""
        inputs = [value, self._scale_of(value, scale, dtype), self._zero()]
        return self._insert("QuantizeLinear", inputs, value, f"{value.name}_int8", ir.DataType.INT8)

    def dequantize(self, integers: ir.Value, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        """Insert DQ behind integers, with the scale and the name of `value`, and return the floats."""
        inputs = [integers, self._scale_of(value, scale, dtype), self._zero()]
        return self._insert("DequantizeLinear", inputs, integers, f"{value.name}_dequantized", dtype)

    def dequantized(
        self,
        name: str,
        pack: Callable[[], tuple[ir.ExternalTensor, np.ndarray]],
        *,
        use: str,
        axis: int = 0,
        block_size: int = 0,
    ) -> ir.Value:
        """Return the floats that a packed weight stands for.

        Args:
            name: of the float initializer.
            pack: returns the integers and their scales.
            use: what they are for; each use has its own DQ, since onnxruntime fuses one that nobody else reads.
            axis: along which scales lie.
            block_size: values along the axis that share a scale; 0: a scale for each.
        """
        if (name, use) in self._weights:
            return self._weights[name, use]
        tensor, scales = pack()
        if str(tensor.name) not in self.graph.initializers:
            integers = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape))
            integers.dtype = tensor.dtype
            self.graph.register_initializer(integers)
        scale = self.constant(f"{name}_scale", scales)
        attributes = {"axis": axis} | ({"block_size": block_size} if block_size else {})
        node = ir.node(
            "DequantizeLinear",
            [self.graph.initializers[str(tensor.name)], scale],
            attributes,
            name=self.free_node(f"{name}/DequantizeLinear"),
        )
        self.graph.insert_before(self.graph[0], node)
        self.nodes[str(node.name)] = node
        node.outputs[0].name, node.outputs[0].dtype = self.free_name(f"{name}_dequantized"), scale.dtype
        self._weights[name, use] = node.outputs[0]
        return node.outputs[0]

    def transposed(self, value: ir.Value) -> ir.Value:
        """Return a weight [N, K] as [K, N]; engines turn the integers once, on load."""
        if value not in self._transposed:
            node = ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{value.name}/Transpose")
            producer = value.producer()
            assert producer is not None
            self.graph.insert_after(producer, node)
            node.outputs[0].name, node.outputs[0].dtype = f"{value.name}_turned", value.dtype
            self._transposed[value] = node.outputs[0]
        return self._transposed[value]

    def multiply(self, node: ir.Node, data: ir.Value, weight: ir.Value) -> None:
        """Let a product multiply these. A Gemm becomes MatMul and Add: none fuses one whose bias is float."""
        if node.op_type == "MatMul":
            node.replace_input_with(0, data)
            node.replace_input_with(1, weight)
            return
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        out = node.outputs[0]
        product = ir.node("MatMul", [data, weight], name=node.name)
        new = product.outputs[0]
        new.name, new.dtype = self.free_name(f"{out.name}_product"), out.dtype
        self.graph.insert_before(node, product)
        if bias is not None:
            add = ir.node("Add", [new, bias], name=f"{str(node.name).rpartition('/')[0]}/Add_bias")
            self.graph.insert_before(node, add)
            new = add.outputs[0]
        self.replace(out, new)
        self.graph.remove(node, safe=True)
        self.nodes[str(node.name)] = product

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Put a value in the place of another one, name and all."""
        new.shape, new.dtype, name = old.shape, old.dtype, old.name
        for index, value in enumerate(self.graph.outputs):
            if value is old:
                self.graph.outputs[index] = new
        old.replace_all_uses_with(new)
        old.name, new.name = f"{name}_replaced", name

    def alias(self, value: ir.Value, name: str) -> ir.Value:
        """Return another initializer of the same bytes."""
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor, ir.ExternalTensor):
            place = tensor.location, tensor.offset, tensor.length, tensor.dtype
            tensor = ir.ExternalTensor(*place, shape=tensor.shape, name=name, base_dir=tensor.base_dir)
        else:
            tensor = ir.tensor(tensor.numpy(), name=name)
        other = ir.Value(name=name, const_value=tensor, shape=value.shape)
        other.dtype = value.dtype
        self.graph.register_initializer(other)
        return other

    def drop_unused(self) -> None:
        """Remove the float weights and transposes that nothing reads any more."""
        for node in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Return an initializer."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
            value.dtype = ir.DataType.from_numpy(array.dtype)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _scale_of(self, value: ir.Value, scale: float, dtype: ir.DataType) -> ir.Value:
        array = np.maximum(np.array(scale, dtype.numpy()), np.finfo(dtype.numpy()).smallest_subnormal)
        key = value, float(array)
        if key not in self._scales:  # blocks may have been given different ranges of one tensor
            self._scales[key] = self.constant(self.free_name(f"{value.name}_scale"), np.array(array, dtype.numpy()))
        return self._scales[key]

    def _zero(self) -> ir.Value:
        return self.constant("int8_zero_point", np.array(0, np.int8))

    def _insert(
        self, operator: str, inputs: list[ir.Value], after: ir.Value, name: str, dtype: ir.DataType
    ) -> ir.Value:
        producer = after.producer()
        stem = f"{producer.name}/{operator}" if producer is not None else f"{after.name}/{operator}"
        if producer is not None and len(producer.outputs) > 1:
            stem = f"{stem}_{after.index()}"
        node = ir.node(operator, inputs, name=self.free_node(stem))
        if producer is not None:
            self.graph.insert_after(producer, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        node.outputs[0].name, node.outputs[0].dtype = self.free_name(name), dtype
        self.nodes[str(node.name)] = node
        return node.outputs[0]

    def free_node(self, name: str) -> str:
        """Return a name for a node that no other one has."""
        number, free = 1, name
        while free in self.nodes:
            number += 1
            free = f"{name}_{number}"
        return free

    def free_name(self, name: str) -> str:
        """Return a name for a value that no other one has."""
        number, free = 1, name
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free
