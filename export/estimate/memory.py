"""What a model's weights, plans, KV cache and kept tensors take on a device: counted once, for estimate and dry run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bridge_stg.export.engines.profiles import Deployment
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape
from bridge_stg.export.estimate.work import FP16, INT8, STORAGE, Storage
from bridge_stg.runtime.chain.vision_pass import FEATURE_BUDGET_BYTES
from bridge_stg.runtime.device.table import Device
from bridge_stg.runtime.errors import EngineError

PRIMITIVE_SMS = (87,)
"""Compute capabilities whose memory is counted for the variant `primitive`, which TensorRT of JetPack 6 needs."""
PROGRAM_BYTES: Mapping[str, tuple[int, int]] = {
    VISION: (2_000_000, 400_000), LANGUAGE: (2_000_000, 500_000), SPATIAL: (7_000_000, 1_150_000)
}  # fmt: skip
"""Programs of each profile in a plan, besides the weights: bytes, and bytes per layer."""
PROCESS_BYTES = 250 * 10**6
"""Memory of the runtime's process without a model: Python, numpy, PyAV, a tokenizer, and frames of a video."""
TIGHT = 0.9
"""Share of the usable memory above which a count is too close to it to be sure."""


def variant_on(device: Device) -> str:
    """Return the variant of the graphs that is counted for a device by default."""
    return "primitive" if device.sm in PRIMITIVE_SMS else "standard"


def verdict_of(needed: int, usable: int) -> str:
    """Return `fits`, `tight` if less than a tenth of the usable bytes is left, or `does not fit`."""
    return "does not fit" if needed > usable else "tight" if needed > TIGHT * usable else "fits"


def check_dtype(dtype: str | None) -> None:
    """Raise EngineError if a precision is not a key of `STORAGE`; None is the default one."""
    if dtype is not None and dtype not in STORAGE:
        raise EngineError("options.invalid", f"--dtype {dtype!r} is unknown; known: {', '.join(STORAGE)}")


def storages_of(shape: ModelShape, device: Device, dtype: str | None) -> dict[str, Storage]:
    """Return how each graph is stored and computed.

    `dtype` is a key of `STORAGE`; None: the precisions of a bundle. As in the recipes of `calibrate`, the vision
    encoder is int8 where the language model is int4, and the spatial decoder stays in float. Raises EngineError if the
    device lacks a precision.
    """
    check_dtype(dtype)
    if dtype is None:
        names = dict(shape.dtypes) or dict.fromkeys((VISION, LANGUAGE, SPATIAL), "fp16")
    else:
        vision = {"int4": "int8", "nvfp4": "fp8"}.get(dtype, dtype)
        names = {VISION: vision, LANGUAGE: dtype, SPATIAL: dtype if dtype in ("fp32", "fp16", "bf16") else "fp16"}
    found = {}
    for graph, name in names.items():
        storage = STORAGE[name]
        if storage.peak not in device.peaks:
            has = ", ".join(device.peaks)
            message = f"{device.name} has no matmuls in {storage.peak}, which {graph} needs in {dtype or name}"
            raise EngineError("engine.unsupported_precision", f"{message}; it has {has}: give another --dtype")
        found[graph] = storage if device.sm is not None else on_cpu(storage)
    return found


def on_cpu(storage: Storage) -> Storage:
    """Return how onnxruntime on CPU computes a storage: with floats of 4 bytes, and weight-only matrices in int8."""
    return dataclasses.replace(storage, activation=4, peak=INT8 if is_weight_only(storage) else storage.peak)


def graph_weights(shape: ModelShape, storages: Mapping[str, Storage]) -> dict[str, float]:
    """Return the bytes of each graph's weights as they are stored."""
    stored: dict[str, float] = dict(shape.stored)
    if not stored:
        vision, language = storages[VISION], storages[LANGUAGE]
        stored[VISION] = (shape.patch_embed + shape.blocks + shape.mergers) * vision.weight
        heads = shape.head * (1 if shape.tied else 2)
        stored[LANGUAGE] = shape.layers * language.weight + heads * language.head
        stored[SPATIAL] = shape.spatial * storages[SPATIAL].weight
    return stored


def is_weight_only(storage: Storage) -> bool:
    """Return whether only weights are quantized."""
    return storage.peak == FP16 and storage.weight < storage.activation


def plan_bytes(
    shape: ModelShape, graph: str, storage: Storage, weights: float, *, weight_only: bool, profiles: int
) -> int:  # fmt: skip
    """Return the bytes of a graph's plan, which is loaded as a whole: weights, and programs of each profile.

    TensorRT-RTX stores weight-only matrices of the decoder layers in one layout for prefill and in another for
    decoding (docs/engines.md); those with quantized inputs once.
    """
    second = storage.weight * shape.layers if graph == LANGUAGE and weight_only else 0.0
    layers = {VISION: shape.depth, LANGUAGE: shape.spec.language.num_layers, SPATIAL: shape.spatial_layers}[graph]
    fixed, per_layer = PROGRAM_BYTES[graph]
    return profiles * (fixed + per_layer * layers) + round(weights + second)


def cache_rows(queries: int) -> int:
    """Return the rows of the KV cache: the video's, which a single query shares, and one per query."""
    return 1 + queries if queries > 1 else 1


def kept_bytes(shape: ModelShape, deployment: Deployment, item_bytes: int) -> int:
    """Return bytes of visual tokens, and of the fine feature maps that bridge heads keep."""
    spec = shape.spec
    levels = 1 + spec.vision.deepstack_levels
    tokens = item_bytes * levels * (deployment.visual_tokens(spec) + 1) * spec.language.hidden_size
    patches = spec.frames.fine_max_pixels // spec.vision.patch_size**2
    maps = item_bytes * spec.frames.max_fine_frames * patches * spec.vision.hidden_size
    return tokens + (min(maps, FEATURE_BUDGET_BYTES) if spec.heads == "bridge" else 0)
