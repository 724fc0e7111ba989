"""What every written graph must pass, traced or made of another graph."""

from __future__ import annotations

from pathlib import Path

import onnx

from bridge_stg.runtime.errors import EngineError

FORBIDDEN = frozenset({"NonZero", "Compress", "Loop", "If", "Scan", "SequenceAt", "SplitToSequence", "Unique"})
"""Operators that TensorRT refuses, or whose output sizes depend on data."""


def check_graph(path: Path) -> None:
    """Run onnx.checker on a graph in its place, and refuse operators that a backend cannot take.

    Raises:
        EngineError: what is wrong, and in which file.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise EngineError(f"{path.name}: onnx.checker refuses the graph ({' '.join(str(error).split())})") from error
    found = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node} & FORBIDDEN
    if found:
        raise EngineError(
            f"{path.parent.name}/{path.name}: holds {', '.join(sorted(found))}, which backends refuse; change the "
            "torch code that it was traced from"
        )
