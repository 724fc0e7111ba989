"""The window of a live stream: its newest groups, their visual tokens, and the prefix of the prompt for them.

Each group is encoded once and extends the prefix; when the window is full, the newer half is prefilled again from its
visual tokens, like a video that begins there. Letters: G groups of P samples, D deepstack levels, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bridge_stg.runtime.backends.session import KVCache
from bridge_stg.runtime.chain.decode import Prefix, prefill_video
from bridge_stg.runtime.chain.opened_video import CachePool, Chain, OpenedVideo, VideoFacts
from bridge_stg.runtime.chain.prompt import Segment, video_segment
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.vision_pass import FineFeatures, Stored, coarse_tokens, on_device
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.live.sampling import FineSample, LiveGroup
from bridge_stg.runtime.video.source import Samples

QUERY_POSITIONS = 128  # positions reserved after the longest prefix, so that one query fits the window's own cache


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A group of the window: its grid index, visual tokens [1+D, N+1, H] (row 0 all zero), fine frames, frame times."""

    place: int
    tokens: Array
    fine: tuple[FineSample, ...]
    frame_times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    end_s: float = math.inf  # see `LiveGroup`


@dataclass(frozen=True, eq=False)
class StoredWindows:
    """What is kept of a stream between processes; see `bridge_stg.runtime.search.indexed`.

    Attributes:
        groups: visual tokens [1+D, N, H] of groups, by their number.
        fine: feature maps or visual tokens of fine frames, see `FineFeatures`.
        pictures: returns the frames that start at times [N ≥ 1] in seconds, at (height, width): uint8 [N, h, w, 3].
    """

    groups: Stored
    fine: Stored
    pictures: Callable[[np.ndarray, tuple[int, int], Limits], np.ndarray]


