"""Test whether INT8 matmuls are exact on this CPU at the largest values, by comparison with integer arithmetic.

x86 CPUs without VNNI multiply 8-bit pairs into 16-bit sums (vpmaddubsw), which saturate: 255 · 127 + 255 · 127 > 32767.
The matmuls are those of quantized graphs: Q/DQ around a MatMul, which onnxruntime fuses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bridge_stg.calibration.quantize.packing import INT8_LIMIT, REDUCED_LIMIT

ROWS, INNER, COLUMNS = (1, 33), (64, 1040), 48
"""One row has another kernel than many rows; 1040 is not a multiple of the larger vector tiles."""


@dataclass(frozen=True)
class SaturationTest:
    """Number of matmuls, names of those that differ from integer arithmetic, and the largest difference of a sum."""

    worst: float
    cases: int
    failed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every matmul was exact."""
        return not self.failed

    @property
    def sentence(self) -> str:
        """The result and its consequence, for the report."""
        if self.passed:
            return f"INT8 matmuls are exact here: {self.cases} cases at ±127 agree with integer arithmetic"
        return (
            f"INT8 matmuls saturate on this CPU ({len(self.failed)} of {self.cases} cases at ±127 differ from integer "
            f"arithmetic, by at most {self.worst:.0f}): weights are quantized to ±{REDUCED_LIMIT}"
        )


def saturation_test(
    multiply: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None, *, limit: int = INT8_LIMIT
) -> SaturationTest:
    """Compare INT8 matmuls at the largest values with integer arithmetic.

    `multiply` multiplies int8 [M, K] with int8 [N, K], by default in onnxruntime; `limit` is the largest magnitude of
    the weights, 64 to check that it avoids saturation.
    """
    matmul = multiply or multiply_in_onnxruntime
    worst, failed, cases = 0.0, [], 0
    for rows, inner in itertools.product(ROWS, INNER):
        for name, left, right in patterns(rows, inner, COLUMNS, limit):
            exact = left.astype(np.int64) @ right.astype(np.int64).T
            # Sums up to 2²⁴ are exact in float32; larger ones may be rounded in the last place.
            allowed = np.maximum(np.abs(exact) * 2.0**-23, 0.01)
            difference = np.abs(matmul(left, right).astype(np.float64) - exact)
            cases += 1
            worst = max(worst, float(difference.max()))
            if (difference > allowed).any():
                failed.append(f"{name}, {rows} × {inner} × {COLUMNS}")
    return SaturationTest(worst, cases, tuple(failed))


def patterns(rows: int, inner: int, columns: int, limit: int = INT8_LIMIT) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return named pairs of int8 activations [rows, inner] and weights [columns, inner] that are likely to saturate."""
    rng = np.random.default_rng(inner)
    left, right = np.full((rows, inner), 127, np.int8), np.full((columns, inner), limit, np.int8)
    pairs = np.where(np.arange(inner) % 4 < 2, 1, -1).astype(np.int8)
    signs = [rng.choice([-1, 1], side.shape).astype(np.int8) for side in (left, right)]
    return [
        ("all at +127", left, right),
        ("+127 times −127", left, -right),
        ("−127 times +127", -left, right),
        ("pairs of one sign", left * pairs, right * pairs),
        ("random signs", left * signs[0], right * signs[1]),
    ]


def multiply_in_onnxruntime(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Multiply int8 [M, K] with int8 [N, K] in onnxruntime, as a quantized graph does. Return float32 [M, N]."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    columns, inner = right.shape
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        matmul (float[M, {inner}] x) => (float[M, {columns}] y) <float scale = {{1}}, int8 zero = {{0}}> {{
            quantized = QuantizeLinear(x, scale, zero)
            activation = DequantizeLinear(quantized, scale, zero)
            rows = DequantizeLinear<axis = 0>(weight, scales, zeros)
            columns = Transpose<perm = [1, 0]>(rows)
            y = MatMul(activation, columns)
        }}"""
    )
    constants = {"weight": right, "scales": np.ones(columns, np.float32), "zeros": np.zeros(columns, np.int8)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": left.astype(np.float32)})[0])
