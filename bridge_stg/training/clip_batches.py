"""Batches of annotated clips: frames, queries, answer ids and labels. No torch modules.

Frames, prompt, grammar and the mapping of spans to groups are the runtime's own, so that training matches inference.
Must not read annotation files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridge_stg.evaluation.datasets.jsonl import Annotation
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings, video_budget, video_segment
from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S, groups_of_span
from bridge_stg.runtime.chain.vision_pass import merged_grid
from bridge_stg.runtime.errors import AnnotationError, BridgeError
from bridge_stg.runtime.video.open import open_source

TRACKED = 0.125  # share of queries for targets present from the start that are given by the first box
NEAR_AN_END = 5  # number of consecutive fine frames around an end of a span; the others are spread
AROUND_S = 1.0  # most of the spread frames are at most this many seconds outside of the span


@dataclass(frozen=True)
class TrainingOptions:
    """Options of a training run."""

    epochs: int = 10
    clips: int = 1  # per step
    questions: int = 4  # largest number of queries per clip and step
    fine_frames: int = 16  # per clip
    learning_rate: float = 1e-4  # peak, of the bridging and spatial parts
    backbone_scale: float = 0.1  # factor on the learning rate of the backbone's weights
    parts: tuple[str, ...] = ("bridging", "spatial", "mergers", "llm")  # trained parts, from `train_clips.PARTS`
    max_visual_tokens: int | None = None  # per video; None: the model's own limit
    seed: int = 0  # of the random order of clips and choice of queries and frames
    bf16: bool = True  # whether matmuls are computed in bfloat16


@dataclass(frozen=True)
class Clip:
    """A video or image with its queries, each of which has a span if its target is present."""

    path: Path
    queries: tuple[Annotation, ...]


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """One clip with B queries. Rows of text are right-padded."""

    frames: Tensor  # uint8 [G, P, height, width, 3]
    fine: Tensor  # uint8 [F, height, width, 3]
    fine_times: Tensor  # float32 [F]
    prefix: Segment
    input_ids: Tensor  # int64 [B, L]: query, answer, bridging queries
    length: Tensor  # int64 [B], without padding
    target: Tensor  # int64 [B, L], the id that follows each position; −100 where the grammar leaves no choice
    boxes: Tensor  # float32 [B, F, 4], cxcywh in 0..1
    positive: Tensor  # bool [B, F], the target is present
    mask: Tensor  # bool [B, F], frames that the query attends to
    counted: Tensor  # bool [B, F], of these, the frames whose truth is known


class ClipBatches:
    """Make batch number `step`, which depends on the seed and the step only; picklable for worker processes."""

    def __init__(self, spec: ModelSpec, tokenizer: Path, clips: Sequence[Clip], options: TrainingOptions) -> None:
        self.spec, self.tokenizer_path, self.clips, self.options = spec, tokenizer, tuple(clips), options

    def __call__(self, step: int) -> list[ClipBatch] | BridgeError:
        """Return the clips of a step; every epoch has all clips in another random order.

        An error is returned, not raised, since raising in a worker process replaces the message by a traceback.
        """
        tokenizer, seed, count = Tokenizer.from_file(self.tokenizer_path), self.options.seed, self.options.clips
        made = []
        for place in range(step * count, (step + 1) * count):
            epoch, index = divmod(place, len(self.clips))
            order = np.random.default_rng((seed, 0, epoch)).permutation(len(self.clips))
            rng = np.random.default_rng((seed, 1, place))
            try:
                made.append(self.batch(rng, tokenizer, self.clips[order[index]]))
            except BridgeError as error:
                return error
        return made

    def batch(self, rng: np.random.Generator, tokenizer: Tokenizer, clip: Clip) -> ClipBatch:
        """Return one clip with some of its queries."""
        spec, options, queries = self.spec, self.options, list(clip.queries)
        if len(queries) > options.questions:
            queries = [queries[i] for i in sorted(rng.choice(len(queries), options.questions, replace=False))]
        with open_source(clip.path, spec, budget=video_budget(tokenizer, spec, options.max_visual_tokens)) as source:
            coarse, grid, size = source.coarse(), source.fine_grid(), (source.width, source.height)
            for query in queries:
                check_span(query, source.duration_s, is_image=source.is_image)
            spans = [query.span for query in queries if query.span is not None]
            fine = source.fine(choose_fine(rng, grid, spans, rate=spec.frames.fine_fps, count=options.fine_frames))
        strings = time_strings(coarse.group_times, spec.prompt)
        prefix = video_segment(tokenizer, spec, coarse.group_times, merged_grid(coarse.frames, spec))
        free = AnswerGrammar(tokenizer, spec.prompt, strings)
        from_first = AnswerGrammar(tokenizer, spec.prompt, strings, allow_none=False, first_start=0)
        shape = (len(queries), len(fine.times))
        boxes, positive = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
        mask, counted, rows = np.ones(shape, bool), np.ones(shape, bool), []
        for b, query in enumerate(queries):
            groups = first_box = None
            if query.span is not None:
                start, end = query.span
                groups = groups_of_span(start, end, coarse.times)
                positive[b] = (fine.times >= start - TIME_TOLERANCE_S) & (fine.times < end - TIME_TOLERANCE_S)
                near = (fine.times > start - rng.uniform(0.3, 1.2)) & (fine.times < end + rng.uniform(0.3, 1.2))
                if rng.random() < 0.5 and near.any():
                    mask[b] = near
                if len(query.times):
                    boxes[b] = boxes_at(query, fine.times, size)
                    tracked = groups[0] == 0 and rng.random() < TRACKED
                    if query.task == "track" or tracked:
                        first_box, groups = (query.boxes[0] / np.array([*size, *size])).clip(0, 1), (0, groups[1])
                else:
                    counted[b] = ~positive[b]
            segment = query_segment(tokenizer, spec, query.query, prefix.next_position, first_box=first_box)
            grammar = free if first_box is None else from_first
            rows.append(answer_row(segment.input_ids, grammar, groups, spec.language.bridging_ids))
        ids, target, length = pad_rows(rows)
        return ClipBatch(
            frames=torch.from_numpy(coarse.frames),
            fine=torch.from_numpy(fine.frames),
            fine_times=torch.from_numpy(fine.times.astype(np.float32)),
            prefix=prefix, input_ids=ids, length=length, target=target,
            boxes=torch.from_numpy(boxes), positive=torch.from_numpy(positive),
            mask=torch.from_numpy(mask), counted=torch.from_numpy(counted & mask),
        )  # fmt: skip


def check_span(query: Annotation, duration_s: float, *, is_image: bool) -> None:
    """Raise AnnotationError if a query's span begins after the end of the video."""
    if query.span is not None and not is_image and query.span[0] >= duration_s:
        found = f"{query.where}: the field 'span' begins at {query.span[0]:g} s, but the video is {duration_s:.2f} s"
        raise AnnotationError("annotation.bad_field", f"{found} long; expected seconds from its first frame")


