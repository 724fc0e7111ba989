"""Export a checkpoint as a bundle: estimate, record the reference, trace, write, check, compare, rename into place."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bridge_stg.checkpoint.plain_folder import plain_summary
from bridge_stg.checkpoint.weight_store import TOKENIZER, WeightStore
from bridge_stg.export.graph.graph_check import check_graph
from bridge_stg.export.graph.ort_cpu import derive_ort_cpu
from bridge_stg.export.memory import estimate, require_room
from bridge_stg.export.parity.bf16_emulation import write_twin
from bridge_stg.export.parity.golden_cases import record_reference
from bridge_stg.export.parity.parity import REPORT, require
from bridge_stg.export.parity.replay import Replayed, Replays
from bridge_stg.export.tracing.lowering import LOWERINGS
from bridge_stg.export.tracing.precision import PRECISIONS, Precision
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.export.tracing.streaming import with_weights
from bridge_stg.export.tracing.trace import trace_graph
from bridge_stg.export.tracing.weights import write_weights
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.bundle import GOLDEN, GRAPHS
from bridge_stg.runtime.bundle.contracts import graphs_of
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
TOOLS = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir", "onnxruntime")

Progress = Callable[[str], None]
"""Called with the name of each stage when it begins, and with notes."""


def export_bundle(
    checkpoint: Path | str,
    out: Path | str,
    *,
    variants: Sequence[str] = VARIANTS,
    dtype: str = "fp32",
    overwrite: bool = False,
    verify: bool = True,
    adapter: Path | str | None = None,
    progress: Progress = lambda stage: None,
) -> Path:
    """Export a checkpoint as a bundle. Weights are read, cast and written one at a time, for models of any size.

    Args:
        checkpoint: folder with config.json, weights and tokenizer.json: a checkpoint, or a plain Qwen3-VL or
            Qwen2.5-VL, which becomes a bundle with text heads.
        out: folder of the bundle; it appears when it is complete, or not at all.
        variants: variants to trace, of `VARIANTS`; `ort-cpu` is derived from `standard` where it is faster.
        dtype: `fp32`, `fp16` or `bf16`, for weights and matmuls; see `precision`.
        overwrite: whether to replace an existing bundle.
        verify: whether to record golden cases and compare every graph with torch; the manifest says so.
        adapter: name or path of a LoRA adapter to merge; None: the only one in the folder, if any.
        progress: called with the name of each stage when it begins.

    Returns:
        Path of the bundle. `parity.parity_table` shows the comparison, `reports/export.json` has times and memory.

    Raises:
        CheckpointError: the checkpoint cannot be read, or a weight does not fit the dtype.
        BundleError: the target exists, or cannot be written.
        EngineError: a variant or dtype is unknown, memory or disk are not sufficient, a graph fails its checks, or a
            boundary exceeds its tolerance.
    """
    _check_choices(variants, dtype)
    stages = _Stages(progress)
    stages.begin("reading the checkpoint")
    model, store = open_skeleton(checkpoint, adapter=adapter)
    if note := plain_summary(Path(checkpoint)):
        progress(note)
    precision = PRECISIONS[dtype]
    needed = estimate(store, model.spec, precision, verify=verify)
    progress(f"estimated: {needed}")
    low_memory = require_room(needed, Path(out))
    if verify and low_memory and dtype != "fp32":
        progress("memory is short: the replay keeps no second copy of the weights, which is slower")
    with BundleWriter(out, overwrite=overwrite) as writer:
        export = _Export(model, store, precision, writer, stages)
        replayed = export.compare_with_torch(variants, low_memory=low_memory) if verify else None
        if not verify:
            for name in graphs_of(model.spec):
                export.write_graph(name, variants)
        writer.add_file(TOKENIZER, Path(checkpoint) / TOKENIZER)
        stages.begin("writing the manifest")
        about = {
            "dtype": dtype,
            "weight_bytes": sum(f.stat().st_size for f in writer.folder.rglob(WEIGHTS)),
            "estimate": dataclasses.asdict(needed),
            "peak_rss_bytes": peak_bytes(),
            "replay_peak_rss_bytes": replayed and replayed.peak_rss_bytes,
            "replay_seconds": replayed and replayed.seconds,
            "seconds": {stage: round(seconds, 3) for stage, seconds in stages.seconds.items()},
        }
        write_report(writer.folder, EXPORT_REPORT, about)
        described = {
            "name": Path(checkpoint).resolve().name,
            "family": model.spec.vision.family,
            "dtype": TORCH_DTYPE_NAMES[dtype],
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        tools, io_dtype = installed_versions(TOOLS), precision.io_dtype
        return writer.finish(Manifest(model.spec, described, tools=tools, io_dtype=io_dtype, verified=verify))


class _Stages:
    """Reports each stage when it begins, and measures the `seconds` of those that have ended."""

    def __init__(self, report: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._report, self._began, self._current = report, time.monotonic(), ""

    def begin(self, stage: str) -> None:
        now = time.monotonic()
        if self._current:
            self.seconds[self._current] = self.seconds.get(self._current, 0.0) + now - self._began
        self._began, self._current = now, stage
        self._report(stage)


def _check_choices(variants: Sequence[str], dtype: str) -> None:
    unknown = [variant for variant in variants if variant not in LOWERINGS]
    if unknown or not variants:
        found = repr(unknown[0]) if unknown else "an empty list"
        raise EngineError("options.invalid", f"variants: found {found}; choose from {', '.join(VARIANTS)}")
    if dtype not in PRECISIONS:
        raise EngineError("options.invalid", f"dtype: found {dtype!r}; choose from {', '.join(PRECISIONS)}")


@dataclass(frozen=True)
class _Export:
    """One export of a model into the folder of a writer."""

    model: BridgeSTG
    store: WeightStore
    precision: Precision
    writer: BundleWriter
    stages: _Stages

    def write_graph(self, name: str, variants: Sequence[str]) -> list[GraphSpec]:
        """Trace, write and check all variants of one graph, and derive `ort-cpu`; return their contracts."""
        self.stages.begin(f"tracing {name}")
        traced = trace_graph(name, self.model, self.store, list(dict.fromkeys(variants)), precision=self.precision)
        self.stages.begin(f"writing {name}")
        folder = self.writer.folder / GRAPHS / name
        folder.mkdir(parents=True)
        write_weights([graph for _, graph in traced], folder / WEIGHTS)
        self.stages.begin(f"checking {name}")
        for contract, graph in traced:
            ir.save(graph, folder / f"{contract.variant}.onnx")
        contracts = [contract for contract, _ in traced]
        contracts += derive_ort_cpu(contracts, folder)
        for contract in contracts:
            check_graph(folder / f"{contract.variant}.onnx")
            self.writer.add_graph(contract)
        return contracts

    def compare_with_torch(self, variants: Sequence[str], *, low_memory: bool) -> Replayed:
        """Record golden and random-input cases in torch, write all graphs, and check the tolerances.

        Each graph is replayed in a subprocess while the next one is traced.
        """
        folder = self.writer.folder
        with tempfile.TemporaryDirectory(prefix=".cases.", dir=folder.parent) as temporary, ExitStack() as stack:
            cases, names = Path(temporary), graphs_of(self.model.spec)
            self.stages.begin("recording the reference")
            with with_weights(self.model, self.store):
                golden = record_reference(self.model, folder / GOLDEN, cases, names, precision=self.precision.name)
            # Graphs in fp32 are opened faster without a second copy of their weights, and run a call or two each.
            low_memory = low_memory or self.precision.name == "fp32"
            replays = stack.enter_context(Replays(cases, golden, low_memory=low_memory))
            for name in names:
                contracts = self.write_graph(name, variants)
                files = [folder / GRAPHS / name / f"{contract.variant}.onnx" for contract in contracts]
                if self.precision.name == "bf16":
                    contracts = [dataclasses.replace(contract, precision="bf16 twin") for contract in contracts]
                    files = [stack.enter_context(_twin(file)) for file in files]
                replays.add(list(zip(contracts, files, strict=True)))
            self.stages.begin("comparing with torch")
            replayed = replays.finish()
        require(replayed.parity)
        write_report(folder, REPORT, replayed.parity.to_dict())
        return replayed


@contextmanager
def _twin(file: Path) -> Iterator[Path]:
    """Write the twin of a bf16 graph that onnxruntime can run, for the time of the block."""
    twin = write_twin(file)
    try:
        yield twin
    finally:
        twin.unlink()
