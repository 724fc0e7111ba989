"""Read graph files, and check that a written graph is valid ONNX and that every backend can run it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import EngineError

FORBIDDEN = frozenset({"NonZero", "Compress", "Loop", "If", "Scan", "SequenceAt", "SplitToSequence", "Unique"})
"""Operators that TensorRT does not support, or whose output sizes depend on data."""


def check_graph(path: Path) -> None:
    """Run onnx.checker on a graph file, and look for operators that a backend cannot run.

    Raises EngineError if the graph is not valid, or contains such an operator.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        message = f"{path.name}: not a valid ONNX graph ({' '.join(str(error).split())})"
        raise EngineError("export.invalid_graph", message) from error
    if found := {node.op_type for node in load_graph(path).graph.node} & FORBIDDEN:
        message = (
            f"{path.parent.name}/{path.name}: backends do not support {', '.join(sorted(found))}; change the model"
        )
        raise EngineError("export.invalid_graph", message)


def load_graph(path: str | os.PathLike[str]) -> Any:
    """Read a graph file without its weights; raise EngineError if onnx is missing or the file is not a graph."""
    require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(os.fspath(path), load_external_data=False)
    except (OSError, ValueError, DecodeError) as error:
        raise EngineError("bundle.not_onnx", f"{path}: cannot be read as an ONNX graph ({error})") from error


def require_onnx() -> None:
    """Raise EngineError if onnx cannot be imported."""
    try:
        importlib.import_module("onnx")
    except ImportError as error:
        message = f"onnx cannot be imported ({error}). Install it: pip install onnx"
        raise EngineError("host.missing_package", message) from error
