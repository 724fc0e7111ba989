"""What all recipes of one calibration share: smoothing and ranges, computed once and kept on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.calibration.collect.statistics import Statistics
from bridge_stg.calibration.quantize.ranges import TensorRange, choose_ranges
from bridge_stg.calibration.quantize.smooth import choose_smoothing
from bridge_stg.calibration.recipes import Overrides, Recipe
from bridge_stg.calibration.work_folder import read_json, write_json
from bridge_stg.export.graph.blocks import Matmul
from bridge_stg.runtime.host.files import replacing


@dataclass(frozen=True, eq=False)
class Scales:
    """Smoothing and ranges.

    Attributes:
        ranges: by graph, then by node of a product or past_key_0 …
        smoothing: by graph and node, float32 [K].
        strengths: by graph and node, the migration strengths behind it.
    """

    ranges: Mapping[str, Mapping[str, TensorRange]]
    smoothing: Mapping[str, Mapping[str, np.ndarray]]
    strengths: Mapping[str, Mapping[str, float]]


def prepare(
    statistics: Statistics,
    products: Sequence[Matmul],
    recipe: Recipe,
    *,
    folder: Path,
    method: str | None = None,
    overrides: Overrides | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Scales:
    """Compute smoothing and ranges, or read them where they were computed before.

    Args:
        statistics: what was collected.
        products: of the graphs that the recipe quantizes.
        recipe: with all blocks in integers that may be.
        folder: theirs alone; named by all that they are made from.
        method: of all ranges; None: the one of least error.
        overrides: what a person decided.
        progress: called as progress(stage, done, total).
    """
    file, vectors = folder / "ranges.json", folder / "smoothing.npz"
    known = read_json(file)
    if known is None:
        smoothing = choose_smoothing(statistics, recipe, overrides=overrides, progress=progress)
        ranges = choose_ranges(
            statistics, products, method=method, overrides=overrides, smoothing=smoothing.vectors, progress=progress
        )
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(vectors) as partial:
            found = smoothing.vectors.items()
            flat: dict[str, Any] = {f"{graph} {node}": v for graph, of in found for node, v in of.items()}
            np.savez(partial, **flat)
        plain = {g: {node: dataclasses.asdict(one) for node, one in found.items()} for g, found in ranges.items()}
        write_json(file, {"ranges": plain, "strengths": smoothing.strengths})
        known = read_json(file)
    known_vectors: dict[str, dict[str, np.ndarray]] = {}
    with np.load(vectors, allow_pickle=False) as arrays:
        for name in arrays.files:
            graph, _, node = name.partition(" ")
            known_vectors.setdefault(graph, {})[node] = arrays[name]
    ranges = {g: {node: TensorRange(**one) for node, one in of.items()} for g, of in known["ranges"].items()}
    return Scales(ranges, known_vectors, known["strengths"])
