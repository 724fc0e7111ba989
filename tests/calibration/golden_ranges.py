"""Ranges without calibration samples: the largest magnitudes in a bundle's own golden cases."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bridge_stg.calibration.quantize.ranges import TensorRange
from bridge_stg.export.graph.blocks import find_matmuls
from bridge_stg.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from bridge_stg.runtime.backends.session import KVCache, SessionWrapper
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec, TensorSpec
from bridge_stg.runtime.parity.compare import replay


class WatchedSession(SessionWrapper):
    """Keeps the largest value of each extra output, and of each buffer of the cache."""

    def __init__(self, path: Path, graph: GraphSpec, watched: Sequence[str]) -> None:
        extra = tuple(TensorSpec(name, "float32", ()) for name in watched)
        super().__init__(OnnxRuntimeSession(path, dataclasses.replace(graph, outputs=graph.outputs + extra), threads=1))
        self.graph = graph
        self.largest = dict.fromkeys(watched, 0.0)

    def infer(self, feeds: Mapping[str, np.ndarray], *, cache: KVCache | None = None) -> dict[str, np.ndarray]:
        outputs = self.session.infer(feeds, cache=cache)
        kept = {} if cache is None else cache.read()
        for name in list(self.largest):
            if name in outputs:
                self.largest[name] = max(self.largest[name], float(outputs.pop(name)))
        for name, buffer in kept.items():
            self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(buffer).max()))
        return outputs


def golden_ranges(bundle: Bundle, folder: Path) -> dict[str, dict[str, TensorRange]]:
    """Return min-max ranges by graph and node, and by past_key_0 …; copies of the graphs go to `folder`."""
    found = {}
    for name, variants in bundle.manifest.graphs.items():
        path, graph = bundle.graph_path(name, "standard"), variants["standard"]
        copied = folder / name
        shutil.copytree(path.parent, copied)
        model = ir.load(copied / path.name)
        matmuls = find_matmuls(model, name)
        values = {str(v.name): v for node in model.graph for v in node.outputs}
        values |= {str(v.name): v for v in model.graph.inputs}
        watched: dict[str, str] = {}
        for activation in dict.fromkeys(matmul.activation for matmul in matmuls):
            watched[activation] = f"largest_{len(watched)}"
            out = values[activation]
            for operator, attributes in (("Abs", {}), ("ReduceMax", {"keepdims": 0}), ("Cast", {"to": 1})):
                node = ir.node(operator, [out], attributes, name=f"{watched[activation]}/{operator}")
                model.graph.append(node)
                out = node.outputs[0]
            out.name, out.dtype, out.shape = watched[activation], ir.DataType.FLOAT, ir.Shape([])
            model.graph.outputs.append(out)
        ir.save(model, copied / "watched.onnx")
        session = WatchedSession(copied / "watched.onnx", graph, list(watched.values()))
        replay(bundle, {name: session}, graphs=[name])
        session.close()
        named = {matmul.node: session.largest[watched[matmul.activation]] for matmul in matmuls}
        named |= {key: value for key, value in session.largest.items() if key.startswith("past_")}
        found[name] = {key: TensorRange(value / 127, "minmax", value, 0.0) for key, value in named.items()}
    return found
