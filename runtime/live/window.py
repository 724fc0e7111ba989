"""The window of a live stream: its newest groups, their visual tokens, and the prompt's prefix that stands for them.

Each group is encoded once. The prefix is extended by each; when the window is full, the newer half is prefilled again
from its visual tokens, as a video that begins there. Letters: G groups of P samples, D deepstack levels, N tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import KVCache
from bridge_stg.runtime.chain.decode import Prefix, prefill_video
from bridge_stg.runtime.chain.opened_video import CachePool, Chain, OpenedVideo, VideoFacts
from bridge_stg.runtime.chain.prompt import Segment, video_segment
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.chain.vision_pass import FineFeatures, coarse_tokens
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.live.plan import LivePlan
from bridge_stg.runtime.live.sampling import FineSample, LiveGroup
from bridge_stg.runtime.video.source import Samples

QUERY_POSITIONS = 128
"""Room kept behind the longest prefix, so that one query can be asked in the window's own cache."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A group of the window: its place, its visual tokens [1+D, N+1, H] (row 0 all zero), its fine frames."""

    place: int
    tokens: Array
    fine: tuple[FineSample, ...]


class LiveWindow:
    """The window. For one thread; `view` asks queries about it.

    Args:
        chain: the model.
        plan: how the stream is sampled.
        feature_budget_bytes: what the fine feature maps may hold.
    """

    def __init__(self, chain: Chain, plan: LivePlan, *, feature_budget_bytes: int) -> None:
        self._chain, self._plan = chain, plan
        full = self._segment(np.arange(plan.groups) * plan.group)
        if full.next_position > chain.spec.language.max_positions:
            raise VideoError(
                f"a window of {plan.groups * plan.group} coarse frames takes {full.next_position} positions of the "
                f"prompt, more than the model's {chain.spec.language.max_positions}; give a smaller window"
            )
        cache = chain.pool.take(batch=1, positions=len(full) + QUERY_POSITIONS)
        self._own = dataclasses.replace(chain, pool=_WindowPool(cache, chain.pool))
        self._cache = cache
        self._features = FineFeatures(
            chain.vision_encoder, chain.spec, read=self._read_fine, budget_bytes=feature_budget_bytes
        )
        self._held: list[_Held] = []
        self._fine: dict[int, FineSample] = {}
        self._prefix: Prefix | None = None
        self.prefilled = 0
        """Tokens that the language model was fed for prefixes, so far."""

    @property
    def start_s(self) -> float:
        """Time of the window's first sample, in seconds from the first frame of the stream."""
        return float(self._plan.times(np.asarray(self._held[0].place)))

    @property
    def end_s(self) -> float:
        """Time up to which the window knows the stream."""
        return float(self._plan.times(np.asarray(self._held[-1].place + self._plan.group)))

    def add(self, group: LiveGroup, limits: Limits) -> bool:
        """Encode a group and take it into the prefix; return whether the prefix had to be rebuilt.

        It is rebuilt where the window would be longer than it may: by frames, or by time if the stream had gaps.
        """
        plan, chain = self._plan, self._chain
        with limits.stage("vision_coarse"):
            frames = group.frames[None]
            tokens = coarse_tokens(chain.vision_encoder, chain.spec, frames, report=limits.report)
        self._held.append(_Held(group.place, tokens, group.fine))
        self._fine |= {sample.place: sample for sample in group.fine}
        end = group.place + plan.group
        overflows = end - self._held[0].place > plan.groups * plan.group
        with limits.stage("rebuild" if overflows else "prefill"):
            if overflows:
                self._forget(before=end - plan.groups // 2 * plan.group)
            self._extend(0 if overflows or self._prefix is None else len(self._held) - 1, limits)
        return overflows

    def view(self) -> OpenedVideo:
        """Return the window as a video whose times count from the window's first sample; good until the next `add`."""
        assert self._prefix is not None
        plan, start = self._plan, self.start_s
        places = np.array([held.place for held in self._held]) - self._held[0].place
        times = plan.times(places[:, None] + np.arange(plan.group))
        fine = np.array(list(self._fine), np.int64)
        video = VideoFacts(
            "the live stream",
            (plan.width, plan.height),
            is_image=False,
            frame_times=np.unique([sample.time_s - start for sample in self._fine.values()]),
            fine_grid=np.round(fine / plan.fine_fps - start, 9),
            sample_times=times,
            interval_s=plan.interval_s,
            duration_s=self.end_s - start,
            choice=plan.choice(times.mean(axis=1)),
        )
        return OpenedVideo(self._own, video, self._prefix, _WindowFeatures(self._features, fine, start))

    def close(self) -> None:
        """Give the cache back, and let go of everything else."""
        self._features.clear()
        self._held, self._fine, self._prefix = [], {}, None
        self._chain.pool.give(self._cache)

    def _segment(self, places: np.ndarray) -> Segment:
        plan, vision = self._plan, self._chain.spec.vision
        times = plan.times((places - places[0])[:, None] + np.arange(plan.group)).mean(axis=1)
        side = vision.patch_size * vision.merge_size
        grid = (plan.coarse_size[0] // side, plan.coarse_size[1] // side)
        return video_segment(self._chain.tokenizer, self._chain.spec, times, grid)

    def _extend(self, first: int, limits: Limits) -> None:
        """Feed the groups from index `first` on, behind those that stand in the cache."""
        segment = self._segment(np.array([held.place for held in self._held]))
        behind = 0 if first == 0 or self._prefix is None else self._prefix.length
        new = [held.tokens for held in self._held[first:]]
        rows = sum(held.tokens.shape[1] - 1 for held in self._held[:first])
        rest = segment.part(behind, len(segment))
        visual_index = np.where(rest.visual_index > 0, rest.visual_index - rows, 0)
        self._prefix = prefill_video(
            self._chain.language_model,
            self._cache,
            dataclasses.replace(rest, visual_index=visual_index),
            arrays.join([new[0], *(tokens[:, 1:] for tokens in new[1:])], axis=1),
            report=limits.report,
            cached=behind,
        )
        self.prefilled += len(rest)

    def _forget(self, *, before: int) -> None:
        """Let go of the groups before a place of the coarse grid."""
        self._held = [held for held in self._held if held.place >= before]
        self._fine = {sample.place: sample for held in self._held for sample in held.fine}
        self._features.forget(min(self._fine, default=0))
        self._prefix = None

    def _read_fine(self, places: np.ndarray, limits: Limits) -> Samples:
        limits.check()
        samples = [self._fine[int(place)] for place in places]
        return Samples(
            frames=np.stack([sample.picture for sample in samples]),
            times=np.array([sample.time_s for sample in samples]),
        )


class _WindowFeatures:
    """The fine features by their place in the window; they are kept by their place in the stream."""

    def __init__(self, features: FineFeatures, places: np.ndarray, start_s: float) -> None:
        self._features, self._places, self._start_s = features, places, start_s

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[Array, np.ndarray]:
        maps, times = self._features.at(self._places[indices], limits)
        return maps, times - self._start_s

    def clear(self) -> None:
        """Keep the maps, which outlive the view."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cached maps."""
        return self._features.nbytes


class _WindowPool:
    """Hands out the window's own cache for a single query, which goes behind the prefix; others from the pool.

    Caches of the pool have one capacity, that of the window, whatever the prefix's length: memory stays flat.
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
    """Return a grounding whose times lie `shift_s` later; the answer's text still counts from the window's start."""
    spans = (("span", grounding.span), ("named_span", grounding.named_span))
    parts: tuple[tuple[str, Any], ...] = (("tube", grounding.tube), ("boxes", grounding.boxes))
    later: dict[str, Any] = {
        name: None if span is None else (span[0] + shift_s, span[1] + shift_s) for name, span in spans
    }
    for name, boxes in parts:
        later[name] = None if boxes is None else dataclasses.replace(boxes, times=boxes.times + shift_s)
    return dataclasses.replace(grounding, **later)
