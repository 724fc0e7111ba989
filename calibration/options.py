"""What a calibration may be told, and the recipe that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from bridge_stg.calibration.recipes import GRAPH_RECIPES, RECIPES, Overrides, Recipe
from bridge_stg.export.graph.blocks import FLOAT, Matmul, Table, find_matmuls, find_tables
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import BridgeError

HERE = "onnxruntime-cpu"
"""The target that gates are measured on."""


@dataclass(frozen=True)
class Options:
    """What a calibration may be told.

    Attributes:
        recipe: one of `RECIPES`.
        graphs: graph → one of `GRAPH_RECIPES`, other than the recipe's own.
        int8_cache: whether keys and values are int8.
        overrides: a YAML file that a person has edited.
        method: of all ranges; None: the one of least error, a tensor.
        max_drop: points of a metric that may be lost on the samples of the choice.
        max_changed: percent of answers that may change there.
        force_int8: graphs that become INT8 whatever their gate finds.
        targets: names of `support.TARGETS` that the bundle is for.
        confirm: blocks whose rank the metric confirms.
        max_trials: of the search for blocks that stay in float.
        seed: of the rows that are drawn, and of the bootstrap.
        threads: CPU threads of an engine; None: its own choice.
    """

    recipe: str = "w8a8"
    graphs: Mapping[str, str] = field(default_factory=dict)
    int8_cache: bool = False
    overrides: Path | None = None
    method: str | None = None
    max_drop: float = 1.0
    max_changed: float = 3.0
    force_int8: tuple[str, ...] = ()
    targets: tuple[str, ...] = (HERE,)
    confirm: int = 6
    max_trials: int = 24
    seed: int = 0
    threads: int | None = None


def asked_recipe(options: Options, overrides: Overrides, bundle: Bundle) -> Recipe:
    """Return the recipe that is asked for, all blocks in integers that may be.

    Raises:
        BridgeError: a name is unknown, or a limit is none.
    """
    if options.recipe not in RECIPES:
        raise BridgeError(f"recipe {options.recipe!r} is unknown; expected one of: {', '.join(RECIPES)}.")
    if not (options.max_drop > 0 and options.max_changed > 0):
        raise BridgeError(f"the limits are {options.max_drop:g} and {options.max_changed:g}; expected more than 0.")
    recipe = RECIPES[options.recipe]
    for graph, name in options.graphs.items():
        if graph not in GRAPHS or name not in GRAPH_RECIPES:
            raise BridgeError(
                f"the recipe of {graph} is {name!r}; expected one of {', '.join(GRAPH_RECIPES)}, for one of "
                f"{', '.join(GRAPHS)}."
            )
        recipe = recipe.with_graph(graph, name)
    for name in options.force_int8:
        if not recipe.of(name).quantizes:
            raise BridgeError(
                f"--force-int8 {name}: the recipe leaves this graph in float; choose a recipe for it first."
            )
    if options.int8_cache:
        recipe = recipe.with_int8_cache()
    _check_blocks(overrides, bundle)
    return overrides.apply(recipe)


def _check_blocks(overrides: Overrides, bundle: Bundle) -> None:
    """Refuse names that the bundle does not have, before hours of work."""
    asked = [*overrides.keep_float, *overrides.methods, *overrides.smoothing]
    if not asked:
        return
    known: dict[str, None] = {}
    for name, variants in bundle.manifest.graphs.items():
        model = ir.load(bundle.graph_path(name, next(iter(variants))))
        entries: list[Matmul | Table] = [*find_matmuls(model, name), *find_tables(model, name)]
        known |= dict.fromkeys(entry.block for entry in entries)
        known |= dict.fromkeys(entry.node for entry in entries)
        cache = next(iter(variants.values())).cache
        known |= dict.fromkeys(cache.past_names if cache is not None else ())
    for name in asked:
        if name not in known or (name in overrides.keep_float and "/" in name):
            blocks = [block for block in known if "/" not in block and "." in block]
            near = [block for block in blocks if block.partition(".")[0] == name.partition(".")[0]] or blocks
            raise BridgeError(
                f"overrides: {name!r} is no block of this bundle; its blocks: {', '.join(near[:40])}"
                + (f" and {len(near) - 40} more." if len(near) > 40 else ".")
            )


def recipe_names(recipe: Recipe) -> list[str]:
    """Return the recipes of the table of support that a recipe uses."""
    found: dict[str, None] = {}
    for chosen in recipe.graphs.values():
        parts = chosen.name.split("-")
        found |= dict.fromkeys(part for part in parts if part != FLOAT)
    return list(found)
