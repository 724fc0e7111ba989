"""Operations and bytes of each stage of a grounding, counted from a model's shape. A multiply-add is two operations.

Bytes are those that a stage moves between memory and processor: weights once per call, keys and values once per row,
inputs and outputs of each matmul. What stays in caches between kernels is counted as if it did not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bridge_stg.export.estimate.shapes import ModelShape

FP32, FP16, INT8, FP8, FP4 = "fp32", "fp16", "int8", "fp8", "fp4"
SPATIAL_HEADS = 8
"""Heads of the spatial decoder's attention, by its config's default."""


@dataclass(frozen=True)
class Storage:
    """How a graph is stored and computed.

    Attributes:
        weight, head: bytes per weight, scales included; of the head and the embedding table.
        peak: precision of the matmuls' inputs, a key of `Device.peaks`; attention is in fp16 at most.
        activation: bytes per value between matmuls, and of the KV cache.
        on_cpu: memory of onnxruntime on CPU as a multiple of the weights: it packs matrices into new memory, computes
            fp16 in fp32, and has int8 and int4 weights in one layout for prefill and one for decoding.
    """

    weight: float
    head: float
    peak: str
    activation: int = 2
    on_cpu: float = 1.5

    @property
    def attention(self) -> str:
        """Precision of the matmuls inside attention, which no engine computes in integers."""
        return FP32 if self.activation == 4 else FP16


STORAGE = {
    "fp32": Storage(4, 4, FP32, 4, on_cpu=1.25),
    "fp16": Storage(2, 2, FP16, on_cpu=3.4),
    "bf16": Storage(2, 2, FP16, on_cpu=3.4),
    "int8": Storage(1, 1, INT8, on_cpu=2.2),
    "int4": Storage(0.5 + 2 / 32, 1, FP16, on_cpu=3.0),
    "fp8": Storage(1, 1, FP8),
    "nvfp4": Storage(0.5 + 1 / 16, 1, FP4),
}
"""Precisions of `--dtype`; int4 has an fp16 scale per 32 values and an int8 head, as the recipe `w4` makes it."""


@dataclass(frozen=True)
class Work:
    """Operations by precision of their inputs, and bytes moved."""

    matmuls: float = 0.0
    attention: float = 0.0
    weights: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def times(self, count: float) -> Work:
        """Return the work of `count` calls."""
        return Work(*(count * value for value in self.values()))

    def values(self) -> tuple[float, float, float, float]:
        """Return all four counts."""
        return self.matmuls, self.attention, self.weights, self.moved


def vision_work(
    shape: ModelShape, storage: Storage, *, groups: int, patches: int, calls: int = 1, tokens: bool = True
) -> Work:
    """Count the vision encoder.

    Args:
        shape: the model.
        storage: of the vision encoder.
        groups: number of groups of frames, of `patches` each.
        patches: patches of a group, which attend to each other.
        calls: number of calls, each of which reads the weights.
        tokens: whether visual tokens are computed, or the feature map only, as for fine frames.
    """
    vision, count = shape.spec.vision, groups * patches
    merged = count // vision.merge_size**2 if tokens else 0
    matmuls = 2.0 * count * (shape.patch_embed + shape.blocks) + 2.0 * merged * shape.mergers
    window = min(vision.window_patches**2, patches) if vision.window_patches else patches
    attended = shape.full_blocks * patches + (shape.depth - shape.full_blocks) * window
    per_block = 6 * vision.hidden_size + 2 * shape.vision_inner  # inputs and outputs of its matmuls, in values
    return Work(
        matmuls, 4.0 * count * attended * vision.hidden_size,
        calls * (shape.patch_embed + shape.blocks + (shape.mergers if tokens else 0)) * storage.weight,
        float(count * shape.depth * per_block * storage.activation),
    )  # fmt: skip


def language_work(
    shape: ModelShape, storage: Storage, *, length: int, past: int = 0, rows: int = 1, outputs: int = 1, calls: int = 1
) -> Work:
    """Count the language model on `length` new tokens per row after `past` others, in `calls` calls of equal length."""
    language = shape.spec.language
    tokens, hidden = rows * length, language.hidden_size
    matmuls = 2.0 * tokens * shape.layers + 2.0 * rows * outputs * shape.head
    pairs = length * past + length * (length + 1) / 2
    per_layer = 5 * hidden + 3 * shape.query_width + 2 * shape.kv_width + 4 * shape.inner
    cache = 2.0 * language.num_layers * shape.kv_width * storage.activation
    return Work(
        matmuls, 4.0 * rows * language.num_layers * shape.query_width * pairs,
        calls * (shape.layers * storage.weight + (shape.head * storage.head if outputs else 0)),
        tokens * language.num_layers * per_layer * storage.activation
        + rows * cache * sum(past + length * (i + 1) / calls for i in range(calls)),
    )  # fmt: skip


def spatial_work(
    shape: ModelShape, storage: Storage, *, frames: int, patches: int, queries: int, folded: bool = False
) -> Work:
    """Count the spatial decoder on `frames` of `patches` each, for `queries` on one video.

    `folded` says that queries are multiplied by the projections of keys and values, not patches, as in `ort-cpu`.
    """
    if not shape.spatial_layers:
        return Work()
    width, layers, inner = shape.spatial_width, shape.spatial_layers, shape.spatial_inner
    projections = 2 if folded else 3 + 2 * layers
    features = frames * patches * width * (shape.spec.vision.hidden_size + projections * width)
    rows = frames * queries * layers * (15 * width**2 + 2 * width * inner)
    attended = patches * (SPATIAL_HEADS if folded else 1) + frames
    moved = frames * patches * width * (2 * projections + 2 * layers) * storage.activation
    return Work(
        2.0 * (features + rows), 4.0 * layers * queries * frames * width * attended,
        shape.spatial * storage.weight, float(moved),
    )  # fmt: skip


def chunks(count: int, at_most: int) -> int:
    """Return the number of calls for `count` items."""
    return max(1, math.ceil(count / max(1, at_most)))
