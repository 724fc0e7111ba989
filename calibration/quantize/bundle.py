"""Write a quantized bundle of a float bundle: weights are streamed, golden cases and tokenizer are copied."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import onnx_ir as ir

from bridge_stg.calibration.quantize.graph import GraphQuantizer, Progress, Ranges, Smoothing, forms_of
from bridge_stg.calibration.quantize.int4 import Int4Weights
from bridge_stg.calibration.quantize.kv_cache import quantize_cache
from bridge_stg.calibration.recipes import GraphRecipe, Recipe
from bridge_stg.export.graph.blocks import FLOAT, INT4, INT8, Matmul, Table, find_matmuls, find_tables
from bridge_stg.export.graph.graph_check import check_graph
from bridge_stg.export.graph.ort_cpu import derive_ort_cpu
from bridge_stg.export.graph.weight_file import WeightFile
from bridge_stg.runtime.bundle.bundle import GOLDEN, GRAPHS, Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.bundle.writer import BundleWriter
from bridge_stg.runtime.errors import BridgeError, BundleError
from bridge_stg.runtime.host.packages import installed_versions
from bridge_stg.runtime.parity.tolerances import Tolerances, measure_tolerances

WEIGHTS = "weights.data"
TOOLS = ("onnx", "onnx-ir", "onnxruntime")


def quantize_bundle(
    source: Bundle,
    out: str | os.PathLike[str],
    *,
    recipe: Recipe,
    ranges: Mapping[str, Ranges],
    smoothing: Mapping[str, Smoothing] | None = None,
    int4: Int4Weights | None = None,
    calibration: Mapping[str, Any] | None = None,
    variants: Sequence[str] | None = None,
    measure: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a quantized bundle; on one machine the same source, recipe, ranges and smoothing give the same bytes.

    Args:
        source: float bundle in fp32 or fp16.
        out: folder of the new bundle; it appears when it is complete, or not at all.
        recipe: what is quantized.
        ranges: ranges of activations by graph and node, and of keys and values by past_key_0 …
        smoothing: vectors [K] by graph and node.
        int4: weights rounded with this smoothing; None: int4 weights are rounded without activations.
        calibration: samples and options of the calibration, for the manifest.
        variants: variants of the source to write; None: all. `ort-cpu` is derived where it helps.
        measure: whether to measure the tolerances of the golden cases here; otherwise `verify` will not pass.
        overwrite: whether to replace an existing bundle.
        progress: called as progress(stage, done, total).

    Raises:
        BundleError: the source is quantized or bf16, or the folder cannot be written.
        BridgeError: a block or variant is unknown, a range is missing, a weight cannot be stored, or an output of the
            golden cases is not finite.
        EngineError: no variant runs on this machine.
    """
    manifest = source.manifest
    wanted = _check(source, recipe, variants)
    with BundleWriter(out, overwrite=overwrite) as writer:
        for name, present in manifest.graphs.items():
            graphs = [graph for variant, graph in present.items() if variant in wanted]
            chosen = recipe.of(name)
            if not chosen.quantizes or not _any_quantized(source, graphs[0], chosen):
                graphs += [graph for graph in present.values() if graph.made_by_pass and graph.derived_from in wanted]
                for graph in graphs:
                    writer.add_graph(graph, source.graph_path(name, graph.variant))
                continue
            folder = writer.folder / GRAPHS / name
            folder.mkdir(parents=True)
            with WeightFile(folder / WEIGHTS) as weights:
                quantizer = GraphQuantizer(
                    name, chosen, ranges=ranges.get(name, {}), smoothing=(smoothing or {}).get(name, {}),
                    weights=weights, int4=int4, progress=progress,
                )  # fmt: skip
                written = [_write(source, graph, quantizer, folder) for graph in graphs]
            round_head = quantizer.round_head if chosen.weights == INT4 else None
            derived = derive_ort_cpu(written, folder, decode=chosen.decode_form, round_head=round_head)
            for graph in written + derived:
                check_graph(folder / f"{graph.variant}.onnx")
                writer.add_graph(graph)
        manifest = dataclasses.replace(
            manifest,
            graphs={},
            files=(),
            fingerprint="",
            calibration={"recipe": recipe.to_dict(), **(calibration or {})},
            tools={**manifest.tools, **installed_versions(TOOLS)},
        )
        _copy_files(source, writer, measure_tolerances(writer.draft(manifest), source) if measure else {})
        return writer.finish(manifest)


