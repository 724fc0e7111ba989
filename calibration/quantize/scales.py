"""Compute the quantization scales that all recipes of one calibration share, once, and keep them on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.overrides import Overrides
from bridge_stg.calibration.quantize.int4 import Int4Weights
from bridge_stg.calibration.quantize.ranges import TensorRange, choose_ranges
from bridge_stg.calibration.quantize.smooth import choose_smoothing
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.work_folder import read_arrays, read_json, write_json
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.host.files import replacing

Ranges: TypeAlias = Mapping[str, Mapping[str, TensorRange]]
Vectors: TypeAlias = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Scales:
    """What a calibration computes from its statistics.

    Attributes:
        ranges: by graph and node of a matmul, or past_key_0 …
        smoothing: vectors float32 [K] by graph and node.
        int4: int4 weights, which are rounded when they are first needed; None without statistics.
    """

    ranges: Mapping[str, Mapping[str, TensorRange]] = field(default_factory=dict)
    smoothing: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    int4: Int4Weights | None = None


def compute_scales(
    statistics: Statistics,
    matmuls: Sequence[Matmul],
    recipe: Recipe,
    *,
    folder: Path,
    method: str | None = None,
    overrides: Overrides | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Scales:
    """Compute smoothing and ranges, or read them if `folder` has them. It must be named by all that they depend on."""
    file, vectors = folder / "ranges.json", folder / "smoothing.npz"
    if (found := _stored(file, vectors)) is None:
        smoothing = choose_smoothing(statistics, recipe, overrides=overrides, progress=progress)
        ranges = choose_ranges(
            statistics,
            matmuls,
            method=method,
            overrides=overrides,
            smoothing=smoothing.vectors,
            recipe=recipe,
            progress=progress,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(vectors) as partial:
            made = smoothing.vectors.items()
            flat: dict[str, Any] = {f"{graph} {node}": v for graph, of in made for node, v in of.items()}
            np.savez(partial, **flat)
        plain = {g: {node: dataclasses.asdict(one) for node, one in of.items()} for g, of in ranges.items()}
        write_json(file, {"ranges": plain, "strengths": smoothing.strengths})
        found = ranges, {graph: dict(of) for graph, of in made}
    return Scales(*found, Int4Weights(statistics, found[1], recipe, folder / "int4"))


@dataclass(frozen=True)
class _RangesFile:
    """Content of ranges.json: ranges by graph and node, and the migration strengths that were chosen."""

    ranges: Mapping[str, Mapping[str, TensorRange]]
    strengths: Any


def _stored(file: Path, vectors: Path) -> tuple[Ranges, Vectors] | None:
    """Return ranges and smoothing vectors as they were written; None if a file is missing or damaged."""
    known, arrays = read_json(file, _RangesFile), read_arrays(vectors)
    if known is None or arrays is None:
        return None
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, vector in arrays.items():
        graph, _, node = name.partition(" ")
        found.setdefault(graph, {})[node] = vector
    return known.ranges, found
