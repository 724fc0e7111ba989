"""Memory and hours of a training, before it starts: one step of each stage on tensors without values.

The model's own forward and backward pass run under torch's `FakeTensorMode`, which computes shapes only, and
`LiveStorages` measures them. docs/training.md says what is not in the figures.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bridge_stg.model.config import BridgeSTGConfig
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.prompt import Segment
from bridge_stg.runtime.device.table import GPU_KEPT, GPUS
from bridge_stg.runtime.host.memory import gigabytes
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import Budget, CoarsePlan
from bridge_stg.training.data.clips import ClipBatch
from bridge_stg.training.estimate.live_storages import LiveStorages
from bridge_stg.training.loss.clip_task import ClipTask
from bridge_stg.training.parts import add_lora, part_of, trained_parameters
from bridge_stg.training.recipe import NEW_PARTS, DataRecipe, Stage, TrainingRecipe

HEAD_TOKENS, GROUP_TOKENS, QUERY_TOKENS, ANSWER_TOKENS = 16, 12, 24, 16
"""Tokens of the prompt's head, of the time and markers of a group, and of a query and its answer."""
CHOICES = 8  # answer tokens of a query that the grammar leaves open, each with logits
VIDEO_SIZE = (480, 640)  # height and width of a usual video, in pixels
CLIP_SECONDS = 30.0  # the mean length of a clip in VidSTG (arXiv 2001.06891) is 28 s
USABLE = 0.92  # share of a GPU's memory that the tensors may fill; the allocator's fragments take the rest
UTILISATION = 0.3
"""Assumed share of a GPU's peak in matmuls, over the whole step."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage needs on each device; bytes, of the longest clip, and hours, of clips of the mean length."""

    name: str
    trained: int  # parameters
    weights: int
    gradients: int
    optimizer: int  # moments, and moving averages
    activations: int  # kept for the backward pass, without those of the logits
    logits: int
    peak: int  # of all tensors at the same time
    operations: float  # of matmuls per step, all devices together
    hours: float | None  # None: no GPU was given


@dataclass(frozen=True)
class Estimate:
    """The estimates of all stages on `devices` times a GPU, None: no GPU was given."""

    stages: tuple[StageEstimate, ...]
    gpu: str | None
    devices: int
    sharded: bool

    def fits(self, stage: StageEstimate) -> bool | None:
        """Return whether a stage fits the memory of the GPU; None: unknown."""
        if self.gpu is None:
            return None
        return stage.peak + GPU_KEPT <= USABLE * GPUS[self.gpu].memory

    def table(self) -> str:
        """Return a text table, one line per stage."""
        columns = ("stage", "trained", "weights", "gradients", "optimizer", "activations", "logits", "peak", "hours")
        rows: list[tuple[str, ...]] = [columns]
        for stage in self.stages:
            sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.logits, stage.peak)
            hours = "–" if stage.hours is None else f"{stage.hours:.1f}"
            missing = " (too much)" if self.fits(stage) is False else ""
            *cells, peak = map(gigabytes, sizes)
            rows.append((stage.name, millions(stage.trained), *cells, peak + missing, hours))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        how = " with sharded weights" if self.sharded else ""
        where = f" on {self.devices} × {self.gpu}{how}" if self.gpu else ""
        note = f"Estimated per device{where}, for the longest clips; hours without reading videos and validation."
        return "\n".join([*lines, note])


def millions(count: int) -> str:
    """Format a number of parameters."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def estimate(
    config: BridgeSTGConfig, recipe: TrainingRecipe, *, gpu: str | None = None, devices: int = 1,
    sharded: bool = False, mean_s: float = CLIP_SECONDS, longest_s: float = math.inf,
    video_size: tuple[int, int] = VIDEO_SIZE, attention: str = "sdpa", frozen: torch.dtype = torch.bfloat16,
) -> Estimate:  # fmt: skip
    """Estimate memory and time of each stage of a recipe.

    Args:
        config: the checkpoint's config.
        recipe: the recipe.
        gpu: one of `runtime.device.table.GPUS`; None: no hours.
        devices: number of processes, each with one device.
        sharded: whether the weights are sharded over them (FSDP2), not replicated.
        mean_s: mean length of a clip in seconds, for the hours.
        longest_s: length of the longest clip in seconds, for the memory; infinite: as many groups as the model takes.
        video_size: height and width of the videos in pixels.
        attention: name in transformers' attention registry, as in the training.
        frozen: dtype of frozen weights of the backbone.

    Raises:
        BridgeError: a stage does not fit the model, as in the training.
    """
    usual = clip_shape(config.model_spec(), recipe.data, mean_s, video_size)
    longest = clip_shape(config.model_spec(), recipe.data, longest_s, video_size)
    stages = []
    for stage in recipe.stages:
        model = StageModel(config, stage, bf16=recipe.precision == "bf16", attention=attention, frozen=frozen)
        cost = model.measure(longest)
        operations = stage.clips * cost.operations * model.work(usual) / model.work(longest)
        hours = None
        if gpu is not None:
            hours = stage.steps * operations / (devices * UTILISATION * GPUS[gpu].peaks["fp16"]) / 3600
        stages.append(model.on_device(cost, operations, hours, devices=devices, sharded=sharded))
    return Estimate(tuple(stages), gpu, devices, sharded)


@dataclass(frozen=True)
class ClipShape:
    """The numbers and sizes that give a clip's tensors their shapes; frames as (height, width) in pixels."""

    groups: int
    coarse: tuple[int, int]
    fine_frames: int
    fine: tuple[int, int]
    queries: int


