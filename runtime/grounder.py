"""The API that programs embed: load a bundle once, then ground queries in videos, images and streams of frames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bridge_stg.runtime.backends.kv_pool import KVPool
from bridge_stg.runtime.backends.session import Session, fixed_capacity
from bridge_stg.runtime.bundle.contracts import GRAPHS
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.decode import Prefix, prefill_video
from bridge_stg.runtime.chain.opened_video import Chain, OpenedVideo
from bridge_stg.runtime.chain.prompt import Tokenizer, check_query, video_budget, video_segment
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import TRACKED, Task, track_from
from bridge_stg.runtime.chain.vision_pass import FineFeatures, coarse_tokens, merged_grid
from bridge_stg.runtime.errors import EngineError, VideoError
from bridge_stg.runtime.host.limits import Limits, Progress
from bridge_stg.runtime.host.usage import UseCount
from bridge_stg.runtime.video.source import CoarseFrames, open_source

if TYPE_CHECKING:
    from bridge_stg.runtime.backends.choose import ChosenBackend
    from bridge_stg.runtime.live.watch import LiveWatch

Video: TypeAlias = "str | os.PathLike[str] | np.ndarray | Iterable[tuple[float, np.ndarray]]"
"""A path of a video or image; an image uint8 [H, W, 3] in RGB; or an iterable of (time in seconds, such an image).

