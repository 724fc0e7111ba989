"""TensorRT's inspector: its JSON as kernels, and as the report of an engine that was built on the device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge_stg.export.engines import build as engine_build
from bridge_stg.export.engines import inspector as engine_inspector
from bridge_stg.export.engines import select_builds
from bridge_stg.export.engines.build import build_engines, engine_line
from bridge_stg.export.engines.compile import Compiled
from bridge_stg.export.engines.inspector import inspected_kernels
from bridge_stg.export.engines.layers import ATTENTION, graph_nodes, plan_summary
from bridge_stg.runtime.backends.tensorrt.library import TensorRT
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import EngineError
from tests.errors import raises


class Opened:
    """The module `tensorrt` on a device, as far as the inspector goes; it opens engines that begin with `plan`."""

    __version__ = "10.15.1"
    LayerInformationFormat = SimpleNamespace(JSON="json", ONELINE="oneline")

    class ILogger:
        INTERNAL_ERROR, ERROR = 0, 1

        def __init__(self) -> None:
            pass

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def Runtime(self, logger: Any) -> Any:
        def deserialize(plan: bytes) -> Any:
            if not plan.startswith(b"plan"):
                logger.log(self.ILogger.ERROR, "header.magicTag")
                return None
            return SimpleNamespace(create_engine_inspector=lambda: SimpleNamespace(get_engine_information=self.inform))

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def inform(self, form: str) -> str:
        assert form == "json"
        return json.dumps({"Layers": self.layers, "Bindings": []})


def layer(kind: str, name: str, *nodes: str, reads: tuple[str, ...] = ("Half",), **more: Any) -> dict[str, Any]:
    metadata = "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)
    inputs = [{"Name": f"{name}.{i}", "Dimensions": [1], "Format/Datatype": dtype} for i, dtype in enumerate(reads)]
    return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": [], "Metadata": metadata, **more}


def kernels(*layers: Any, plan: bytes = b"plan") -> Any:
    return inspected_kernels(TensorRT("tensorrt", Opened(list(layers))), plan)


@pytest.mark.parametrize(
    ("described", "kind", "reads", "weights"),
    [
        (layer("gemm", "m_myl0_4", "n"), "matmul", "fp16", "fp16"),
        (layer("gemm", "m_myl0_4", "n", reads=("Float", "Int8")), "matmul", "int8", "int8"),
        (layer("kgen", "__myl_FcAdd", "n", reads=("Int64", "BFloat16")), "matmul", "bf16", "bf16"),
        (layer("kgen", "t", "n", TacticName="sm80_xmma_gemm_f32"), "matmul", "fp16", "fp16"),
        (layer("CaskConvolution", "c", "n", reads=("Row major linear FP16 format",), Weights={"Type": "Int8"}),
         "matmul", "fp16", "int8"),
        (layer("kgen", "_gemm_mha_v2_myl0_9", "n"), "attention", "fp16", "fp16"),
        (layer("kgen", "__myl_MulSum", "n", reads=()), "other", "", ""),
    ],
)  # fmt: skip
def test_a_layer_as_a_kernel(described: dict[str, Any], kind: str, reads: str, weights: str) -> None:
    (found,) = kernels(described)
    assert (found.kind, found.nodes, found.activations, found.weights) == (kind, ("n",), reads, weights)


def test_engines_without_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    with raises("engine.no_layers", "header.magicTag", kind=EngineError):
        kernels(plan=b"other")
    with raises("engine.no_layers", "10.15.1", kind=EngineError):
        kernels("names only", layer("gemm", "m"))
    monkeypatch.setattr(engine_inspector, "available_bytes", lambda: 4)
    with raises("engine.out_of_memory", "0 MB", kind=EngineError):
        kernels(layer("gemm", "m", "n"))


@pytest.fixture
def on_the_device(exported: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bundle, Opened]:
    """The tiny bundle on a fake device whose TensorRT fuses every attention."""
    shutil.copytree(exported.path, tmp_path / "b")
    bundle = Bundle.load(tmp_path / "b")
    nodes = graph_nodes(bundle.graph_path("language_model", "standard"))
    tensorrt = Opened(
        [
            layer("kgen", "_gemm_mha_v2", node.name) if node.operator in ATTENTION else layer("gemm", "m", node.name)
            for node in nodes
        ]
    )
    device = SimpleNamespace(sm=87, memory=8 * 10**9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(select_builds, "machine", lambda: SimpleNamespace(devices=(device,), device_problem=None))
    monkeypatch.setattr(select_builds, "load_tensorrt", lambda family: tensorrt)
    monkeypatch.setattr(engine_build, "compile_graph", lambda *_, **__: Compiled(b"plan", None))
    return bundle, tensorrt


def test_the_report_of_an_engine_that_was_built_here(on_the_device: tuple[Bundle, Opened]) -> None:
    bundle, _ = on_the_device
    said: list[str] = []
    (entry,) = build_engines(bundle, ["this"], graphs=["language_model"], say=said.append)
    counts = plan_summary(entry.built["layers"])
    assert counts["attention"] == {"fused": 3} and set(counts["products"]) == {"fp16"}
    assert "3 fused" in engine_line(entry) and not any("cannot report" in line for line in said)


def test_a_report_that_fails_loses_no_engine(
    on_the_device: tuple[Bundle, Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, tensorrt = on_the_device
    monkeypatch.setattr(tensorrt, "inform", lambda form: "{")
    said: list[str] = []
    (entry,) = build_engines(bundle, ["this"], graphs=["language_model"], say=said.append)
    assert entry.built["layers"] is None and entry.read_plan() == b"plan"
    assert any(line.startswith("language_model (standard): ") for line in said)
