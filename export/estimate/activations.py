"""Activation memory of engines: a model of the tensors that TensorRT-RTX's builder keeps between layers.

A profile needs memory in proportion to tensors at its largest sizes. Blocks reuse the memory of those before, with one
exception: in the variant `primitive`, the engine rearranges the KV cache of all decoder layers before it runs the
first. So the need is the larger of two stages, each a weighted sum of tensors. `benchmarks/large/activations.py` fits
the weights to figures of the builder, and reports the errors on sizes and models that were held out; docs/engines.md
has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge_stg.export.engines.profiles import GraphProfiles
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape

Features = dict[str, float]

FITTED: Mapping[str, tuple[Features, ...]] = {
    "language_model primitive": (
        {"inner": 8.7899, "scores": 2.6984, "cache": 5.7898},
        {"caches": 2.9586, "constant": 15.3877},
    ),
    "language_model standard": ({"inner": 3.8673, "repeated": 2.0982},),
    "vision_encoder standard": ({"inner": 3.875, "constant": 8.192},),
    "vision_encoder primitive": ({"inner": 4.0, "constant": 16.384},),
    "spatial_decoder standard": ({"hidden": 8.3432, "constant": 39.1996},),
    "spatial_decoder primitive": ({"hidden": 8.3432, "constant": 39.1996},),
}
"""Weights of the features for each stage, by graph and variant, as the benchmark prints them."""


def profile_features(shape: ModelShape, graph: str, sizes: Mapping[str, int]) -> Features:
    """Return bytes of the tensors of a block in fp16 by name, at sizes of the graph's symbols; `S` is the capacity."""
    spec = shape.spec
    language = spec.language
    if graph == LANGUAGE:
        tokens, rows, positions = sizes["B"] * sizes["L"], sizes["B"], sizes["S"]
        heads = shape.query_width // language.head_dim
        return {
            "inner": 2.0 * tokens * shape.inner,
            "scores": 2.0 * heads * tokens * positions,
            "cache": 2.0 * rows * positions * shape.kv_width,
            "repeated": 2.0 * rows * positions * shape.query_width,
            "caches": 2.0 * rows * positions * shape.kv_width * language.num_layers,
            "constant": 1e6,
        }
    if graph == VISION:
        patches = sizes["G"] * sizes["N"]
        return {
            "inner": 2.0 * patches * shape.vision_inner,
            "constant": 1e6,
        }
    return {
        "hidden": 4.0 * sizes["F"] * sizes["h"] * sizes["w"] * shape.spatial_width,  # fp32 in every precision
        "constant": 1e6,
    }


def modelled_activation(
    shape: ModelShape, graph: str, variant: str, profiles: GraphProfiles, *, item_bytes: int = 2
) -> int:  # fmt: skip
    """Return the activation bytes of a graph's engine: that of its largest profile; floats have `item_bytes`."""
    largest = 0.0
    for ranges in profiles.profiles.values():
        sizes = {symbol: sizes[2] for symbol, sizes in ranges.items()}
        if profiles.capacity is not None:
            sizes["S"] = profiles.capacity
        largest = max(largest, largest_stage(profile_features(shape, graph, sizes), FITTED[f"{graph} {variant}"]))
    return int(largest * (item_bytes / 2 if graph != SPATIAL else 1))


def largest_stage(features: Features, stages: Sequence[Features]) -> float:
    """Return the bytes of the stage that needs most."""
    return max(sum(weight * features[name] for name, weight in stage.items()) for stage in stages)