Images of an iterable may be arrays of any library that speaks DLPack; where the graphs run on a GPU, they may lie
there, and stay there."""


class Grounder:
    """A loaded model, safe to use from many threads. A context manager: closing frees its engines.

    Args:
        sessions: the three graphs by name.
        spec: what the chain must know about the model.
        tokenizer: the model's tokenizer.
        kv_budget_bytes: what the KV caches of one batch of queries may hold; more queries go in several batches.
        feature_budget_bytes: what a video's fine feature maps may hold between calls.
        unchanged_tolerance: how much a patch of the coarse frames may change, in levels of 0 to 255 on average, for a
            group to count as the one before it and not be encoded again; 0: not at all (see `unchanged.deduplicate_frames`).
        verified: whether the graphs were compared with the torch reference when they were exported.
        target: which backend the sessions run on and why, to be told; None where that is not known.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        kv_budget_bytes: int = 2**29,
        feature_budget_bytes: int = 2**28,
        unchanged_tolerance: float = 0.0,
        verified: bool = True,
        target: ChosenBackend | None = None,
    ) -> None:
        missing = [name for name in GRAPHS if name not in sessions]
        if missing:
            raise EngineError(
                f"the chain needs a session for {missing[0]!r}; it was given: {', '.join(sessions) or 'none'}"
            )
        if not 0 <= unchanged_tolerance <= 255:
            raise VideoError(f"unchanged_tolerance={unchanged_tolerance!r}: expected levels, from 0 to 255")
        self.verified = verified
        self.target = target
        self._sessions = dict(sessions)
        self._feature_budget_bytes = feature_budget_bytes
        self._unchanged_tolerance = unchanged_tolerance
        self._chain = Chain(
            vision_encoder=sessions["vision_encoder"],
            language_model=sessions["language_model"],
            spatial_decoder=sessions["spatial_decoder"],
            spec=spec,
            tokenizer=tokenizer,
            pool=KVPool(sessions["language_model"], budget_bytes=kv_budget_bytes),
            usage=UseCount(self._free, closed_error=EngineError("this Grounder is closed; load the bundle again")),
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        wait: bool = True,
        unchanged_tolerance: float = 0.0,
    ) -> Grounder:
        """Load a bundle.

        Args:
            path: the bundle's folder.
            backend: "auto", or the name of an engine; `Grounder.target` says which one runs, and why.
            variant: the lowering to run, such as "standard"; None for the best that runs here.
            threads: CPU threads of an engine; None for its own default.
            wait: whether to return when all engines are open. Else those of a CPU are opened while the first video is
                read, and one that refuses its graph says so at the first call that needs it.
            unchanged_tolerance: see `Grounder`.

        Raises:
            BundleError: the bundle is damaged, incomplete or of an unknown schema.
            EngineError: the backend is unknown or missing, or refuses a graph.
        """
        from bridge_stg.runtime.backends.choose import open_sessions
        from bridge_stg.runtime.bundle.bundle import Bundle

        bundle = Bundle.load(path)
        sessions = open_sessions(bundle, backend=backend, variant=variant, threads=threads, wait=wait)
        try:
            tokenizer = Tokenizer.from_file(bundle.tokenizer_path)
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        target: ChosenBackend | None = getattr(sessions, "target", None)
        return cls(
            sessions,
            bundle.manifest.spec,
            tokenizer,
            unchanged_tolerance=unchanged_tolerance,
            verified=bundle.manifest.verified,
            target=target,
        )

    @property
    def spec(self) -> ModelSpec:
        """What the chain knows about the model."""
        return self._chain.spec

    def check_query(self, query: str) -> None:
        """Do nothing with a query that can be asked; no video is read for it.

        Raises:
            QueryError: it is empty or too long for any video.
        """
        check_query(self._chain.tokenizer, self.spec.prompt, query)

    def ground(
        self,
        video: Video,
        query: str,
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
        buffer_frames: int = 256,
        max_visual_tokens: int | None = None,
    ) -> Grounding:
        """Find when and where the query's target is in a video, image or stream.

        Args:
            video: see `Video`; an iterable is read once, to its end.
            query: what to find, in words.
            allow_none: whether the answer may be that the target is not there.
            deadline_s: seconds after which the call stops.
            cancel: a `threading.Event`, or a callable that returns True to stop.
            progress: called as progress(stage, done, total); total is None where it is not known.
            buffer_frames: frames of an iterable that are kept for the spatial pass; thinned evenly beyond.
            max_visual_tokens: what the coarse frames may take of the prompt; a longer video is read in smaller frames,
                then at a lower rate (see `Grounding.coarse`). None: what the model's own rules allow.

        Raises:
            VideoError: the video cannot be read, or `max_visual_tokens` is too small for one group of its frames.
            QueryError: the query is empty or too long.
            Interrupted: the deadline passed, or `cancel` was set; the message names the stage.
            EngineError: a backend failed, or this Grounder is closed.
        """
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        return self._once(video, query, Task(allow_none=allow_none), limits, buffer_frames, max_visual_tokens)

    def span(
        self,
        video: Video,
        query: str,
        *,
        allow_none: bool = True,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
        buffer_frames: int = 256,
        max_visual_tokens: int | None = None,
    ) -> Grounding:
        """Find only when it happens (temporal grounding): the spatial decoder does not run, and there are no boxes.

        Arguments and errors are those of `ground`.
        """
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        return self._once(video, query, Task("span", allow_none=allow_none), limits, buffer_frames, max_visual_tokens)

    def locate(
        self,
        image: str | os.PathLike[str] | np.ndarray,
        query: str,
        *,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
    ) -> Grounding:
        """Find the one box of a target that is in an image for sure (referring expression): the answer is never none.

        Arguments and errors are those of `ground`.

        Raises:
            VideoError: it is a video; or as of `ground`.
        """
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        return self._once(image, query, Task("image", allow_none=False), limits, 256, None)

    def track(
        self,
        video: Video,
        first_box: Sequence[float] | np.ndarray,
        *,
        query: str = TRACKED,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
        buffer_frames: int = 256,
        max_visual_tokens: int | None = None,
    ) -> Grounding:
        """Follow what is in a box of the first frame (tracking): the answer is never none.

        Args:
            video: see `Video`.
            first_box: left, top, right, bottom in pixels of the first frame.
            query: what it is, in words, if known.
            deadline_s, cancel, progress, buffer_frames, max_visual_tokens: as of `ground`.

        Returns:
            A box for every frame of the video, the first one as given. The span begins with the video; frames behind it
            hold the last box, marked as not visible.

        Raises:
            QueryError: the box is no box, or lies outside the frame; or as of `ground`.
        """
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        return self._once(video, query, track_from(first_box), limits, buffer_frames, max_visual_tokens)

    def open(
        self,
        video: Video,
        *,
        deadline_s: float | None = None,
        cancel: Any = None,
        progress: Progress | None = None,
        buffer_frames: int = 256,
        max_visual_tokens: int | None = None,
    ) -> OpenedVideo:
        """Read a video and compute what does not depend on a query. Arguments and errors are those of `ground`."""
        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        with self._chain.usage.call():
            return self._open(video, limits, buffer_frames, max_visual_tokens)

    def watch(
        self,
        source: str | int | os.PathLike[str] | Iterable[tuple[float, np.ndarray]],
        queries: Sequence[str],
        *,
        realtime: bool = False,
        latest_wins: bool | None = None,
        cancel: Any = None,
        **options: Any,
    ) -> LiveWatch:
        """Watch a live stream: ask standing queries about its last seconds again and again.

        Iterate over what is returned, in a `with` block: each `LiveUpdate` holds a round's answers and events.

        Args:
            source: a video file; an address such as rtsp://camera/stream; a camera's number or device file; or an
                iterable of (time in seconds, RGB uint8 [H, W, 3]) with strictly increasing times and one size.
            queries: what to find, in words.
            realtime: give a file's frames at their own pace instead of as fast as they are taken.
            latest_wins: whether frames that the machine is too slow for give way to later ones, and are counted; else
                the source waits. None: it waits for files and iterables.
            cancel: a `threading.Event`, or a callable that returns True to end the watch, like `LiveWatch.stop`.
            options: the fields of `LiveOptions`.

        Raises:
            VideoError: the source is none of these, or an option is out of range. While iterating: the source cannot be
                opened, breaks off, or is silent for `stall_s`.
            QueryError: a query is empty or too long.
            EngineError: while iterating: a backend failed, or this Grounder is closed.
        """
        from bridge_stg.runtime.live.source import open_live
        from bridge_stg.runtime.live.watch import LiveOptions, LiveWatch

        with self._chain.usage.call():
            chosen = LiveOptions(**options)
            return LiveWatch(
                self._chain,
                open_live(source, realtime=realtime, latest_wins=latest_wins, timeout_s=chosen.stall_s),
                queries,
                chosen,
                cancel=cancel,
                feature_budget_bytes=self._feature_budget_bytes,
            )

    def _once(
        self, video: Video, query: str, task: Task, limits: Limits, buffer_frames: int, max_visual_tokens: int | None
    ) -> Grounding:
        with self._chain.usage.call():
            check_query(self._chain.tokenizer, self.spec.prompt, query)  # before a long video is read for it
            with self._open(video, limits, buffer_frames, max_visual_tokens) as opened:
                return opened.ground_within(limits, [query], task)[0]

    def close(self) -> None:
        """Close the engines. Calls under way finish; later ones raise EngineError. May be called again."""
        self._chain.usage.close()

    def __enter__(self) -> Grounder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _free(self) -> None:
        self._chain.pool.clear()
        for session in self._sessions.values():
            session.close()

    def _open(self, video: Video, limits: Limits, buffer_frames: int, max_visual_tokens: int | None) -> OpenedVideo:
        chain = self._chain
        with limits.stage("decode_video"):
            source = open_source(
                video,
                chain.spec,
                buffer_frames=buffer_frames,
                budget=video_budget(
                    chain.tokenizer, chain.spec, max_visual_tokens, capacity=fixed_capacity(chain.language_model)
                ),
                device=getattr(chain.vision_encoder, "device", None),
            )
        try:
            with limits.stage("decode_video"):
                coarse = source.coarse(limits)
                grid = source.fine_grid()
            prefix = self._prefix(coarse, limits)
            features = FineFeatures(
                chain.vision_encoder,
                chain.spec,
                read=lambda places, limits: source.fine(grid[places], limits),
                budget_bytes=self._feature_budget_bytes,
                read_ahead=source.fine_size if source.read_ahead else None,
            )
            return OpenedVideo(chain, source, coarse, prefix, features, grid, dict(limits.timings))
        except BaseException:
            source.close()
            raise

    def _prefix(self, coarse: CoarseFrames, limits: Limits) -> Prefix:
        """Compute the visual tokens of the coarse frames, and the keys and values of the video's part of the prompt."""
        chain, language = self._chain, self.spec.language
        segment = video_segment(chain.tokenizer, chain.spec, coarse.group_times, merged_grid(coarse.frames, chain.spec))
        if segment.next_position > language.max_positions:
            raise VideoError(
                f"even {len(coarse.frames)} group of the smallest frames takes {segment.next_position} positions of "
                f"the prompt, more than the model's {language.max_positions}; use a model with more positions, or "
                "one with a lower frames.coarse_min_pixels in its config"
            )
        with limits.stage("vision_coarse"):
            tokens = coarse_tokens(
                chain.vision_encoder,
                chain.spec,
                coarse.frames,
                report=limits.report,
                tolerance=self._unchanged_tolerance,
            )
        with limits.stage("prefill"):
            cache = chain.pool.take(batch=1, positions=len(segment))
            return prefill_video(chain.language_model, cache, segment, tokens, report=limits.report)
