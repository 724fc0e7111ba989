"""Measure the physical limits of the machine: memory bandwidth and the peak rate of matmuls.

Usage: python benchmarks/speed/limits.py [--threads 2] [--seconds 2] (prints JSON)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import numpy as np

from bridge_stg.export.engines.devices import bandwidth

BUFFER_BYTES = 2**29
"""Bytes read by the bandwidth test, many times the size of any last-level cache."""

GEMMS = ((512, 896, 4864), (1024, 1024, 4096), (2048, 2048, 6144), (1024, 4096, 4096))
"""Rows, inputs and outputs of the matmuls; the fastest one counts."""


def gemm_peaks(threads: int, *, shapes: Sequence[tuple[int, int, int]] = GEMMS, seconds: float = 1.0) -> dict[str, Any]:
    """Return the peak operations per second of each implementation, and the shape that reached it."""
    ways: dict[str, Callable[..., Callable[[], Any]]] = {
        "onnxruntime_fp32": _onnxruntime_fp32,
        "onnxruntime_int8": _onnxruntime_int8,
        "torch_fp32": _torch_fp32,
    }
    return {name: _peak(way, shapes, threads, seconds) for name, way in ways.items()}


def _peak(
    way: Callable[..., Callable[[], Any]], shapes: Sequence[tuple[int, int, int]], threads: int, seconds: float
) -> dict[str, Any]:
    best: dict[str, Any] = {"flops": 0.0, "shape": None}
    for shape in shapes:
        run = way(*shape, threads)
        fastest = min(_timed(run, seconds / len(shapes)))
        rate = 2 * shape[0] * shape[1] * shape[2] / fastest
        if rate > best["flops"]:
            best = {"flops": rate, "shape": list(shape)}
    return best


def _timed(run: Callable[[], Any], seconds: float) -> Iterator[float]:
    run()
    ends = time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        run()
        now = time.perf_counter()
        yield now - began
        if now > ends:
            return


def _session(nodes: list[Any], initializers: dict[str, np.ndarray], shape: list[int], dtype: int, threads: int) -> Any:
    import onnx
    import onnxruntime

    graph = onnx.helper.make_graph(
        nodes,
        "matmul",
        [onnx.helper.make_tensor_value_info("x", dtype, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _onnxruntime_fp32(m: int, k: int, n: int, threads: int) -> Callable[[], Any]:
    import onnx

    generator = np.random.default_rng(0)
    weights = generator.standard_normal((k, n), dtype=np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    session = _session([node], {"w": weights}, [m, k], onnx.TensorProto.FLOAT, threads)
    x = generator.standard_normal((m, k), dtype=np.float32)
    return lambda: session.run(None, {"x": x})


def _onnxruntime_int8(m: int, k: int, n: int, threads: int) -> Callable[[], Any]:
    """Return a MatMulIntegerToFloat of uint8 × int8, as used in the variant `ort-cpu`."""
    import onnx

    generator = np.random.default_rng(0)
    constants = {
        "w": generator.integers(-127, 128, (k, n)).astype(np.int8),
        "a": np.array(0.01, np.float32),
        "b": np.full(n, 0.01, np.float32),
        "z": np.array(128, np.uint8),
    }
    node = onnx.helper.make_node("MatMulIntegerToFloat", ["x", "w", "a", "b", "z"], ["y"], domain="com.microsoft")
    session = _session([node], constants, [m, k], onnx.TensorProto.UINT8, threads)
    x = generator.integers(0, 256, (m, k)).astype(np.uint8)
    return lambda: session.run(None, {"x": x})


def _torch_fp32(m: int, k: int, n: int, threads: int) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    x, weights = torch.randn(m, k), torch.randn(n, k)

    def run() -> None:
        with torch.no_grad():
            torch.nn.functional.linear(x, weights)

    return run


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=2.0, show_default=True, help="Seconds per implementation.")
def main(threads: int, seconds: float) -> None:
    """Print the limits as JSON."""
    limits = {
        "bandwidth": bandwidth(threads, buffer_bytes=BUFFER_BYTES),
        "gemm": gemm_peaks(threads, seconds=seconds),
        "threads": threads,
    }
    click.echo(json.dumps(limits))


if __name__ == "__main__":
    main()
