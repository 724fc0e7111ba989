"""The TensorRT package of this machine, for tests that parse or compile with it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from bridge_stg.export.engines.compile import CAPACITY, Sizes, compile_graph, empty_network, parse_graph
from bridge_stg.runtime.bundle.spec import VisionSpec

RTX = "tensorrt_rtx_bindings"


def any_tensorrt() -> ModuleType:
    """Return any TensorRT package, or skip the test; the wheels of RTX need no GPU, but exist for few machines."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError:
        return rtx()


def rtx() -> ModuleType:
    """Return TensorRT-RTX, or skip the test."""
    return pytest.importorskip(RTX, reason='no TensorRT-RTX here: pip install -e ".[rtx]" to run this test')


def parse(path: Path) -> list[str]:
    """Return the errors of TensorRT's parser."""
    tensorrt = any_tensorrt()
    return parse_graph(tensorrt, empty_network(tensorrt), path, CAPACITY)


def compile_for(path: Path, sizes: Sizes, *, capacity: int = CAPACITY, sms: tuple[int, ...] = ()) -> bytes:
    """Return the plan of a graph, compiled by TensorRT-RTX for one range of sizes."""
    return bytes(compile_graph(rtx(), path, {"": sizes}, capacity=capacity, sms=sms).plan)


def small_sizes(vision: VisionSpec) -> Sizes:
    """Return a small range of sizes for the symbols of all graphs of a model."""
    side = vision.patch_size * vision.merge_size
    low, usual, high = (rows * columns * vision.merge_size**2 for rows, columns in ((1, 1), (2, 3), (4, 4)))
    return {
        "G": (1, 2, 4), "height": (side, 2 * side, 4 * side), "width": (side, 3 * side, 4 * side),
        "N": (low, usual, high), "B": (1, 2, 4), "L": (1, 32, 128), "K": (1, 2, 8), "V": (2, 20, 64),
        "S": (16, 128, 256), "F": (1, 8, 32), "h": (2, 8, 16), "w": (2, 8, 16),
    }  # fmt: skip
