"""Recipes: which parts of each graph are quantized, and to what. Knows nothing of files and measurements."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge_stg.calibration.options import RECIPE_NAMES
from bridge_stg.export.engines.support import NOT_OFFERED
from bridge_stg.export.graph.blocks import FLOAT, FP8, HEAD, INT4, INT8, NVFP4, QUANTIZED_FORMS, Matmul, Table
from bridge_stg.export.graph.graph_edit import NVFP4_BLOCK
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import BridgeError

BLOCK_SIZES = (16, 32, 64, 128, 256)
FLOATING = (FP8, NVFP4)
"""Forms of both operands of a matmul, which only GPUs multiply."""


@dataclass(frozen=True)
class GraphRecipe:
    """Which parts of one graph are quantized.

    Attributes:
        weights: `float`; `int8` or `fp8` (E4M3), one scale per channel; `int4`, one scale per channel and `block_size`
            values; or `nvfp4` (E2M1), one fp8 scale per channel and 16 values, and one for the tensor. The head is int8
            at most. It shares its bytes with the embedding table where the two are tied.
        activations: `float`; `int8` or `fp8` with one fixed scale per tensor; or `nvfp4`, one fp8 scale per 16 values,
            which is computed in each call, and a fixed one for the tensor. Only with weights of the same form, and fp8
            and nvfp4 weights only with them.
        cache: `float`, or `int8` for keys and values, with one fixed scale per buffer.
        embedding: `float`, or `int8` for the table of token embeddings, with one scale per row.
        smooth: whether outliers of activations may move into weights (SmoothQuant; AWQ with float activations).
        block_size: number of int4 values that share a scale.
        keep_float: names of blocks that stay in float.
        reduced_range: whether int8 weights are limited to −64 … 64, for CPUs whose 16-bit sums saturate.
        decode_form: whether int8 and int4 weights of the language model are stored once more for decoding on CPU, see
            `ort_cpu.derive_ort_cpu`; None: if they are too large for its caches.
    """

    weights: str = FLOAT
    activations: str = FLOAT
    cache: str = FLOAT
    embedding: str = FLOAT
    smooth: bool = False
    block_size: int = 32
    keep_float: tuple[str, ...] = ()
    reduced_range: bool = False
    decode_form: bool | None = None

    def __post_init__(self) -> None:
        known: dict[str, tuple[str | int, ...]] = dict.fromkeys(("activations", "cache", "embedding"), (FLOAT, INT8))
        known |= {
            "weights": (FLOAT, *QUANTIZED_FORMS),
            "activations": (FLOAT, INT8, *FLOATING),
            "block_size": BLOCK_SIZES,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                expected = ", ".join(map(str, values))
                raise _error(f"{name} is {getattr(self, name)!r}; expected one of: {expected}.")
        if self.activations not in (FLOAT, self.weights):
            needed, found = self.activations, self.weights
            raise _error(f"{needed} activations need {needed} weights, but weights is {found!r}.")
        if self.weights in FLOATING and self.activations == FLOAT:
            why = NOT_OFFERED["nvfp4 weights with float activations"]
            raise _error(f"{self.weights} weights need {self.weights} activations; without, {why}.")

    @property
    def quantizes(self) -> bool:
        """Whether any part is quantized, without regard to `keep_float`."""
        return self.weights != FLOAT or INT8 in (self.cache, self.embedding)

    @property
    def name(self) -> str:
        """`float`, `w8a8`, `w8`, `w4`, `fp8` or `nvfp4`, followed by `-kv8` for an int8 cache."""
        weights = {INT8: "w8", INT4: "w4"}.get(self.weights, self.weights)
        return weights + ("a8" if self.activations == INT8 else "") + ("-kv8" if self.cache == INT8 else "")

    def precision(self, source: str) -> str:
        """Return the precision for the manifest entry of a graph that is quantized from precision `source`."""
        if not self.quantizes:
            return source
        form = INT8 if self.weights == FLOAT else self.weights
        return f"{form} {self.name}" + (f" {source}" if source != "fp32" else "")

    def form_of(self, matmul: Matmul) -> str:
        """Return how the weight of a matmul is stored: `float`, or one of `QUANTIZED_FORMS`."""
        if self.weights == FLOAT or matmul.block in self.keep_float:
            return FLOAT
        block = {INT4: self.block_size, NVFP4: NVFP4_BLOCK}.get(self.weights, 1)
        return INT8 if matmul.block == HEAD or matmul.k % block else self.weights

    def form_of_table(self, table: Table) -> str:
        """Return how a table of embeddings is stored: `float` or `int8`."""
        return FLOAT if table.block in self.keep_float else self.embedding


GRAPH_RECIPES: Mapping[str, GraphRecipe] = {
    "float": GraphRecipe(),
    "w8a8": GraphRecipe(weights=INT8, activations=INT8, embedding=INT8, smooth=True),
    "w8": GraphRecipe(weights=INT8, embedding=INT8),
    "w4": GraphRecipe(weights=INT4, embedding=INT8, smooth=True),
    "fp8": GraphRecipe(weights=FP8, activations=FP8, embedding=INT8),
    "nvfp4": GraphRecipe(weights=NVFP4, activations=NVFP4, embedding=INT8),
}
"""By `options.GRAPH_RECIPE_NAMES`: values of --vision, --language and --spatial."""


@dataclass(frozen=True)
class Recipe:
    """One recipe per graph; graphs that are not named stay in float."""

    name: str
    graphs: Mapping[str, GraphRecipe]

    def of(self, graph: str) -> GraphRecipe:
        """Return the recipe of a graph."""
        return self.graphs.get(graph, GraphRecipe())

    @property
    def parts(self) -> list[str]:
        """The recipes of the support table that this one uses: `w8a8`, `w8`, `w4`, `fp8`, `nvfp4`, `kv8`."""
        names = [part for chosen in self.graphs.values() for part in chosen.name.split("-")]
        return [name for name in dict.fromkeys(names) if name != FLOAT]

    def replace(self, graph: str, **changes: Any) -> Recipe:
        """Return the recipe with fields of one graph's recipe changed."""
        changed = dataclasses.replace(self.of(graph), **changes)
        return dataclasses.replace(self, graphs={**self.graphs, graph: changed})

    def with_graph(self, graph: str, name: str) -> Recipe:
        """Return the recipe with another of `GRAPH_RECIPES` for a graph, which keeps its `cache` and `keep_float`."""
        if graph not in GRAPHS or name not in GRAPH_RECIPES:
            known = f"{', '.join(GRAPH_RECIPES)}, for one of the graphs {', '.join(GRAPHS)}"
            raise _error(f"the recipe of {graph} is {name!r}; expected one of {known}.")
        before = self.of(graph)
        fields = vars(GRAPH_RECIPES[name]) | {"cache": before.cache, "keep_float": before.keep_float}
        return self.replace(graph, **fields)

    def with_reduced_range(self) -> Recipe:
        """Return the recipe with int8 weights that do not saturate 16-bit sums, where activations are int8."""
        recipe = self
        for name in [name for name, chosen in self.graphs.items() if chosen.activations == INT8]:
            recipe = recipe.replace(name, reduced_range=True)
        return recipe

    def with_float(self, *blocks: str) -> Recipe:
        """Return the recipe with more blocks in float. The start of a block's name is its graph."""
        recipe = self
        for block in blocks:
            kept = recipe.of(graph_of(block)).keep_float
            if block not in kept:
                recipe = recipe.replace(graph_of(block), keep_float=(*kept, block))
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)


def _recipe(language_model: str) -> Recipe:
    """Return a recipe: the vision encoder is best in 8 bits, and the small spatial decoder stays in float."""
    vision = GRAPH_RECIPES["fp8" if GRAPH_RECIPES[language_model].weights in FLOATING else "w8a8"]
    vision = dataclasses.replace(vision, embedding=FLOAT)
    language = GRAPH_RECIPES[language_model]
    return Recipe(language_model, dict(zip(GRAPHS, (vision, language, GraphRecipe()), strict=True)))


RECIPES: Mapping[str, Recipe] = {name: _recipe(name) for name in RECIPE_NAMES}


def graph_of(block: str) -> str:
    """Return the graph with which the name of a block begins. Raises BridgeError."""
    graph = block.partition(".")[0]
    if graph not in GRAPHS:
        expected = ", ".join(GRAPHS)
        raise BridgeError("calibration.unknown_block", f"block {block!r}: its name must begin with one of: {expected}.")
    return graph


def _error(problem: str) -> BridgeError:
    return BridgeError("calibration.bad_recipe", f"recipe: {problem}")
