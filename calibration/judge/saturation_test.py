"""Whether INT8 products are exact on this machine, at the values that may saturate, against integer arithmetic.

x86 CPUs without VNNI multiply 8-bit pairs into 16-bit sums (vpmaddubsw), which clip: 255 · 127 + 255 · 127 > 32767. The
products are those of the quantized graphs: Q/DQ around a MatMul, which onnxruntime fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.errors import EngineError

FULL, REDUCED = 127, 64
"""Largest magnitudes of int8 weights: all, and what a recipe with `reduced_range` has: 2 · 255 · 64 < 32768."""

ROWS, INNER, COLUMNS = (1, 33), (64, 1040), 48
"""One row is another kernel than many; 1040 is no multiple of the larger vector tiles."""

Multiply = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class SaturationTest:
    """What the self-test found.

    Attributes:
        worst: the largest difference from integer arithmetic, in units of the integer sums, over all cases.
        cases: how many products were compared.
        failed: the names of the cases that differ.
    """

    worst: float
    cases: int
    failed: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every product was exact."""
        return not self.failed

    @property
    def weight_limit(self) -> int:
        """The largest magnitude that int8 weights may have on this kind of machine."""
        return FULL if self.passed else REDUCED

    @property
    def sentence(self) -> str:
        """Say what was found, and what follows."""
        if self.passed:
            return f"INT8 products are exact here: {self.cases} cases at ±127 agree with integer arithmetic"
        return (
            f"INT8 products saturate on this CPU ({len(self.failed)} of {self.cases} cases at ±127 differ from integer "
            f"arithmetic, by {self.worst:.0f} at most): weights are quantized to ±{REDUCED}"
        )


def saturation_test(multiply: Multiply | None = None, *, limit: int = FULL) -> SaturationTest:
    """Compare INT8 products at the largest values with integer arithmetic.

    Args:
        multiply: takes int8 [M, K] and int8 [N, K], returns their products [M, N]; onnxruntime's if not given.
        limit: the largest magnitude of the weights: 127 to find out, 64 to see that it helps.

    Raises:
        EngineError: onnx or onnxruntime is missing.
    """
    product = multiply or multiply_in_onnxruntime
    worst, failed, cases = 0.0, [], 0
    for rows in ROWS:
        for inner in INNER:
            for name, left, right in patterns(rows, inner, COLUMNS, limit):
                exact = left.astype(np.int64) @ right.astype(np.int64).T
                # Sums up to 2²⁴ have exact floats; what is above may be rounded in the last place.
                allowed = np.maximum(np.abs(exact) * 2.0**-23, 0.01)
                difference = np.abs(product(left, right).astype(np.float64) - exact)
                cases += 1
                worst = max(worst, float(difference.max()))
                if (difference > allowed).any():
                    failed.append(f"{name}, {rows} × {inner} × {COLUMNS}")
    return SaturationTest(worst, cases, tuple(failed))


def patterns(rows: int, inner: int, columns: int, limit: int = FULL) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return named pairs of int8 activations [rows, inner] and weights [columns, inner] that are most apt to clip."""
    rng = np.random.default_rng(inner)
    ones = np.ones((rows, inner), np.int8), np.ones((columns, inner), np.int8)
    signs = rng.choice([-1, 1], (rows, inner)).astype(np.int8), rng.choice([-1, 1], (columns, inner)).astype(np.int8)
    pairs = np.where(np.arange(inner) % 4 < 2, 1, -1).astype(np.int8)
    return [
        ("all at +127", ones[0] * np.int8(127), ones[1] * np.int8(limit)),
        ("+127 times −127", ones[0] * np.int8(127), -ones[1] * np.int8(limit)),
        ("−127 times +127", -ones[0] * np.int8(127), ones[1] * np.int8(limit)),
        ("pairs of one sign", ones[0] * pairs * np.int8(127), ones[1] * pairs * np.int8(limit)),
        ("random signs", signs[0] * np.int8(127), signs[1] * np.int8(limit)),
    ]


def multiply_in_onnxruntime(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the products [M, N] of int8 [M, K] and int8 [N, K] by onnxruntime, as a quantized graph has them."""
    try:
        import onnx
        import onnxruntime
        from onnx import numpy_helper
    except ImportError as error:
        raise EngineError(
            f"the self-test of INT8 products needs onnx and onnxruntime ({error}). Install them: pip install "
            '"bridge-stg[calibrate]"'
        ) from error
    columns, inner = right.shape
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        product (float[M, {inner}] x) => (float[M, {columns}] y) <float scale = {{1}}, int8 zero = {{0}}> {{
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
