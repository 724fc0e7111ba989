"""Activation memory of engines: a model of the tensors that TensorRT-RTX's builder keeps between layers.

A profile needs memory in proportion to tensors at its largest sizes. Blocks reuse the memory of those before, with one
exception: decode steps of the variant `primitive` rearrange the keys of all decoder layers before they run the first.
So the need is that of the largest of several stages, each a weighted sum of tensors. `benchmarks/large/activations.py`
fits the weights to figures of the builder, and reports the errors on models that were held out; docs/engines.md has
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bridge_stg.export.engines.profiles import GraphProfiles, Range
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape

Features = dict[str, float]
Sizes = dict[str, int]
FEW_PATCHES = 15_000
"""Patches that a profile of the spatial decoder is tuned for, below which the builder keeps more tensors of each."""

FITTED: Mapping[str, tuple[Features, ...]] = {
    "language_model primitive": (
        {"inner": 1.8458, "query": 8.8816, "scores": 3.0641},
        {"keys": 0.9686, "constant": 17.8728},
    ),
    "language_model standard": (
        {"inner": 2.7847, "query": 11.4747},
        {"inner": 1.6512, "query": 5.2938, "repeated": 2.0019, "mask": 0.8468, "constant": 0.21},
    ),
    "vision_encoder standard": ({"inner": 3.827, "constant": 8.1944},),
    "vision_encoder primitive": ({"inner": 4.0, "constant": 16.384},),
    "spatial_decoder standard": ({"hidden": 8.0548, "few": 4.3819, "constant": 8.4475},),
    "spatial_decoder primitive": ({"hidden": 8.0531, "few": 4.3865, "constant": 8.4933},),
}
"""Weights of the features for each stage, by graph and variant, as the benchmark prints them."""


def profile_sizes(ranges: Mapping[str, Range], capacity: int | None) -> tuple[Sizes, Sizes]:
    """Return the usual and the largest sizes of a profile's symbols, with `capacity` as S unless it is None."""
    fixed = {} if capacity is None else {"S": capacity}
    usual, most = ({symbol: sizes[place] for symbol, sizes in ranges.items()} | fixed for place in (1, 2))
    return usual, most


def profile_features(shape: ModelShape, graph: str, most: Mapping[str, int], usual: Mapping[str, int]) -> Features:
    """Return bytes of the tensors of a block in fp16 by name.

    Args:
        shape: sizes of the model.
        graph: name of the graph.
        most: largest sizes of a profile's symbols.
        usual: sizes that the profile is tuned for.
    """
    spec = shape.spec
    language = spec.language
    if graph == LANGUAGE:
        tokens, rows, positions = most["B"] * most["L"], most["B"], most["S"]
        prefills = usual["L"] > 1
        heads = shape.query_width // language.head_dim
        return {
            "inner": 2.0 * tokens * shape.inner,
            "query": 2.0 * tokens * shape.query_width,
            "scores": 2.0 * heads * tokens * (positions + most["L"]),
            "mask": 2.0 * tokens * positions,
            "keys": 0.0 if prefills else 2.0 * rows * positions * shape.kv_width * language.num_layers,
            "repeated": 2.0 * rows * positions * shape.query_width,
            "constant": 1e6,
        }
    if graph == VISION:
        return {"inner": 2.0 * most["G"] * most["N"] * shape.vision_inner, "constant": 1e6}
    patches, tuned = (sizes["F"] * sizes["h"] * sizes["w"] for sizes in (most, usual))
    hidden = 4.0 * patches * shape.spatial_width  # fp32 in every precision
    return {"hidden": hidden, "few": hidden if tuned < FEW_PATCHES else 0.0, "constant": 1e6}


def modelled_activation(
    shape: ModelShape, graph: str, variant: str, profiles: GraphProfiles, *, item_bytes: int = 2
) -> int:  # fmt: skip
    """Return the activation bytes of a graph's engine: that of its largest profile; floats have `item_bytes`."""
    largest = 0.0
    for ranges in profiles.profiles.values():
        usual, most = profile_sizes(ranges, profiles.capacity)
        largest = max(largest, largest_stage(profile_features(shape, graph, most, usual), FITTED[f"{graph} {variant}"]))
    return int(largest * (item_bytes / 2 if graph != SPATIAL else 1))


def largest_stage(features: Features, stages: Sequence[Features]) -> float:
    """Return the bytes of the stage that needs most."""
    return max(sum(weight * features[name] for name, weight in stage.items()) for stage in stages)
