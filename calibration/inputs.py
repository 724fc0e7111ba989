"""Read and check the inputs of a calibration, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from bridge_stg.calibration.collect.samples import CalibrationSet, overlap, read_samples, warnings_of
from bridge_stg.calibration.options import LOCAL_BACKEND, Options, require_packages
from bridge_stg.calibration.overrides import Overrides, read_overrides
from bridge_stg.calibration.quantize.bundle import check_precision
from bridge_stg.calibration.recipes import RECIPES, Recipe
from bridge_stg.export.engines.support import UNSUPPORTED, require, support
from bridge_stg.export.graph.blocks import INT8, QUANTIZED_FORMS, Matmul, Table, find_matmuls, find_tables
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.spec import chosen_heads
from bridge_stg.runtime.bundle.writer import is_bundle
from bridge_stg.runtime.errors import BridgeError, BundleError
from bridge_stg.runtime.host.files import require_space

RESERVED_BYTES = 2**28
"""Disk space for statistics and reports, in addition to the bundles."""

LISTED = 40


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checked inputs of a calibration, see `calibrate`; `recipe` is the requested one, with `overrides` applied."""

    bundle: Bundle
    calibration: CalibrationSet
    select: CalibrationSet | None
    evaluate: CalibrationSet | None
    own_tubes: bool
    overrides: Overrides
    recipe: Recipe
    warnings: tuple[str, ...]

    @property
    def selection(self) -> CalibrationSet:
        """The samples that decide which blocks stay in float."""
        return self.select if self.select is not None else self.calibration

    @property
    def selection_labelled(self) -> bool:
        """Whether the annotations of the selection samples are the ground truth."""
        return self.select is not None and not self.own_tubes


def read_inputs(
    bundle: Path,
    out: Path,
    *,
    samples: Path,
    options: Options,
    media: Path | None = None,
    select: Path | None = None,
    evaluate: Path | None = None,
    own_tubes: bool = False,
    overwrite: bool = False,
) -> Inputs:
    """Read and check all inputs; see `calibrate` for the arguments and errors."""
    require_packages()
    source = Bundle.load(bundle)
    chosen_heads(source.manifest.spec, options.heads)
    _check_source(source)
    _check_out(source, out, overwrite=overwrite)
    sets = read_sets(samples, media=media, select=select, evaluate=evaluate, own_tubes=own_tubes)
    warnings = warnings_of(sets["calibration"], {name: one for name, one in sets.items() if name != "calibration"})
    if select is None:
        warnings.append(
            "no --select was given: blocks were selected on the calibration samples, against the float bundle's own "
            "tubes"
        )
    elif own_tubes:
        warnings.append("no annotations were used: the float bundle's own tubes are the ground truth")
    overrides = Overrides() if options.overrides is None else read_overrides(options.overrides)
    recipe = requested_recipe(options, overrides, source)
    if not recipe.parts:
        raise BridgeError("calibration.bad_recipe", "every graph is float, so nothing is quantized; choose a recipe.")
    warnings += check_backends(source, recipe.parts, options.backends)
    return Inputs(
        bundle=source, calibration=sets["calibration"], select=sets.get("select"), evaluate=sets.get("evaluation"),
        own_tubes=own_tubes, overrides=overrides, recipe=recipe, warnings=tuple(warnings),
    )  # fmt: skip


def read_sets(
    samples: Path,
    *,
    media: Path | None = None,
    select: Path | None = None,
    evaluate: Path | None = None,
    own_tubes: bool = False,
) -> dict[str, CalibrationSet]:
    """Read the given files of samples, as `calibration`, `select` and `evaluation`.

    Raises:
        BridgeError: a file is missing, required labels are missing, or selection and evaluation share media.
    """
    sets: dict[str, CalibrationSet] = {}
    files = {
        "calibration": ("--samples", samples),
        "select": ("--select", select),
        "evaluation": ("--evaluate", evaluate),
    }
    for name, (option, file) in files.items():
        if file is None:
            continue
        if not file.is_file():
            found = "is a folder" if file.is_dir() else "does not exist"
            what = f"{option} {file} {found}; expected JSON lines (docs/annotations.md)."
            raise BridgeError("annotation.not_found", what)
        sets[name] = read_samples(file, media)
        if name != "calibration" and not sets[name].labelled and not own_tubes:
            what = f"{file}: not every line has labels (span, boxes); add them, or pass --own-tubes"
            raise BridgeError("calibration.no_labels", what)
    both = [sets[name].entries for name in ("select", "evaluation") if name in sets]
    if len(both) == 2 and (shared := overlap(*both)):
        what = f"share {len(shared)} samples or their media, the first {shared[0]!r}; give other clips to one of them"
        raise BridgeError("calibration.shared_samples", f"{select} and {evaluate} {what}")
    return sets


