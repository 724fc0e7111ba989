"""From a checkpoint to a bundle: estimate, trace, write, check, compare with torch, and rename into place."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bridge_stg.checkpoint.checkpoint import TOKENIZER
from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.graph.graph_check import check_graph
from bridge_stg.export.graph.ort_cpu import derive_ort_cpu
from bridge_stg.export.memory import estimate, require_room
from bridge_stg.export.parity.bf16_emulation import write_twin
from bridge_stg.export.parity.golden_cases import record_golden
from bridge_stg.export.parity.parity import REPORT, require
from bridge_stg.export.parity.reference import record_probes
from bridge_stg.export.parity.replay import Replayed, replay_in_subprocess
from bridge_stg.export.tracing.lowering import LOWERINGS
from bridge_stg.export.tracing.precision import PRECISIONS, Precision
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.export.tracing.streaming import with_weights
from bridge_stg.export.tracing.trace import trace_graph
from bridge_stg.export.tracing.weights import write_weights
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.bundle import GOLDEN, GRAPHS
from bridge_stg.runtime.bundle.contracts import GRAPHS as GRAPH_NAMES
from bridge_stg.runtime.bundle.manifest import GraphSpec, Manifest
from bridge_stg.runtime.bundle.reports import write_report
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.packages import installed_versions

VARIANTS = tuple(LOWERINGS)
WEIGHTS = "weights.data"
EXPORT_REPORT = "export"
TORCH_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
TOOLS = ("bridge-stg", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")

Progress = Callable[[str], Any]


def export_bundle(
    checkpoint: Path | str,
    out: Path | str,
    *,
    variants: Sequence[str] = VARIANTS,
    dtype: str = "fp32",
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Export a checkpoint as a bundle. Weights are read, cast and written one at a time, whatever the model's size.

    Args:
        checkpoint: folder with config.json, weights and tokenizer.json.
        out: the bundle's folder; appears when it is complete, or not at all.
        variants: lowerings to export, of `VARIANTS`; `ort-cpu` comes of itself with `standard` where it is of use.
        dtype: `fp32`, `fp16` or `bf16`, of weights and products; see `precision`.
        overwrite: whether to replace a bundle that is there.
        verify: whether to record golden cases and compare every graph with torch; the manifest says so.
        progress: called with the name of each stage when it begins.

    Returns:
        The bundle's path; `parity.parity_table` shows what was measured, `reports/export.json` what it took.

    Raises:
        CheckpointError: the checkpoint cannot be read, or a weight does not fit the dtype.
        BundleError: the target exists, or cannot be written.
        EngineError: a variant or dtype is unknown, memory or disk do not suffice, a graph fails its checks, or it
            leaves its tolerance at a boundary.
    """
    stages = Stages(progress or (lambda stage: None))
    _check_choices(variants, dtype)
    precision = PRECISIONS[dtype]
    stages("reading the checkpoint")
    model, store = open_skeleton(checkpoint)
    needed = estimate(store, model.spec, precision, verify=verify)
    stages.note(f"estimated: {needed}")
    lean = require_room(needed, Path(out))
    if verify and lean:
        stages.note("memory is short: the replay keeps no second copy of the weights, which is slower")
    with BundleWriter(out, overwrite=overwrite) as writer:
        contracts = [
            contract
            for name in GRAPH_NAMES
            for contract in _export_graph(name, model, store, variants, precision, writer, stages)
        ]
        writer.add_file(TOKENIZER, Path(checkpoint) / TOKENIZER)
        replayed = _verify(model, store, contracts, writer, stages, lean=lean) if verify else None
        stages("writing the manifest")
        about = {
            "dtype": dtype,
            "weight_bytes": sum(f.stat().st_size for f in writer.folder.rglob(WEIGHTS)),
            "estimate": dataclasses.asdict(needed),
            "peak_rss_bytes": peak_bytes(),
            "replay_peak_rss_bytes": None if replayed is None else replayed.peak_rss_bytes,
            "replay_seconds": None if replayed is None else replayed.seconds,
            "seconds": stages.seconds,
        }
        write_report(writer.folder, EXPORT_REPORT, about)
        return writer.finish(
            Manifest(
                spec=model.spec,
                model=_about(model, Path(checkpoint), precision),
                tools=installed_versions(TOOLS),
                io_dtype=precision.io_dtype,
                verified=verify,
            )
        )


