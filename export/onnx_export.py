"""From a checkpoint to a bundle: trace, write, check, compare with torch, and rename into place."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from bridge_stg.checkpoint import TOKENIZER, load_checkpoint
from bridge_stg.export.golden import record_golden
from bridge_stg.export.lowering import LOWERINGS
from bridge_stg.export.parity import REPORT, measure, require
from bridge_stg.export.trace import trace_graph
from bridge_stg.export.weights import write_weights
from bridge_stg.model import BridgeSTG
from bridge_stg.runtime.bundle import GOLDEN, GRAPHS
from bridge_stg.runtime.bundle_writer import BundleWriter
from bridge_stg.runtime.contracts import GRAPHS as GRAPH_NAMES
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.manifest import GraphSpec, Manifest
from bridge_stg.runtime.onnxruntime_session import OnnxRuntimeSession
from bridge_stg.runtime.reports import write_report
from bridge_stg.runtime.session import Session

VARIANTS = tuple(LOWERINGS)
WEIGHTS = "weights.data"
TOOLS = ("bridge-stg", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")

FORBIDDEN = frozenset({"NonZero", "Compress", "Loop", "If", "Scan", "SequenceAt", "SplitToSequence", "Unique"})
"""Operators that TensorRT refuses, or whose output sizes depend on data."""

Progress = Callable[[str], Any]


def export_bundle(
    checkpoint: Path | str,
    out: Path | str,
    *,
    variants: Sequence[str] = VARIANTS,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Export a checkpoint as a bundle.

    Args:
        checkpoint: folder with config.json, model.safetensors and tokenizer.json.
        out: the bundle's folder; appears when it is complete, or not at all.
        variants: lowerings to export, of `VARIANTS`.
        overwrite: whether to replace a bundle that is there.
        verify: whether to compare every graph with torch; the manifest says so.
        progress: called with the name of each stage when it begins.

    Returns:
        The bundle's path; `parity.parity_table` shows what was measured.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        BundleError: the target exists, or cannot be written.
        EngineError: a variant is unknown, a graph fails its checks, or it leaves its tolerance at a boundary.
    """
    report = progress or (lambda stage: None)
    _check_variants(variants)
    report("reading the checkpoint")
    model = load_checkpoint(checkpoint)
    with BundleWriter(out, overwrite=overwrite) as writer:
        contracts = [c for name in GRAPH_NAMES for c in _export_graph(name, model, variants, writer, report)]
        writer.add_file(TOKENIZER, Path(checkpoint) / TOKENIZER)
        report("recording golden cases")
        record_golden(model, writer.folder / GOLDEN)
        if verify:
            report("comparing with torch")
            _verify(model, contracts, writer)
        report("writing the manifest")
        return writer.finish(
            Manifest(spec=model.spec, model=_about(model, Path(checkpoint)), tools=_tools(), verified=verify)
        )


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


def _check_variants(variants: Sequence[str]) -> None:
    unknown = [variant for variant in variants if variant not in LOWERINGS]
    if unknown or not variants:
        found = repr(unknown[0]) if unknown else "an empty list"
        raise EngineError(f"variants: found {found}; choose from {', '.join(VARIANTS)}")


def _export_graph(
    name: str, model: BridgeSTG, variants: Sequence[str], writer: BundleWriter, report: Progress
) -> list[GraphSpec]:
    """Trace, write and check all variants of one graph; return their contracts."""
    traced: list[tuple[GraphSpec, ir.Model]] = []
    for variant in dict.fromkeys(variants):
        report(f"tracing {name} ({variant})")
        traced.append(trace_graph(name, model, LOWERINGS[variant]))
    report(f"writing and checking {name}")
    folder = writer.folder / GRAPHS / name
    folder.mkdir(parents=True)
    write_weights([graph for _, graph in traced], folder / WEIGHTS)
    for contract, graph in traced:
        path = folder / f"{contract.variant}.onnx"
        ir.save(graph, path)
        check_graph(path)
        writer.add_graph(contract)
    return [contract for contract, _ in traced]


def _verify(model: BridgeSTG, contracts: Sequence[GraphSpec], writer: BundleWriter) -> None:
    """Measure parity of every graph, keep the table in the bundle, and stop the export if it does not hold."""
    sessions: dict[str, dict[str, Session]] = {}
    try:
        for contract in contracts:
            path = writer.folder / GRAPHS / contract.name / f"{contract.variant}.onnx"
            sessions.setdefault(contract.name, {})[contract.variant] = OnnxRuntimeSession(path, contract)
        parity = measure(model, sessions)
    finally:
        for session in (session for variants in sessions.values() for session in variants.values()):
            session.close()
    require(parity)
    write_report(writer.folder, REPORT, parity.to_dict())


def _about(model: BridgeSTG, checkpoint: Path) -> dict[str, Any]:
    return {
        "name": checkpoint.resolve().name,
        "family": model.spec.vision.family,
        "dtype": "float32",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _tools() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {}
    for name in TOOLS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