def _check(source: Bundle, recipe: Recipe, variants: Sequence[str] | None) -> list[str]:
    """Check source, recipe and variants, and return the variants to write."""
    check_precision(source)
    manifest = source.manifest
    present = list(dict.fromkeys(graph.variant for graph in manifest.all_graphs() if not graph.made_by_pass))
    wanted = present if variants is None else list(dict.fromkeys(variants))
    for variant in wanted:
        if variant not in present or any(variant not in graphs for graphs in manifest.graphs.values()):
            what = f"{source.path}: not every graph has a variant {variant!r}; known: {', '.join(present)}."
            raise BundleError("bundle.no_variant", what)
    if not wanted:
        raise BundleError("bundle.no_variant", f"variants: found an empty list; choose from {', '.join(present)}.")
    for name in recipe.graphs:
        if name not in manifest.graphs:
            what = f"{source.path}: the recipe has a graph {name!r}; this bundle has: {', '.join(manifest.graphs)}."
            raise BundleError("bundle.no_graph", what)
        model = ir.load(source.graph_path(name, wanted[0]))
        entries: list[Matmul | Table] = [*find_matmuls(model, name), *find_tables(model, name)]
        blocks = sorted({entry.block for entry in entries})
        for block in recipe.of(name).keep_float:
            if block not in blocks:
                what = f"block {block!r} is to stay in float, but the blocks of graph {name} are: {', '.join(blocks)}."
                raise BridgeError("calibration.unknown_block", what)
    return wanted


def check_precision(source: Bundle) -> None:
    """Raise BundleError if a graph is neither fp32 nor fp16."""
    for graph in source.manifest.all_graphs():
        if graph.precision not in ("fp32", "fp16"):
            what = f"{source.path}: graph {graph} is {graph.precision}; expected one of --dtype fp32 or fp16."
            raise BundleError("bundle.precision", what)


def _any_quantized(source: Bundle, graph: GraphSpec, recipe: GraphRecipe) -> bool:
    """Return whether a recipe quantizes anything of a graph, without the blocks that stay in float."""
    if recipe.cache == INT8 and graph.cache is not None:
        return True
    model = ir.load(source.graph_path(graph.name, graph.variant))
    forms, table_form = forms_of(recipe, find_matmuls(model, graph.name), find_tables(model, graph.name))
    return table_form != FLOAT or any(form != FLOAT for form in forms.values())


def _write(source: Bundle, spec: GraphSpec, quantizer: GraphQuantizer, folder: Path) -> GraphSpec:
    """Quantize one variant, and return its spec."""
    model = ir.load(source.graph_path(spec.name, spec.variant))
    quantizer.quantize(model)
    if quantizer.recipe.cache == INT8 and spec.cache is not None:
        spec = quantize_cache(model, spec, quantizer.ranges)
    ir.save(model, folder / f"{spec.variant}.onnx")
    return dataclasses.replace(
        spec,
        opset=model.graph.opset_imports[""],
        precision=quantizer.recipe.precision(spec.precision),
        derived_from=spec.variant,
    )


def _copy_files(source: Bundle, writer: BundleWriter, tolerances: Tolerances) -> None:
    """Copy tokenizer and golden cases; outputs of quantized graphs get their tolerances."""
    for entry in source.manifest.files:
        file, path = source.path / entry.path, PurePosixPath(entry.path)
        if path.parts[0] == GOLDEN and path.name == "case.json":
            case = json.loads(file.read_text(encoding="utf-8"))
            case["tolerance"] = {**case.get("tolerance", {}), **tolerances.get(path.parent.name, {})}
            writer.add_file(entry.path, (json.dumps(case, indent=1, default=asdict) + "\n").encode())
        else:
            writer.add_file(entry.path, file)
