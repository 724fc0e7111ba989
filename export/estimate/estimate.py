"""Memory and seconds of a grounding on a device, before anything runs there.

A stage takes the longer of two times, a roofline: operations over the device's peak, and bytes over its bandwidth, each
times a fitted efficiency. `benchmarks/gpu/estimates.py` fits the efficiencies and compares the estimates with measured
times; docs/devices.md has the errors. Decoding the video is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.export.engines.profiles import MAX_QUERIES, PREFILL_TOKENS, Deployment
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape
from bridge_stg.export.estimate.work import STORAGE, Storage, Work, chunks, language_work, spatial_work, vision_work
from bridge_stg.runtime.backends.kv_pool import bucketed
from bridge_stg.runtime.backends.session import PREFILL_CHUNK
from bridge_stg.runtime.device.table import Device
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.memory import gigabytes
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarsePlan

HEAD_TOKENS, GROUP_TOKENS, QUERY_TOKENS = 16, 12, 24
"""Tokens of the prompt's head, of the time and markers of a group, and of a query."""
ANSWER_STEPS, STEP_TOKENS = 4, 4
"""Calls for the answer of bridge heads, and tokens per call: the grammar forces the others."""
BOX_STEPS, BOX_TOKENS = 14, 48
"""Calls and tokens for a box that text heads write: benchmarks/results/text_answers.json."""
PRIMITIVE_SMS = (87,)
"""Compute capabilities whose memory is counted for the variant `primitive`, which TensorRT of JetPack 6 needs."""
SCORE_BYTES, EXPANDED = 6, 3
"""Bytes per score of attention that is not fused, in fp32 and their softmax in fp16; and copies of the keys of all
layers that a decode step holds. Figures of TensorRT-RTX's builder: docs/engines.md."""
TIGHT = 0.9
"""Share of the usable memory above which an estimate is too close to it to be sure."""
VISIBLE = 0.5
"""Assumed share of the coarse groups that show the target."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks that its kernels reach.

    Attributes:
        compute, memory: share of the peak operations and of the bandwidth.
        source: what they were fitted on.
    """

    compute: float
    memory: float
    source: str


ORIN = Efficiency(0.46, 0.74, "published times of Qwen3-VL-2B on Orin")
THOR = Efficiency(0.27, 0.79, "published times of Qwen3-VL-2B on AGX Thor")
HOST = Efficiency(0.63, 0.56, "times of a 0.5B model on a CPU, with the limits of that CPU")
ASSUMED = dataclasses.replace(ORIN, source="not fitted: those of Orin")


def verdict_of(needed: int, usable: int) -> str:
    """Return `fits`, `tight` if less than a tenth of the usable bytes is left, or `does not fit`."""
    return "does not fit" if needed > usable else "tight" if needed > TIGHT * usable else "fits"


def efficiency_of(device: Device) -> Efficiency:
    """Return the efficiencies of a device's kind."""
    return HOST if device.sm is None else {87: ORIN, 110: THOR}.get(device.sm, ASSUMED)


@dataclass(frozen=True)
class Request:
    """What is estimated.

    Attributes:
        frames: coarse frames of the video.
        queries: queries on the video; more than engines decode together run in batches.
        size: height and width of the video in pixels.
        fine_frames: fine frames of all tubes together; None: as many as coarse frames.
    """

    frames: int = 32
    queries: int = 1
    size: tuple[int, int] = (720, 1280)
    fine_frames: int | None = None


