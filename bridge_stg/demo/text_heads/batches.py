"""Batches for training the demo's text heads: clips or images with three queries each. No torch modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge_stg.demo.sprites import COLOUR_NAMES
from bridge_stg.demo.synthetic import FRAME_SIZES, Scene, make_scene
from bridge_stg.demo.text_heads.model import CLOSE, OPEN, SCALE, SEPARATOR, STOP
from bridge_stg.demo.training.batches import LOOKS, three_queries
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy
from bridge_stg.runtime.chain.positions import VisualGrid
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, time_numbers, token_id, video_segment, visual_segment
from bridge_stg.runtime.heads.json_grammar import BOX, END, LABEL, START, TIME, json_label
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.training.data.answers import pad_right, pad_rows

TWINS = 0.5  # share of clips whose first two things differ in direction only
SPANS = 0.25  # share of queries in clips that ask for the span alone
STILLS = 0.5  # share of images in which everything is visible; the others are frames of clips
IMAGES_PER_CLIP = 2
Entry = tuple[int, np.ndarray]  # group, and box [4] cxcywh in 0..1


@dataclass(frozen=True)
class TextBatch:
    """V clips or images with B queries each, all of one size and length. The V·B rows of text are right-padded."""

    frames: Tensor  # uint8 [V, G, P, height, width, 3]
    prefix: Segment
    input_ids: Tensor  # int64 [V·B, L]: query and answer
    target: Tensor  # int64 [V·B, L], the id that follows each position of the answer; −100 elsewhere
    cell: (
        Tensor  # int64 [V·B, L], the visual token at the target's centre where a side of its box follows; −1 elsewhere
    )
    box: Tensor  # float32 [V·B, L, 4], the box there, cxcywh in 0..1
    looks: Tensor  # float32 [V, G·n, LOOKS], 1 for the look of a thing that covers a visual token
    boxes: Tensor  # float32 [V, G·n, 4], the box of that thing; zeros: background
    places: Tensor  # float32 [V, G·n, 2], the centre of a visual token in the frame


class TextBatchMaker:
    """Make batch number `step`, which depends on the seed and the step only; picklable for worker processes."""

    def __init__(self, spec: ModelSpec, tokenizer: Path, seed: int, *, clips: int = 8) -> None:
        self.spec, self.tokenizer_path, self.seed, self.clips = spec, tokenizer, seed, clips

    def __call__(self, step: int) -> TextBatch:
        """Return the batch: clips at even steps, single images at odd ones."""
        rng = np.random.default_rng((self.seed, 3, step))
        source = FRAME_SIZES[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
        period = self.spec.vision.temporal_patch_size
        if step % 2:
            scenes, times = [], []
            for _ in range(IMAGES_PER_CLIP * self.clips):
                still = rng.random() < STILLS
                scene = make_scene(rng, still=still, size=source, twins=TWINS)
                thing = scene.things[int(rng.integers(len(scene.things)))]
                scenes.append(scene)
                times.append(np.full((1, period), 0.0 if still else rng.uniform(thing.start, thing.end)))
            return self._batch(rng, scenes, times, image=True)
        groups = int(rng.integers(6, 13))
        gap = float(rng.choice([1, 0.5, 2], p=[0.8, 0.1, 0.1])) / self.spec.frames.coarse_fps
        samples = (np.arange(groups * period) * gap).reshape(groups, period)
        duration = groups * period * gap
        scenes = [make_scene(rng, size=source, duration=duration, twins=TWINS) for _ in range(self.clips)]
        return self._batch(rng, scenes, [samples] * self.clips, image=False)

    def _batch(
        self, rng: np.random.Generator, scenes: Sequence[Scene], samples: Sequence[np.ndarray], *, image: bool
    ) -> TextBatch:
        """Return the batch of scenes, each seen at its times [G, P]."""
        spec, tokenizer = self.spec, Tokenizer.from_file(self.tokenizer_path)
        text = spec.text
        assert text is not None
        factor = spec.vision.patch_size * spec.vision.merge_size
        height, width = frame_sizes(scenes[0].height, scenes[0].width, spec)[int(image)]
        grid = height // factor, width // factor
        groups = len(samples[0])
        if image:
            prefix = visual_segment(tokenizer, spec, text.image_head, text.image_token, VisualGrid(1, *grid))
        else:
            prefix = video_segment(tokenizer, spec, samples[0].mean(1), grid)
        turn = text.image_turn if image else text.video_turn
        numbers = time_numbers(samples[0].mean(1), spec.prompt)
        cells = grid[0] * grid[1]
        looks = np.zeros((len(scenes), groups * cells, LOOKS), np.float32)
        boxes = np.zeros((len(scenes), groups * cells, 4), np.float32)
        frames, rows, cell, box = [], [], [], []
        for v, (scene, at) in enumerate(zip(scenes, samples)):
            shown = scene.render(at[:, :1].ravel() if image else at.ravel(), width, height)
            shown = shown.reshape(groups, -1, height, width, 3)
            frames.append(np.broadcast_to(shown, (*at.shape, height, width, 3)))
            entries = [seen_in(scene, i, at) for i in range(len(scene.things))]
            for thing, found in zip(scene.things, entries):
                for group, where in found:
                    covered = group * cells + covered_cells(where, grid)
                    looks[v, covered, thing.name * len(COLOUR_NAMES) + thing.colour] = 1
                    boxes[v, covered] = where
            for query in three_queries(rng, scene, tracking=False):
                found = [] if query.thing is None else entries[query.thing]
                if image:
                    form, answer = text.image, boxes_text(found, (), query.text)
                elif rng.random() < SPANS:
                    form, answer = text.span, span_text(found, numbers)
                else:
                    form, answer = text.tube, boxes_text(found, numbers, query.text)
                message = turn.replace("{message}", form.replace("{query}", query.text))
                ids, target, places = row(tokenizer, message, answer)
                rows.append((ids, target))
                cell.append([-1] * len(ids))
                box.append(np.zeros((len(ids), 4), np.float32))
                for place, (group, where) in zip(places, found):
                    sides = slice(place, place + 4)
                    cell[-1][sides] = [group * cells + nearest_cell(where, grid)] * 4
                    box[-1][sides] = where
        input_ids, targets, _ = pad_rows(rows)
        padded = torch.zeros(*input_ids.shape, 4)
        for i, values in enumerate(box):
            padded[i, : len(values)] = torch.from_numpy(values)
        return TextBatch(
            frames=torch.from_numpy(np.stack(frames)), prefix=prefix, input_ids=input_ids, target=targets,
            cell=pad_right(cell, -1), box=padded, looks=torch.from_numpy(looks), boxes=torch.from_numpy(boxes),
            places=torch.from_numpy(np.tile(cell_centres(grid), (len(scenes), groups, 1)).astype(np.float32)),
        )  # fmt: skip


def seen_in(scene: Scene, thing: int, samples: np.ndarray) -> list[Entry]:
    """Return the groups of samples [G, P] in which a thing is visible, with its box at the mean time of each."""
    target = scene.things[thing]
    groups = np.flatnonzero(target.visible(samples.ravel()).reshape(samples.shape).any(1))
    return list(zip(groups.tolist(), target.boxes(samples[groups].mean(1)).clip(0, 1)))


def boxes_text(found: Sequence[Entry], numbers: Sequence[str], query: str) -> str:
    """Return the list of boxes that answers a query; without `numbers`, the times of the groups, it has no times."""
    entries = []
    for group, box in found:
        sides = np.round(box_cxcywh_to_xyxy(box) * SCALE).astype(int).clip(0, SCALE)
        left, top = (sides[:2]).clip(0, SCALE - 1)
        right, bottom = max(left + 1, sides[2]), max(top + 1, sides[3])
        time = f"{TIME}{numbers[group]}, " if numbers else "{"
        entries.append(f"{time}{BOX}{left}, {top}, {right}, {bottom}]{LABEL}{json_label(query)}}}")
    return f"{OPEN}{SEPARATOR.join(entries)}{CLOSE}"


def span_text(found: Sequence[Entry], numbers: Sequence[str]) -> str:
    """Return the answer that names the first and the last time of the groups, or that there is none."""
    if not found:
        return json.dumps(None)
    return f"{START}{numbers[found[0][0]]}{END}{numbers[found[-1][0]]}}}"


def row(tokenizer: Tokenizer, message: str, answer: str) -> tuple[list[int], list[int], list[int]]:
    """Return the ids of a message and its answer, their targets, and the positions of the text before each box."""
    prompt, written = tokenizer.encode(message), tokenizer.encode(answer)
    ids = prompt + written
    target = [-100] * (len(prompt) - 1) + written + [token_id(tokenizer, STOP)]
    before = token_id(tokenizer, BOX)
    return ids, target, [len(prompt) + i for i, token in enumerate(written) if token == before]


def cell_centres(grid: tuple[int, int]) -> np.ndarray:
    """Return the centres [n, 2], x and y in 0..1, of the visual tokens of a group with (rows, columns) `grid`."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return (np.stack([x, y], 1) + 0.5) / [grid[1], grid[0]]


def nearest_cell(box: np.ndarray, grid: tuple[int, int]) -> int:
    """Return the visual token in which the centre of a box [4] lies."""
    return int(((cell_centres(grid) - box[:2]) ** 2).sum(1).argmin())


def covered_cells(box: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return the visual tokens whose centres lie in a box [4], and the one in which its own centre lies."""
    inside = (np.abs(cell_centres(grid) - box[:2]) < box[2:] / 2 * 0.9).all(1)
    inside[nearest_cell(box, grid)] = True
    return np.flatnonzero(inside)
