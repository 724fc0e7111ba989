"""The memory of building and running engines on a device, before anything is built: `build --dry-run`.

Counts what a device holds while it runs the chain: plans, the activations that all engines share, KV cache, tensors
that are kept between stages, and the process. Activations come from the real builder where it is installed, else from
`activations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge_stg.export.engines.devices import find_device
from bridge_stg.export.engines.profiles import Deployment, profiles_of
from bridge_stg.export.engines.select_builds import Build, build_bytes, cache_row_bytes, has_weight_only
from bridge_stg.export.engines.targets import TARGETS, find_target
from bridge_stg.export.estimate.activations import modelled_activation
from bridge_stg.export.estimate.builder_figures import BuilderFigures
from bridge_stg.export.estimate.memory import (
    PROCESS_BYTES,
    cache_rows,
    graph_weights,
    is_weight_only,
    kept_bytes,
    plan_bytes,
    storages_of,
    variant_on,
    verdict_of,
)
from bridge_stg.export.estimate.shapes import ModelShape, shape_of_bundle
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import graph_contract, graphs_of
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.device.table import DEVICES, Device
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import gigabytes

IO_DTYPES = {2: "float16", 4: "float32"}


@dataclass(frozen=True)
class GraphMemory:
    """One graph's engine, in bytes.

    Attributes:
        weights, plan: of the graph, and of the engine's file, which is loaded as a whole.
        activations: tensors between layers, for the largest profile.
        figures: where `activations` are from: `builder` or `model`.
        cache_row: a row of the KV cache; 0 without one.
        build_peak: memory of compiling it, on the device for a Jetson.
    """

    graph: str
    variant: str
    precision: str
    weights: int
    plan: int
    activations: int
    figures: str
    cache_row: int
    build_peak: int


@dataclass(frozen=True)
class DryRun:
    """What the engines of a model need on a device.

    Attributes:
        device: the device.
        frames, queries: coarse frames per video, and queries that are decoded together.
        requested_frames: coarse frames that were requested; the model may read fewer.
        graphs: the engines.
        kept: bytes of visual tokens and feature maps between stages.
        most_rows: queries that the engines decode together.
    """

    device: Device
    frames: int
    requested_frames: int
    queries: int
    graphs: tuple[GraphMemory, ...]
    kept: int
    most_rows: int

    @property
    def kv_cache(self) -> int:
        """Bytes of the rows of the KV cache; see `cache_rows`."""
        return self._row * cache_rows(self.queries)

    @property
    def _row(self) -> int:
        return max(graph.cache_row for graph in self.graphs)

    @property
    def activations(self) -> int:
        """Bytes of activations: all engines share those of the largest."""
        return max(graph.activations for graph in self.graphs)

    @property
    def needed(self) -> int:
        """Bytes of running the whole chain."""
        return sum(graph.plan for graph in self.graphs) + self.activations + self.kv_cache + self.kept + PROCESS_BYTES

    @property
    def build_peak(self) -> int:
        """Bytes of compiling the largest graph; engines are compiled one after the other."""
        return max(graph.build_peak for graph in self.graphs)

    @property
    def built_on_device(self) -> bool:
        """Whether engines are compiled in the memory of the device: on a Jetson."""
        return self.device.kind == "jetson"

    @property
    def most_queries(self) -> int:
        """Queries that fit together, at most those of the engines; 0 if the row of the video does not fit."""
        free = self.device.usable - (self.needed - self.kv_cache)
        rows = free // max(self._row, 1)
        return 0 if rows < 1 else min(self.most_rows, max(1, rows - 1))

    def verdict(self, needed: int) -> str:
        """Return the verdict about bytes of the device's memory; see `verdict_of`."""
        return verdict_of(needed, self.device.usable)

    def graph_verdict(self, graph: GraphMemory) -> str:
        """Return the verdict about one engine alone, and about compiling it where that happens on the device."""
        needed = graph.plan + graph.activations + graph.cache_row + PROCESS_BYTES
        return self.verdict(max(needed, graph.build_peak if self.built_on_device else 0))

    @property
    def fits(self) -> bool:
        """Whether the chain runs, and is compiled if that happens on the device."""
        return max(self.needed, self.build_peak if self.built_on_device else 0) <= self.device.usable

    def table(self) -> str:
        """Return the result as text."""
        columns = ("graph", "precision", "weights", "plan", "activations", "KV row", "build peak", "")
        rows: list[tuple[str, ...]] = [columns]
        for g in self.graphs:
            sizes = (g.weights, g.plan, g.activations, g.cache_row, g.build_peak)
            rows.append((f"{g.graph} ({g.variant})", g.precision, *map(gigabytes, sizes), self.graph_verdict(g)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        fewer = self.frames < self.requested_frames
        frames = f"{self.frames} frames" + (f" (the model's limit; {self.requested_frames} requested)" if fewer else "")
        lines = [f"{self.device.title}: {frames}, queries at once: {self.queries}"]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        plans = sum(graph.plan for graph in self.graphs)
        parts = {"engines": plans, "activations": self.activations, "KV cache": self.kv_cache}
        parts |= {"kept tensors": self.kept, "process": PROCESS_BYTES}
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        usable = gigabytes(self.device.usable)
        lines.append(f"  running: {gigabytes(self.needed)} of {usable}: {self.verdict(self.needed)} ({listed})")
        where = f"of {usable}: {self.verdict(self.build_peak)}" if self.built_on_device else "on any machine"
        if self.device.kind == "gpu":
            where = "of the host's memory"
        if self.built_on_device and self.build_peak > self.device.usable:
            largest = max(self.graphs, key=lambda graph: graph.build_peak)
            enough = largest.build_peak - largest.activations <= self.device.usable
            smaller = "--max-frames or --max-queries" if enough else "precision, or a smaller model"
            where += f"; {largest.graph} needs a smaller {smaller}"
        lines.append(f"  building: {gigabytes(self.build_peak)} {where}")
        limit = ", the maximum of these engines (--max-queries)" if self.most_queries == self.most_rows else ""
        lines.append(f"  queries that fit at once: {self.most_queries}{limit}")
        builder = self.graphs[0].figures == "builder"
        source = "the TensorRT-RTX builder" if builder else "a model fitted to engines in fp16 and fp32"
        lines.append(f"  activations by {source}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain values; sizes are in bytes."""
        return {
            "target": self.device.name, "frames": self.frames, "queries": self.queries, "fits": self.fits,
            "memory": {
                "engines": sum(graph.plan for graph in self.graphs), "activations": self.activations,
                "kv_cache": self.kv_cache, "kept": self.kept, "process": PROCESS_BYTES, "needed": self.needed,
                "usable": self.device.usable, "verdict": self.verdict(self.needed),
            },
            "build": {"peak": self.build_peak, "on_device": self.built_on_device},
            "most_queries": self.most_queries,
            "graphs": [dataclasses.asdict(g) | {"verdict": self.graph_verdict(g)} for g in self.graphs],
        }  # fmt: skip


def device_of(name: str) -> Device:
    """Return the device of a name: of `devices.DEVICES`, or of an engine target, by its memory.

    Raises EngineError if it is neither.
    """
    if name == "thor":
        name = "agx-thor"
    if any(target.name == name for target in TARGETS) and not any(device.name == name for device in DEVICES):
        target = find_target(name)
        peaks = dict.fromkeys(target.precisions, 1.0)
        return Device(name, f"{target.device} ({name})", target.memory, 0, 1.0, peaks, target.sms[0])
    if all(device.name != name for device in DEVICES):
        known = dict.fromkeys([*(device.name for device in DEVICES), *(target.name for target in TARGETS)])
        raise EngineError("options.invalid", f"target {name!r} is unknown; known: {', '.join(known)}")
    return find_device(name)


def dry_run(
    shape: ModelShape,
    device: Device,
    deployment: Deployment,
    *,
    queries: int = 1,
    bundle: Bundle | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    where: str = "--profiles",
    builder: BuilderFigures | None = None,
) -> DryRun:
    """Count the memory of a model's engines on a device.

    Args:
        shape: sizes of the model.
        device: the device.
        deployment: what the engines are built for.
        queries: queries whose rows of the KV cache must fit.
        bundle: the model's bundle; None: only its sizes are known.
        dtype: key of `work.STORAGE` if there is no bundle; None: fp16.
        variant: variant of the graphs; None: `primitive` on Orin, which JetPack 6 needs, else `standard`.
        overrides: see `profiles.profiles_of`.
        where: file of the overrides.
        builder: figures of the real builder, used where it has them; None: only the fitted model.

    Raises:
        EngineError: the device lacks the precision, or a profile is invalid.
        BundleError: the bundle lacks the variant.
    """
    spec, storages = shape.spec, storages_of(shape, device, dtype)
    variant = variant or variant_on(device)
    weights = graph_weights(shape, storages)
    graphs = []
    for name in graphs_of(spec):
        if bundle is None:
            graph, item_bytes = _contract(name, shape, storages[name].activation, variant), storages[name].activation
        else:
            graph = bundle.graph(name, variant)
            item_bytes = float_bytes(graph.precision)
        profiles = profiles_of(graph, spec, deployment=deployment, overrides=overrides, where=where)
        found = None
        if builder is not None and bundle is not None:
            found = builder.activation(bundle, graph, profiles, device.sm or 0)
        modelled = modelled_activation(shape, name, variant, profiles, item_bytes=item_bytes)
        activations, size = modelled if found is None else found, round(weights[name])
        weight_only = is_weight_only(storages[name]) if bundle is None else has_weight_only(graph)
        count = len(profiles.profiles)
        plan = plan_bytes(shape, name, storages[name], size, weight_only=weight_only, profiles=count)
        graphs.append(
            GraphMemory(
                graph=name, variant=variant, precision=graph.precision if bundle else dtype or "fp16", weights=size,
                plan=plan, activations=activations, figures="model" if found is None else "builder",
                cache_row=cache_row_bytes(graph, profiles),
                build_peak=build_bytes(size, activations if device.kind == "jetson" else 0, weight_only=weight_only),
            )
        )  # fmt: skip
    kept = kept_bytes(shape, deployment, max(storage.activation for storage in storages.values()))
    return DryRun(
        device, deployment.frames(spec), deployment.max_frames, queries, tuple(graphs), kept, deployment.max_queries
    )


def _contract(name: str, shape: ModelShape, item_bytes: int, variant: str) -> GraphSpec:
    dtype = IO_DTYPES[item_bytes]
    update = "append" if variant == "primitive" else "in_place"
    return graph_contract(
        name, shape.spec, variant=variant, opset=24, io_dtype=dtype, cache_update=update, cache_dtype=dtype
    )  # fmt: skip


def float_bytes(precision: str) -> int:
    """Return the bytes of a float of a graph by its precision, such as `int8 w8a8 fp16`."""
    return 2 if "16" in precision else 4


def activations_of(bundle: Bundle) -> Callable[[Build], int]:
    """Return a function that estimates the activation bytes of an engine to build."""
    shape = shape_of_bundle(bundle)

    def of_build(build: Build) -> int:
        graph = build.graph
        item_bytes = float_bytes(graph.precision)
        return modelled_activation(shape, graph.name, graph.variant, build.profiles, item_bytes=item_bytes)

    return of_build
