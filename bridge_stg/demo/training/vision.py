"""First stage of the demo's training: only the vision encoder, on single groups of frames, with losses per patch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import FRAME_SIZES, make_scene
from bridge_stg.demo.training.batches import LOOKS
from bridge_stg.model.model import BridgeSTG
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import merge_order, vision_tables
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.training.loss.clip_task import ClipTask

PAIR_GAP_S = 0.5
SHIFT = 10.0
"""Weight of the losses of displacements, which are small: with 1, nothing was learned of them in 3000 steps."""


class DenseHead(nn.Module):
    """Predictions for training only: objectness, name, colour, box and displacement of what covers a patch.

    For each visual token, the looks of what covers it, and the displacement.
    """

    def __init__(self, channels: int, merged: int) -> None:
        super().__init__()
        self.patch = nn.Linear(channels, 1 + len(NAMES) + len(COLOUR_NAMES) + 4 + 2)
        self.token = nn.Linear(merged, LOOKS + 2)


def vision_batch(spec: ModelSpec, seed: int, step: int, *, patches: int = 9000) -> dict[str, Tensor]:
    """Render groups of frames, and label their patches (in merge order) with the thing that covers them.

    Returns:
        frames uint8 [G, P, height, width, 3]; name, colour int64 [G, N], −1 for background; box float [G, N, 4],
        centre offset and size in patches / 4; shift float [G, N, 2], displacement within the group in patches.
    """
    rng = np.random.default_rng((seed, 1, step))
    source = FRAME_SIZES[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
    fine = bool(step % 2)
    vision = spec.vision
    height, width = frame_sizes(source[1], source[0], spec)[fine]
    rows, columns = height // vision.patch_size, width // vision.patch_size
    count = patches // (rows * columns)
    period = vision.temporal_patch_size
    order = merge_order(rows, columns, vision.merge_size)
    centre = np.stack([(order % columns + 0.5) / columns, (order // columns + 0.5) / rows], -1)
    frames = np.empty((count, period, height, width, 3), np.uint8)
    labels = np.full((2, count, rows * columns), -1)
    box = np.zeros((count, rows * columns, 4), np.float32)
    shift = np.zeros((count, rows * columns, 2), np.float32)
    grid = np.array([columns, rows], np.float32)
    for i in range(count):
        still = fine or rng.random() < 0.3
        scene = make_scene(rng, still=bool(rng.random() < 0.6) if still else False, size=source)
        target = scene.things[rng.integers(len(scene.things))]
        time = float(rng.uniform(target.start, max(target.end - PAIR_GAP_S, target.start)))
        times = np.full(period, time) if still else time + np.arange(period) * PAIR_GAP_S
        frames[i] = scene.render(times, width, height)
        for thing in scene.things:
            visible = thing.visible(times)
            if not visible.any():
                continue
            path = thing.boxes(times)[visible]
            mean = path.mean(0)
            inside = (np.abs(centre - mean[:2]) < np.maximum(mean[2:] / 2 * 0.95, 0)).all(1)
            inside[np.argmin(((centre - mean[:2]) ** 2).sum(1))] = True
            labels[:, i, inside] = [[thing.name], [thing.colour]]
            box[i, inside] = np.concatenate(
                [(mean[:2] - centre[inside]) * grid, np.tile(mean[2:] * grid, (inside.sum(), 1))], 1
            )
            shift[i, inside] = (path[-1] - path[0])[:2] * grid
    return {
        "frames": torch.from_numpy(frames), "name": torch.from_numpy(labels[0]), "colour": torch.from_numpy(labels[1]),
        "box": torch.from_numpy(box / 4), "shift": torch.from_numpy(shift),
    }  # fmt: skip


class VisionTask(ClipTask):
    """The loss of the vision encoder; the dense head is discarded after training."""

    def __init__(self, model: BridgeSTG) -> None:
        super().__init__(model)
        self.head = DenseHead(model.spec.vision.hidden_size, model.spec.language.hidden_size)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:  # type: ignore[override]
        """Return the loss of a batch, and its parts to log."""
        encoder, head, spec, frames = self.model.vision_encoder, self.head, self.model.spec, batch["frames"]
        rows, columns = (size // spec.vision.patch_size for size in frames.shape[2:4])
        positions = [torch.from_numpy(table) for table in vision_tables(spec.vision, rows, columns).values()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            states = encoder.hidden_states(frames, *positions)
            dense = head.patch(states[-1])
            merged = head.token(encoder.merge(states)[0])
        dense, merged = dense.float(), merged.float().unflatten(0, (len(frames), -1))
        parts = dense.split([1, len(NAMES), len(COLOUR_NAMES), 4, 2], -1)
        inside = batch["name"] >= 0
        block = spec.vision.merge_size**2
        looks = batch["name"] * len(COLOUR_NAMES) + batch["colour"]
        there = torch.zeros(*inside.shape, LOOKS).scatter_(2, looks.clamp(min=0)[..., None], inside[..., None].float())
        there = there.unflatten(1, (-1, block)).amax(2)
        covered = inside.unflatten(1, (-1, block))
        moved = batch["shift"].unflatten(1, (-1, block)).sum(2) / covered.sum(2).clamp(min=1)[..., None]
        merged, token_shift = merged.split([LOOKS, 2], -1)
        covered = covered.any(2)
        figures = {
            "objectness": 4 * F.binary_cross_entropy_with_logits(parts[0][..., 0], inside.float()),
            "name": F.cross_entropy(parts[1][inside], batch["name"][inside]),
            "colour": F.cross_entropy(parts[2][inside], batch["colour"][inside]),
            "box": 4 * F.smooth_l1_loss(parts[3][inside], batch["box"][inside], beta=0.1),
            "shift": SHIFT * F.smooth_l1_loss(parts[4][inside], batch["shift"][inside], beta=0.1),
            "token_shift": SHIFT * F.smooth_l1_loss(token_shift[covered], moved[covered], beta=0.1),
            "token": 10 * F.binary_cross_entropy_with_logits(merged, there),
        }
        total = torch.stack(list(figures.values())).sum()
        logged = {k: v.item() for k, v in figures.items()}
        logged["name_accuracy"] = float((parts[1].argmax(-1) == batch["name"])[inside].float().mean())
        return total, logged