def requested_recipe(options: Options, overrides: Overrides, bundle: Bundle) -> Recipe:
    """Return the recipe of the options and overrides. Raises BridgeError if they are invalid or conflict."""
    if options.recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise BridgeError("calibration.bad_recipe", f"recipe {options.recipe!r} is unknown; expected one of: {known}.")
    if not (options.max_drop > 0 and options.max_changed > 0):
        limits = f"max_drop {options.max_drop:g} and max_changed {options.max_changed:g}"
        raise BridgeError("options.invalid", f"the limits are {limits}; expected more than 0.")
    graphs = graphs_of(bundle.manifest.spec)
    if absent := [name for name in (*options.graphs, *options.force_int8) if name not in graphs]:
        what = f"the recipe names {absent[0]}; the graphs of this bundle are {', '.join(graphs)}."
        raise BridgeError("calibration.bad_recipe", what)
    recipe = Recipe(options.recipe, {name: RECIPES[options.recipe].of(name) for name in graphs})
    for graph, name in options.graphs.items():
        recipe = recipe.with_graph(graph, name)
    if floats := [name for name in options.force_int8 if not recipe.of(name).quantizes]:
        what = f"--force-int8 {floats[0]}: the recipe keeps this graph in float; change it."
        raise BridgeError("options.conflict", what)
    if options.int8_cache:
        recipe = recipe.replace("language_model", cache=INT8)
    local = LOCAL_BACKEND in options.backends
    precision = bundle.manifest.all_graphs()[0].precision
    if options.decode_form and (not local or precision != "fp32"):
        what = f"--decode-form is for fp32 bundles and {LOCAL_BACKEND}; {bundle.path} is {precision}, the targets are "
        raise BridgeError("options.conflict", f"{what}{', '.join(options.backends)}. Leave it out.")
    recipe = recipe.replace("language_model", decode_form=options.decode_form if local else False)
    _check_names(overrides, bundle)
    return recipe.with_float(*overrides.keep_float)


def check_backends(bundle: Bundle, recipes: Sequence[str], backends: Sequence[str]) -> list[str]:
    """Return warnings for backends that support a recipe only partly. Raises EngineError if one does not at all."""
    warnings: dict[str, None] = {}
    graphs = bundle.manifest.all_graphs()
    dtype = "fp16" if graphs[0].precision == "fp16" else "fp32"
    variants = list(dict.fromkeys(graph.variant for graph in graphs))
    for backend in backends:
        for recipe in recipes:
            derived = ["ort-cpu"] if recipe == "nvfp4" and "standard" in variants else []  # in the quantized bundle
            present = dict.fromkeys([*variants, *derived])
            able = [name for name in present if support(backend, recipe, name, dtype).verdict != UNSUPPORTED]
            sentences = [require(backend, recipe, name, dtype) for name in able or variants[:1]]
            warnings |= dict.fromkeys(sentence for sentence in sentences if sentence)
            if len(able) < len(variants):
                warnings[f"{backend} supports {recipe} only in the variant {' or '.join(able)}."] = None
    return list(warnings)


def _check_names(overrides: Overrides, bundle: Bundle) -> None:
    """Raise BridgeError for a name in the overrides that the bundle does not have."""
    if not overrides.names:
        return
    blocks: dict[str, None] = {}
    nodes: set[str] = set()
    for graph, variants in bundle.manifest.graphs.items():
        spec = next(iter(variants.values()))
        model = ir.load(bundle.graph_path(graph, spec.variant))
        entries: list[Matmul | Table] = [*find_matmuls(model, graph), *find_tables(model, graph)]
        blocks |= dict.fromkeys(entry.block for entry in entries)
        nodes.update((entry.node for entry in entries), spec.cache.past_names if spec.cache is not None else ())
    for name in overrides.names:
        if name not in blocks and (name not in nodes or name in overrides.keep_float):
            near = [block for block in blocks if block.partition(".")[0] == name.partition(".")[0]] or list(blocks)
            more = f" and {len(near) - LISTED} more." if len(near) > LISTED else "."
            what = f"overrides: {name!r} is not a block of this bundle; its blocks: {', '.join(near[:LISTED])}{more}"
            raise BridgeError("calibration.unknown_block", what)


def _check_source(source: Bundle) -> None:
    quantized = [graph for graph in source.manifest.all_graphs() if graph.precision.split()[0] in QUANTIZED_FORMS]
    if quantized or source.manifest.calibration is not None:
        found = f"graph {quantized[0]} is {quantized[0].precision}" if quantized else "its manifest has a calibration"
        raise BundleError("bundle.quantized", f"{source.path}: is already quantized ({found}); give the float bundle.")
    check_precision(source)


def _check_out(source: Bundle, out: Path, *, overwrite: bool) -> None:
    if out.resolve() == source.path.resolve():
        raise BundleError("output.is_input", f"{out}: is the input bundle; choose another --out.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not is_bundle(out):
            raise BundleError("output.exists", f"{out}: exists and is not a bundle. Choose another --out.")
        if not overwrite:
            raise BundleError("output.exists", f"{out} exists. Pass --overwrite to replace it, or another --out.")
    weights = sum(entry.size for entry in source.manifest.entries().values())
    require_space(out, 2 * weights + RESERVED_BYTES, purpose="the calibration")
