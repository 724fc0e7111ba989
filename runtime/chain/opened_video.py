"""One opened video: its prefix is computed once, then queries are grounded in it, one or many at a time.

`OpenedVideo.ground_within` lists the steps of a query in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy, boxes_to_pixels
from bridge_stg.runtime.chain.decode import Answer, Prefix, answer_queries, positions_needed
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer, query_segment, time_strings
from bridge_stg.runtime.chain.results import FrameBoxes, Grounding, Tube, tube_in_span
from bridge_stg.runtime.chain.spans import fine_frames, in_span, refine_span, span_of_groups
from bridge_stg.runtime.chain.spatial_pass import Located, SpatialQuery, locate
from bridge_stg.runtime.chain.tasks import TRACKED, Task, track_from
from bridge_stg.runtime.chain.vision_pass import FeatureMaps
from bridge_stg.runtime.device.array_ops import on_host
from bridge_stg.runtime.errors import QueryError, VideoError
from bridge_stg.runtime.host.limits import CallKeywords, Limits
from bridge_stg.runtime.host.threads import Closable, UseCount
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import CoarseChoice

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers bring it along; it is not a dependency

Span = tuple[float, float]


class CachePool(Protocol):
    """Provides KV caches; see `bridge_stg.runtime.backends.kv_pool.KVPool`."""

    def take(self, *, batch: int, positions: int) -> KVCache:
        """Return a cache of `batch` rows with room for `positions` tokens each."""

    def give(self, cache: KVCache) -> None:
        """Take a cache back."""

    def rows(self, like: KVCache, *, positions: int) -> int:
        """Return how many rows of `positions` tokens fit the budget, at least one."""


@dataclass(frozen=True, eq=False)
class Chain:
    """The sessions and rules that all videos of one Grounder share."""

    vision_encoder: Session
    language_model: Session
    spatial_decoder: Session
    spec: ModelSpec
    tokenizer: Tokenizer
    pool: CachePool
    usage: UseCount


@dataclass(frozen=True, eq=False)
class VideoFacts:
    """Size and times of a video whose coarse frames have been read.

    Attributes:
        name: name of the video in messages.
        size: width and height of the video as it is shown, in pixels.
        is_image: whether it is a single image.
        frame_times: float64 [N], times of all frames in seconds.
        fine_grid: float64 [K], times of the fine grid in seconds.
        sample_times: float64 [G, P], times of the coarse samples in seconds.
        interval_s: seconds between two coarse samples.
        duration_s: length in seconds; of an image, one coarse sample interval.
        choice: rate and size of the coarse samples.
        clock: where the times come from; see `Grounding.clock`.
        stream: index of the video stream; see `Grounding.stream`.
    """

    name: str
    size: tuple[int, int]
    is_image: bool
    frame_times: np.ndarray
    fine_grid: np.ndarray
    sample_times: np.ndarray
    interval_s: float
    duration_s: float
    choice: CoarseChoice
    clock: str = "timestamps"
    stream: int | None = None


class OpenedVideo(Closable):
    """A video whose prefix has been computed. Get one from `Grounder.open`; safe to use from many threads.

    Every call takes the keyword arguments `deadline_s` (seconds after which the call stops), `cancel` (a
    `threading.Event`, or a callable that returns True to stop) and `progress` (called as progress(stage, done, total);
    total is None where it is not known).

    Attributes:
        size: width and height of the video as it is shown, in pixels.
        duration_s: length in seconds; of an image, one coarse sample interval.
        features: the fine feature maps by their index on the fine grid.
    """

    def __init__(
        self,
        chain: Chain,
        video: VideoFacts,
        prefix: Prefix,
        features: FeatureMaps,
        *,
        timings: Mapping[str, float] | None = None,
        close_source: Callable[[], None] | None = None,
    ) -> None:
        self._chain, self._video, self._prefix = chain, video, prefix
        self._timings, self._close_source = dict(timings or {}), close_source
        self.size, self.duration_s, self.features = video.size, video.duration_s, features
        times = time_strings(video.sample_times.mean(axis=1), chain.spec.prompt)
        self._grammars = {
            (allow_none, first): AnswerGrammar(
                chain.tokenizer, chain.spec.prompt, times, allow_none=allow_none, first_start=first
            )
            for allow_none, first in ((True, None), (False, None), (False, 0))
        }
        self._answer_tokens = self._grammars[True, None].longest_answer
        closed_error = VideoError("video.closed", "this video is closed; open it again to ground in it")
        self._usage = UseCount(self._free, closed_error=closed_error)

    def ground(self, query: str, *, allow_none: bool = True, **limits: Unpack[CallKeywords]) -> Grounding:
        """Find when and where the query's target is in this video.

        Arguments and errors as for `Grounder.ground`. A closed video, or frames that cannot be read again, raise
        VideoError.
        """
        return self._call([query], Task(allow_none=allow_none), Limits(**limits))[0]

    def span(self, query: str, *, allow_none: bool = True, **limits: Unpack[CallKeywords]) -> Grounding:
        """Find only the time span of the target, without boxes. Arguments and errors as for `ground`."""
        return self._call([query], Task("span", allow_none=allow_none), Limits(**limits))[0]

    def locate(self, query: str, **limits: Unpack[CallKeywords]) -> Grounding:
        """Find the box of a target that is known to be in this image. Arguments and errors as for `ground`."""
        return self._call([query], Task("image", allow_none=False), Limits(**limits))[0]

    def track(
        self, first_box: Sequence[float] | np.ndarray, *, query: str = TRACKED, **limits: Unpack[CallKeywords]
    ) -> Grounding:
        """Follow the target in a box of the first frame (left, top, right, bottom in pixels) through the whole video.

        The span begins with the video and ends where the target leaves; after it the last box is repeated. `query` says
        what it is, if known. Errors as for `ground`; an invalid box raises QueryError.
        """
        return self._call([query], track_from(first_box), Limits(**limits))[0]

    def ground_many(
        self, queries: Sequence[str], *, allow_none: bool = True, **limits: Unpack[CallKeywords]
    ) -> list[Grounding]:
        """Ground several queries in batches; the results are those of `ground`, in the order of the queries.

        Arguments and errors as for `ground`; a QueryError names the index of the query.
        """
        if isinstance(queries, str):
            raise QueryError("query.not_a_list", "ground_many takes a list of queries; pass a single one to `ground`")
        return self._call(list(queries), Task(allow_none=allow_none), Limits(**limits))

    def _call(self, queries: list[str], task: Task, limits: Limits) -> list[Grounding]:
        with self._chain.usage.call():
            return self.ground_within(limits, queries, task)

    def ground_within(self, limits: Limits, queries: list[str], task: Task) -> list[Grounding]:
        """Ground queries as part of a call that is under way already, and that keeps the grounder open."""
        chain, video = self._chain, self._video
        with self._usage.call():
            if task.name == "image" and not video.is_image:
                message = (
                    f"{video.name} is a video; to find when and where, call `ground` (`infer` without --task image)"
                )
                raise VideoError("video.not_an_image", message)
            prompts = self._prompts(queries, task)
            with limits.stage("answer"):
                answers = self._answer(prompts, self._grammars[task.grammar_key], limits)
            times, sizes = video.sample_times, {"interval_s": video.interval_s, "duration_s": video.duration_s}
            spans = [answer.groups and span_of_groups(answer.groups, times, **sizes) for answer in answers]
            searches = self._searches(answers, spans) if task.name != "span" else {}
            most = chain.spec.frames.max_fine_frames
            located = locate(
                chain.spatial_decoder, self.features, video.fine_grid, searches, max_frames=most, limits=limits
            )
            timings = {**self._timings, **limits.timings, "total": limits.elapsed_s}
            return [
                self._result(query, task, answer, named_span=span, located=located.get(i), timings=timings)
                for i, (query, answer, span) in enumerate(zip(queries, answers, spans, strict=True))
            ]

    def _prompts(self, queries: list[str], task: Task) -> list[Segment]:
        """Return the queries' part of the prompt; of several, a QueryError names the index of the wrong one."""
        prompts = []
        for i, query in enumerate(queries):
            try:
                prompts.append(self._prompt(query, task))
            except QueryError as error:
                if len(queries) == 1:
                    raise
                raise QueryError(error.code, f"query {i} (of 0 to {len(queries) - 1}): {error}") from error
        return prompts

    def _prompt(self, query: str, task: Task) -> Segment:
        chain, start = self._chain, self._prefix.next_position
        segment = query_segment(chain.tokenizer, chain.spec, query, start, first_box=task.relative_box(self.size))
        language = chain.spec.language
        last = segment.next_position + self._answer_tokens + language.num_bridging_queries
        if last > language.max_positions:
            message = (
                f"after this video, the query ends at position {last} of {language.max_positions}; shorten one of them"
            )
            raise QueryError("query.too_long", message)
        return segment

    def _answer(self, prompts: list[Segment], grammar: AnswerGrammar, limits: Limits) -> list[Answer]:
        """Run the language model, in batches whose caches fit the budget."""
        pool, language = self._chain.pool, self._chain.spec.language
        answers: list[Answer] = []
        while len(answers) < len(prompts):
            rest = prompts[len(answers) :]
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
                grammar,
                bridging_ids=language.bridging_ids,
                report=limits.report_from(len(answers), len(prompts)),
            )
            pool.give(cache)  # not after a failed call, which leaves the cache in an unknown state
        return answers

    def _searches(self, answers: Sequence[Answer], spans: Sequence[Span | None]) -> dict[int, SpatialQuery]:
        """Choose the fine frames around the span of each answer that names one, by the answer's index."""
        spec, video = self._chain.spec, self._video
        margin_s = spec.span.margin_s
        if margin_s is None:
            margin_s = video.interval_s * spec.vision.temporal_patch_size
        # An image's only fine frame lasts as long as the image.
        fps = 1 / video.duration_s if video.is_image else spec.frames.fine_fps
        most = spec.frames.max_fine_frames
        searches = {}
        for i, (answer, span) in enumerate(zip(answers, spans, strict=True)):
            if span is not None and answer.taps is not None:
                frames = fine_frames(span, video.fine_grid, fine_fps=fps, margin_s=margin_s, max_frames=most)
                searches[i] = SpatialQuery(frames, answer.taps)
        return searches

    def _result(
        self,
        query: str,
        task: Task,
        answer: Answer,
        *,
        named_span: Span | None,
        located: Located | None,
        timings: Mapping[str, float],
    ) -> Grounding:
        span, tube, boxes, presence, fine = named_span, None, None, 0.0, 0
        if named_span is not None and located is not None:
            span, tube = self._refined(named_span, located, task)
            boxes = self._frame_boxes(tube, span, task)
            presence, fine = float(tube.presence.mean()), len(located.frames.indices)
        return Grounding(
            query=query,
            found=span is not None,
            span=span,
            tube=tube,
            boxes=boxes,
            size=self.size,
            coarse=self._video.choice,
            answer=self._chain.tokenizer.decode(answer.ids),
            named_span=named_span,
            scores={"absent": answer.absent, "answer": math.exp(answer.log_probability), "presence": presence},
            tokens=self._token_counts(fine),
            timings=dict(timings),
            clock=self._video.clock,
            stream=self._video.stream,
            task=task.name,
            unknown_words=self._chain.spec.unknown_words(query),
            taps=None if answer.taps is None else np.array(on_host(answer.taps)),
        )

    def _refined(self, named: Span, located: Located, task: Task) -> tuple[Span, Tube]:
        """Return the span after the presence scores moved its ends, and the boxes of the fine frames in it."""
        (width, height), threshold = self.size, self._chain.spec.span.presence_threshold
        frames, presence = located.frames, located.presence
        start, end = refine_span(named, frames, presence, threshold=threshold, duration_s=self.duration_s)
        span = (start if task.first_box is None else named[0]), end
        boxes = boxes_to_pixels(box_cxcywh_to_xyxy(located.boxes), width=width, height=height)
        times = located.shown_times
        return span, tube_in_span(span, frames, shown_times=times, boxes=boxes, presence=presence, threshold=threshold)

    def _frame_boxes(self, tube: Tube, span: Span, task: Task) -> FrameBoxes:
        """Return the boxes of the video's frames inside the span; of a track those of all frames."""
        times = self._video.frame_times
        inside = in_span(times, span)
        if task.first_box is None:
            return tube.at(times[inside])
        boxes = tube.at(times)
        boxes.boxes[0] = task.first_box
        boxes.visible[~inside] = False
        return boxes

    def _token_counts(self, fine_frames_used: int) -> dict[str, float]:
        """Count the visual tokens of a query's two passes, and those of the whole fine grid at fine size."""
        vision, coarse = self._chain.spec.vision, self._video.choice.tokens
        factor = vision.patch_size * vision.merge_size
        _, (height, width) = frame_sizes(self.size[1], self.size[0], self._chain.spec)
        per_frame = (height // factor) * (width // factor)
        fine, dense = fine_frames_used * per_frame, len(self._video.fine_grid) * per_frame
        return {"coarse": coarse, "fine": fine, "dense": dense, "ratio": (coarse + fine) / dense}

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the keys and values of the prefix, and the cached fine feature maps."""
        return self._prefix.cache.nbytes + self.features.nbytes

    def _free(self) -> None:
        if self._close_source is not None:
            self._close_source()
        self.features.clear()
        self._chain.pool.give(self._prefix.cache)


GroundedVideo = OpenedVideo
"""Former name of `OpenedVideo`; kept for one release."""
