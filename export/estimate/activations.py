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
from bridge_stg.export.estimate.shapes import LANGUAGE, VISION, ModelShape

Features = dict[str, float]
Sizes = dict[str, int]
FLOATS = {2: "fp16", 4: "fp32"}
"""What an engine is named after in `FITTED` by the bytes of its floats; bf16 is as fp16."""
FEW_PATCHES = {2: 15_000, 4: 20_000}
"""Patches that a profile of the spatial decoder is tuned for, below which the builder keeps more tensors of each, by
the bytes of a float."""

FITTED: Mapping[str, tuple[Features, ...]] = {
    "language_model primitive fp16": (
        {"inner": 1.8458, "query": 8.8816, "scores": 3.0641},
        {"keys": 0.9686, "constant": 17.8728},
    ),
    "language_model standard fp16": (
        {"inner": 2.7847, "query": 11.4747},
        {"inner": 1.6512, "query": 5.2938, "repeated": 2.0019, "mask": 0.8468, "constant": 0.21},
    ),
    "language_model primitive fp32": ({"query": 6.7417, "scores": 1.9096, "repeated": 0.8698}, {"keys": 0.9787}),
    "language_model standard fp32": (
        {"scores": 1.6983, "repeated": 1.7552},
        {"scores": 1.0905, "repeated": 2.0013, "constant": 8.5139},
    ),
    "vision_encoder standard fp16": ({"inner": 3.827, "constant": 8.1944},),
    "vision_encoder primitive fp16": ({"inner": 4.0, "constant": 16.384},),
    "vision_encoder standard fp32": ({"inner": 1.8014, "scores": 2.0012},),
    "vision_encoder primitive fp32": ({"inner": 1.8014, "scores": 2.0012},),
    "spatial_decoder standard fp16": ({"hidden": 16.1096, "few": 2.1909, "constant": 8.4475},),
    "spatial_decoder standard fp32": ({"hidden": 16.0832, "few": 3.4858, "constant": 5.8708},),
    "spatial_decoder primitive fp16": ({"hidden": 16.1063, "few": 2.1932, "constant": 8.4933},),
    "spatial_decoder primitive fp32": ({"hidden": 16.1477, "few": 3.4085},),
}
"""Weights of the features for each stage, by graph and variant, as the benchmark prints them."""


def profile_sizes(ranges: Mapping[str, Range], capacity: int | None) -> tuple[Sizes, Sizes]:
    """Return the usual and the largest sizes of a profile's symbols, with `capacity` as S unless it is None."""
    fixed = {} if capacity is None else {"S": capacity}
    usual, most = ({symbol: sizes[place] for symbol, sizes in ranges.items()} | fixed for place in (1, 2))
    return usual, most


def profile_features(
    shape: ModelShape, graph: str, most: Mapping[str, int], usual: Mapping[str, int], item_bytes: int
) -> Features:  # fmt: skip
    """Return bytes of the tensors of a block by name.

    Args:
        shape: sizes of the model.
        graph: name of the graph.
        most: largest sizes of a profile's symbols.
        usual: sizes that the profile is tuned for.
        item_bytes: bytes of a float between layers.
    """
    spec, item = shape.spec, float(item_bytes)
    language = spec.language
    if graph == LANGUAGE:
        tokens, rows, positions = most["B"] * most["L"], most["B"], most["S"]
        prefills = usual["L"] > 1
        heads = shape.query_width // language.head_dim
        return {
            "inner": item * tokens * shape.inner,
            "query": item * tokens * shape.query_width,
            "scores": item * heads * tokens * (positions + most["L"]),
            "mask": item * tokens * positions,
            "keys": 0.0 if prefills else item * rows * positions * shape.kv_width * language.num_layers,
            "repeated": item * rows * positions * shape.query_width,
            "constant": 1e6,
        }
    if graph == VISION:
        patches, heads = most["G"] * most["N"], spec.vision.hidden_size // spec.vision.head_dim
        return {
            "inner": item * patches * shape.vision_inner,
            "scores": item * heads * patches * most["N"],
            "constant": 1e6,
        }
    patches, tuned = (sizes["F"] * sizes["h"] * sizes["w"] for sizes in (most, usual))
    few = patches if tuned < FEW_PATCHES[item_bytes] else 0
    return {
        "hidden": item * patches * shape.spatial_width, "few": item * few * spec.vision.hidden_size, "constant": 1e6
    }  # fmt: skip


def modelled_activation(
    shape: ModelShape, graph: str, variant: str, profiles: GraphProfiles, *, item_bytes: int = 2
) -> int:  # fmt: skip
    """Return the activation bytes of a graph's engine: that of its largest profile; floats have `item_bytes`."""
    stages, largest = FITTED[f"{graph} {variant} {FLOATS[item_bytes]}"], 0.0
    for ranges in profiles.profiles.values():
        usual, most = profile_sizes(ranges, profiles.capacity)
        largest = max(largest, largest_stage(profile_features(shape, graph, most, usual, item_bytes), stages))
    return int(largest)


def largest_stage(features: Features, stages: Sequence[Features]) -> float:
    """Return the bytes of the stage that needs most."""
    return max(sum(weight * features[name] for name, weight in stage.items()) for stage in stages)
