"""From a float bundle to a quantized one: weights are streamed, golden cases and tokenizer are carried over."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bridge_stg.calibration.quantize.graph import GraphQuantizer, Progress, Ranges, Smoothing, forms_of
from bridge_stg.calibration.quantize.kv_cache import quantize_cache
from bridge_stg.calibration.quantize.weight_file import WeightFile
from bridge_stg.calibration.recipes import GraphRecipe, Recipe
from bridge_stg.export.graph.blocks import FLOAT, INT8, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.graph_check import check_graph
from bridge_stg.export.graph.ort_cpu import derive_ort_cpu
from bridge_stg.runtime.bundle.bundle import GOLDEN, GRAPHS, Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.errors import BridgeError, BundleError
from bridge_stg.runtime.host.packages import installed_versions
from bridge_stg.runtime.parity.compare import tolerance_of

WEIGHTS = "weights.data"
TOOLS = ("bridge-stg", "onnx", "onnx-ir", "onnxruntime")


def quantize_bundle(
    source: Bundle,
    out: str | os.PathLike[str],
    *,
    recipe: Recipe,
    ranges: Mapping[str, Ranges],
    smoothing: Mapping[str, Smoothing] | None = None,
    calibration: Mapping[str, Any] | None = None,
    variants: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a quantized bundle; the same source, recipe, ranges and smoothing give the same bytes.

    Args:
        source: an fp32 or fp16 bundle that is not quantized.
        out: the new bundle's folder; appears when it is complete, or not at all.
        recipe: what of each graph is in integers.
        ranges: of activations, by graph and node, and of keys and values, by past_key_0 …
        smoothing: vectors [K] by graph and node.
        calibration: for the manifest: which samples gave the ranges, and how.
        variants: those of the source that are written; None: all. `ort-cpu` comes of itself where it is of use.
        overwrite: whether to replace a bundle that is there.
        progress: called as progress(stage, done, total).

    Raises:
        BundleError: the source is quantized or bf16, or the target cannot be written.
        BridgeError: a block or variant is unknown, a range is missing, or a weight cannot be stored.
    """
    manifest = source.manifest
    wanted = _check(source, recipe, variants)
    with BundleWriter(out, overwrite=overwrite) as writer:
        for name, present in manifest.graphs.items():
            graphs = [graph for variant, graph in present.items() if variant in wanted]
            chosen = recipe.of(name)
            if not chosen.quantizes or not _has_integers(source, graphs[0], chosen):
                derived = [graph for graph in present.values() if graph.made_by_pass and graph.derived_from in wanted]
                for graph in graphs + derived:
                    writer.add_graph(graph, source.graph_path(name, graph.variant))
                continue
            folder = writer.folder / GRAPHS / name
            folder.mkdir(parents=True)
            with WeightFile(folder / WEIGHTS) as weights:
                quantizer = GraphQuantizer(
                    name,
                    chosen,
                    ranges=ranges.get(name, {}),
                    smoothing=(smoothing or {}).get(name, {}),
                    weights=weights,
                    progress=progress,
                )
                written = [_write(source, graph, chosen, quantizer, ranges.get(name, {}), folder) for graph in graphs]
            for graph in written + derive_ort_cpu(written, folder):
                check_graph(folder / f"{graph.variant}.onnx")
                writer.add_graph(graph)
        precisions = {name: recipe.of(name).precision(_precision(source, name)) for name in manifest.graphs}
        _carry(source, writer, precisions)
        return writer.finish(
            dataclasses.replace(
                manifest,
                graphs={},
                files=(),
                fingerprint="",
                calibration={"recipe": recipe.to_dict(), **(calibration or {})},
                tools={**manifest.tools, **installed_versions(TOOLS)},
            )
        )