def clip_shape(spec: ModelSpec, data: DataRecipe, seconds: float, video_size: tuple[int, int]) -> ClipShape:
    """Return the shape of a clip of `seconds`, by the runtime's own rules; `video_size` is (height, width)."""
    frames = spec.frames
    tokens = min((n for n in (data.max_visual_tokens, frames.max_visual_tokens) if n is not None), default=None)
    plan = CoarsePlan(*video_size, spec, Budget(visual_tokens=tokens))
    wanted = seconds * frames.coarse_fps / spec.vision.temporal_patch_size
    groups = min(plan.capacity, max(1, math.ceil(min(wanted, plan.capacity))))
    coarse = plan.size_of(np.arange(groups, dtype=np.float64)) or plan.smallest
    fine_frames = min(data.fine_frames, max(1, math.ceil(min(seconds * frames.fine_fps, data.fine_frames))))
    return ClipShape(groups, coarse, fine_frames, frame_sizes(*video_size, spec)[1], data.queries)


def empty_batch(spec: ModelSpec, shape: ClipShape) -> ClipBatch:
    """Return a batch of zeros with the shapes of a clip's tensors."""
    side = spec.vision.patch_size * spec.vision.merge_size
    rows, columns = shape.coarse[0] // side, shape.coarse[1] // side
    tokens = shape.groups * rows * columns
    length = HEAD_TOKENS + shape.groups * GROUP_TOKENS + tokens
    index = np.zeros(length, np.int64)
    index[-tokens:] = 1 + np.arange(tokens)
    prefix = Segment(np.zeros(length, np.int64), index, np.zeros((3, length), np.int64), length)
    row = QUERY_TOKENS + ANSWER_TOKENS + spec.language.num_bridging_queries
    frames = (shape.queries, shape.fine_frames)
    return ClipBatch(
        frames=torch.zeros(shape.groups, spec.vision.temporal_patch_size, *shape.coarse, 3, dtype=torch.uint8),
        fine=torch.zeros(shape.fine_frames, *shape.fine, 3, dtype=torch.uint8),
        fine_times=torch.zeros(shape.fine_frames),
        prefix=prefix,
        input_ids=torch.zeros(shape.queries, row, dtype=torch.int64),
        length=torch.full((shape.queries,), row),
        target=torch.zeros(shape.queries, row, dtype=torch.int64),
        boxes=torch.zeros(*frames, 4),
        positive=torch.ones(frames, dtype=torch.bool),
        mask=torch.ones(frames, dtype=torch.bool),
        counted=torch.ones(frames, dtype=torch.bool),
    )


@dataclass(frozen=True)
class MicroBatchCost:
    """What one micro-batch takes: bytes in addition to the weights, and operations of matmuls."""

    forward_peak: int  # largest sum during the forward pass
    kept: int  # for the backward pass
    peak: int  # largest sum during both passes, with the gradients
    reduced_peak: int  # the same, if each gradient is freed as soon as it is complete
    logits: int
    operations: float


