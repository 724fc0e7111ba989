"""Batches for the demo's second training stage: clips with three queries each, answers and labels. No torch modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge_stg.demo.questions import Question, ask, ask_to_track
from bridge_stg.demo.sprites import COLOUR_NAMES, NAMES
from bridge_stg.demo.synthetic import DIRECTION_NAMES, FRAME_SIZES, Scene, make_scene
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings, video_segment
from bridge_stg.runtime.chain.spans import groups_of_span
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.training.data.answers import answer_row, pad_right, pad_rows
from bridge_stg.training.data.labels import NEAR_AN_END

LOOKS = len(NAMES) * len(COLOUR_NAMES)
ASKED = (len(NAMES), len(COLOUR_NAMES), len(DIRECTION_NAMES))
QUERIES_PER_CLIP = 3
Span = tuple[int, int] | None  # first and last group; None if the target is absent
ABSENT, TWINS = 0.35, 0.5
"""Share of queries about absent things, and of clips whose first two things differ in direction only."""


@dataclass(frozen=True)
class GroundingBatch:
    """V clips with B queries each, all of one size and length. The V·B rows of text are right-padded."""

    frames: Tensor  # uint8 [V, G, P, height, width, 3]
    fine: Tensor  # uint8 [V, F, height, width, 3]
    fine_times: Tensor  # float32 [V, F]
    prefix: Segment
    input_ids: Tensor  # int64 [V·B, L]: query, answer, bridging queries
    length: Tensor  # int64 [V·B], without padding
    target: Tensor  # int64 [V·B, L], the id that follows each position; −100 where the grammar leaves no choice
    pointer: Tensor  # int64 [V·B, L], the group that the position must predict; −1: none
    span: Tensor  # int64 [V·B, 2], groups; −1: absent
    asked: Tensor  # int64 [V·B, 3]: name, colour and direction in the query; the last class: not in the query
    boxes: Tensor  # float32 [V, B, F, 4]
    positive: Tensor  # bool [V, B, F]
    mask: Tensor  # bool [V, B, F]
    looks: Tensor  # float32 [V, G, LOOKS], 1 for each look in a group
    moving: Tensor  # float32 [V, G, LOOKS, 4]
    time_digits: Tensor  # int64 [G, 2]: whole seconds, first decimal


class BatchMaker:
    """Make batch number `step`, which depends on the seed and the step only; picklable for worker processes."""

    def __init__(self, spec: ModelSpec, tokenizer: Path, seed: int, *, clips: int = 8, fine_frames: int = 8) -> None:
        self.spec, self.tokenizer_path, self.seed = spec, tokenizer, seed
        self.clips, self.fine_frames = clips, fine_frames

    def __call__(self, step: int) -> GroundingBatch:
        """Return the batch; of every eight, one has single images and two have queries to track."""
        rng = np.random.default_rng((self.seed, 2, step))
        still, tracking = step % 8 == 7, step % 8 in {3, 6}
        source = FRAME_SIZES[rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])]
        groups = 1 if still else int(rng.integers(6, 13))
        period = self.spec.vision.temporal_patch_size
        gap = float(rng.choice([1, 0.5, 2], p=[0.8, 0.1, 0.1])) / self.spec.frames.coarse_fps
        samples = np.zeros((1, period)) if still else (np.arange(groups * period) * gap).reshape(groups, period)
        duration = groups * period * gap
        scenes = [
            make_scene(rng, still=still, size=source, duration=duration, twins=TWINS, from_start=0.5 * tracking)
            for _ in range(self.clips * 3 if still else self.clips)
        ]
        return self._batch(rng, scenes, samples, tracking=tracking)

    def _batch(
        self, rng: np.random.Generator, scenes: list[Scene], samples: np.ndarray, *, tracking: bool
    ) -> GroundingBatch:
        tokenizer, still = Tokenizer.from_file(self.tokenizer_path), scenes[0].duration == 0
        factor = self.spec.vision.patch_size * self.spec.vision.merge_size
        (height, width), (fine_h, fine_w) = frame_sizes(scenes[0].height, scenes[0].width, self.spec)
        times = samples.mean(1)
        strings = time_strings(times, self.spec.prompt)
        prefix = video_segment(tokenizer, self.spec, times, (height // factor, width // factor))
        grammar = AnswerGrammar(tokenizer, self.spec.prompt, strings)
        from_first = AnswerGrammar(tokenizer, self.spec.prompt, strings, allow_none=False, first_start=0)
        count = 1 if still else self.fine_frames
        frames, fine, fine_times, rows, spans, asked, pointer = [], [], [], [], [], [], []
        shape = (len(scenes), QUERIES_PER_CLIP, count)
        boxes, positive, mask = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool), np.ones(shape, bool)
        looks = np.zeros((len(scenes), len(times), LOOKS), np.float32)
        moving = np.zeros((*looks.shape, 4), np.float32)
        for v, scene in enumerate(scenes):
            shown = scene.render(samples[:, :1].ravel() if still else samples.ravel(), width, height)
            frames.append(
                np.broadcast_to(shown.reshape(len(samples), -1, height, width, 3), (*samples.shape, height, width, 3))
            )
            queries = three_queries(rng, scene, tracking=tracking)
            at = np.zeros(1) if still else self._fine_times(rng, scene, queries)
            fine.append(scene.render(at, fine_w, fine_h))
            fine_times.append(at)
            for thing in scene.things:
                look = thing.name * len(COLOUR_NAMES) + thing.colour
                there = thing.visible(samples.ravel()).reshape(samples.shape).any(1)
                looks[v, there, look] = 1
                if thing.direction is not None:
                    moving[v, there, look, thing.direction] = 1
            for b, query in enumerate(queries):
                span = first_box = None
                if query.thing is not None:
                    thing = scene.things[query.thing]
                    span = groups_of_span(thing.start, thing.end, samples)
                    boxes[v, b], positive[v, b] = thing.boxes(at), thing.visible(at)
                    near = (at > thing.start - rng.uniform(0.3, 1.2)) & (at < thing.end + rng.uniform(0.3, 1.2))
                    if rng.random() < 0.5 and near.any():
                        mask[v, b] = near
                    if query.kind == "track":
                        first_box = scene.first_box(query.thing).tolist()
                spans.append(span)
                named = zip((query.name, query.colour, query.direction), ASKED)
                asked.append([classes if value is None else value for value, classes in named])
                segment = query_segment(tokenizer, self.spec, query.text, prefix.next_position, first_box=first_box)
                rule = grammar if first_box is None else from_first
                ids, target = answer_row(segment.input_ids, rule, span, self.spec.language.bridging_ids)
                rows.append((ids, target))
                pointer.append(pointers(ids, target, len(segment.input_ids), rule, span))
        input_ids, targets, length = pad_rows(rows)
        return GroundingBatch(
            frames=torch.from_numpy(np.stack(frames)),
            fine=torch.from_numpy(np.stack(fine)),
            fine_times=torch.from_numpy(np.stack(fine_times).astype(np.float32)),
            prefix=prefix,
            input_ids=input_ids, length=length, target=targets, pointer=pad_right(pointer, -1),
            span=torch.tensor([span or (-1, -1) for span in spans]),
            asked=torch.tensor(asked),
            boxes=torch.from_numpy(boxes), positive=torch.from_numpy(positive), mask=torch.from_numpy(mask),
            looks=torch.from_numpy(looks), moving=torch.from_numpy(moving),
            time_digits=torch.tensor([[int(t), int(f"{t:.1f}"[-1])] for t in times]),
        )  # fmt: skip

    def _fine_times(self, rng: np.random.Generator, scene: Scene, queries: list[Question]) -> np.ndarray:
        """Return sorted times on the fine grid: some around one end of a span, the others in and around the span."""
        rate = self.spec.frames.fine_fps
        last = round(scene.duration * rate) - 1
        targets = [query.thing for query in queries if query.thing is not None]
        thing = scene.things[int(rng.choice(targets)) if targets else 0]
        end = thing.start if rng.random() < 0.5 else thing.end
        first = int(np.clip(round(end * rate) - rng.integers(1, NEAR_AN_END), 0, last - NEAR_AN_END))
        chosen = set(range(first, first + NEAR_AN_END))
        low, high = max(0, round((thing.start - 1) * rate)), min(last, round((thing.end + 1) * rate))
        while len(chosen) < self.fine_frames:
            inside = rng.random() < 0.8
            chosen.add(int(rng.integers(low, high + 1)) if inside and high > low else int(rng.integers(0, last + 1)))
        return np.asarray(sorted(chosen)) / rate


def three_queries(rng: np.random.Generator, scene: Scene, *, tracking: bool) -> list[Question]:
    """Return QUERIES_PER_CLIP queries; with `tracking`, first those of things that are present from the start."""
    queries = [ask_to_track(rng, scene, i) for i, thing in enumerate(scene.things) if tracking and thing.start == 0]
    while len(queries) < QUERIES_PER_CLIP:
        queries += ask(rng, scene, absent=ABSENT)
    return queries[:QUERIES_PER_CLIP]


def pointers(ids: list[int], target: list[int], start: int, grammar: AnswerGrammar, span: Span) -> list[int]:
    """Return the group that each position of a row must predict, −1 for none.

    Predicted are the positions that choose an id of a time, and those after the opening of a time. `ids` and `target`
    are the row's ids and targets, and the answer begins at `start`.
    """
    pointer = [-1] * len(ids)
    if span is None:
        return pointer
    half = len(grammar.time_ids[span[0]])
    for i in range(len(grammar.answer_ids(span))):
        before = start + i - 1
        if target[before] >= 0 or i in (1, half + len(grammar.between) + 1):
            pointer[before] = span[0] if i < half else span[1]
    return pointer
