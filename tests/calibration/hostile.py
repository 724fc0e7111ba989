"""A bundle with one hostile block: its float outputs do not change, but plain INT8 makes them useless."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.writer import BundleWriter

GRAPH = "language_model"
FACTOR = 1024.0
"""A power of two, so that float outputs do not change at all."""


def hostile_bundle(source: Path, out: Path, *, layer: int, channels: int = 3) -> tuple[Path, str]:
    """Scale some channels of one layer's values up, and the columns that read them down. Return the bundle and block.

    A few channels of o_proj's input become 1024 times as large as the others, so that one scale per tensor leaves no
    levels for the others. Smoothing cannot undo it, because of the grouped heads before it.
    """
    bundle = Bundle.load(source)
    spec = bundle.manifest.spec.language
    prefix = f"model.language_model.layers.{layer}.self_attn"
    with BundleWriter(out) as writer:
        for variants in bundle.manifest.graphs.values():
            for variant in variants.values():
                writer.add_graph(variant, bundle.graph_path(variant.name, variant.variant))
        for entry in bundle.manifest.files:
            writer.add_file(entry.path, source / entry.path)
        folder = writer.folder / "graphs" / GRAPH
        path = folder / f"{next(iter(bundle.manifest.graphs[GRAPH]))}.onnx"
        graph = onnx.load(path, load_external_data=False).graph
        weights = {tensor.name: tensor for tensor in graph.initializer}
        rows = _mapped(folder, weights[f"{prefix}.v_proj.weight"])
        columns = _mapped(folder, weights[f"{prefix}.o_proj.weight"])
        shared = columns.shape[1] // (spec.kv_heads * spec.head_dim)
        for channel in range(channels):
            head, place = divmod(channel * (rows.shape[0] // channels), spec.head_dim)
            rows[head * spec.head_dim + place] *= FACTOR
            for query_head in range(head * shared, (head + 1) * shared):
                columns[:, query_head * spec.head_dim + place] /= FACTOR
        rows.flush()
        columns.flush()
        return writer.finish(bundle.manifest), f"{GRAPH}.layers.{layer}.self_attn"


def _mapped(folder: Path, tensor: onnx.TensorProto) -> np.memmap:
    """Return float32 external data [N, K] that can be written to."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = os.fspath(folder / place["location"])
    return np.memmap(file, np.float32, "r+", int(place["offset"]), tuple(tensor.dims))