class Stages:
    """Tells a callback of each stage as it begins, and keeps how many seconds each took."""

    def __init__(self, report: Progress) -> None:
        self._report, self._began, self._current = report, time.monotonic(), ""
        self._taken: dict[str, float] = {}

    def __call__(self, stage: str) -> None:
        """Begin a stage."""
        now = time.monotonic()
        if self._current:
            self._taken[self._current] = self._taken.get(self._current, 0.0) + now - self._began
        self._began, self._current = now, stage
        self._report(stage)

    def note(self, text: str) -> None:
        """Tell something in the middle of a stage."""
        self._report(text)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, the one that is under way not counted; their order is that of the stages."""
        return {stage: round(seconds, 3) for stage, seconds in self._taken.items()}


def _check_choices(variants: Sequence[str], dtype: str) -> None:
    unknown = [variant for variant in variants if variant not in LOWERINGS]
    if unknown or not variants:
        found = repr(unknown[0]) if unknown else "an empty list"
        raise EngineError(f"variants: found {found}; choose from {', '.join(VARIANTS)}")
    if dtype not in PRECISIONS:
        raise EngineError(f"dtype: found {dtype!r}; choose from {', '.join(PRECISIONS)}")


def _export_graph(
    name: str,
    model: BridgeSTG,
    store: WeightStore,
    variants: Sequence[str],
    precision: Precision,
    writer: BundleWriter,
    stages: Stages,
) -> list[GraphSpec]:
    """Trace, write and check all variants of one graph, derived ones too; return their contracts."""
    traced: list[tuple[GraphSpec, ir.Model]] = []
    for variant in dict.fromkeys(variants):
        stages(f"tracing {name} ({variant})")
        traced.append(trace_graph(name, model, store, LOWERINGS[variant], precision=precision))
    stages(f"writing {name}")
    folder = writer.folder / GRAPHS / name
    folder.mkdir(parents=True)
    write_weights([graph for _, graph in traced], folder / WEIGHTS)
    stages(f"checking {name}")
    for contract, graph in traced:
        ir.save(graph, folder / f"{contract.variant}.onnx")
    contracts = [contract for contract, _ in traced]
    contracts += derive_ort_cpu(contracts, folder)
    for contract in contracts:
        check_graph(folder / f"{contract.variant}.onnx")
        writer.add_graph(contract)
    return contracts


def _verify(
    model: BridgeSTG,
    store: WeightStore,
    contracts: Sequence[GraphSpec],
    writer: BundleWriter,
    stages: Stages,
    *,
    lean: bool,
) -> Replayed:
    """Record golden cases and probes in torch, replay them apart, and stop the export where parity does not hold."""
    precision = contracts[0].precision
    with tempfile.TemporaryDirectory(prefix=".probes.", dir=writer.folder.parent) as folder:
        probes = Path(folder)
        with with_weights(model, store):
            stages("recording golden cases")
            golden = record_golden(model, writer.folder / GOLDEN, precision=precision)
            stages("recording the reference")
            for name in dict.fromkeys(contract.name for contract in contracts):
                record_probes(name, model, probes)
        stages("comparing with torch")
        files = [writer.folder / GRAPHS / contract.name / f"{contract.variant}.onnx" for contract in contracts]
        twins = [write_twin(file) for file in files] if precision == "bf16" else []
        graphs = [dataclasses.replace(c, precision="bf16 twin") for c in contracts] if twins else contracts
        try:
            replayed = replay_in_subprocess(list(zip(graphs, twins or files, strict=True)), probes, golden, lean=lean)
        finally:
            for twin in twins:
                twin.unlink()
    require(replayed.parity)
    write_report(writer.folder, REPORT, replayed.parity.to_dict())
    return replayed


def _about(model: BridgeSTG, checkpoint: Path, precision: Precision) -> dict[str, Any]:
    return {
        "name": checkpoint.resolve().name,
        "family": model.spec.vision.family,
        "dtype": TORCH_DTYPE_NAMES[precision.name],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