def choose_fine(
    rng: np.random.Generator, grid: np.ndarray, spans: Sequence[tuple[float, float]], *, rate: float, count: int
) -> np.ndarray:
    """Return sorted times [count] of the fine grid: some around one end of one span, the others around it or anywhere.

    Without spans, all times are random. A grid of at most `count` times is returned completely.
    """
    if len(grid) <= count:
        return grid
    last = len(grid) - 1
    start, end = spans[int(rng.integers(len(spans)))] if spans else (0.0, grid[-1])
    run = min(NEAR_AN_END, count)
    first = round((start if rng.random() < 0.5 else end) * rate) - int(rng.integers(1, run + 1))
    first = int(np.clip(first, 0, last - run + 1))
    chosen = set(range(first, first + run))
    low, high = max(0, round((start - AROUND_S) * rate)), min(last, round((end + AROUND_S) * rate))
    while len(chosen) < count:
        inside = rng.random() < 0.8 and low < high
        chosen.add(int(rng.integers(low, high + 1)) if inside else int(rng.integers(0, last + 1)))
    return grid[sorted(chosen)]


def boxes_at(query: Annotation, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a query's boxes at times [F], cxcywh in 0..1, [F, 4].

    They are interpolated between annotated times; before the first and after the last, the nearest box is used.
    """
    width, height = size
    corners = np.stack([np.interp(times, query.times, query.boxes[:, i]) for i in range(4)], -1)
    corners = (corners / np.array([width, height, width, height])).clip(0, 1)
    return np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)


def answer_row(
    query_ids: np.ndarray, grammar: AnswerGrammar, groups: tuple[int, int] | None, bridging_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return ids and targets of one row: query, answer and bridging ids.

    Targets are the answer ids among which the grammar leaves a choice; all others are −100.
    """
    answer, state = grammar.answer_ids(groups), grammar.start()
    ids = [*map(int, query_ids), *answer, *bridging_ids]
    target = [-100] * len(ids)
    while not state.done:
        state.forced()
        if not state.done:
            place = len(state.ids)
            target[len(query_ids) + place - 1] = answer[place]
            state.choose(answer[place])
    return ids, target


def pad_rows(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and targets [B, L], right-padded, and lengths [B]."""
    ids, target = zip(*rows)
    return pad_right(ids, 0), pad_right(target, -100), torch.tensor([*map(len, ids)])


def pad_right(rows: Sequence[list[int]], fill: int) -> Tensor:
    """Pad rows on the right to int64 [B, L]."""
    return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=fill)
