"""The TensorRT package of this machine, for tests that parse or compile with it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from bridge_stg.export.engines.compile import CAPACITY, Sizes, compile_graph, empty_network, parse_graph

RTX = "tensorrt_rtx_bindings"


def any_tensorrt() -> ModuleType:
    """Return any TensorRT package, or skip the test; the wheels of RTX need no GPU, but exist for few machines."""
    try:
        return importlib.import_module("tensorrt")
    except ImportError:
        return rtx()


def rtx() -> ModuleType:
    """Return TensorRT-RTX, or skip the test."""
    return pytest.importorskip(RTX, reason='no TensorRT-RTX here: pip install "bridge-stg[rtx]" to run this test')


def parse(path: Path) -> list[str]:
    """Return the errors of TensorRT's parser."""
    tensorrt = any_tensorrt()
    return parse_graph(tensorrt, empty_network(tensorrt), path, CAPACITY)


def compile_for(path: Path, sizes: Sizes, *, capacity: int = CAPACITY) -> bytes:
    """Return the plan of a graph, compiled by TensorRT-RTX for one range of sizes."""
    return bytes(compile_graph(rtx(), path, {"": sizes}, capacity=capacity).plan)
