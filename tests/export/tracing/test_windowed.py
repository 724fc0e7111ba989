"""The family whose vision encoder attends in windows goes the same way: both variants, in fp32 and in fp16."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch

from bridge_stg.checkpoint.checkpoint import save_checkpoint
from bridge_stg.demo.tiny_model import write_demo_tokenizer
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.graph.graph_check import FORBIDDEN
from bridge_stg.export.parity.parity import Parity
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.parity.compare import replay
from tests.export.conftest import random_model, tiny_windowed_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def windowed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windowed")
    write_demo_tokenizer(folder / "demo.json")
    save_checkpoint(random_model(tiny_windowed_config()), folder / "tiny", folder / "demo.json", dtype=torch.bfloat16)
    return folder / "tiny"


@pytest.mark.parametrize(("dtype", "rel_l2"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_windowed_attention_is_exported(windowed_checkpoint: Path, tmp_path: Path, dtype: str, rel_l2: float) -> None:
    bundle = Bundle.load(export_bundle(windowed_checkpoint, tmp_path / "bundle", dtype=dtype))
    parity = Parity.from_dict(read_report(bundle.path, "parity"))
    assert max(boundary.rel_l2 for boundary in parity.boundaries) <= rel_l2
    assert parity.least_iou is not None and parity.least_iou >= 0.99
    assert all(moved > 0.1 for moved in parity.dependence.values()), parity.dependence
    for variant, graph in bundle.manifest.graphs["vision_encoder"].items():
        assert {"window_index", "window_mask", "window_place"} <= {tensor.name for tensor in graph.inputs}
        proto = onnx.load(bundle.graph_path("vision_encoder", variant), load_external_data=False)
        assert not {node.op_type for node in proto.graph.node} & FORBIDDEN
        dims = {d.dim_param for v in proto.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
        assert dims == {"G", "height", "width", "N", "W"}
    sessions = open_sessions(bundle, variant="standard", threads=1)
    assert all(boundary.passed for boundary in replay(bundle, sessions))