class LiveWindow:
    """The window, for use by one thread; its fine feature maps take at most `feature_budget_bytes`.

    With `stored`, groups and fine frames may be without pixels: those that are needed are read from there. All groups
    are of the shot that starts at `shot_s`.
    """

    def __init__(
        self, chain: Chain, plan: LivePlan, *, feature_budget_bytes: int, stored: StoredWindows | None = None,
        shot_s: float = 0.0,
    ) -> None:  # fmt: skip
        self._chain, self._plan, self._stored, self._shot_s = chain, plan, stored, shot_s
        full = self._segment(np.arange(plan.groups) * plan.group)
        if full.next_position > chain.spec.language.max_positions:
            text = f"{full.next_position} of the prompt's {chain.spec.language.max_positions} positions"
            raise VideoError("live.window_too_large", f"the window takes {text}; give a shorter window")
        self._cache = chain.pool.take(batch=1, positions=len(full) + QUERY_POSITIONS)
        self._own = dataclasses.replace(chain, pool=_WindowPool(self._cache, chain.pool))
        self._features = FineFeatures(
            chain.vision_encoder,
            chain.spec,
            read=self._read_fine,
            budget_bytes=feature_budget_bytes,
            as_tokens=chain.heads == "text",
            stored=None if stored is None else stored.fine,
        )
        self._groups: list[_Encoded] = []  # those in the prefix
        self._encoded: dict[int, _Encoded] = {}  # those that `show` has encoded, by their place
        self._fine: dict[int, FineSample] = {}
        self._prefix: Prefix | None = None
        self.prefilled = 0  # tokens that the language model has prefilled so far
        self.settle_s = plan.group_s + 1 / plan.fine_fps  # see `EventTracker`

    @property
    def start_s(self) -> float:
        """Time of the window's first sample, in seconds from the first frame of the stream."""
        return self._shot_s + float(self._plan.times(np.asarray(self._groups[0].place)))

    @property
    def end_s(self) -> float:
        """Time of the window's end, in seconds from the first frame of the stream."""
        end_s = self._shot_s + float(self._plan.times(np.asarray(self._groups[-1].place + self._plan.group)))
        return min(end_s, self._groups[-1].end_s)

    def add(self, group: LiveGroup, limits: Limits) -> bool:
        """Encode a group and extend the prefix; return whether the prefix had to be rebuilt.

        It is rebuilt when the window would get too long, by frames, or by time if the stream had gaps.
        """
        plan, chain = self._plan, self._chain
        with limits.stage("vision_coarse"):
            tokens = coarse_tokens(chain.vision_encoder, chain.spec, group.frames[None], report=limits.report)
        self._groups.append(_Encoded(group.place, tokens, group.fine))
        self._fine |= {sample.place: sample for sample in group.fine}
        end = group.place + plan.group
        overflows = end - self._groups[0].place > plan.groups * plan.group
        with limits.stage("rebuild" if overflows else "prefill"):
            if overflows:
                self._forget(before=end - plan.groups // 2 * plan.group)
            self._extend(0 if overflows or self._prefix is None else len(self._groups) - 1, limits)
        return overflows

    def show(self, groups: Sequence[LiveGroup], limits: Limits) -> None:
        """Prefill these consecutive groups instead of all others; each is encoded once, until `forget`."""
        new = [group for group in groups if group.place not in self._encoded]
        if new:
            with limits.stage("vision_coarse"):
                tokens = tokens_of(self._chain, self._plan, new, self._stored, limits)
            for group in new:
                own = arrays.join([tokens[group.place]], axis=1, zeros_before=1)
                self._encoded[group.place] = _Encoded(group.place, own, group.fine, group.frame_times, group.end_s)
        self._groups = [self._encoded[group.place] for group in groups]
        self._fine = {sample.place: sample for group in groups for sample in group.fine}
        with limits.stage("prefill"):
            self._extend(0, limits)

    def forget(self, *, before: int) -> None:
        """Drop what `show` has encoded before a point of the coarse grid."""
        self._encoded = {place: encoded for place, encoded in self._encoded.items() if place >= before}
        self._features.forget(int(np.ceil(before * self._plan.interval_s * self._plan.fine_fps - 1e-6)))

    def view(self) -> OpenedVideo:
        """Return the window as a video whose times count from its first sample; valid until `add` or `show`."""
        assert self._prefix is not None
        plan, start = self._plan, self.start_s
        places = np.array([encoded.place for encoded in self._groups]) - self._groups[0].place
        times = plan.times(places[:, None] + np.arange(plan.group))
        fine = np.array(list(self._fine), np.int64)
        fine_times = np.array([sample.time_s for sample in self._fine.values()])
        shown = [fine_times, *(encoded.frame_times for encoded in self._groups)]
        video = VideoFacts(
            "the live stream",
            (plan.width, plan.height),
            is_image=False,
            frame_times=np.unique(np.concatenate(shown) - start),
            fine_grid=np.round(fine / plan.fine_fps + self._shot_s - start, 9),
            sample_times=times,
            interval_s=plan.interval_s,
            duration_s=self.end_s - start,
            choice=plan.choice(times.mean(axis=1)),
        )
        return OpenedVideo(self._own, video, self._prefix, _WindowFeatures(self._features, fine, start))

    def close(self) -> None:
        """Return the cache to the pool, and drop everything else."""
        self._features.clear()
        self._groups, self._encoded, self._fine, self._prefix = [], {}, {}, None
        self._chain.pool.give(self._cache)

    def _segment(self, places: np.ndarray) -> Segment:
        plan, vision = self._plan, self._chain.spec.vision
        times = plan.times((places - places[0])[:, None] + np.arange(plan.group)).mean(axis=1)
        side = vision.patch_size * vision.merge_size
        grid = (plan.coarse_size[0] // side, plan.coarse_size[1] // side)
        return video_segment(self._chain.tokenizer, self._chain.spec, times, grid)

    def _extend(self, first: int, limits: Limits) -> None:
        """Prefill the groups from index `first` on, after those in the cache."""
        segment = self._segment(np.array([encoded.place for encoded in self._groups]))
        cached = 0 if first == 0 or self._prefix is None else self._prefix.length
        new = [encoded.tokens for encoded in self._groups[first:]]
        rows = sum(encoded.tokens.shape[1] - 1 for encoded in self._groups[:first])
        rest = segment.part(cached, len(segment))
        self._prefix = prefill_video(
            self._chain.language_model,
            self._cache,
            rest.with_rows(-rows),
            arrays.join([new[0], *(tokens[:, 1:] for tokens in new[1:])], axis=1),
            report=limits.report,
            cached=cached,
        )
        self.prefilled += len(rest)

    def _forget(self, *, before: int) -> None:
        """Drop the groups before a point of the coarse grid."""
        self._groups = [encoded for encoded in self._groups if encoded.place >= before]
        self._fine = {sample.place: sample for encoded in self._groups for sample in encoded.fine}
        self._features.forget(min(self._fine, default=0))
        self._prefix = None

    def _read_fine(self, places: np.ndarray, limits: Limits) -> Samples:
        return samples_of([self._fine[int(place)] for place in places], self._plan, self._stored, limits)


def tokens_of(
    chain: Chain, plan: LivePlan, groups: Sequence[LiveGroup], stored: StoredWindows | None, limits: Limits
) -> dict[int, Array]:
    """Return the visual tokens [1+D, N, H] of groups by their place; those that are not stored are encoded."""
    numbers = {group.place // plan.group: group for group in groups}
    found: dict[int, Array] = {}
    if stored is not None:
        found = {
            numbers[number].place: on_device(tokens, chain.vision_encoder)
            for number, (tokens, _) in stored.groups.get(numbers).items()
        }
    missing = [group for group in groups if group.place not in found]
    if not missing:
        return found
    frames = np.stack([group.frames for group in missing])
    if stored is not None and not frames.shape[-1]:
        times = np.concatenate([group.shown_times for group in missing])
        frames = stored.pictures(times, plan.coarse_size, limits).reshape(-1, plan.group, *plan.coarse_size, 3)
    encoded = coarse_tokens(chain.vision_encoder, chain.spec, frames, report=limits.report)[:, 1:]
    size = encoded.shape[1] // len(missing)
    made = {group.place: encoded[:, i * size : (i + 1) * size] for i, group in enumerate(missing)}
    if stored is not None:
        stored.groups.put({place // plan.group: (arrays.on_host(tokens), 0.0) for place, tokens in made.items()})
    return found | made


def samples_of(samples: Sequence[FineSample], plan: LivePlan, stored: StoredWindows | None, limits: Limits) -> Samples:
    """Return fine frames; those without pixels are read."""
    limits.check()
    times = np.array([sample.time_s for sample in samples])
    frames = np.stack([sample.frame for sample in samples])
    if stored is not None and not frames.shape[-1]:
        frames = stored.pictures(times, plan.fine_size, limits)
    return Samples(frames=frames, times=times)


class _WindowFeatures:
    """Fine feature maps by their index in the window; they are cached by their index in the stream."""

    def __init__(self, features: FineFeatures, places: np.ndarray, start_s: float) -> None:
        self._features, self._places, self._start_s = features, places, start_s

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[Array, np.ndarray]:
        maps, times = self._features.at(self._places[indices], limits)
        return maps, times - self._start_s

    def clear(self) -> None:
        """Do nothing: the next view uses the maps."""

    @property
    def nbytes(self) -> int:
        return self._features.nbytes


class _WindowPool:
    """Provides the window's own cache for a single query, appended to the prefix, and other caches from the pool.

    All caches have the window's capacity, for any length of the prefix, so that memory stays constant.
    """

    def __init__(self, cache: KVCache, pool: CachePool) -> None:
        self._cache, self._pool = cache, pool

    def take(self, *, batch: int, positions: int) -> KVCache:
        if batch == 1 and positions <= self._cache.capacity:
            return self._cache
        return self._pool.take(batch=batch, positions=max(positions, self._cache.capacity))

    def give(self, cache: KVCache) -> None:
        if cache is not self._cache:
            self._pool.give(cache)

    def rows(self, like: KVCache, *, positions: int) -> int:
        return self._pool.rows(like, positions=max(positions, self._cache.capacity))


def in_stream_time(grounding: Grounding, shift_s: float) -> Grounding:
    """Return a grounding with all times `shift_s` later, except those in the answer's text."""
    spans = (None if s is None else (s[0] + shift_s, s[1] + shift_s) for s in (grounding.span, grounding.named_span))
    span, named_span = spans
    tube, boxes = grounding.tube, grounding.boxes
    return dataclasses.replace(
        grounding,
        span=span,
        named_span=named_span,
        tube=None if tube is None else dataclasses.replace(tube, times=tube.times + shift_s),
        boxes=None if boxes is None else dataclasses.replace(boxes, times=boxes.times + shift_s),
    )
