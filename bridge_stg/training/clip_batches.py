"""Batches of annotated clips: frames as the runtime reads them, questions, the answers' ids, labels. No torch modules.

Frames, prompt, grammar and the rule from spans to groups are the runtime's own, so that a model is trained on what it
will be asked. Knows nothing of files of annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings, video_budget, video_segment
from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S, groups_of_span
from bridge_stg.runtime.chain.vision_pass import merged_grid
from bridge_stg.runtime.errors import AnnotationError, BridgeError
from bridge_stg.runtime.video.open import open_source

TRACKED = 0.125
"""Share of questions about what is there from the start that are asked by the first box."""
NEAR_AN_END = 5
"""Fine frames of a clip that lie side by side around an end of a span; the rest are spread."""
AROUND_S = 1.0
"""Seconds around a span that most of the spread frames come from."""


@dataclass(frozen=True, eq=False)
class ClipQuestion:
    """One question about a clip, and what is true.

    Attributes:
        where: `file:line`, for errors.
        query: the sentence.
        span: start and end in seconds; None if the target is not there.
        times: float64 [N], of the boxes, increasing; none where only the span is known.
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the video as it is shown.
        track: whether it is asked by its first box only.
    """

    where: str
    query: str
    span: tuple[float, float] | None
    times: np.ndarray
    boxes: np.ndarray
    track: bool = False


@dataclass(frozen=True)
class Clip:
    """A video or image with its questions."""

    path: Path
    questions: tuple[ClipQuestion, ...]


@dataclass(frozen=True, eq=False)
class ClipBatch:
    """One clip with B questions. Rows of text are right-padded."""

    frames: Tensor  # uint8 [G, P, height, width, 3]
    fine: Tensor  # uint8 [F, height, width, 3]
    fine_times: Tensor  # float32 [F]
    prefix: Segment
    input_ids: Tensor  # int64 [B, L]: query, answer, bridging queries
    length: Tensor  # int64 [B], without padding
    target: Tensor  # int64 [B, L], the id that follows each position; −100 where the grammar leaves no choice
    boxes: Tensor  # float32 [B, F, 4], cxcywh in 0..1
    positive: Tensor  # bool [B, F], the target is there
    mask: Tensor  # bool [B, F], frames that the question looks at
    counted: Tensor  # bool [B, F], of these the ones with a known truth


class ClipBatches:
    """Makes batch number `step`; picklable, so that a worker process can hold it.

    Args:
        spec: the model's rules.
        tokenizer: path of its tokenizer.json.
        clips: all of them.
        seed: batch `step` follows from it and the step alone.
        clips_per_step: clips of a batch.
        questions: most questions of a clip that are asked at once.
        fine_frames: fine frames of a clip.
        max_visual_tokens: what a video may take of the prompt; None: the model's own bound.
    """

    def __init__(
        self, spec: ModelSpec, tokenizer: Path, clips: Sequence[Clip], *, seed: int, clips_per_step: int = 1,
        questions: int = 4, fine_frames: int = 16, max_visual_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.tokenizer_path, self.clips, self.seed = spec, tokenizer, tuple(clips), seed
        self.clips_per_step, self.questions, self.fine_frames = clips_per_step, questions, fine_frames
        self.max_visual_tokens = max_visual_tokens

    def __call__(self, step: int) -> list[ClipBatch] | BridgeError:
        """Return the clips of a step; every epoch goes through all of them in another order.

        An error is returned, not raised: it would leave a worker process with that process's traceback as its message.
        """
        tokenizer = Tokenizer.from_file(self.tokenizer_path)
        made = []
        for place in range(step * self.clips_per_step, (step + 1) * self.clips_per_step):
            epoch, index = divmod(place, len(self.clips))
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.clips))
            rng = np.random.default_rng((self.seed, 1, place))
            try:
                made.append(self.batch(rng, tokenizer, self.clips[order[index]]))
            except BridgeError as error:
                return error
        return made

    def batch(self, rng: np.random.Generator, tokenizer: Tokenizer, clip: Clip) -> ClipBatch:
        """Return one clip with some of its questions.

        Raises:
            BridgeError: the video cannot be read, a question cannot be asked, or its truth lies outside of the video.
        """
        spec, asked = self.spec, list(clip.questions)
        if len(asked) > self.questions:
            asked = [asked[i] for i in sorted(rng.choice(len(asked), self.questions, replace=False))]
        with open_source(clip.path, spec, budget=video_budget(tokenizer, spec, self.max_visual_tokens)) as source:
            coarse, grid, size = source.coarse(), source.fine_grid(), (source.width, source.height)
            for question in asked:
                check_span(question, source.duration_s, is_image=source.is_image)
            spans = [q.span for q in asked if q.span is not None]
            fine = source.fine(choose_fine(rng, grid, spans, rate=spec.frames.fine_fps, count=self.fine_frames))
        strings = time_strings(coarse.group_times, spec.prompt)
        prefix = video_segment(tokenizer, spec, coarse.group_times, merged_grid(coarse.frames, spec))
        free = AnswerGrammar(tokenizer, spec.prompt, strings)
        from_first = AnswerGrammar(tokenizer, spec.prompt, strings, allow_none=False, first_start=0)
        shape = (len(asked), len(fine.times))
        boxes, positive = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
        mask, counted, rows = np.ones(shape, bool), np.ones(shape, bool), []
        for b, question in enumerate(asked):
            groups = None if question.span is None else groups_of_span(*question.span, coarse.times)
            first_box = None
            if question.span is not None:
                start, end = question.span
                positive[b] = (fine.times >= start - TIME_TOLERANCE_S) & (fine.times < end - TIME_TOLERANCE_S)
                near = (fine.times > start - rng.uniform(0.3, 1.2)) & (fine.times < end + rng.uniform(0.3, 1.2))
                if rng.random() < 0.5 and near.any():
                    mask[b] = near
                if len(question.times):
                    boxes[b] = boxes_at(question, fine.times, size)
                    tracked = groups is not None and groups[0] == 0 and rng.random() < TRACKED
                    if question.track or tracked:
                        first_box = (question.boxes[0] / np.array([*size, *size])).clip(0, 1)
                else:
                    counted[b] = ~positive[b]
            if first_box is not None and groups is not None:
                groups = (0, groups[1])
            query = query_segment(tokenizer, spec, question.query, prefix.next_position, first_box=first_box)
            grammar = free if first_box is None else from_first
            rows.append(answer_row(query.input_ids, grammar, groups, spec.language.bridging_ids))
        ids, target, length = pad_rows(rows)
        return ClipBatch(
            frames=torch.from_numpy(coarse.frames),
            fine=torch.from_numpy(fine.frames),
            fine_times=torch.from_numpy(fine.times.astype(np.float32)),
            prefix=prefix, input_ids=ids, length=length, target=target,
            boxes=torch.from_numpy(boxes), positive=torch.from_numpy(positive),
            mask=torch.from_numpy(mask), counted=torch.from_numpy(counted & mask),
        )  # fmt: skip


def check_span(question: ClipQuestion, duration_s: float, *, is_image: bool) -> None:
    """Raise AnnotationError if a question's span begins behind the end of its video."""
    if question.span is not None and not is_image and question.span[0] >= duration_s:
        raise AnnotationError(
            "annotation.bad_field",
            f"{question.where}: the field 'span' begins at {question.span[0]:g} s, but the video is {duration_s:.2f} s "
            "long; expected seconds from its first frame",
        )


