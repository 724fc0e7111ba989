"""The patch embedding of `ort-cpu`: one matmul over bytes, with normalization by channel folded into its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from bridge_stg.export.graph.patch_embedding import embed_patches_by_matmul
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.positions import vision_tables

NAME = "vision_encoder"


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (2, 2)])
def test_the_matmul_computes_what_the_convolution_did(
    exported: Bundle, tmp_path: Path, rows: int, columns: int
) -> None:
    vision = exported.manifest.spec.vision
    model = ir.load(exported.graph_path(NAME, "standard"))
    random = np.random.default_rng(0)
    for stem, low, high in (("scale", 0.005, 0.02), ("shift", -2, -1)):  # another one for every channel
        value = model.graph.initializers[f"{NAME}.{stem}"]
        value.const_value = ir.tensor(random.uniform(low, high, 3).astype(np.float32), name=value.name)
    shape = (3, vision.temporal_patch_size, rows * vision.patch_size, columns * vision.patch_size, 3)
    feeds = {"frames": random.integers(0, 256, shape, np.uint8), **vision_tables(vision, rows, columns)}

    def outputs(name: str) -> list[np.ndarray]:
        ir.save(model, tmp_path / name)
        (tmp_path / "weights.data").unlink(missing_ok=True)
        (tmp_path / "weights.data").hardlink_to(exported.path / "graphs" / NAME / "weights.data")
        return list(onnxruntime.InferenceSession(tmp_path / name).run(None, feeds))

    expected = outputs("standard.onnx")
    assert embed_patches_by_matmul(model)
    assert not {"Conv"} & {node.op_type for node in model.graph}
    for found, wanted in zip(outputs("changed.onnx"), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_graphs_without_images_stay(exported: Bundle) -> None:
    for name in ("language_model", "spatial_decoder"):
        assert not embed_patches_by_matmul(ir.load(exported.graph_path(name, "standard")))
