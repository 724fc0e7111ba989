"""Search a video that is longer than the model's window: read it once, and ground the queries in each window.

The machinery is that of a live stream: a thread decodes and samples the file (`live/reader`), and a `LiveWindow` keeps
visual tokens, so that a frame that two windows share is encoded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.opened_video import Chain
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.spans import Span
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.chain.vision_pass import FineFeatures
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.memory import trim_heap
from bridge_stg.runtime.index.fine import BLOCK
from bridge_stg.runtime.live.plan import LivePlan, plan_stream
from bridge_stg.runtime.live.reader import POLL_S, GroupQueue, LiveReader
from bridge_stg.runtime.live.sampling import LiveGroup
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.live.window import LiveWindow, StoredWindows, in_stream_time, samples_of, tokens_of
from bridge_stg.runtime.search.indexed import IndexedVideo
from bridge_stg.runtime.search.occurrences import Occurrences, SearchResult, is_seen
from bridge_stg.runtime.search.options import SearchOptions, window_groups
from bridge_stg.runtime.search.state import SearchState
from bridge_stg.runtime.video.token_budget import Budget

STAGE = "search"  # of the progress, in seconds of the video


@dataclass(frozen=True, eq=False)
class Search:
    """The search of one video for several queries.

    Attributes:
        chain: sessions and rules.
        source: the video.
        queries: what to find, checked.
        options: length and overlap of the windows, and others.
        budget: budget of the coarse frames of a window.
        length_s: length of the video in seconds, for the progress; None: unknown.
        identity: plain values that identify video and model in the state file.
        feature_budget_bytes: see `LiveWindow`.
        indexed: the video with its index, whose `source` is used; None: without an index.
    """

    chain: Chain
    source: LiveSource
    queries: Sequence[str]
    options: SearchOptions
    budget: Budget
    length_s: float | None
    identity: Mapping[str, Any]
    feature_budget_bytes: int
    indexed: IndexedVideo | None = None

    def run(self, limits: Limits) -> list[SearchResult]:
        """Return the occurrences of each query. Raises BridgeError as `Grounder.search` does."""
        spec, options = self.chain.spec, self.options
        size, group = window_groups(spec, options.window_s), spec.vision.temporal_patch_size
        hop = size - min(round(options.overlap * size), size - 1)
        searched = {"task": options.task, "allow_none": options.allow_none, "groups": size, "hop": hop}
        identity = {**self.identity, **searched, "queries": list(self.queries)}
        with SearchState(options.state, identity) as state, limits.stage(STAGE):
            found = [Occurrences(1 / spec.frames.coarse_fps) for _ in self.queries]
            for frame_times, answers in state.windows:
                _add(found, answers, frame_times)
            done = len(state.windows)
            state.windows.clear()
            limits.report(done * hop * group / spec.frames.coarse_fps, self.length_s)
            reader = self._reader(size, hop, start=done * hop * group)
            timings: dict[str, float] = {}
            with closing(reader):
                for window in self._windows(reader, _Layout(size, hop, done), limits):
                    state.add(window.frame_times, window.answers)
                    _add(found, window.answers, window.frame_times)
                    for stage, seconds in window.timings.items():
                        timings[stage] = timings.get(stage, 0.0) + seconds
            assert reader.plan is not None  # otherwise there was no frame, which is an error
            group_s = group * reader.plan.interval_s
            timings["total"] = limits.elapsed_s
            results = [
                one.result(
                    top=options.top,
                    length_s=size * group_s,
                    overlap_s=(size - hop) * group_s,
                    timings=timings,
                    clock=self.source.times_from.clock,
                    stream=self.source.times_from.stream,
                )
                for one in found
            ]
            state.remove()
        return results

    def index(self, limits: Limits, *, fine: bool) -> float:
        """Store what a search would encode, with `fine` of all fine frames, and return the seconds of the video.

        Raises BridgeError as `Grounder.index` does.
        """
        assert self.indexed is not None
        reader = self._reader(window_groups(self.chain.spec, self.options.window_s), BLOCK, start=0)
        with closing(reader), limits.stage("index"):
            for plan, groups, _ in self._parts(reader, limits, size=BLOCK, hop=BLOCK):
                within, stored = Limits(cancel=_checking(limits)), self.indexed.stored(plan)
                tokens_of(self.chain, plan, groups, stored, within)
                if fine:
                    self._index_fine(groups, plan, stored, within)
                self._report(plan, groups, limits)
        return reader.end_s or 0.0

    def _index_fine(self, groups: Sequence[LiveGroup], plan: LivePlan, stored: StoredWindows, limits: Limits) -> None:
        samples = {sample.place: sample for group in groups for sample in group.fine}
        features = FineFeatures(
            self.chain.vision_encoder,
            self.chain.spec,
            read=lambda places, limits: samples_of([samples[int(i)] for i in places], plan, stored, limits),
            budget_bytes=0,
            as_tokens=self.chain.heads == "text",
            stored=stored.fine,
        )
        if samples:
            features.at(np.array(sorted(samples), np.int64), limits)

    def _reader(self, size: int, hop: int, *, start: int) -> LiveReader:
        spec = self.chain.spec
        window = size * spec.vision.temporal_patch_size

        def plan_of(height: int, width: int) -> LivePlan:
            return plan_stream(height, width, spec, self.chain.tokenizer, window=window, budget=self.budget)

        queue, pixels = GroupQueue(hop, latest_wins=False), self.indexed is None or self.indexed.facts is None
        return LiveReader(self.source, plan_of, queue, hold_s=float("inf"), start=start, whole=True, pixels=pixels)

    def _windows(self, reader: LiveReader, layout: _Layout, limits: Limits) -> Iterator[_Window]:
        """Yield the windows that are not finished yet, in time of the video."""
        window: LiveWindow | None = None
        try:
            for plan, groups, ended in self._parts(reader, limits, size=layout.size, hop=layout.hop):
                if ended and groups[-1].place < layout.end(plan.group):  # an earlier window has these groups
                    return
                layout.done += 1
                window = window or self._window(plan)
                within = Limits(cancel=_checking(limits))  # whose stages are not shown as progress
                answers = self._answer(window, groups, within)
                self._report(plan, groups, limits)
                times = np.concatenate([one.frame_times for one in groups])
                yield _Window(times, _clipped(answers, reader.end_s), within.timings)
                window.forget(before=layout.done * layout.hop * plan.group)
                trim_heap()  # freed frames would stay in the heaps of threads
        finally:
            if window is not None:
                window.close()

    def _window(self, plan: LivePlan) -> LiveWindow:
        stored = None if self.indexed is None else self.indexed.stored(plan)
        return LiveWindow(self.chain, plan, feature_budget_bytes=self.feature_budget_bytes, stored=stored)

    def _parts(
        self, reader: LiveReader, limits: Limits, *, size: int, hop: int
    ) -> Iterator[tuple[LivePlan, list[LiveGroup], bool]]:
        """Read, and yield `size` groups, each time `hop` later; at the end of the file, with True, what is left."""
        kept: list[LiveGroup] = []
        ended = False
        reader.start()
        while not ended:
            group = self._next(reader, limits)
            ended = group is None
            kept += [] if group is None else [group]
            if reader.plan is not None and kept and (ended or len(kept) >= size):
                yield reader.plan, kept, ended
                kept = kept[hop:]

    def _report(self, plan: LivePlan, groups: Sequence[LiveGroup], limits: Limits) -> None:
        """Report progress up to the end of these groups."""
        end_s = float(plan.times(np.asarray(groups[-1].place + plan.group)))
        limits.report(min(end_s, self.length_s or end_s), self.length_s)

    def _next(self, reader: LiveReader, limits: Limits) -> LiveGroup | None:
        """Return the next group; None at the end of the file. Raises the reader's errors."""
        while True:
            limits.check()
            group = reader.queue.get(POLL_S)
            if group is not None or reader.queue.ended:
                return group

    def _answer(self, window: LiveWindow, groups: Sequence[LiveGroup], limits: Limits) -> list[list[Grounding]]:
        """Return all answers to each query in these groups.

        An answer names one span; so the groups before and after it are searched again, if they are as many as the
        windows overlap, or more.
        """
        least = max(2, round(self.options.overlap * len(groups)))
        task = Task(self.options.task, allow_none=self.options.allow_none)
        answers: list[list[Grounding]] = [[] for _ in self.queries]
        parts = {(0, len(groups)): list(range(len(self.queries)))}  # groups (first, end) to the queries to ground
        while parts:
            (first, end), asked = parts.popitem()
            window.show(groups[first:end], limits)
            start_s, view = window.start_s, window.view()
            found = view.ground_within(limits, [self.queries[i] for i in asked], task)
            group_s = (window.end_s - start_s) / (end - first)
            for i, grounding in zip(asked, found, strict=True):
                seen = is_seen(grounding)
                if seen or not answers[i]:  # "not there" in a part says nothing of the window
                    answers[i].append(in_stream_time(grounding, start_s))
                if not seen or grounding.span is None or not self.options.allow_none:
                    continue
                before = first + int(grounding.span[0] / group_s + 1e-6)
                after = first + int(np.ceil(grounding.span[1] / group_s - 1e-6))
                for part in ((first, min(before, end)), (max(after, first), end)):
                    if part[1] - part[0] >= least and part != (first, end):
                        parts.setdefault(part, []).append(i)
        return answers


