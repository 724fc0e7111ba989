"""Batches of annotated clips: frames, queries, answer ids and labels. No torch modules.

Frames, prompt, grammar and the mapping of spans to groups are the runtime's own, so that training matches inference.
Must not read annotation files. One clip is in memory at a time; see media.py for its bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime.bundle.bundle import file_sha256
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings, video_budget, video_segment
from bridge_stg.runtime.chain.spans import groups_of_span
from bridge_stg.runtime.chain.vision_pass import merged_grid
from bridge_stg.runtime.errors import AnnotationError, BridgeError, QueryError, VideoError
from bridge_stg.runtime.host.failures import MESSAGES, host_error, reporting_host_errors
from bridge_stg.training.data.answers import answer_row, pad_rows
from bridge_stg.training.data.augment import View, choose_view
from bridge_stg.training.data.checks import check_span
from bridge_stg.training.data.frame_cache import ClipFrames, FrameCache, read_frames
from bridge_stg.training.data.labels import Label, choose_fine_times, label_of
from bridge_stg.training.data.media import Medium, open_clip
from bridge_stg.training.data.micro_batch import MicroBatch, Skipped
from bridge_stg.training.data.mixture import Mixture
from bridge_stg.training.data.sources import Clip

ATTEMPTS = 8  # clips that are tried for a place
CONTENT, FINE_TIMES = 10, 11  # purposes of random numbers, besides those of the mixture


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


@dataclass(frozen=True, eq=False)
class Row:
    """A query of a batch: its sample, its text, and its label; None: the target is absent."""

    sample: Sample
    text: str
    label: Label | None


class ClipBatches:
    """Make the micro-batch of a place, one clip; it depends on the mixture and the place only.

    Picklable for worker processes.

    Args:
        spec: rules of the model's frames, prompt and answer.
        tokenizer: its tokenizer.json.
        mixture: the clip at each place, and the rules of the data.
    """

    def __init__(self, spec: ModelSpec, tokenizer: Path, mixture: Mixture) -> None:
        self.spec, self.tokenizer_path, self.mixture, self.recipe = spec, tokenizer, mixture, mixture.recipe

    def __call__(self, place: int) -> MicroBatch | BridgeError:
        """Return the micro-batch of a place; a clip that cannot be read is replaced by another one of its source.

        An error that concerns no single clip is returned, not raised, since raising in a worker process replaces the
        message by a traceback.
        """
        skipped: list[Skipped] = []
        try:
            with reporting_host_errors():
                for attempt in range(ATTEMPTS):
                    clip = self.mixture.index.clips[self.mixture.clip(place, attempt)]
                    try:
                        return MicroBatch(self.batch(place, attempt), clip.name, tuple(skipped))
                    except (VideoError, AnnotationError, QueryError) as error:
                        found = host_error(error)
                        if found is not None and found.code in MESSAGES:  # not the clip's fault
                            return found
                        skipped.append(Skipped(clip.name, str(error)))
        except BridgeError as error:
            return error
        message = f"{ATTEMPTS} clips in a row cannot be read. The first is {skipped[0].media}: {skipped[0].reason}"
        return AnnotationError("annotation.broken_media", message)

    def batch(self, place: int, attempt: int = 0) -> ClipBatch:
        """Return the clip of a place with some of its queries. Raises BridgeError if it cannot be read."""
        spec, recipe, number = self.spec, self.recipe, self.mixture.clip(place, attempt)
        clip, medium = self.mixture.index.clips[number], self.mixture.index.sizes[number].medium
        rng, tokenizer = self.mixture.rng(CONTENT, place, attempt), tokenizer_of(self.tokenizer_path)
        rows = self.rows(rng, number)
        view = choose_view(
            rng, recipe.augment, medium, [row.label for row in rows], [row.text for row in rows],
            tracks=any(row.sample.task == "track" for row in rows),
            group_s=spec.vision.temporal_patch_size / spec.frames.coarse_fps,
        )  # fmt: skip
        frames, later_s = self.frames(clip, medium, view, rows, (place, attempt))
        labels = [row.label and view.label(row.label.shifted(later_s), medium.size) for row in rows]
        queries = [view.query(row.text) for row in rows]
        coarse, fine = view.frames(frames.coarse), view.frames(np.asarray(frames.fine.frames))
        group_times = np.asarray(frames.times.mean(axis=1))
        strings = time_strings(group_times, spec.prompt)
        prefix = video_segment(tokenizer, spec, group_times, merged_grid(coarse, spec))
        free = AnswerGrammar(tokenizer, spec.prompt, strings)
        from_first = AnswerGrammar(tokenizer, spec.prompt, strings, allow_none=False, first_start=0)
        times = frames.fine.times
        shape = (len(rows), len(times))
        boxes, positive = np.zeros((*shape, 4), np.float32), np.zeros(shape, bool)
        mask, counted, texts = np.ones(shape, bool), np.ones(shape, bool), []
        for b, (row, label, query) in enumerate(zip(rows, labels, queries)):
            groups = first_box = None
            if label is not None:
                start, end = label.span
                groups = groups_of_span(start, end, frames.times)
                positive[b], counted[b] = label.positive(times), label.counted(times)
                near = (times > start - rng.uniform(0.3, 1.2)) & (times < end + rng.uniform(0.3, 1.2))
                if rng.random() < recipe.near_span and near.any():
                    mask[b] = near
                if len(label.times):
                    boxes[b] = cxcywh(label.boxes_at(times))
                    tracked = groups[0] == 0 and rng.random() < recipe.tracked
                    if row.sample.task == "track" or tracked:
                        first_box, groups = label.boxes[0], (0, groups[1])
            segment = query_segment(tokenizer, spec, query, prefix.next_position, first_box=first_box)
            grammar = free if first_box is None else from_first
            texts.append(answer_row(segment.input_ids, grammar, groups, spec.language.bridging_ids))
        ids, target, length = pad_rows(texts)
        return ClipBatch(
            frames=torch.from_numpy(coarse), fine=torch.from_numpy(fine),
            fine_times=torch.from_numpy(times.astype(np.float32)),
            prefix=prefix, input_ids=ids, length=length, target=target,
            boxes=torch.from_numpy(boxes), positive=torch.from_numpy(positive),
            mask=torch.from_numpy(mask), counted=torch.from_numpy(counted & mask),
        )  # fmt: skip

    def rows(self, rng: np.random.Generator, number: int) -> list[Row]:
        """Return some queries of a clip, a share of them replaced by those of other media, with the answer "none"."""
        clip, recipe = self.mixture.index.clips[number], self.recipe
        size, samples, rows = self.mixture.index.sizes[number].medium.size, list(clip.queries), []
        if len(samples) > recipe.queries:
            samples = [samples[i] for i in sorted(rng.choice(len(samples), recipe.queries, replace=False))]
        for sample in samples:
            foreign = None
            if sample.task != "track" and rng.random() < recipe.absent:
                foreign = self.mixture.foreign_query(rng, sample.task, number)
            if foreign is None:
                rows.append(Row(sample, sample.query, label_of(sample.read_truth(), sample.task, size)))
            else:
                rows.append(Row(sample, foreign, None))
        return rows

    def frames(
        self, clip: Clip, medium: Medium, view: View, rows: Sequence[Row], purpose: tuple[int, ...]
    ) -> tuple[ClipFrames, float]:
        """Return a clip's frames, cropped and scaled, and how many seconds later than the whole clip they begin."""
        spec, recipe = self.spec, self.recipe
        budget = video_budget(tokenizer_of(self.tokenizer_path), spec, recipe.max_visual_tokens)

        def choose(grid: np.ndarray, duration_s: float, *, is_image: bool, later_s: float = 0.0) -> np.ndarray:
            present = [(row.sample, row.label.shifted(later_s).span) for row in rows if row.label is not None]
            for sample, span in present:
                if not is_image:
                    check_span(sample, span, duration_s)
            return choose_fine_times(
                self.mixture.rng(FINE_TIMES, *purpose), grid, [span for _, span in present],
                rate=spec.frames.fine_fps, count=recipe.fine_frames,
            )  # fmt: skip

        if recipe.frame_cache is not None and view.is_whole:
            rule = [recipe.max_visual_tokens, file_digest(self.tokenizer_path)]
            cache = FrameCache(Path(recipe.frame_cache), spec, rule)
            return cache.read(clip, lambda: open_clip(clip, spec, budget=budget)[0], choose), 0.0
        source, later_s = open_clip(
            clip, view.spec(spec, medium.size), budget=budget, crop=view.crop, later_s=view.later_s
        )
        with source:
            return read_frames(source, partial(choose, later_s=later_s)), later_s


@lru_cache(maxsize=2)
def tokenizer_of(path: Path) -> Tokenizer:
    """Return a tokenizer, which is read once in a process."""
    return Tokenizer.from_file(path)


@lru_cache(maxsize=2)
def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, which is read once in a process."""
    return file_sha256(path)


def cxcywh(boxes: np.ndarray) -> np.ndarray:
    """Turn corners [F, 4] into centres and sizes."""
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], -1)
