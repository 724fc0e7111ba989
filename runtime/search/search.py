"""Search a video that is longer than the model's window: read it once, and ground the queries in each window.

The machinery is that of a live stream: a thread decodes and samples the file (`live/reader`), and a `LiveWindow` keeps
visual tokens, so that a frame that two windows share is encoded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.opened_video import Chain
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.tasks import Task
from bridge_stg.runtime.chain.vision_pass import FineFeatures
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.memory import trim_heap
from bridge_stg.runtime.index.fine import BLOCK
from bridge_stg.runtime.live.cuts import CutFinder
from bridge_stg.runtime.live.plan import LivePlan, plan_stream
from bridge_stg.runtime.live.reader import POLL_S, GroupQueue, LiveReader
from bridge_stg.runtime.live.sampling import LiveGroup
from bridge_stg.runtime.live.source import LiveSource
from bridge_stg.runtime.live.window import LiveWindow, StoredWindows, in_stream_time, samples_of, tokens_of
from bridge_stg.runtime.search.indexed import IndexedVideo
from bridge_stg.runtime.search.occurrences import Occurrences, SearchResult, is_seen
from bridge_stg.runtime.search.options import SearchOptions
from bridge_stg.runtime.search.state import SearchState, SearchWindow
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
        size = options.groups(spec)
        hop = size - min(round(options.overlap * size), size - 1)
        searched = {"task": options.task, "allow_none": options.allow_none, "cuts": options.cuts, "groups": size}
        identity = {**self.identity, **searched, "hop": hop, "queries": list(self.queries)}
        with SearchState(options.state, identity) as state, limits.stage(STAGE):
            found = [Occurrences(1 / spec.frames.coarse_fps) for _ in self.queries]
            for window in state.windows:
                _add(found, window)
            done = len(state.windows)
            state.windows.clear()
            reader = self._reader(size, hop)
            timings: dict[str, float] = {}
            with closing(reader):
                for window in self._windows(reader, limits, size=size, hop=hop, done=done):
                    state.add(window)
                    _add(found, window)
                    for stage, seconds in window.timings.items():
                        timings[stage] = timings.get(stage, 0.0) + seconds
            assert reader.plan is not None  # otherwise there was no frame, which is an error
            group_s = reader.plan.group_s
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
        reader = self._reader(self.options.groups(self.chain.spec), BLOCK)
        with closing(reader), limits.stage("index"):
            for plan, groups in self._parts(reader, limits, size=BLOCK, hop=BLOCK):
                within, stored = Limits(cancel=_checking(limits)), self.indexed.stored(plan, groups[0].shot_s)
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

    def _reader(self, size: int, hop: int) -> LiveReader:
        spec = self.chain.spec

        def plan_of(height: int, width: int) -> LivePlan:
            return plan_stream(height, width, spec, self.chain.tokenizer, groups=size, budget=self.budget)

        queue, pixels, cuts = GroupQueue(hop, latest_wins=False), True, CutFinder() if self.options.cuts else None
        if self.indexed is not None:
            pixels, cuts = self.indexed.facts is None, self.indexed.cuts
        return LiveReader(self.source, plan_of, queue, hold_s=math.inf, whole=True, cuts=cuts, pixels=pixels)

    def _windows(self, reader: LiveReader, limits: Limits, *, size: int, hop: int, done: int) -> Iterator[SearchWindow]:
        """Yield the windows in order of time, without the first `done`, which are finished."""
        window, shot_s = None, -1.0
        try:
            for number, (plan, groups) in enumerate(self._parts(reader, limits, size=size, hop=hop)):
                if number >= done:
                    if window is None or groups[0].shot_s != shot_s:
                        if window is not None:
                            window.close()
                        window, shot_s = self._window(plan, groups[0].shot_s), groups[0].shot_s
                    within = Limits(cancel=_checking(limits))  # whose stages are not shown as progress
                    answers = self._answer(window, groups, plan.group_s, within)
                    times = np.concatenate([one.frame_times for one in groups])
                    yield SearchWindow(shot_s, times, answers, within.timings)
                    window.forget(before=groups[0].place + hop * plan.group)
                    trim_heap()  # freed frames would stay in the heaps of threads
                self._report(plan, groups, limits)
        finally:
            if window is not None:
                window.close()

    def _window(self, plan: LivePlan, shot_s: float) -> LiveWindow:
        stored = None if self.indexed is None else self.indexed.stored(plan, shot_s)
        budget = self.feature_budget_bytes
        return LiveWindow(self.chain, plan, feature_budget_bytes=budget, stored=stored, shot_s=shot_s)

    def _parts(
        self, reader: LiveReader, limits: Limits, *, size: int, hop: int
    ) -> Iterator[tuple[LivePlan, list[LiveGroup]]]:
        """Read, and yield `size` groups of a shot, then those `hop` later; last, what is left of the shot."""
        kept: list[LiveGroup] = []
        left = 0  # groups at the end of `kept` that no part had
        reader.start()
        while True:
            group = self._next(reader, limits)
            if kept and (group is None or group.shot_s != kept[0].shot_s):
                if left:
                    assert reader.plan is not None
                    yield reader.plan, kept
                kept, left = [], 0
            if group is None:
                break
            kept, left = [*kept, group], left + 1
            if len(kept) == size:
                assert reader.plan is not None
                yield reader.plan, kept
                kept, left = kept[hop:], 0
        if self.indexed is not None:
            self.indexed.keep()

    def _report(self, plan: LivePlan, groups: Sequence[LiveGroup], limits: Limits) -> None:
        """Report progress up to the end of these groups."""
        end_s = groups[-1].shot_s + float(plan.times(np.asarray(groups[-1].place + plan.group)))
        limits.report(min(end_s, groups[-1].end_s, self.length_s or end_s), self.length_s)

    def _next(self, reader: LiveReader, limits: Limits) -> LiveGroup | None:
        """Return the next group; None at the end of the file. Raises the reader's errors."""
        while True:
            limits.check()
            group = reader.queue.get(POLL_S)
            if group is not None or reader.queue.ended:
                return group

    def _answer(
        self, window: LiveWindow, groups: Sequence[LiveGroup], group_s: float, limits: Limits
    ) -> list[list[Grounding]]:
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


def _checking(limits: Limits) -> Callable[[], bool]:
    """Return a cancel signal that raises the error of outer limits."""

    def check() -> bool:
        limits.check()
        return False

    return check


def _add(found: Sequence[Occurrences], window: SearchWindow) -> None:
    for occurrences, groundings in zip(found, window.answers, strict=True):
        occurrences.add(groundings, window.frame_times, window.shot_s)
