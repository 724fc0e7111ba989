"""The exported bundle is complete, follows its contract, and has the weights of the checkpoint once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
from safetensors.numpy import load_file

from bridge_stg import cli
from bridge_stg.export import export_bundle as onnx_export
from bridge_stg.export.export_bundle import export_bundle
from bridge_stg.export.graph.graph_check import FORBIDDEN, check_graph
from bridge_stg.export.graph.weight_file import ALIGNMENT
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS, graph_contract
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import BundleError, CheckpointError, EngineError
from tests.errors import raises
from tests.evaluation.validation import validate

pytestmark = pytest.mark.slow
VARIANTS = {"standard": ("in_place", 24), "primitive": ("append", 18)}
ALL_VARIANTS = {*VARIANTS, "ort-cpu"}
both = pytest.mark.parametrize("variant", VARIANTS)
each = pytest.mark.parametrize("name", GRAPHS)

ONNX_DTYPES = {
    onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.BOOL: "bool",
}  # fmt: skip


def graph_of(bundle: Bundle, name: str, variant: str) -> onnx.GraphProto:
    return onnx.load(bundle.graph_path(name, variant), load_external_data=False).graph


def places(graph: onnx.GraphProto) -> dict[str, tuple[str, int, int]]:
    """Return (file, offset, length) of each external tensor."""
    found = {}
    for tensor in graph.initializer:
        if tensor.external_data:
            entry = onnx.external_data_helper.ExternalDataInfo(tensor)
            found[tensor.name] = (entry.location, int(entry.offset), int(entry.length))
    return found


def test_bundle_is_complete(exported: Bundle, model: BridgeSTG) -> None:
    manifest = exported.manifest
    assert {name: set(variants) for name, variants in manifest.graphs.items()} == dict.fromkeys(GRAPHS, ALL_VARIANTS)
    assert manifest.verified and manifest.spec == model.spec and manifest.io_dtype == "float32"
    assert manifest.model["parameters"] == sum(p.numel() for p in model.parameters())
    assert {"torch", "transformers", "onnx", "onnxscript", "onnxruntime"} <= set(manifest.tools)
    assert exported.tokenizer_path.is_file()
    assert [case.name for case in exported.golden_cases()] == ["batch", "clip", "image"]
    parity = read_report(exported.path, "parity")
    assert parity["passed"] is True
    validate(parity, "parity_report")
    assert not list(exported.path.parent.glob(".*"))


def test_every_stage_is_named(exported: Bundle, stages: list[str]) -> None:
    assert [stage for stage in stages if stage.startswith("tracing")] == [f"tracing {name}" for name in GRAPHS]
    assert stages[0] == "reading the checkpoint" and stages[-1] == "writing the manifest"
    assert re.match(r"estimated: about .* of memory and .* for the replay, and .* of disk", stages[1])
    assert "comparing with torch" in stages


@each
@both
def test_graphs_keep_the_contract(exported: Bundle, model: BridgeSTG, name: str, variant: str) -> None:
    update, opset = VARIANTS[variant]
    contract = graph_contract(name, model.spec, variant=variant, opset=opset, cache_update=update)
    graph = graph_of(exported, name, variant)
    for values, tensors in ((graph.input, contract.inputs), (graph.output, contract.outputs)):
        found = [
            (v.name, ONNX_DTYPES[v.type.tensor_type.elem_type],
             tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
            for v in values
        ]  # fmt: skip
        assert found == [(tensor.name, tensor.dtype, tensor.dims) for tensor in tensors]


@each
@both
def test_operators(exported: Bundle, model: BridgeSTG, name: str, variant: str) -> None:
    graph = graph_of(exported, name, variant)
    found = Counter(node.op_type for node in graph.node)
    assert not set(found) & FORBIDDEN
    assert {node.domain for node in graph.node} == {""}
    attentions = {"vision_encoder": 2, "language_model": 3, "spatial_decoder": 6}[name]
    standard = variant == "standard"
    assert found["Attention"] == (attentions if standard else 0)
    assert found["TensorScatter"] == (6 if standard and name == "language_model" else 0)
    part = {"vision_encoder": model.vision_encoder, "spatial_decoder": model.spatial_decoder}.get(name)
    if part is not None:
        norms = sum(type(module).__name__ == "LayerNorm" for module in part.modules())
        assert found["LayerNormalization"] == norms > 0


@both
def test_versions_suit_older_runtimes(exported: Bundle, variant: str) -> None:
    for name in GRAPHS:
        proto = onnx.load(exported.graph_path(name, variant), load_external_data=False)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", VARIANTS[variant][1])]
        assert proto.ir_version <= 10


@both
def test_head_dims_are_written_out(exported: Bundle, model: BridgeSTG, variant: str) -> None:
    graph = graph_of(exported, "language_model", variant)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if not t.external_data}
    targets = [node.input[1] for node in graph.node if node.op_type == "Reshape" and "self_attn/" in node.name]
    shapes = [constants[name].tolist() for name in targets if name in constants]
    head_dim, kv_heads = model.spec.language.head_dim, model.spec.language.kv_heads
    assert shapes.count([0, 0, 4, head_dim]) == 3 and shapes.count([0, 0, kv_heads, head_dim]) == 6
    for shape in (shape for shape in shapes if len(shape) == 4):
        assert shape[3] == head_dim and (shape[2] > 0 or shape[1] > 0), shape


@each
def test_variants_share_weights(exported: Bundle, model: BridgeSTG, name: str) -> None:
    """All variants point at the same bytes, and no tensor is there twice, a tied head included."""
    standard, *others = (places(graph_of(exported, name, variant)) for variant in (*VARIANTS, "ort-cpu"))
    assert others == [standard, standard] and len(standard) > 10
    file = exported.path / "graphs" / name / "weights.data"
    contents = {p.detach().numpy().tobytes() for p in getattr(model, name).parameters()}
    assert file.stat().st_size <= sum(map(len, contents)) + ALIGNMENT * len(standard)
    assert ("model.language_model.embed_tokens.weight" in standard) == (name == "language_model")
    assert not any("lm_head" in tensor for tensor in standard)
    assert sorted(p.name for p in file.parent.iterdir()) == [
        *(f"{v}.onnx" for v in sorted(ALL_VARIANTS)),
        "weights.data",
    ]


@each
def test_weights_are_the_checkpoint_s(exported: Bundle, checkpoint: Path, name: str) -> None:
    """Names, values and layout: a graph can be traced back to its checkpoint tensor by tensor."""
    stored = load_file(checkpoint / "model.safetensors")
    content = (exported.path / "graphs" / name / "weights.data").read_bytes()
    found = places(graph_of(exported, name, "standard"))
    assert len(set(found) & set(stored)) >= len(found) - 3  # buffers are not in a checkpoint
    for tensor, (_, offset, length) in found.items():
        if tensor in stored:
            values = np.frombuffer(content[offset : offset + length], np.float32)
            np.testing.assert_array_equal(values, stored[tensor].astype(np.float32).ravel())


def test_graphs_tell_nothing_of_the_machine(exported: Bundle) -> None:
    root = str(Path(onnx_export.__file__).resolve().parents[1]).encode()
    for graph in exported.manifest.all_graphs():
        content = (exported.path / graph.file).read_bytes()
        assert root not in content and b"site-packages" not in content and b"stack_trace" not in content


def test_nodes_are_named_by_module(exported: Bundle) -> None:
    names = [node.name for node in graph_of(exported, "language_model", "standard").node]
    assert len(set(names)) == len(names)
    assert "model.language_model.layers.0.self_attn/Attention" in names
    assert "model.language_model.layers.2.mlp.down_proj/MatMul" in names


def test_misuse(tmp_path: Path, checkpoint: Path, exported: Bundle) -> None:
    with raises("options.invalid", "'fancy'", "standard, primitive", kind=EngineError):
        export_bundle(checkpoint, tmp_path / "bundle", variants=("fancy",))
    with raises("options.invalid", "variants", kind=EngineError):
        export_bundle(checkpoint, tmp_path / "bundle", variants=())
    with raises("options.invalid", "'fp8'", "fp32, fp16, bf16", kind=EngineError):
        export_bundle(checkpoint, tmp_path / "bundle", dtype="fp8")
    with raises("checkpoint.not_found", tmp_path / "nothing", kind=CheckpointError):
        export_bundle(tmp_path / "nothing", tmp_path / "bundle")
    with raises("output.exists", exported.path, kind=BundleError):
        export_bundle(checkpoint, exported.path)
    assert list(tmp_path.iterdir()) == []


def test_what_it_took_is_reported(exported: Bundle, stages: list[str]) -> None:
    report = read_report(exported.path, "export")
    validate(report, "export_report")
    written = sum(file.stat().st_size for file in exported.path.glob("graphs/*/weights.data"))
    assert report["weight_bytes"] == written > 0 and report["dtype"] == "fp32"
    assert report["peak_rss_bytes"] > 10 * written and report["replay_peak_rss_bytes"] > written
    assert [*report["seconds"]] == [stages[0], *stages[2:-1]]
    assert len(report["replay_seconds"]) == len(GRAPHS) * len(ALL_VARIANTS)


def test_without_verify(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest and the commands say so, and the bundle runs."""
    monkeypatch.setattr(onnx_export, "graphs_of", lambda spec: ("spatial_decoder",))
    bundle = tmp_path / "bundle"
    options = ["--out", str(bundle), "--variant", "primitive", "--no-verify"]
    assert cli.run(["export", str(checkpoint), *options]) == 0
    assert "unverified" in capsys.readouterr().out
    assert Bundle.load(bundle, check="all").manifest.verified is False
    assert cli.run(["inspect", str(bundle)]) == 0
    assert "unverified" in capsys.readouterr().out
    assert not (bundle / "reports/parity.json").exists() and not (bundle / "golden").exists()


def test_forbidden_operators(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[N] x) => (int64[1, M] y) { y = NonZero(x) }'
    )
    onnx.save(model, tmp_path / "standard.onnx")
    with raises("export.invalid_graph", "NonZero", kind=EngineError):
        check_graph(tmp_path / "standard.onnx")


def test_invalid_graphs(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y) { y = MatMul(x, x) }'
    )
    onnx.save(model, tmp_path / "standard.onnx")
    with raises("export.invalid_graph", "standard.onnx", kind=EngineError):
        check_graph(tmp_path / "standard.onnx")