def choose_fine(
    rng: np.random.Generator, grid: np.ndarray, spans: Sequence[tuple[float, float]], *, rate: float, count: int
) -> np.ndarray:
    """Return sorted times of the fine grid [K]: a run around one end of one span, the rest around it and anywhere.

    A clip without spans gives any frames; one with few fine frames all of them.
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


def boxes_at(question: ClipQuestion, times: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a question's boxes at times [F], cxcywh in 0..1, float32 [F, 4].

    Between two annotated times they are interpolated; before the first and behind the last the nearest one holds.
    """
    width, height = size
    corners = np.stack([np.interp(times, question.times, question.boxes[:, i]) for i in range(4)], -1)
    corners = (corners / np.array([width, height, width, height])).clip(0, 1)
    return np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)


def answer_row(
    query_ids: np.ndarray, grammar: AnswerGrammar, groups: tuple[int, int] | None, bridging_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return ids and targets of one row: the query, its answer, the bridging ids.

    Targets are the ids that the grammar leaves to the model; what follows without a choice is never asked for.
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
    ids, target = ([row[part] for row in rows] for part in (0, 1))
    return pad_right(ids, 0), pad_right(target, -100), torch.tensor([len(row) for row in ids])


def pad_right(rows: Sequence[list[int]], fill: int) -> Tensor:
    """Return int64 [B, L]: rows of up to L values, filled up."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
