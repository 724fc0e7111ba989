"""Quantize one graph with explicit Q/DQ: matmuls, the table in int8, smoothing folded into weights.

The form that onnxruntime, TensorRT 10 and 11 all support: symmetric, zero point 0, weights per channel, activations per
tensor; nvfp4 in the form that TensorRT compiles to a matmul of fp4. Biases, norms, softmax and residual additions stay
in float. Weights go from file to file one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from bridge_stg.calibration.quantize.int4 import Int4Weights, int4_rounded
from bridge_stg.calibration.quantize.packing import (
    NO_FACTORS,
    ChannelPieces,
    Factors,
    Nvfp4Pieces,
    StoredSource,
    pack_nibbles,
    storable,
)
from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.calibration.quantize.smoothing_groups import smoothing_groups
from bridge_stg.calibration.recipes import GraphRecipe
from bridge_stg.export.graph.blocks import FLOAT, FP8, HEAD, INT4, INT8, NVFP4, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.graph_edit import STORED, TENSORRT_DOMAIN, Edit
from bridge_stg.export.graph.weight_file import WeightFile
from bridge_stg.runtime.errors import BridgeError

INLINE_BYTES = 256
"""Smaller tensors stay in the .onnx file, as do integers that are not weights: backends need them at load time."""

HALF_SCALES_SINCE, INT4_SINCE, NVFP4_SINCE = 19, 21, 23
"""First opsets whose QuantizeLinear supports fp16 scales and fp8, and DequantizeLinear int4 and blocks, and nvfp4."""

IR_VERSIONS = {INT4: 10, NVFP4: 11}

Ranges = Mapping[str, TensorRange]
"""By node of a matmul, or past_key_0 … for keys and values."""

Smoothing = Mapping[str, np.ndarray]
"""By node of a matmul: float32 [K], divisor of its activation; equal for matmuls that share an activation."""

Progress = Callable[[str, int, int], Any]


class GraphQuantizer:
    """Quantizes the variants of one graph into one file of weights, each weight once."""

    def __init__(
        self,
        graph: str,
        recipe: GraphRecipe,
        *,
        ranges: Ranges,
        smoothing: Smoothing,
        weights: WeightFile,
        int4: Int4Weights | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._graph, self.recipe = graph, recipe
        self.ranges, self._smoothing = ranges, smoothing
        self._weights, self._int4 = weights, int4
        self._progress = progress or (lambda stage, done, total: None)
        self._packed: dict[tuple[Any, ...], tuple[ir.ExternalTensor, Any]] = {}
        self._copied: dict[tuple[Any, ...], ir.ExternalTensor] = {}

    def quantize(self, model: ir.Model) -> None:
        """Quantize one float variant in place, except for keys and values; see `quantize_bundle` for the errors."""
        matmuls, tables = find_matmuls(model, self._graph), find_tables(model, self._graph)
        forms, table_form = forms_of(self.recipe, matmuls, tables)
        factors = self._factors(model)
        edit = Edit(model.graph)
        half = False
        for done, matmul in enumerate(matmuls):
            self._progress(f"quantizing {self._graph}", done, len(matmuls))
            form = forms[matmul.node]
            if form == FLOAT:
                continue
            node = edit.nodes[matmul.node]
            weight = self._weight(edit, matmul, form, factors.get(matmul.weight, NO_FACTORS))
            data = node.inputs[0]
            assert data is not None and weight.dtype is not None
            half |= weight.dtype == ir.DataType.FLOAT16
            if form == self.recipe.activations:
                data = edit.quantized(data, self._scale(matmul), weight.dtype, form)
            edit.multiply(node, data, weight)
        for table in tables:
            if table_form == INT8:
                pack = partial(self._pack, edit, table.weight, INT8, NO_FACTORS, transposed=False)
                rows = edit.dequantized(table.weight, pack, use="table")
                edit.nodes[table.node].replace_input_with(0, rows)
        edit.drop_unused()
        opset = model.graph.opset_imports[""]
        used = set(forms.values())
        needed = [INT4_SINCE] * (INT4 in used) + [NVFP4_SINCE] * (NVFP4 in used)
        needed += [HALF_SCALES_SINCE] * (half or FP8 in used)
        model.graph.opset_imports[""] = max(opset, *needed, 0)
        model.ir_version = max(model.ir_version, *(IR_VERSIONS.get(form, 0) for form in used))
        if NVFP4 in used:
            model.graph.opset_imports[TENSORRT_DOMAIN] = 1
        self._store(model.graph, factors)

    def round_head(self, node: str, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Round the head's smoothed weight float32 [K, N] to int4 for decoding on CPU, see `int4_rounded`."""
        activation = None if self._int4 is None else self._int4.activation(self._graph, node)
        block = math.gcd(self.recipe.block_size, len(weight))
        return int4_rounded(weight, activation, block_size=block, dtype=np.float32)

    def _factors(self, model: ir.Model) -> dict[str, Factors]:
        """Return the factors of smoothing by initializer; they apply to float blocks of a smoothed group too."""
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
            vector, k = np.asarray(vectors[0], np.float32), group.matmuls[0].k
            alike = len(vectors) == len(group.nodes) and all(np.array_equal(vector, other) for other in vectors)
            if not alike or vector.shape != (k,) or not (np.isfinite(vector).all() and (vector > 0).all()):
                found = f"found {len(vectors)} of shape {list(vector.shape)}; expected one, of {k} positive numbers"
                raise BridgeError("calibration.bad_smoothing", f"smoothing of {', '.join(group.nodes)}: {found}.")
            for matmul in group.matmuls:
                columns[matmul.weight] = vector
            for name in group.divided:
                rows[name] = 1 / vector
        if left:
            what = f"smoothing of {min(left)}: no node before it can be divided; leave it out."
            raise BridgeError("calibration.bad_smoothing", what)
        return {name: Factors(columns.get(name), rows.get(name)) for name in {**columns, **rows}}

    def _scale(self, matmul: Matmul) -> float:
        found = self.ranges.get(matmul.node)
        if found is None or not (np.isfinite(found.scale) and found.scale > 0):
            if found is None:
                problem = "has no range: no sample ran it (the spatial decoder runs for targets that are found)"
            else:
                problem = f"has the scale {found.scale}; expected a positive number"
            what = f"{matmul.node}: its activation {problem}. Give other --samples, or collect them with this bundle."
            raise BridgeError("calibration.missing_range", what)
        return float(found.scale)

    def _weight(self, edit: Edit, matmul: Matmul, form: str, factors: Factors) -> ir.Value:
        """Return a dequantized weight [K, N].

        The head stays [N, K], with a Transpose: it may be a table too, and is too large to be transposed in memory.
        """
        name, transposed = matmul.weight, matmul.block != HEAD
        if form == NVFP4:
            tensor, (scales, scale) = self._pack(edit, name, form, factors, transposed=False)
            return edit.transposed(edit.from_nvfp4(tensor, scales, scale, name))
        value = edit.dequantized(
            name,
            partial(self._pack, edit, name, form, factors, transposed=transposed, node=matmul.node),
            use="product",
            axis=0 if form == INT4 or not transposed else 1,
            block_size=self.recipe.block_size if form == INT4 else 0,
        )
        return value if transposed else edit.transposed(value)

    def _pack(
        self, edit: Edit, name: str, form: str, factors: Factors, *, transposed: bool, node: str = ""
    ) -> tuple[ir.ExternalTensor, Any]:
        """Return the values and the scales of a weight, which are written on the first call for any variant.

        `node` is that of the matmul whose activation int4 is rounded for.
        """
        tensor = edit.graph.initializers[name].const_value
        assert tensor is not None
        key = (*_place(tensor), form, transposed, *_bytes_of(factors))
        if key not in self._packed:
            source = StoredSource(tensor, factors)
            n, k = source.shape
            if form == INT4:
                levels, scales = self._rounded(source, node)
                content = [pack_nibbles(levels).tobytes()]
                self._packed[key] = self._weights.write(name, ir.DataType.INT4, (k, n), content), scales
            elif form == NVFP4:
                pieces = Nvfp4Pieces(source)
                written = self._weights.write(name, STORED[form], (n, k), pieces)
                self._packed[key] = written, (pieces.scales, pieces.scale)
            else:
                eight = ChannelPieces(source, form=form, transposed=transposed, reduced=self.recipe.reduced_range)
                shape = (k, n) if transposed else (n, k)
                self._packed[key] = self._weights.write(name, STORED[form], shape, eight), eight.scales
        packed, scales = self._packed[key]
        return self._weights.alias(packed, f"{name}_{form}"), scales

    def _rounded(self, source: StoredSource, node: str) -> tuple[np.ndarray, np.ndarray]:
        """Return int4 levels [K, N] and scales [K / block_size, N]; each factor of a row becomes one of its scales."""
        dtype, rows = source.tensor.dtype.numpy(), source.factors.rows
        if self._int4 is not None:
            levels, scales = self._int4.rounded(self._graph, node)
            return levels, scales if rows is None else storable(scales.astype(np.float32) * rows, dtype)
        weight = np.concatenate([block.T for _, block in source.rows()], axis=1)
        return int4_rounded(weight, None, block_size=self.recipe.block_size, dtype=dtype)

    def _store(self, graph: ir.Graph, factors: Mapping[str, Factors]) -> None:
        """Move float tensors into the weight file, multiplied by their factors."""
        for name, value in sorted(graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            if isinstance(tensor, ir.ExternalTensor) and tensor.dtype in (STORED[FP8], STORED[NVFP4]):
                continue  # it is there already
            source = StoredSource(tensor, factors.get(name, NO_FACTORS))
            if tensor.nbytes < INLINE_BYTES:
                if not source.factors.none or isinstance(tensor, ir.ExternalTensor):
                    raw = np.frombuffer(b"".join(source.pieces()), tensor.dtype.numpy())
                    value.const_value = ir.tensor(raw.reshape(source.shape), dtype=tensor.dtype, name=name)
                continue
            key = (*_place(tensor), *_bytes_of(source.factors))
            if key not in self._copied:
                self._copied[key] = self._weights.write(name, tensor.dtype, source.shape, source.pieces())
            value.const_value = self._weights.alias(self._copied[key], name)


def forms_of(recipe: GraphRecipe, matmuls: list[Matmul], tables: list[Table]) -> tuple[dict[str, str], str]:
    """Return the stored form of each matmul's weight, by node, and of the table.

    A tied head and table share their bytes: they are int8 if both may be, else float.
    """
    forms = {matmul.node: recipe.form_of(matmul) for matmul in matmuls}
    table_form = recipe.form_of_table(tables[0]) if tables else FLOAT
    tied = {table.weight for table in tables}
    for matmul in matmuls:
        if matmul.weight in tied:
            table_form = INT8 if table_form == INT8 and forms[matmul.node] != FLOAT else FLOAT
            forms[matmul.node] = table_form
    return forms, table_form


def _place(tensor: ir.TensorProtocol) -> tuple[Any, ...]:
    """Return a key that identifies equal tensors of two variants."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset, tensor.length, tuple(tensor.shape)
    return (tensor.tobytes(), tuple(tensor.shape))


def _bytes_of(factors: Factors) -> tuple[bytes, bytes]:
    columns, rows = (b"" if v is None else v.tobytes() for v in (factors.columns, factors.rows))
    return columns, rows
