"""One opened video: its prefix is computed once, then queries are grounded in it, one or many at a time.

A head (`bridge_stg.runtime.heads`), which the chain opens for each video, answers the queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.decode import Prefix
from bridge_stg.runtime.chain.prompt import Segment, Tokenizer
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.spans import Span, span_of_groups
from bridge_stg.runtime.chain.tasks import TRACKED, Task, track_from
from bridge_stg.runtime.chain.vision_pass import FeatureMaps
from bridge_stg.runtime.errors import QueryError, VideoError
from bridge_stg.runtime.host.limits import CallKeywords, Limits
from bridge_stg.runtime.host.threads import Closable, UseCount
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.token_budget import CoarseChoice

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers bring it along; it is not a dependency


ChatMessage: TypeAlias = "tuple[str, str]"
"""A message of a chat: its role (`system`, `user` or `assistant`) and its text."""


class CachePool(Protocol):
    """Provides KV caches; see `bridge_stg.runtime.backends.kv_pool.KVPool`."""

    def take(self, *, batch: int, positions: int) -> KVCache:
        """Return a cache of `batch` rows with room for `positions` tokens each."""

    def give(self, cache: KVCache) -> None:
        """Take a cache back."""

    def rows(self, like: KVCache, *, positions: int) -> int:
        """Return how many rows of `positions` tokens fit the budget, at least one."""


class Head(Protocol):
    """Answers the queries on one video."""

    def ground(self, queries: Sequence[str], task: Task, limits: Limits) -> list[Grounding]:
        """Return the grounding of each query, without its timings.

        Raises:
            QueryError: a query is empty or too long, or the head does not support the task.
        """

    def ask(self, question: str, *, history: Sequence[ChatMessage], max_tokens: int, limits: Limits) -> TextStream:
        """Return the answer to a question after earlier messages, as text that is written while it is iterated.

        Raises:
            QueryError: the question is empty or too long, a message is invalid, or the model has no text head.
        """


class TextStream(Iterator[str]):
    """The answer to a question, in pieces of text.

    Attributes:
        prompt_tokens: tokens of the prompt, those of the video included.
        tokens: tokens of the answer so far.
        finish_reason: `stop` (the model ended the answer) or `length` (`max_tokens` was reached); empty before the end.
    """

    prompt_tokens: int
    tokens: int
    finish_reason: str


@dataclass(frozen=True, eq=False)
class Chain:
    """The sessions and rules that all videos of one Grounder share.

    Attributes:
        heads: what answers queries, one of `bridge_stg.runtime.bundle.spec.HEADS`.
        open_head: returns the head that answers the queries on a video.
    """

    vision_encoder: Session
    language_model: Session
    spec: ModelSpec
    tokenizer: Tokenizer
    pool: CachePool
    usage: UseCount
    heads: str
    open_head: Callable[[Chain, VideoParts], Head]


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

    def span_of(self, groups: tuple[int, int]) -> Span:
        """Return the span in seconds from the first to the last of a named pair of groups; see `span_of_groups`."""
        return span_of_groups(groups, self.sample_times, interval_s=self.interval_s, duration_s=self.duration_s)

    def fine_size(self, spec: ModelSpec) -> tuple[int, int]:
        """Return width and height of fine frames in pixels."""
        _, (height, width) = frame_sizes(self.size[1], self.size[0], spec)
        return width, height

    def result_fields(self, spec: ModelSpec, fine_frames: int) -> dict[str, Any]:
        """Return the fields of a `Grounding` that follow from the video and the number of fine frames used."""
        (width, height), side = self.fine_size(spec), spec.vision.patch_size * spec.vision.merge_size
        per_frame, coarse = (height // side) * (width // side), self.choice.tokens
        fine, dense = fine_frames * per_frame, len(self.fine_grid) * per_frame
        tokens = {"coarse": coarse, "fine": fine, "dense": dense, "ratio": (coarse + fine) / dense}
        return {
            "size": self.size, "coarse": self.choice, "tokens": tokens, "clock": self.clock, "stream": self.stream
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class VideoParts:
    """What a head needs of one video: facts, the prefix, and feature maps or visual tokens of fine frames."""

    facts: VideoFacts
    prefix: Prefix
    features: FeatureMaps


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
        self._head = chain.open_head(chain, VideoParts(video, prefix, features))
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

    def ask(
        self,
        question: str,
        *,
        history: Sequence[ChatMessage] = (),
        max_tokens: int = 512,
        **limits: Unpack[CallKeywords],
    ) -> Iterator[str]:
        """Answer a question about this video, and yield the text while the model writes it.

        Arguments and errors as for `Grounder.ask`.
        """
        with self._chain.usage.call(), self._usage.call():
            yield from self.ask_within(Limits(**limits), question, history=history, max_tokens=max_tokens)

    def ask_within(
        self, limits: Limits, question: str, *, history: Sequence[ChatMessage] = (), max_tokens: int
    ) -> TextStream:
        """Answer a question as part of a running call, which keeps the grounder open; the stream also counts tokens."""
        return self._head.ask(question, history=history, max_tokens=max_tokens, limits=limits)

    def _call(self, queries: list[str], task: Task, limits: Limits) -> list[Grounding]:
        with self._chain.usage.call():
            return self.ground_within(limits, queries, task)

    def ground_within(self, limits: Limits, queries: list[str], task: Task) -> list[Grounding]:
        """Ground queries as part of a call that is under way already, and that keeps the grounder open."""
        video = self._video
        with self._usage.call():
            if task.name == "image":
                check_image(video.name, is_image=video.is_image)
            groundings = self._head.ground(queries, task, limits)
            earlier_s = sum(s for stage, s in self._timings.items() if stage not in limits.timings)
            timings = {**self._timings, **limits.timings, "total": earlier_s + limits.elapsed_s}
            words = self._chain.spec.unknown_words
            return [dataclasses.replace(g, timings=timings, unknown_words=words(g.query)) for g in groundings]

    @property
    def nbytes(self) -> int:
        """Bytes in memory: the keys and values of the prefix, and the cached fine feature maps."""
        return self._prefix.cache.nbytes + self.features.nbytes

    def _free(self) -> None:
        if self._close_source is not None:
            self._close_source()
        self.features.clear()
        self._chain.pool.give(self._prefix.cache)


def check_image(name: str, *, is_image: bool) -> None:
    """Raise VideoError if a source of this name is a video."""
    if not is_image:
        message = f"{name} is a video; to find when and where, call `ground` (`infer` without --task image)"
        raise VideoError("video.not_an_image", message)


def prompts_of(queries: Sequence[str], prompt: Callable[[str], Segment]) -> list[Segment]:
    """Return the prompt of each query. Raises the QueryError of `prompt`; of several queries, it names the index."""
    prompts = []
    for i, query in enumerate(queries):
        try:
            prompts.append(prompt(query))
        except QueryError as error:
            if len(queries) == 1:
                raise
            raise QueryError(error.code, f"query {i} (of 0 to {len(queries) - 1}): {error}") from error
    return prompts


GroundedVideo = OpenedVideo
"""Former name of `OpenedVideo`; kept for one release."""
