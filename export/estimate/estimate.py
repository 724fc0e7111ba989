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
from bridge_stg.export.estimate.dry_run import dry_run
from bridge_stg.export.estimate.memory import PROCESS_BYTES, cache_rows, graph_weights, storages_of, verdict_of
from bridge_stg.export.estimate.shapes import LANGUAGE, SPATIAL, VISION, ModelShape
from bridge_stg.export.estimate.work import Storage, Work, chunks, language_work, spatial_work, vision_work
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
HOST = Efficiency(0.76, 0.61, "times of a 0.5B model on a CPU, with the limits of that CPU")
ASSUMED = dataclasses.replace(ORIN, source="not fitted: those of Orin")


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
class Memory:
    """Bytes by use.

    Attributes:
        weights: weights of all graphs, of engines their plans.
        kv_cache: keys and values of all rows.
        activations: tensors of the largest stage.
        kept: visual tokens and feature maps, kept between stages.
        process: the process without a model; 0 where the other uses contain it.
    """

    weights: int
    kv_cache: int
    activations: int
    kept: int
    process: int

    @property
    def needed(self) -> int:
        """Bytes of all uses."""
        return self.weights + self.kv_cache + self.activations + self.kept + self.process


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes and time in seconds of one request.

    Attributes:
        memory: bytes by use.
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
    memory: Memory
    usable: int
    stages: tuple[StageTime, ...]
    token_s: float
    coarse: tuple[int, int]
    fine: tuple[int, int] | None
    prefix: int

    @property
    def needed(self) -> int:
        """Bytes of all uses."""
        return self.memory.needed

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
        uses = {name.replace("_", " "): size for name, size in dataclasses.asdict(self.memory).items() if size}
        memory = ", ".join(f"{name} {gigabytes(size)}" for name, size in uses.items()).replace("kv", "KV")
        lines = [
            f"{self.device.title}, {self.dtype}, {self.heads} heads",
            f"  memory   {gigabytes(self.needed)} of {gigabytes(self.usable)}: {verdict} ({memory})",
        ]
        for stage in self.stages:
            bound = "memory" if stage.memory_bound else "compute"
            counted = f"{stage.operations / 1e12:8.3f} T operations  {stage.moved / 1e9:8.2f} GB"
            lines.append(f"  {stage.name:14}{stage.seconds:9.3f} s  {counted}  limited by {bound}")
        lines.append(f"  {'total':14}{self.seconds:9.3f} s  without decoding the video")
        speed = 1 / self.token_s
        lines.append(f"  {speed:.{1 if speed < 100 else 0}f} tokens per second; efficiencies: {self.efficiency.source}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the values of the definition `estimate` in `evaluation/schema/machine.py`."""
        return {
            "target": self.device.name,
            "dtype": self.dtype,
            "heads": self.heads,
            "fits": self.fits,
            "memory": {**dataclasses.asdict(self.memory), "needed": self.needed, "usable": self.usable},
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
        dtype: key of `work.STORAGE`; None: the precisions of a bundle, or fp16.

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
    if on_cpu:
        memory = cpu_memory(
            shape, storages, patches=max(patches, fine_patches if frames else 0), chunk=chunk,
            positions=bucketed(past + spec.language.num_bridging_queries), rows=rows, tokens=tokens, fine=frames,
        )  # fmt: skip
    else:
        memory = gpu_memory(shape, device, Deployment(request.frames, rows), dtype)
    return Estimate(
        device=device, efficiency=counter.efficiency, dtype=dtype or shape.dtypes.get(LANGUAGE, "fp16"),
        heads=spec.heads, memory=memory, usable=device.usable, stages=tuple(counter.stages), coarse=coarse,
        fine=fine if frames else None, prefix=prefix,
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


def cpu_memory(
    shape: ModelShape, storages: Mapping[str, Storage], *, patches: int, chunk: int, positions: int, rows: int,
    tokens: int, fine: int,
) -> Memory:  # fmt: skip
    """Return the memory of onnxruntime on a CPU; its multiples of the weights are fitted with that of the process.

    Args:
        shape: the model.
        storages: storage by graph.
        patches: patches of the largest frame.
        chunk: tokens of a prefill step.
        positions: KV positions of a row.
        rows: queries that are decoded together.
        tokens: visual tokens of the video.
        fine: fine frames whose feature maps are kept.
    """
    spec = shape.spec
    vision, language, act = spec.vision, spec.language, storages[LANGUAGE].activation
    weights = sum(size * storages[name].on_cpu for name, size in graph_weights(shape, storages).items())
    row = 2 * language.num_layers * shape.kv_width * act * positions
    groups = max(1, min(spec.frames.encoder_chunk_groups, spec.frames.encoder_chunk_patches // patches))
    encoder = groups * patches * (8 * vision.hidden_size + 2 * shape.vision_inner) * storages[VISION].activation
    per_token = 6 * language.hidden_size + 2 * shape.query_width + 2 * shape.kv_width + 3 * shape.inner
    decoder = chunk * per_token * act + 4 * language.vocab_size * 16
    kept = (1 + vision.deepstack_levels) * (tokens + 1) * language.hidden_size * act
    kept += fine * patches * vision.hidden_size * storages[VISION].activation
    return Memory(round(weights), row * cache_rows(rows), max(encoder, decoder), kept, 0)


def gpu_memory(shape: ModelShape, device: Device, deployment: Deployment, dtype: str | None) -> Memory:
    """Return the memory of engines, as the dry run counts it."""
    found = dry_run(shape, device, deployment, queries=deployment.max_queries, dtype=dtype)
    plans = sum(graph.plan for graph in found.graphs)
    return Memory(plans, found.kv_cache, found.activations, found.kept, PROCESS_BYTES)
