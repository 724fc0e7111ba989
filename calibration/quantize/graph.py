"""One graph with explicit Q/DQ: products in int8 or int4, the table in int8, outliers moved into weights.

The one form that onnxruntime, TensorRT 10 and 11 all take: symmetric, zero point 0, weights a channel, activations a
tensor. Biases, norms, softmax and what adds up residuals stay float. Weights go from file to file one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.calibration.quantize.packing import NO_FACTORS, Factors, Int4Pieces, Int8Pieces, StoredSource
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.calibration.quantize.smoothing_groups import smoothing_groups
from bridge_stg.calibration.quantize.weight_file import WeightFile
from bridge_stg.calibration.recipes import GraphRecipe
from bridge_stg.export.graph.blocks import FLOAT, HEAD, INT4, INT8, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.graph_edit import Edit
from bridge_stg.runtime.errors import BridgeError

INLINE_BYTES = 256
"""Smaller tensors stay in the .onnx file, as do integers that are no weights: engines want to see them at once."""

HALF_SCALES_SINCE, INT4_SINCE = 19, 21
"""First opsets whose QuantizeLinear takes fp16 scales, and whose DequantizeLinear takes int4 and blocks."""

INT4_IR_VERSION = 10

Ranges = Mapping[str, TensorRange]
"""By the node of a product, or past_key_0 … for keys and values."""

Smoothing = Mapping[str, np.ndarray]
"""By the node of a product: float32 [K], what its activation is divided by; alike where products share one."""

Progress = Callable[[str, int, int], Any]


class GraphQuantizer:
    """Quantizes the variants of one graph into one file of weights, each weight once.

    Args:
        graph: its name.
        recipe: what is in integers.
        ranges: of every int8 activation.
        smoothing: of the products that are smoothed.
        weights: where all tensors of the variants go.
        progress: called as progress("quantizing GRAPH", done, total) with products.
    """

    def __init__(
        self,
        graph: str,
        recipe: GraphRecipe,
        *,
        ranges: Ranges,
        smoothing: Smoothing,
        weights: WeightFile,
        progress: Progress | None = None,
    ) -> None:
        self._graph, self._recipe = graph, recipe
        self._ranges, self._smoothing = ranges, smoothing
        self._weights = weights
        self._progress = progress or (lambda stage, done, total: None)
        self._packed: dict[tuple[Any, ...], tuple[ir.ExternalTensor, np.ndarray]] = {}
        self._copied: dict[tuple[Any, ...], ir.ExternalTensor] = {}

    def quantize(self, model: ir.Model) -> None:
        """Change one float variant in place; keys and values are left alone.

        Raises:
            BridgeError: a product has no range, or a weight cannot be stored.
        """
        products, tables = find_matmuls(model, self._graph), find_tables(model, self._graph)
        forms, table_form = forms_of(self._recipe, products, tables)
        factors = self._factors(model)
        edit = Edit(model.graph)
        half = False
        for done, product in enumerate(products):
            self._progress(f"quantizing {self._graph}", done, len(products))
            form = forms[product.node]
            if form == FLOAT:
                continue
            node = edit.nodes[product.node]
            weight = self._weight(edit, product, form, factors.get(product.weight, NO_FACTORS))
            data = node.inputs[0]
            assert data is not None and weight.dtype is not None
            half |= weight.dtype == ir.DataType.FLOAT16
            if self._recipe.activations == INT8:
                data = edit.quantized(data, self._scale(product), weight.dtype)
            edit.multiply(node, data, weight)
        for table in tables:
            if table_form == INT8:
                pack = partial(self._pack, edit, table.weight, INT8, NO_FACTORS, turned=False)
                rows = edit.dequantized(table.weight, pack, use="table")
                edit.nodes[table.node].replace_input_with(0, rows)
        edit.drop_unused()
        opset = model.graph.opset_imports[""]
        if INT4 in forms.values():
            model.graph.opset_imports[""] = max(opset, INT4_SINCE)
            model.ir_version = max(model.ir_version, INT4_IR_VERSION)
        elif half:
            model.graph.opset_imports[""] = max(opset, HALF_SCALES_SINCE)
        self._store(model.graph, factors)

    def _factors(self, model: ir.Model) -> dict[str, Factors]:
        """Return what smoothing multiplies initializers by; float or not, all of a group must follow."""
        if not self._smoothing:
            return {}
        columns: dict[str, np.ndarray] = {}
        rows: dict[str, np.ndarray] = {}
        left = set(self._smoothing)
        for group in smoothing_groups(model, self._graph):
            vectors = [self._smoothing[node] for node in group.nodes if node in self._smoothing]
            left -= set(group.nodes)
            if not vectors:
                continue
            vector, k = np.asarray(vectors[0], np.float32), group.products[0].k
            alike = len(vectors) == len(group.nodes) and all(np.array_equal(vector, other) for other in vectors)
            if not alike or vector.shape != (k,) or not (np.isfinite(vector).all() and (vector > 0).all()):
                raise BridgeError(
                    f"smoothing of {', '.join(group.nodes)}: expected one vector of {k} positive numbers for all of "
                    f"them, found {len(vectors)} of shape {list(vector.shape)}."
                )
            for product in group.products:
                columns[product.weight] = vector
            for name in group.divided:
                rows[name] = 1 / vector
        if left:
            raise BridgeError(f"smoothing of {min(left)}: nothing before it can be divided; leave it out.")
        return {name: Factors(columns.get(name), rows.get(name)) for name in {**columns, **rows}}

    def _scale(self, product: Matmul) -> float:
        if product.node not in self._ranges:
            raise BridgeError(
                f"{product.node}: no range was found for what it multiplies; collect statistics of graph "
                f"{product.graph} with the same bundle first."
            )
        scale = float(self._ranges[product.node].scale)
        if not (np.isfinite(scale) and scale > 0):
            raise BridgeError(f"{product.node}: its range has the scale {scale}; expected a positive number.")
        return scale

    def _weight(self, edit: Edit, product: Matmul, form: str, factors: Factors) -> ir.Value:
        """Return a weight as [K, N] floats that come out of integers.

        The head stays [N, K] behind a transpose: it may be a table too, and is too large to be turned here.
        """
        name, turned = product.weight, product.block != HEAD
        value = edit.dequantized(
            name,
            partial(self._pack, edit, name, form, factors, turned=turned),
            use="product",
            axis=0 if form == INT4 or not turned else 1,
            block_size=self._recipe.block_size if form == INT4 else 0,
        )
        return value if turned else edit.transposed(value)

    def _pack(
        self, edit: Edit, name: str, form: str, factors: Factors, *, turned: bool
    ) -> tuple[ir.ExternalTensor, np.ndarray]:
        """Return the integers and the scales of a weight, which are written if no variant has asked for them yet."""
        tensor = edit.graph.initializers[name].const_value
        assert tensor is not None
        key = (*_place(tensor), form, turned, *_bytes_of(factors))
        if key not in self._packed:
            source = StoredSource(tensor, factors)
            n, k = source.shape
            if form == INT4:
                four = Int4Pieces(source, block_size=self._recipe.block_size)
                self._packed[key] = self._weights.write(name, ir.DataType.INT4, (k, n), four), four.scales
            else:
                eight = Int8Pieces(source, turned=turned, reduced=self._recipe.reduced_range)
                shape = (k, n) if turned else (n, k)
                self._packed[key] = self._weights.write(name, ir.DataType.INT8, shape, eight), eight.scales
        packed, scales = self._packed[key]
        return self._weights.again(packed, f"{name}_{form}"), scales

    def _store(self, graph: ir.Graph, factors: Mapping[str, Factors]) -> None:
        """Move what is still float out of the graph; what smoothing changes, changed."""
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            source = StoredSource(tensor, factors.get(name, NO_FACTORS))
            if tensor.nbytes < INLINE_BYTES:
                if not source.factors.none or isinstance(tensor, ir.ExternalTensor):
                    raw = np.frombuffer(b"".join(source.pieces()), tensor.dtype.numpy())
                    value.const_value = ir.tensor(raw.reshape(source.shape), dtype=tensor.dtype, name=name)
                continue
            key = (*_place(tensor), *_bytes_of(source.factors))
            if key not in self._copied:
                self._copied[key] = self._weights.write(name, tensor.dtype, source.shape, source.pieces())
            written = self._copied[key]
            place = int(written.offset or 0), int(written.length or 0)
            value.const_value = self._weights.at(name, tensor.dtype, source.shape, place)


def forms_of(recipe: GraphRecipe, products: list[Matmul], tables: list[Table]) -> tuple[dict[str, str], str]:
    """Return how each product's weight is stored, by node, and how the table is.

    A head that is tied to the table is int8 where both may be, and float where one must: its bytes are there once.
    """
    forms = {product.node: recipe.form_of(product) for product in products}
    table_form = recipe.form_of_table(tables[0]) if tables else FLOAT
    tied = {table.weight for table in tables}
    for product in products:
        if product.weight in tied:
            table_form = INT8 if table_form == INT8 and forms[product.node] != FLOAT else FLOAT
            forms[product.node] = table_form
    return forms, table_form


def _place(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    """What tells two variants' tensors of the same bytes."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset, tensor.length, tuple(tensor.shape)
    return (tensor.tobytes(), tuple(tensor.shape))


def _bytes_of(factors: Factors) -> tuple[bytes, bytes]:
    return tuple(b"" if v is None else v.tobytes() for v in (factors.columns, factors.rows))  # type: ignore[return-value]