def _check(source: Bundle, recipe: Recipe, variants: Sequence[str] | None) -> list[str]:
    """Refuse what cannot be quantized, and return the variants to write."""
    manifest = source.manifest
    for graph in manifest.all_graphs():
        if graph.precision not in ("fp32", "fp16"):
            raise BundleError(
                f"{source.path}: graph {graph} is {graph.precision}; calibrate a bundle that was exported with "
                "--dtype fp32 or fp16."
            )
    present = list(dict.fromkeys(graph.variant for graph in manifest.all_graphs() if not graph.made_by_pass))
    wanted = present if variants is None else list(dict.fromkeys(variants))
    for variant in wanted:
        if variant not in present or any(variant not in graphs for graphs in manifest.graphs.values()):
            known = ", ".join(present)
            raise BundleError(f"{source.path}: not every graph has a variant {variant!r}; it has: {known}.")
    if not wanted:
        raise BundleError(f"variants: found an empty list; choose from {', '.join(present)}.")
    for name in recipe.graphs:
        if name not in manifest.graphs:
            known = ", ".join(manifest.graphs)
            raise BundleError(f"{source.path}: the recipe names a graph {name!r}; this bundle has: {known}.")
        known_blocks = {entry.block for entry in _entries(source, name, wanted[0])}
        for block in recipe.of(name).keep_float:
            if block not in known_blocks:
                raise BridgeError(
                    f"block {block!r} is to stay float, but graph {name} has no such block with products; it has: "
                    f"{', '.join(sorted(known_blocks))}."
                )
    return wanted


def _has_integers(source: Bundle, graph: GraphSpec, recipe: GraphRecipe) -> bool:
    """Whether anything is left to quantize beside the blocks that are kept."""
    if recipe.cache == INT8 and graph.cache is not None:
        return True
    model = ir.load(source.graph_path(graph.name, graph.variant))
    forms, table_form = forms_of(recipe, find_matmuls(model, graph.name), find_tables(model, graph.name))
    return table_form != FLOAT or any(form != FLOAT for form in forms.values())


def _write(
    source: Bundle, spec: GraphSpec, recipe: GraphRecipe, quantizer: GraphQuantizer, ranges: Ranges, folder: Path
) -> GraphSpec:
    """Quantize one variant, and return its contract."""
    model = ir.load(source.graph_path(spec.name, spec.variant))
    quantizer.quantize(model)
    if recipe.cache == INT8 and spec.cache is not None:
        spec = quantize_cache(model, spec, ranges)
    ir.save(model, folder / f"{spec.variant}.onnx")
    return dataclasses.replace(
        spec,
        opset=model.graph.opset_imports[""],
        precision=recipe.precision(spec.precision),
        derived_from=spec.variant,
    )


def _entries(source: Bundle, graph: str, variant: str) -> list[Matmul | Table]:
    """Return the products and tables of a graph."""
    model = ir.load(source.graph_path(graph, variant))
    return [*find_matmuls(model, graph), *find_tables(model, graph)]


def _precision(source: Bundle, graph: str) -> str:
    return next(iter(source.manifest.graphs[graph].values())).precision


def _carry(source: Bundle, writer: BundleWriter, precisions: Mapping[str, str]) -> None:
    """Copy tokenizer and golden cases; the cases allow quantized graphs the tolerances of their precision."""
    graphs = source.manifest.graphs
    outputs = {name: next(iter(variants.values())).outputs for name, variants in graphs.items()}
    wider = {
        f"{name}.{tensor.name}": asdict(tolerance)
        for name, tensors in outputs.items()
        for tensor in tensors
        if (tolerance := tolerance_of(precisions[name], tensor.name)) is not None
    }
    for entry in source.manifest.files:
        file = source.path / entry.path
        if entry.path.startswith(f"{GOLDEN}/") and entry.path.endswith("/case.json"):
            case = json.loads(file.read_text(encoding="utf-8"))
            case["tolerance"] = {**case.get("tolerance", {}), **wider}
            writer.add_file(entry.path, (json.dumps(case, indent=1) + "\n").encode())
        else:
            writer.add_file(entry.path, file)
