"""Recipes: what of each graph is stored and multiplied in integers, and what a person overrides."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bridge_stg.export.graph.blocks import FLOAT, HEAD, INT4, INT8, Matmul, Table, block_of
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.errors import BridgeError

METHODS = ("minmax", "percentile", "entropy", "mse")
"""Ways to find the range of an activation."""

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class GraphRecipe:
    """What of one graph is in integers.

    Attributes:
        weights: `float`; `int8`, a scale a channel; or `int4`, a scale a channel and `block_size` values. The head
            is int8 at most, and shares its bytes with the table where they are tied.
        activations: `float`, or `int8` with one fixed scale a tensor (with int8 weights only).
        cache: `float` or `int8`, of keys and values, one fixed scale a buffer.
        embedding: `float` or `int8`, a scale a row, of the table of token embeddings.
        smooth: whether outliers of activations may move into weights (SmoothQuant).
        block_size: values that share a scale, of int4.
        keep_float: names of blocks that stay as they are.
        reduced_range: whether int8 weights use −64 … 64 alone, for CPUs whose 16-bit sums saturate.
    """

    weights: str = FLOAT
    activations: str = FLOAT
    cache: str = FLOAT
    embedding: str = FLOAT
    smooth: bool = False
    block_size: int = 32
    keep_float: tuple[str, ...] = ()
    reduced_range: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("weights", (FLOAT, INT8, INT4)),
            ("activations", (FLOAT, INT8)),
            ("cache", (FLOAT, INT8)),
            ("embedding", (FLOAT, INT8)),
            ("block_size", BLOCK_SIZES),
        ):
            if getattr(self, name) not in known:
                expected = ", ".join(map(str, known))
                raise BridgeError(f"recipe: {name} is {getattr(self, name)!r}; expected one of: {expected}.")
        if self.activations == INT8 and self.weights != INT8:
            raise BridgeError(f"recipe: int8 activations need int8 weights, and these are {self.weights}.")

    @property
    def quantizes(self) -> bool:
        """Whether anything is in integers, blocks that are kept aside."""
        return INT8 in (self.weights, self.cache, self.embedding) or self.weights == INT4

    @property
    def name(self) -> str:
        """`float`, `w8a8`, `w8`, `w4`, with `-kv8` behind it for an int8 cache."""
        weights = {FLOAT: FLOAT, INT8: "w8", INT4: "w4"}[self.weights]
        return weights + ("a8" if self.activations == INT8 else "") + ("-kv8" if self.cache == INT8 else "")

    def precision(self, source: str) -> str:
        """Return the precision of a graph made so from one of precision `source`, for its manifest entry."""
        if not self.quantizes:
            return source
        return f"{INT4 if self.weights == INT4 else INT8} {self.name}" + (f" {source}" if source != "fp32" else "")

    def form_of(self, product: Matmul) -> str:
        """Return how the weight of a product is to be stored."""
        if self.weights == FLOAT or product.block in self.keep_float:
            return FLOAT
        if self.weights == INT4 and (product.block == HEAD or product.k % self.block_size):
            return INT8
        return self.weights

    def form_of_table(self, table: Table) -> str:
        """Return how a table of embeddings is to be stored."""
        return FLOAT if table.block in self.keep_float else self.embedding


_SPATIAL = GraphRecipe()

GRAPH_RECIPES: Mapping[str, GraphRecipe] = {
    "float": GraphRecipe(),
    "w8a8": GraphRecipe(weights=INT8, activations=INT8, embedding=INT8, smooth=True),
    "w8": GraphRecipe(weights=INT8, embedding=INT8),
    "w4": GraphRecipe(weights=INT4, embedding=INT8),
}
"""What --vision, --language and --spatial take."""


@dataclass(frozen=True)
class Recipe:
    """A recipe of each graph; graphs that are not named stay float."""

    name: str
    graphs: Mapping[str, GraphRecipe]

    def of(self, graph: str) -> GraphRecipe:
        """Return the recipe of a graph."""
        return self.graphs.get(graph, GraphRecipe())

    def replace(self, graph: str, **changes: Any) -> Recipe:
        """Return the recipe with fields of one graph's recipe changed."""
        changed = dataclasses.replace(self.of(graph), **changes)
        return dataclasses.replace(self, graphs={**self.graphs, graph: changed})

    def with_graph(self, graph: str, name: str) -> Recipe:
        """Return the recipe with another one of `GRAPH_RECIPES` for a graph; the blocks that it keeps stay kept.

        Raises:
            BridgeError: the name is unknown.
        """
        if name not in GRAPH_RECIPES:
            raise BridgeError(f"recipe of {graph}: {name!r} is unknown; expected one of: {', '.join(GRAPH_RECIPES)}.")
        before = self.of(graph)
        changed = dataclasses.replace(GRAPH_RECIPES[name], cache=before.cache, keep_float=before.keep_float)
        return dataclasses.replace(self, graphs={**self.graphs, graph: changed})

    def with_int8_cache(self) -> Recipe:
        """Return the recipe with keys and values in int8."""
        return self.replace("language_model", cache=INT8)

    def with_float(self, *blocks: str) -> Recipe:
        """Return the recipe with more blocks in float. A block belongs to the graph that its name begins with."""
        graphs = dict(self.graphs)
        for block in blocks:
            graph = graph_of(block)
            before = graphs.get(graph, GraphRecipe())
            if block not in before.keep_float:
                graphs[graph] = dataclasses.replace(before, keep_float=(*before.keep_float, block))
        return dataclasses.replace(self, graphs=graphs)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` returned."""
        graphs = {
            name: GraphRecipe(**{**fields, "keep_float": tuple(fields["keep_float"])})
            for name, fields in values["graphs"].items()
        }
        return cls(values["name"], graphs)


def _recipe(name: str) -> Recipe:
    """Vision does best in W8A8 whatever the language model is; the spatial decoder is small and decides the boxes."""
    return Recipe(
        name,
        {
            "vision_encoder": dataclasses.replace(GRAPH_RECIPES["w8a8"], embedding=FLOAT),
            "language_model": GRAPH_RECIPES[name],
            "spatial_decoder": _SPATIAL,
        },
    )


RECIPES: Mapping[str, Recipe] = {name: _recipe(name) for name in ("w8a8", "w8", "w4")}


def graph_of(block: str) -> str:
    """Return the graph that a block belongs to.

    Raises:
        BridgeError: its name begins with none.
    """
    graph = block.partition(".")[0]
    if graph not in GRAPHS:
        raise BridgeError(f"block {block!r}: its name must begin with one of: {', '.join(GRAPHS)}.")
    return graph


@dataclass(frozen=True)
class Overrides:
    """What a person decides, whatever was measured.

    Attributes:
        keep_float: blocks that stay float.
        methods: block or product (`module/Operator`) → one of `METHODS`.
        smoothing: block or product → migration strength, 0 (none) … 1.
    """

    keep_float: tuple[str, ...] = ()
    methods: Mapping[str, str] = field(default_factory=dict)
    smoothing: Mapping[str, float] = field(default_factory=dict)

    def method_of(self, node: str) -> str | None:
        """Return the method that was asked for a product, or for its block."""
        return self.methods.get(node, self.methods.get(block_of(node)))

    def strength_of(self, node: str) -> float | None:
        """Return the migration strength that was asked for a product, or for its block."""
        return self.smoothing.get(node, self.smoothing.get(block_of(node)))

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these blocks in float."""
        return recipe.with_float(*self.keep_float)


_HEADER = """\
# Overrides of a calibration. Edit, and hand it back: calibrate … --overrides THIS_FILE
#   keep_float: blocks that stay float
#   methods:    range of the activations of a block or product: {methods}
#   smoothing:  migration strength of a block or product, 0 (none) to 1
"""


def write_overrides(path: str | os.PathLike[str], overrides: Overrides) -> None:
    """Write overrides as YAML that a person can edit."""
    values = {
        "keep_float": list(overrides.keep_float),
        "methods": dict(overrides.methods),
        "smoothing": {name: float(strength) for name, strength in overrides.smoothing.items()},
    }
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    Path(path).write_text(_HEADER.format(methods=", ".join(METHODS)) + text, encoding="utf-8")


def read_overrides(path: str | os.PathLike[str]) -> Overrides:
    """Read overrides from a YAML file.

    Raises:
        BridgeError: the file cannot be read, or holds an unknown key, method, graph or strength.
    """
    file = Path(path)
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BridgeError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())}).") from error
    values = {} if values is None else values
    known = [f.name for f in dataclasses.fields(Overrides)]
    if not isinstance(values, dict) or set(values) - set(known):
        found = ", ".join(map(repr, set(values) - set(known))) if isinstance(values, dict) else type(values).__name__
        raise BridgeError(f"{file}: found {found}; expected a mapping with the keys {', '.join(known)}.")
    keep = values.get("keep_float") or []
    if not isinstance(keep, list) or not all(isinstance(block, str) for block in keep):
        raise BridgeError(f"{file}: keep_float is {keep!r}; expected a list of names of blocks.")
    for block in keep:
        graph_of(block)
    methods = _mapping(file, "methods", values.get("methods"))
    for name, method in methods.items():
        if method not in METHODS:
            raise BridgeError(f"{file}: methods: {name} is {method!r}; expected one of: {', '.join(METHODS)}.")
    smoothing = _mapping(file, "smoothing", values.get("smoothing"))
    for name, strength in smoothing.items():
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
            raise BridgeError(f"{file}: smoothing: {name} is {strength!r}; expected a number from 0 to 1.")
    return Overrides(tuple(keep), methods, {name: float(strength) for name, strength in smoothing.items()})


def _mapping(file: Path, key: str, values: Any) -> dict[str, Any]:
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise BridgeError(f"{file}: {key} is {values!r}; expected a mapping from names of blocks or products.")
    return values