@dataclass
class _Layout:
    """Windows of `size` groups, each `hop` groups after the one before; the first `done` are finished."""

    size: int
    hop: int
    done: int

    def end(self, group: int) -> int:
        """Return the end of the finished windows on the coarse grid, for groups of `group` samples."""
        return ((self.done - 1) * self.hop + self.size) * group if self.done else 0


@dataclass(frozen=True, eq=False)
class _Window:
    """A finished window: the times of its frames [N], all answers to each query, seconds by stage."""

    frame_times: np.ndarray
    answers: list[list[Grounding]]
    timings: Mapping[str, float]


def _checking(limits: Limits) -> Callable[[], bool]:
    """Return a cancel signal that raises the error of outer limits."""

    def check() -> bool:
        limits.check()
        return False

    return check


def _clipped(answers: list[list[Grounding]], end_s: float | None) -> list[list[Grounding]]:
    """Clip spans to the end of the video: the last group of frames may be longer than the rest of the video."""
    if end_s is None:
        return answers
    last_s = end_s

    def clipped(span: Span | None) -> Span | None:
        return span and (min(span[0], last_s), min(span[1], last_s))

    return [
        [replace(one, span=clipped(one.span), named_span=clipped(one.named_span)) for one in found] for found in answers
    ]


def _add(found: Sequence[Occurrences], answers: Sequence[Sequence[Grounding]], frame_times: np.ndarray) -> None:
    for occurrences, groundings in zip(found, answers, strict=True):
        occurrences.add(groundings, frame_times)