class StageModel:
    """A stage's model on tensors without values, on which a micro-batch is measured."""

    def __init__(
        self, config: BridgeSTGConfig, stage: Stage, *, bf16: bool, attention: str, frozen: torch.dtype
    ) -> None:
        self.stage, self.mode = stage, FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = BridgeSTG(config, attention=attention)
            if stage.lora is not None:
                add_lora(self.model, stage.lora)
            self.task = ClipTask(self.model, bf16=bf16).train()
            names = list(trained_parameters(self.task, stage, frozen=frozen))
        with self.mode:
            make_fake(self.task)
        parameters = dict(self.task.named_parameters())
        self.trained = {name: parameters[name] for name in names}
        for part in (self.model.language_model, self.model.vision_encoder):
            part.checkpoint_activations = stage.checkpoint_activations

    def measure(self, shape: ClipShape) -> MicroBatchCost:
        """Run one micro-batch."""
        with self.mode:
            batch = empty_batch(self.model.spec, shape)
            weights = {id(parameter.untyped_storage()) for parameter in self.task.parameters()}
            with LiveStorages(weights) as live:
                total, logits = self.forward(batch)
                forward_peak, kept = live.peak, live.now
                hooks = [value.register_post_accumulate_grad_hook(live.add_reduced) for value in self.trained.values()]
                live.collect_garbage = True
                gc.freeze()
                try:
                    torch.autograd.backward(total)
                finally:
                    gc.unfreeze()
            for hook, parameter in zip(hooks, self.trained.values()):
                hook.remove()
                parameter.grad = None
        return MicroBatchCost(forward_peak, kept - logits, live.peak, live.reduced_peak, logits, live.operations)

    def work(self, shape: ClipShape) -> float:
        """Return bytes of weights times patches or tokens of a clip, for ratios between the operations of clips."""
        vision, language = (
            size_of(part.parameters()) for part in (self.model.vision_encoder, self.model.language_model)
        )
        spec = self.model.spec.vision
        coarse, fine = (height * width / spec.patch_size**2 for height, width in (shape.coarse, shape.fine))
        patches = shape.groups * coarse + shape.fine_frames * fine
        return vision * patches + language * shape.groups * (coarse / spec.merge_size**2 + GROUP_TOKENS)

    def forward(self, batch: ClipBatch) -> tuple[Tensor, int]:
        """Return a scalar of all outputs, and the bytes of the logits and their gradients."""
        task, model = self.task, self.model
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.bf16):
            suffix = task.language(batch, task.visual_tokens(batch.frames), batch.input_ids)
            chosen = suffix[-1][:, :CHOICES].flatten(0, 1)
            logits = model.language_model.logits(chosen)
            loss = logits.log_softmax(-1).mean()
            found = model.spatial_decoder.localize(
                task.feature_map(batch.fine)[None], task.taps(batch, suffix), batch.fine_times[None], batch.mask[None]
            )
        outputs = (*found.boxes, *found.presence, found.heat, found.content, found.summary)
        total = torch.stack([loss, *(output.float().mean() for output in outputs)]).sum()
        return total, 2 * logits.nbytes + (logits.nbytes // 2 if task.bf16 else 0)

    def on_device(
        self, cost: MicroBatchCost, operations: float, hours: float | None, *, devices: int, sharded: bool
    ) -> StageEstimate:
        """Return the estimate for each of the devices."""
        trained = list(self.trained.values())
        new = [value for name, value in self.trained.items() if part_of(name) in NEW_PARTS]
        weights = size_of(self.task.parameters())
        gradients = size_of(trained)
        optimizer = (2 if self.stage.optimizer == "adamw" else 0.5) * gradients + size_of(new) * bool(self.stage.ema)
        several = self.stage.clips // devices > 1
        gathered, buckets = 0, 0
        in_pass = cost.peak
        if sharded and devices > 1:  # the gradients of each layer are reduced with every clip
            gathered = self.gathered()
            in_pass = cost.reduced_peak + gradients // devices
            weights, gradients, optimizer = weights // devices, gradients // devices, optimizer / devices
        elif devices > 1:
            buckets = gradients  # of DDP
            gradients += buckets
        held = (gradients - buckets) * several
        in_passes = max(cost.forward_peak + held, in_pass) + buckets + gathered
        return StageEstimate(
            name=self.stage.name, trained=sum(parameter.numel() for parameter in trained), weights=weights,
            gradients=gradients, optimizer=round(optimizer), activations=cost.kept, logits=cost.logits,
            peak=weights + round(optimizer) + max(in_passes, gradients), operations=operations, hours=hours,
        )  # fmt: skip

    def gathered(self) -> int:
        """Return the bytes of weights that a device gathers: two layers of the LLM, and all that are in no layer."""
        sizes = [size_of(layer.parameters()) for layer in self.model.language_model.model.layers]
        return size_of(self.task.parameters()) - sum(sizes) + 2 * max(sizes)


def make_fake(module: nn.Module) -> None:
    """Replace the meta tensors of a module, in place, by tensors without values on the CPU; call in a fake mode."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for members in (part._parameters, part._buffers):  # noqa: SLF001 - the public setters keep no ties
            for name, value in members.items():
                if value is not None and id(value) not in made:
                    empty: Any = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    made[id(value)] = nn.Parameter(empty, value.requires_grad) if members is part._parameters else empty  # noqa: SLF001
                if value is not None:
                    members[name] = made[id(value)]


def size_of(parameters: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(parameter.nbytes for parameter in parameters)
