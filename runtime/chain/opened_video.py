"""One opened video: its prefix is computed once, then queries are grounded in it, one or many at a time.

A query's way, top to bottom: its segment, `_answer` (when), `_spatial_query` (which fine frames), the spatial pass
(where), `_grounding` (the result).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.kv_pool import KVPool
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy, boxes_to_pixels
from bridge_stg.runtime.chain.decode import Answer, Prefix, answer_queries, positions_needed
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings
from bridge_stg.runtime.chain.results import Grounding, tube_in_span
from bridge_stg.runtime.chain.spans import fine_frames, in_span, refine_span, span_of_groups
from bridge_stg.runtime.chain.spatial_pass import Located, SpatialQuery, locate
from bridge_stg.runtime.chain.tasks import TRACKED, Task, track_from
from bridge_stg.runtime.chain.vision_pass import FineFeatures
from bridge_stg.runtime.device.array_ops import on_host
from bridge_stg.runtime.errors import QueryError, VideoError
from bridge_stg.runtime.host.limits import Limits, Progress
from bridge_stg.runtime.host.usage import UseCount
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.source import CoarseFrames, VideoSource


@dataclass(frozen=True, eq=False)
class Chain:
    """What all videos of one Grounder share."""

    vision_encoder: Session
    language_model: Session
    spatial_decoder: Session
    spec: ModelSpec
    tokenizer: Tokenizer
    pool: KVPool
    usage: UseCount


class OpenedVideo:
    """A video whose prefix has been computed. Get one from `Grounder.open`; safe to use from many threads.

    Attributes:
        size: width and height of the video as it is shown, in pixels.
        duration_s: its length in seconds; of an image, the one coarse interval that it stands for.
    """

    def __init__(
        self,
        chain: Chain,
        source: VideoSource,
        coarse: CoarseFrames,
        prefix: Prefix,
        features: FineFeatures,
        grid: np.ndarray,
        timings: Mapping[str, float],
    ) -> None:
        self._chain = chain
        self._source = source
        self._prefix = prefix
        self._features = features
        self._grid = grid
        self._timings = timings
        self._sample_times, self._interval_s = coarse.times, coarse.interval_s
        self._choice = coarse.choice
        times = time_strings(coarse.group_times, chain.spec.prompt)
        self._grammars = {
            (allow_none, first): AnswerGrammar(
                chain.tokenizer, chain.spec.prompt, times, allow_none=allow_none, first_start=first
            )
            for allow_none, first in ((True, None), (False, None), (False, 0))
        }
        grammar = self._grammars[True, None]
        longest = max(map(len, grammar.time_ids))
        self._answer_tokens = max(2 * longest + len(grammar.between), len(grammar.none_ids))
        self._usage = UseCount(
            self._free, closed_error=VideoError("this video is closed; open it again to ground in it")
        )
        self.size = (source.width, source.height)
        self.duration_s = coarse.duration_s

    def ground(
        self,
        query: str,
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> Grounding:
        """Find when and where the query's target is in this video.

        Args:
            query: what to find, in words.
            allow_none: whether the answer may be that the target is not there.
            deadline_s: seconds after which the call stops.
            cancel: a `threading.Event`, or a callable that returns True to stop.
            progress: called as progress(stage, done, total).

        Raises:
            QueryError: the query is empty or too long.
            Interrupted: the deadline passed, or `cancel` was set.
            EngineError: a backend failed.
            VideoError: the video is closed, or its frames cannot be read again.
        """
        return self._call([query], Task(allow_none=allow_none), deadline_s, cancel, progress)[0]

    def span(
        self,
        query: str,
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> Grounding:
        """Find only when it happens: no fine frame is read and no box computed. Arguments and errors as of `ground`."""
        return self._call([query], Task("span", allow_none=allow_none), deadline_s, cancel, progress)[0]

    def locate(
        self,
        query: str,
        *,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> Grounding:
        """Find the one box of a target that is in this image for sure. Arguments and errors are those of `ground`.

        Raises:
            VideoError: this is a video.
        """
        return self._call([query], Task("image", allow_none=False), deadline_s, cancel, progress)[0]

    def track(
        self,
        first_box: Sequence[float] | np.ndarray,
        *,
        query: str = TRACKED,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> Grounding:
        """Follow what is in a box of the first frame: a box for every frame of the video.

        The span begins with the video and ends where the target leaves; behind it the last box is held.

        Args:
            first_box: left, top, right, bottom in pixels.
            query: what it is, in words, if known.
            deadline_s, cancel, progress: as of `ground`.

        Raises:
            QueryError: the box is no box, or lies outside the frame; and as of `ground`.
        """
        return self._call([query], track_from(first_box), deadline_s, cancel, progress)[0]

    def ground_many(
        self,
        queries: Sequence[str],
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> list[Grounding]:
        """Ground several queries in batches; the results are those of `ground`, in the queries' order.

        Arguments and errors are those of `ground`; a QueryError names the place of the query at fault.
        """
        if isinstance(queries, str):
            raise QueryError("ground_many takes a list of queries, but was given one string; ask `ground` one query")
        return self._call(list(queries), Task(allow_none=allow_none), deadline_s, cancel, progress)

    def _call(
        self, queries: list[str], task: Task, deadline_s: float | None, cancel: Any, progress: Progress | None
    ) -> list[Grounding]:
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        with self._chain.usage.call():
            return self.ground_within(limits, queries, task)

    def ground_within(self, limits: Limits, queries: list[str], task: Task) -> list[Grounding]:
        """Ground queries as part of a call that has begun already, and that holds the grounder open."""
        with self._usage.call():
            if task.name == "image" and not self._source.is_image:
                raise VideoError(
                    f"{self._source.name} is a video, and a box is located in one image. Ask when and where instead "
                    "(`Grounder.ground`; `infer` without --task image)"
                )
            segments = self._query_segments(queries, task)
            with limits.stage("answer"):
                answers = self._answer(segments, self._grammars[task.grammar_key], limits)
            sought = {
                i: self._spatial_query(answer)
                for i, answer in enumerate(answers)
                if answer.groups is not None and task.has_boxes
            }
            located = locate(
                self._chain.spatial_decoder,
                self._features,
                self._grid,
                list(sought.values()),
                max_frames=self._chain.spec.frames.max_fine_frames,
                limits=limits,
            )
            found = dict(zip(sought, located, strict=True))
            groundings = [
                self._grounding(query, task, answer, sought.get(i), found.get(i))
                for i, (query, answer) in enumerate(zip(queries, answers, strict=True))
            ]
            timings = {**self._timings, **limits.timings, "total": limits.elapsed_s}
            return [dataclasses.replace(grounding, timings=timings) for grounding in groundings]

    @property
    def nbytes(self) -> int:
        """What it holds in memory now: the keys and values of its prefix, and the fine feature maps that are kept."""
        return self._prefix.cache.nbytes + self._features.nbytes

    def close(self) -> None:
        """Close the video. Calls under way finish; later ones raise VideoError. May be called again."""
        self._usage.close()

    def __enter__(self) -> OpenedVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _free(self) -> None:
        self._source.close()
        self._features.clear()
        self._chain.pool.give(self._prefix.cache)

    def _query_segments(self, queries: list[str], task: Task) -> list[Segment]:
        """Return the queries' segments, their positions following the video's.

        Raises:
            QueryError: a query is empty, too long, or no string; of several, its place is named.
        """
        segments = []
        for i, query in enumerate(queries):
            try:
                segments.append(self._query_segment(query, task))
            except QueryError as error:
                if len(queries) == 1:
                    raise
                raise QueryError(f"query {i} (of 0 to {len(queries) - 1}): {error}") from error
        return segments

    def _query_segment(self, query: str, task: Task) -> Segment:
        chain = self._chain
        segment = query_segment(
            chain.tokenizer, chain.spec, query, self._prefix.next_position, first_box=task.relative_box(self.size)
        )
        language = chain.spec.language
        last = segment.next_position + self._answer_tokens + language.num_bridging_queries
        if last > language.max_positions:
            raise QueryError(
                f"the query's {len(segment.input_ids)} tokens do not fit behind this video: they would end at position "
                f"{last} of {language.max_positions}; use a shorter query or a shorter video"
            )
        return segment

    def _answer(self, segments: list[Segment], grammar: AnswerGrammar, limits: Limits) -> list[Answer]:
        """Ask the language model, in batches whose caches fit the budget."""
        pool, language = self._chain.pool, self._chain.spec.language
        answers: list[Answer] = []
        while len(answers) < len(segments):
            rest = segments[len(answers) :]
            positions = positions_needed(
                self._prefix.length, rest, answer_tokens=self._answer_tokens, bridging=language.num_bridging_queries
            )
            batch = rest[: pool.rows(self._prefix.cache, positions=positions)]
            cache = pool.take(batch=len(batch), positions=positions)
            answers += answer_queries(
                self._chain.language_model,
                cache,
                self._prefix,
                batch,
                [grammar] * len(batch),
                bridging_ids=language.bridging_ids,
                report=_counting_on(limits, len(answers), len(segments)),
            )
            pool.give(cache)  # not where the call failed: what stands in the cache then is unknown
        return answers

    def _spatial_query(self, answer: Answer) -> SpatialQuery:
        """Choose the fine frames around the span that an answer names."""
        assert answer.groups is not None and answer.taps is not None
        spec = self._chain.spec
        margin_s = spec.span.margin_s
        if margin_s is None:
            margin_s = self._interval_s * spec.vision.temporal_patch_size
        # An image's only fine frame lasts as long as the image.
        fine_fps = 1 / self.duration_s if self._source.is_image else spec.frames.fine_fps
        frames = fine_frames(
            self._named_span(answer.groups),
            self._grid,
            fine_fps=fine_fps,
            margin_s=margin_s,
            max_frames=spec.frames.max_fine_frames,
        )
        return SpatialQuery(frames=frames, taps=answer.taps)

    def _named_span(self, groups: tuple[int, int]) -> tuple[float, float]:
        return span_of_groups(groups, self._sample_times, interval_s=self._interval_s, duration_s=self.duration_s)

    def _grounding(
        self, query: str, task: Task, answer: Answer, sought: SpatialQuery | None, located: Located | None
    ) -> Grounding:
        """Put a query's result together; its timings are filled in by the caller."""
        scores = {"absent": answer.absent, "answer": math.exp(answer.log_probability), "presence": 0.0}
        nothing = Grounding(
            query=query,
            found=False,
            span=None,
            tube=None,
            boxes=None,
            size=self.size,
            coarse=self._choice,
            answer=self._chain.tokenizer.decode(answer.ids),
            named_span=None,
            scores=scores,
            tokens=self._token_counts(0 if sought is None else len(sought.frames.indices)),
            timings={},
            task=task.name,
            taps=None if answer.taps is None else np.array(on_host(answer.taps)),
        )
        if answer.groups is None:
            return nothing
        if sought is None or located is None:
            named = self._named_span(answer.groups)
            return dataclasses.replace(nothing, found=True, span=named, named_span=named)
        threshold = self._chain.spec.span.presence_threshold
        named = self._named_span(answer.groups)
        span = refine_span(named, sought.frames, located.presence, threshold=threshold, duration_s=self.duration_s)
        if task.first_box is not None:
            span = (named[0], span[1])
        width, height = self.size
        tube = tube_in_span(
            span,
            sought.frames,
            shown_times=located.shown_times,
            boxes=boxes_to_pixels(box_cxcywh_to_xyxy(located.boxes), width=width, height=height),
            presence=located.presence,
            threshold=threshold,
        )
        frame_times = self._source.frame_times
        inside = in_span(frame_times, span)
        boxes = tube.at(frame_times if task.first_box is not None else frame_times[inside])
        if task.first_box is not None:
            boxes.boxes[0] = task.first_box
            boxes.visible[~inside] = False
        return dataclasses.replace(
            nothing,
            found=True,
            span=span,
            named_span=named,
            tube=tube,
            boxes=boxes,
            scores={**scores, "presence": float(tube.presence.mean())},
        )

    def _token_counts(self, fine_frames_used: int) -> dict[str, float]:
        """Count visual tokens: of this query's two passes, and of the whole fine grid at fine size."""
        vision = self._chain.spec.vision
        factor = vision.patch_size * vision.merge_size
        _, (height, width) = frame_sizes(self.size[1], self.size[0], self._chain.spec)
        a_frame = (height // factor) * (width // factor)
        fine, dense = fine_frames_used * a_frame, len(self._grid) * a_frame
        return {
            "coarse": self._choice.tokens,
            "fine": fine,
            "dense": dense,
            "ratio": (self._choice.tokens + fine) / dense,
        }


def _counting_on(limits: Limits, done: int, total: int) -> Callable[[int, int], None]:
    """Return a report of one batch's rows that counts on behind those of earlier batches."""
    return lambda rows, _: limits.report(done + rows, total)


GroundedVideo = OpenedVideo
"""Former name of `OpenedVideo`; kept for one release."""