@dataclass(frozen=True)
class StageTime:
    """One stage: operations, bytes moved, seconds, and whether the memory takes the longer part of them."""

    name: str
    operations: float
    moved: float
    seconds: float
    memory_bound: bool


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes and time in seconds of one request.

    Attributes:
        weights, kv_cache, activations: bytes by use.
        usable: bytes that the device has for them.
        stages: stages in their order, named as in results.
        token_s: seconds per token of an answer without a grammar.
        coarse, fine: (height, width) of the frames in pixels.
        prefix: tokens of the prompt that the video takes.
    """

    device: Device
    efficiency: Efficiency
    dtype: str
    heads: str
    weights: int
    kv_cache: int
    activations: int
    usable: int
    stages: tuple[StageTime, ...]
    token_s: float
    coarse: tuple[int, int]
    fine: tuple[int, int] | None
    prefix: int

    @property
    def needed(self) -> int:
        """Bytes of all uses."""
        return self.weights + self.kv_cache + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has the memory."""
        return self.needed <= self.usable

    @property
    def verdict(self) -> str:
        """See `verdict_of`."""
        return verdict_of(self.needed, self.usable)

    @property
    def seconds(self) -> float:
        """Seconds of all stages, without decoding the video."""
        return sum(stage.seconds for stage in self.stages)

    def table(self) -> str:
        """Return the estimate as text."""
        verdict = self.verdict
        memory = f"weights {gigabytes(self.weights)}, KV cache {gigabytes(self.kv_cache)}, "
        memory += f"activations {gigabytes(self.activations)}"
        lines = [
            f"{self.device.title}, {self.dtype}, {self.heads} heads",
            f"  memory   {gigabytes(self.needed)} of {gigabytes(self.usable)}: {verdict} ({memory})",
        ]
        for stage in self.stages:
            bound = "memory" if stage.memory_bound else "compute"
            counted = f"{stage.operations / 1e12:8.3f} T operations  {stage.moved / 1e9:8.2f} GB"
            lines.append(f"  {stage.name:14}{stage.seconds:9.3f} s  {counted}  limited by {bound}")
        lines.append(f"  {'total':14}{self.seconds:9.3f} s  without decoding the video")
        lines.append(f"  {1 / self.token_s:.1f} tokens per second; efficiencies: {self.efficiency.source}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the values of the definition `estimate` in `evaluation/schema/machine.py`."""
        return {
            "target": self.device.name,
            "dtype": self.dtype,
            "heads": self.heads,
            "fits": self.fits,
            "memory": {
                "weights": self.weights, "kv_cache": self.kv_cache, "activations": self.activations,
                "needed": self.needed, "usable": self.usable,
            },
            "stages": [
                {"name": stage.name, "seconds": round(stage.seconds, 6), "operations": round(stage.operations),
                 "bytes": round(stage.moved), "limited_by": "memory" if stage.memory_bound else "compute"}
                for stage in self.stages
            ],
            "total_s": round(self.seconds, 6),
            "token_s": round(self.token_s, 6),
            "prefix_tokens": self.prefix,
            "efficiencies": dataclasses.asdict(self.efficiency),
        }  # fmt: skip


def storages_of(shape: ModelShape, device: Device, dtype: str | None) -> dict[str, Storage]:
    """Return how each graph is stored and computed.

    `dtype` is a key of `STORAGE`; None: the precisions of a bundle. As in the recipes of `calibrate`, the vision
    encoder is int8 where the language model is int4, and the spatial decoder stays in float. Raises EngineError if the
    device lacks a precision.
    """
    if dtype is not None and dtype not in STORAGE:
        raise EngineError("options.invalid", f"--dtype {dtype!r} is unknown; known: {', '.join(STORAGE)}")
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
        found[graph] = storage if device.sm is not None else dataclasses.replace(storage, activation=4)
    return found


def seconds_of(work: Work, storage: Storage, device: Device, efficiency: Efficiency) -> tuple[float, float]:
    """Return the seconds for the operations and for the bytes."""
    operations = work.matmuls / device.peaks[storage.peak] + work.attention / device.peaks[storage.attention]
    return (
        operations / efficiency.compute,
        (work.weights + work.moved) / (device.bandwidth * efficiency.memory),
    )


class StageCounter:
    """Adds up the stages of one model on one device."""

    def __init__(self, device: Device, storages: Mapping[str, Storage]) -> None:
        self.device, self.storages, self.efficiency = device, storages, efficiency_of(device)
        self.stages: list[StageTime] = []

    def time(self, graph: str, work: Work) -> float:
        """Return the seconds of a call."""
        return max(seconds_of(work, self.storages[graph], self.device, self.efficiency))

    def add(self, name: str, graph: str, *works: Work) -> None:
        """Add a stage whose parts run one after the other."""
        times = [seconds_of(work, self.storages[graph], self.device, self.efficiency) for work in works]
        total = sum(map(max, times))
        bound = sum(memory for compute, memory in times if memory > compute) > total / 2
        operations = sum(work.matmuls + work.attention for work in works)
        self.stages.append(StageTime(name, operations, sum(w.weights + w.moved for w in works), total, bound))


def estimate(shape: ModelShape, device: Device, request: Request, *, dtype: str | None = None) -> Estimate:
    """Estimate one request.

    Args:
        shape: sizes of the model.
        device: the device.
        request: the video and the number of queries.
        dtype: key of `STORAGE`; None: the precisions of a bundle, or fp16.

    Raises:
        EngineError: the device lacks the precision, or the model does not read so many frames.
        VideoError: the video's shape is unsupported.
    """
    spec, storages = shape.spec, storages_of(shape, device, dtype)
    counter, language = StageCounter(device, storages), storages[LANGUAGE]
    groups, coarse, fine = _frames(shape, request)
    patches, fine_patches = (height * width // spec.vision.patch_size**2 for height, width in (coarse, fine))
    tokens = groups * patches // spec.vision.merge_size**2
    prefix = HEAD_TOKENS + groups * GROUP_TOKENS + tokens
    rows, on_cpu = min(request.queries, MAX_QUERIES), device.sm is None
    chunk = min(prefix, PREFILL_CHUNK if on_cpu else PREFILL_TOKENS)

    calls = _encoder_calls(shape, groups, patches)
    counter.add(
        "vision_coarse", VISION, vision_work(shape, storages[VISION], groups=groups, patches=patches, calls=calls)
    )
    prefill = language_work(shape, language, length=prefix, calls=chunks(prefix, chunk), outputs=0)
    counter.add("prefill", LANGUAGE, prefill)
    answer, works = _answer(shape, language, groups=groups, prefix=prefix, rows=rows)
    counter.add("answer", LANGUAGE, *(work.times(chunks(request.queries, rows)) for work in works))
    frames = 0
    if spec.heads == "bridge":
        frames = min(request.fine_frames or request.frames, spec.frames.max_fine_frames)
        calls = _encoder_calls(shape, frames, fine_patches)
        counter.add("vision_fine", VISION, vision_work(
            shape, storages[VISION], groups=frames, patches=fine_patches, calls=calls, tokens=False
        ))  # fmt: skip
        counter.add("spatial", SPATIAL, spatial_work(
            shape, storages[SPATIAL], frames=frames, patches=fine_patches, queries=request.queries, folded=on_cpu
        ))  # fmt: skip

    past = prefix + QUERY_TOKENS + answer
    positions = bucketed(past + spec.language.num_bridging_queries)
    if not on_cpu:  # engines have caches of a fixed size
        positions = max(positions, Deployment(request.frames, rows).positions(spec))
    return Estimate(
        device=device, efficiency=counter.efficiency, dtype=dtype or shape.dtypes.get(LANGUAGE, "fp16"),
        heads=spec.heads, weights=weight_bytes(shape, storages, device),
        kv_cache=kv_bytes(shape, language, positions, rows),
        activations=activation_bytes(
            shape, storages, patches=max(patches, fine_patches if frames else 0), chunk=chunk, positions=positions,
            rows=rows, tokens=tokens, fine=frames, unfused=device.sm in PRIMITIVE_SMS,
        ),
        usable=device.usable, stages=tuple(counter.stages), coarse=coarse, fine=fine if frames else None, prefix=prefix,
        token_s=counter.time(LANGUAGE, language_work(shape, language, length=1, past=past)),
    )  # fmt: skip


def _encoder_calls(shape: ModelShape, groups: int, patches: int) -> int:
    """Return the calls of the vision encoder for groups of `patches` each."""
    frames = shape.spec.frames
    return chunks(groups, min(frames.encoder_chunk_groups, max(1, frames.encoder_chunk_patches // patches)))


def _answer(
    shape: ModelShape, language: Storage, *, groups: int, prefix: int, rows: int
) -> tuple[int, tuple[Work, ...]]:  # fmt: skip
    """Return the tokens of an answer, and the work of its query, its steps and the bridging queries."""
    past = prefix + QUERY_TOKENS
    boxes = math.ceil(VISIBLE * groups)
    text = shape.spec.heads == "text"
    steps, tokens = (BOX_STEPS * boxes, BOX_TOKENS * boxes) if text else (ANSWER_STEPS, ANSWER_STEPS * STEP_TOKENS)
    query = language_work(shape, language, length=QUERY_TOKENS, past=prefix, rows=rows)
    step = language_work(shape, language, length=math.ceil(tokens / steps), past=past + tokens // 2, rows=rows)
    if text:
        return tokens, (query, step.times(steps))
    bridging = shape.spec.language.num_bridging_queries
    last = language_work(shape, language, length=bridging, past=past + tokens, rows=rows, outputs=0)
    return tokens, (query, step.times(steps), last)


def _frames(shape: ModelShape, request: Request) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Return the groups of coarse frames, and the sizes of coarse and fine frames."""
    spec = shape.spec
    plan = CoarsePlan(*request.size, spec, Budget(visual_tokens=spec.frames.max_visual_tokens))
    groups = math.ceil(request.frames / spec.vision.temporal_patch_size)
    if groups > plan.capacity:
        most = plan.capacity * spec.vision.temporal_patch_size
        message = f"--frames {request.frames}: the model reads at most {most} coarse frames of a video at once"
        raise EngineError("options.invalid", f"{message}; longer videos are searched in windows")
    size = plan.size_of(np.arange(groups, dtype=np.float64)) or plan.smallest
    return groups, size, frame_sizes(*request.size, spec)[1]


def weight_bytes(shape: ModelShape, storages: Mapping[str, Storage], device: Device) -> int:
    """Return the bytes of all weights in memory."""
    stored = graph_weights(shape, storages)
    return round(
        sum(
            size * (storages[name].on_cpu if device.sm is None else storages[name].in_plan)
            for name, size in stored.items()
        )
    )


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


def cache_rows(queries: int) -> int:
    """Return the rows of the KV cache: the video's, which a single query shares, and one per query."""
    return 1 + queries if queries > 1 else 1


def kv_bytes(shape: ModelShape, language: Storage, positions: int, rows: int) -> int:
    """Return the bytes of keys and values of `rows` queries."""
    row = 2 * shape.spec.language.num_layers * shape.kv_width * language.activation * positions
    return row * cache_rows(rows)


def activation_bytes(
    shape: ModelShape, storages: Mapping[str, Storage], *, patches: int, chunk: int, positions: int, rows: int,
    tokens: int, fine: int, unfused: bool,
) -> int:  # fmt: skip
    """Return the bytes of the largest stage's tensors, and of those that are kept between stages.

    Args:
        shape: the model.
        storages: storage by graph.
        patches: patches of the largest frame.
        chunk: tokens of a prefill step.
        positions: KV positions of a row.
        rows: queries that are decoded together.
        tokens: visual tokens of the video.
        fine: fine frames whose feature maps are kept.
        unfused: whether attention writes its scores, as in the variant `primitive`.
    """
    spec = shape.spec
    vision, language, act = spec.vision, spec.language, storages[LANGUAGE].activation
    groups = max(1, min(spec.frames.encoder_chunk_groups, spec.frames.encoder_chunk_patches // patches))
    per_patch = 8 * vision.hidden_size + 2 * shape.vision_inner
    encoder = groups * patches * per_patch * storages[VISION].activation
    per_token = 6 * language.hidden_size + 2 * shape.query_width + 2 * shape.kv_width + 3 * shape.inner
    decoder = chunk * per_token * act + 4 * language.vocab_size * 16
    if unfused:
        encoder += groups * (vision.hidden_size // vision.head_dim) * patches**2 * SCORE_BYTES
        scores = (shape.query_width // language.head_dim) * chunk * positions * SCORE_BYTES
        decoder = max(decoder + scores, EXPANDED * rows * positions * shape.kv_width * language.num_layers * act)
    kept = (1 + vision.deepstack_levels) * (tokens + 1) * language.hidden_size * act
    kept += fine * patches * vision.hidden_size * storages[VISION].activation
    return max(encoder, decoder) + kept
