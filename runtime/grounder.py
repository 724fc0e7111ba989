"""The API that programs embed: load a bundle once, then ground queries in videos, images and streams of frames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from bridge_stg.runtime.backends.kv_pool import KVPool
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.contracts import graphs_of
from bridge_stg.runtime.bundle.spec import ModelSpec, chosen_heads
from bridge_stg.runtime.chain.decode import prefill_video
from bridge_stg.runtime.chain.opened_video import Chain, ChatMessage, Head, OpenedVideo, VideoParts
from bridge_stg.runtime.chain.prompt import Tokenizer, check_query
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import TRACKED, Task, track_from
from bridge_stg.runtime.chain.tokenizer import load_tokenizer
from bridge_stg.runtime.chain.vision_pass import FEATURE_BUDGET_BYTES
from bridge_stg.runtime.errors import BridgeError, EngineError, VideoError
from bridge_stg.runtime.heads.bridge import BridgeHead
from bridge_stg.runtime.heads.chat import check_chat, check_context, with_context
from bridge_stg.runtime.heads.options import TextOptions
from bridge_stg.runtime.host.failures import reporting_host_errors
from bridge_stg.runtime.host.limits import CallKeywords, Cancel, Limits, Progress
from bridge_stg.runtime.host.parse import is_number
from bridge_stg.runtime.host.threads import Closable, UseCount
from bridge_stg.runtime.index.index import VisualIndex, encoder_of
from bridge_stg.runtime.index.read import CallOptions, Indexed, OptionKeywords, Video, VideoReader

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers bring it along; it is not a dependency

    from bridge_stg.runtime.backends.choose import ChosenBackend, Sessions
    from bridge_stg.runtime.bundle.bundle import Bundle
    from bridge_stg.runtime.heads.json_grammar import JsonGrammar
    from bridge_stg.runtime.live.source import LiveSource
    from bridge_stg.runtime.live.watch import LiveWatch
    from bridge_stg.runtime.search.occurrences import SearchResult


class Grounder(Closable):
    """A loaded model, safe to use from many threads. A context manager: closing frees its engines.

    Calls that read a video take the fields of `CallOptions` as keyword arguments.

    Args:
        sessions: the sessions of the model's graphs by name.
        spec: the model's sizes, rates and rules.
        tokenizer: the model's tokenizer.
        kv_budget_bytes: maximum bytes of the KV caches of one batch of queries; more queries run in several batches.
            None: by the free memory of the device, see `KVPool`.
        feature_budget_bytes: maximum bytes of a video's fine feature maps that are cached between calls.
        unchanged_tolerance: largest mean change of any patch of the coarse frames, in levels of 0 to 255, at which a
            group is not encoded again; 0: only equal groups (see `vision_pass.deduplicate_frames`).
        heads: what answers queries, one of `bridge_stg.runtime.bundle.spec.HEADS`; None: the model's own.
        text: how text heads answer; None: the defaults of `TextOptions`.
        index: where visual tokens of video files are kept between calls and processes; None: nowhere.
        verified: whether the graphs were compared with the torch reference when they were exported.
        target: the backend of the sessions and why it was chosen; None if unknown.
        bundle: `name` and `fingerprint` of the bundle; None if there is none.

    The arguments `sessions`, `tokenizer`, `heads`, `verified`, `target` and `bundle` are attributes too.
    """

    def __init__(
        self,
        sessions: Mapping[str, Session],
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        kv_budget_bytes: int | None = None,
        feature_budget_bytes: int = FEATURE_BUDGET_BYTES,
        unchanged_tolerance: float = 0.0,
        heads: str | None = None,
        text: TextOptions | None = None,
        index: VisualIndex | None = None,
        verified: bool = True,
        target: ChosenBackend | None = None,
        bundle: Mapping[str, str] | None = None,
    ) -> None:
        names = graphs_of(spec)
        if missing := [name for name in names if name not in sessions]:
            message = f"no session for graph {missing[0]!r}; expected {', '.join(names)}, found {', '.join(sessions)}"
            raise EngineError("engine.missing_session", message)
        self.heads = chosen_heads(spec, heads)
        if not (is_number(unchanged_tolerance) and 0 <= unchanged_tolerance <= 255):
            message = f"unchanged_tolerance={unchanged_tolerance!r}: expected levels from 0 to 255"
            raise VideoError("options.out_of_range", message)
        self.sessions: Mapping[str, Session] = dict(sessions)
        self.tokenizer, self.verified, self.target, self.bundle = tokenizer, verified, target, bundle
        vision_encoder, language_model = sessions["vision_encoder"], sessions["language_model"]
        self._pool = KVPool(language_model, budget_bytes=kv_budget_bytes)
        self._feature_budget_bytes = feature_budget_bytes
        self._index = index
        closed_error = EngineError("engine.closed", "this Grounder is closed; load the bundle again")
        self._usage = UseCount(self._free, closed_error=closed_error)
        self._text = text or TextOptions()
        self._grammar: JsonGrammar | None = None
        if spec.text is not None:
            from bridge_stg.runtime.heads.json_grammar import JsonGrammar

            self._grammar = JsonGrammar(tokenizer)
        self._chain = Chain(
            vision_encoder, language_model, spec, tokenizer, self._pool, self._usage, self.heads, self._open_head
        )
        self._reader = VideoReader(
            self._chain, max_answer_tokens=self._text.max_tokens, index=index,
            unchanged_tolerance=unchanged_tolerance, feature_budget_bytes=feature_budget_bytes,
        )  # fmt: skip

    @classmethod
    @reporting_host_errors()
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        wait: bool = True,
        kv_budget_bytes: int | None = None,
        unchanged_tolerance: float = 0.0,
        heads: str | None = None,
        text: TextOptions | None = None,
        index: str | os.PathLike[str] | None = None,
        max_index_bytes: int | None = None,
    ) -> Grounder:
        """Load a bundle.

        Args:
            path: the bundle's folder.
            backend: "auto", or the name of a backend; `Grounder.target` is the one that was chosen, and why.
            variant: variant of the graphs to run, such as "standard"; None for the best that runs here.
            threads: CPU threads of the backend; None for its own default.
            wait: whether to return only when all sessions are open. Otherwise those of a CPU are opened while the first
                video is read, and an unsupported graph raises at the first call that needs it.
            kv_budget_bytes: see `Grounder`.
            unchanged_tolerance: see `Grounder`.
            heads: see `Grounder`.
            text: see `Grounder`.
            index: folder in which visual tokens of video files are kept, created when the first are stored; several
                processes may share it. None: they are computed in every call.
            max_index_bytes: maximum bytes of the index; the videos used longest ago are deleted from it. None: no
                maximum.

        Raises:
            BridgeError: `index` is not the folder of an index, or cannot be created; a maximum without an index.
            BundleError: the bundle is damaged, incomplete or of an unknown schema, or has no such heads.
            EngineError: the backend is unknown or missing, or does not support a graph.
            HostError: the process ran out of memory, threads or open files.
        """
        from bridge_stg.runtime.backends.choose import open_sessions
        from bridge_stg.runtime.bundle.bundle import Bundle

        if max_index_bytes is not None and index is None:
            raise BridgeError("index.missing", "a maximum size is given, but no folder of an index: pass one (--index)")
        bundle = Bundle.load(path)
        chosen_heads(bundle.manifest.spec, heads)  # a wrong name fails before the sessions are opened
        sessions = open_sessions(bundle, backend=backend, variant=variant, threads=threads, wait=wait)
        return cls.from_sessions(
            bundle,
            sessions,
            kv_budget_bytes=kv_budget_bytes,
            unchanged_tolerance=unchanged_tolerance,
            heads=heads,
            text=text,
            index=index,
            max_index_bytes=max_index_bytes,
        )

    @classmethod
    def from_sessions(
        cls,
        bundle: Bundle,
        sessions: Sessions,
        *,
        index: str | os.PathLike[str] | None = None,
        max_index_bytes: int | None = None,
        **options: Any,
    ) -> Grounder:
        """Return the Grounder of a bundle whose sessions are open, or being opened; close them if that fails.

        `options` are `kv_budget_bytes`, `unchanged_tolerance`, `heads` and `text`. Arguments and errors as for `load`.
        """
        try:
            spec = bundle.manifest.spec
            tokenizer = load_tokenizer(bundle.tokenizer_path, spec)
            kept = None
            if index is not None:
                kept = VisualIndex(index, encoder_of(bundle, sessions.target), max_bytes=max_index_bytes)
            return cls(
                sessions,
                spec,
                tokenizer,
                index=kept,
                verified=bundle.manifest.verified,
                target=sessions.target,
                bundle={"name": bundle.path.resolve().name, "fingerprint": bundle.manifest.fingerprint},
                **options,
            )
        except BaseException:
            sessions.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """The model's sizes, rates and rules."""
        return self._chain.spec

    def warm_up(self) -> None:
        """Answer a query on one black frame, so that the first call does not wait for imports, memory and threads.

        Raises EngineError if a graph does not run.
        """
        frame = [(0.0, np.zeros((64, 64, 3), np.uint8))]
        with suppress(ImportError):  # a missing one is reported when a file is read
            import_module("av")
        if self.heads == "bridge":
            self.ground(frame, "it", allow_none=False)
        else:
            list(self.ask(frame, "it", max_tokens=1))

    def check_query(self, query: str) -> None:
        """Check a query without reading a video; raise QueryError if it is empty, or too long for any video."""
        check_query(self.spec.prompt, query)

    def ground(
        self, video: Video, query: str, *, allow_none: bool = True, **options: Unpack[OptionKeywords]
    ) -> Grounding:
        """Find when and where the query's target is in a video, image or stream.

        Args:
            video: see `Video`; an iterable is read once, to its end.
            query: what to find, in words.
            allow_none: whether the answer may be that the target is absent.
            options: see `CallOptions`.

        Raises:
            VideoError: the video cannot be read, or `max_visual_tokens` is too small for one group of its frames.
            QueryError: the query is empty or too long.
            Interrupted: the deadline passed, or `cancel` was set; the message names the stage.
            EngineError: a backend failed, or this Grounder is closed.
            HostError: the process ran out of memory, threads or open files.
        """
        return self._ground(video, query, Task(allow_none=allow_none), CallOptions(**options))

    def span(
        self, video: Video, query: str, *, allow_none: bool = True, **options: Unpack[OptionKeywords]
    ) -> Grounding:
        """Find only the time span of the target (temporal grounding). Arguments and errors as for `ground`."""
        return self._ground(video, query, Task("span", allow_none=allow_none), CallOptions(**options))

    def locate(
        self, image: str | os.PathLike[str] | np.ndarray, query: str, **limits: Unpack[CallKeywords]
    ) -> Grounding:
        """Find the box of a target that is known to be in an image (referring expression).

        Arguments and errors as for `ground`; a video raises VideoError, too.
        """
        return self._ground(image, query, Task("image", allow_none=False), CallOptions(**limits, image_only=True))

    def track(
        self,
        video: Video,
        first_box: Sequence[float] | np.ndarray,
        *,
        query: str = TRACKED,
        **options: Unpack[OptionKeywords],
    ) -> Grounding:
        """Follow the target in a box of the first frame (tracking): the answer is never none.

        The result has a box for every frame of the video, the first one as given. The span begins with the video; later
        frames repeat the last box, marked as not visible. `first_box` is left, top, right, bottom in pixels of the
        first frame; `query` says what it is, if known. Other arguments and errors as for `ground`; an invalid box, or
        one outside the frame, raises QueryError.
        """
        return self._ground(video, query, track_from(first_box), CallOptions(**options))

    def ask(
        self,
        video: Video,
        question: str,
        *,
        context: Sequence[ChatMessage] = (),
        history: Sequence[ChatMessage] = (),
        max_tokens: int = 512,
        **options: Unpack[OptionKeywords],
    ) -> Iterator[str]:
        """Answer a question about a video, image or stream, and yield the text while the model writes it.

        The video is read when the iteration begins. Decoding is greedy, so equal questions have equal answers.

        Args:
            video: see `Video`; an iterable is read once, to its end.
            question: a question or an instruction.
            context: messages before the video, each (role, text): a message with the role `system`, which replaces the
                system message of the chat template, and turns with the roles `user` and `assistant`.
            history: messages between the video and the question; the video is in the first one, whose role is `user`.
            max_tokens: maximum tokens of the answer; it is cut there.
            options: see `CallOptions`.

        Raises:
            QueryError: the question is empty or too long, a message is invalid, or the model cannot answer in text.
            BridgeError: others as for `ground`.
        """
        call = CallOptions(**options)
        limits = call.limits()
        check_chat(self.spec, question, context=context, history=history, max_tokens=max_tokens)
        with self._usage.call(), self._open(video, call, limits, context) as opened:
            yield from opened.ask_within(limits, question, history=history, max_tokens=max_tokens)

    def open(
        self, video: Video, *, context: Sequence[ChatMessage] = (), **options: Unpack[OptionKeywords]
    ) -> OpenedVideo:
        """Read a video and compute all that does not depend on a query, such as the prefix of the prompt.

        The prefix contains the messages in `context`; see `ask`. Other arguments and errors as for `ground`.
        """
        call = CallOptions(**options)
        limits = call.limits()
        check_context(self.spec, context)
        with self._usage.call():
            return self._open(video, call, limits, context)

    def index(self, video: str | os.PathLike[str], *, fine: bool = False, **options: Unpack[OptionKeywords]) -> Indexed:
        """Store the visual tokens of a video file in the index, so that later calls neither decode nor encode it.

        A video that is longer than one window is stored for `search`, with its default windows.

        Args:
            video: a video file.
            fine: whether to store all fine frames, too; otherwise they are stored when a query needs them.
            options: see `CallOptions`. Calls find what was stored with the same `max_visual_tokens` and `stream`.

        Raises:
            BridgeError: this Grounder has no index; others as for `ground`.
        """
        if self._index is None:
            raise BridgeError("index.missing", "this Grounder has no index; pass index=FOLDER to Grounder.load")
        from bridge_stg.runtime.search.options import is_long
        from bridge_stg.runtime.search.video import index_video

        call = CallOptions(**options)
        limits = call.limits()
        with self._usage.call():
            if is_long(video, self.spec, stream=call.stream):
                budget = self._reader.budget(self.spec, call.max_visual_tokens)
                found = index_video(
                    self._chain, os.fspath(video), limits,
                    budget=budget, stream=call.stream, index=self._index, fine=fine,
                )  # fmt: skip
                return Indexed(*found)
            read = self._reader.read(video, self.spec, call, limits)
            with read.source:
                return read.index(limits, fine=fine)

    def watch(
        self,
        source: str | int | os.PathLike[str] | Iterable[tuple[float, np.ndarray]],
        queries: Sequence[str],
        *,
        realtime: bool = False,
        latest_wins: bool | None = None,
        cancel: Cancel | None = None,
        **options: Any,
    ) -> LiveWatch:
        """Watch a live stream: repeatedly ground standing queries in its last seconds.

        Iterate over the result in a `with` block: each `LiveUpdate` contains the answers and events of one round.

        Args:
            source: a video file; an address such as rtsp://camera/stream; a camera's number or device file; or an
                iterable of (time in seconds, RGB uint8 [H, W, 3]) with strictly increasing times and one size.
            queries: what to find, in words.
            realtime: read a file's frames at their own pace instead of as fast as possible.
            latest_wins: whether frames are dropped (and counted) when the machine is too slow for them; otherwise the
                source waits. None: files and iterables wait, all other sources drop.
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

        with self._usage.call():
            chosen = LiveOptions(**options)
            return LiveWatch(
                self._chain,
                open_live(source, realtime=realtime, latest_wins=latest_wins, timeout_s=chosen.stall_s),
                queries,
                chosen,
                cancel=cancel,
                feature_budget_bytes=self._feature_budget_bytes,
            )

    def search(
        self,
        video: str | os.PathLike[str] | Iterable[tuple[float, np.ndarray]] | LiveSource,
        queries: Sequence[str],
        *,
        max_visual_tokens: int | None = None,
        stream: int | None = None,
        deadline_s: float | None = None,
        cancel: Cancel | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[SearchResult]:
        """Find all occurrences of each query in a video of any length, window by window.

        The video is decoded once, in constant memory. Windows overlap, and spans are merged across their borders.

        Args:
            video: a video file, or an iterable of (time in seconds, RGB uint8 [H, W, 3]), which is read once.
            queries: what to find, in words.
            max_visual_tokens: see `CallOptions`, for one window.
            stream: see `CallOptions`.
            deadline_s: see `CallOptions`.
            cancel: see `CallOptions`.
            progress: see `CallOptions`; the stage is `search`, in seconds of the video.
            options: the fields of `SearchOptions`, such as `window_s`, `overlap`, `top` and `state`.

        Raises:
            VideoError: the video cannot be read, an option is out of range, or `state` is that of another search.
            BridgeError: others as for `ground`.
        """
        from bridge_stg.runtime.search.video import search_video

        limits = Limits(deadline_s=deadline_s, cancel=cancel, progress=progress)
        with self._usage.call():
            return search_video(
                self._chain,
                video,
                queries,
                options,
                limits,
                budget=self._reader.budget(self.spec, max_visual_tokens),
                stream=stream,
                sessions=self.sessions,
                feature_budget_bytes=self._feature_budget_bytes,
                index=self._index,
            )

    def _free(self) -> None:
        self._pool.clear()
        for session in self.sessions.values():
            session.close()

    def _ground(self, video: Video, query: str, task: Task, options: CallOptions) -> Grounding:
        limits = options.limits()
        with self._usage.call():
            check_query(self.spec.prompt, query)  # before a long video is read for it
            with self._open(video, options, limits) as opened:
                return opened.ground_within(limits, [query], task)[0]

    def _open(
        self, video: Video, options: CallOptions, limits: Limits, context: Sequence[ChatMessage] = ()
    ) -> OpenedVideo:
        """Sample the frames, encode them, and prefill the video's part of the prompt, which contains the context."""
        chain = self._chain
        read = self._reader.read(video, with_context(self.spec, context), options, limits)
        try:
            with limits.stage("prefill"):
                cache = chain.pool.take(batch=1, positions=len(read.segment))
                prefix = prefill_video(chain.language_model, cache, read.segment, read.tokens, report=limits.report)
            close = read.source.close
            return OpenedVideo(chain, read.facts, prefix, read.features, timings=limits.timings, close_source=close)
        except BaseException:
            read.source.close()
            raise

    def _open_head(self, chain: Chain, parts: VideoParts) -> Head:
        """Return the head that answers the queries on a video; with bridge heads, a text head answers its questions."""
        text = None
        if self._grammar is not None:
            from bridge_stg.runtime.heads.text import TextHead

            text = TextHead(chain, parts, self._text, self._grammar)
        if self.heads == "bridge" or text is None:
            return BridgeHead(chain, parts, self.sessions["spatial_decoder"], text)
        return text
