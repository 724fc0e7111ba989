"""What a query's answer is: a tube of boxes, and the grounding that holds it. Knows nothing of sessions and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S, FineFrames, in_span
from bridge_stg.runtime.video.token_budget import CoarseChoice

SCHEMA = 1
"""Version of `Grounding.to_json`; it rises when a field is renamed, removed or changes its meaning."""


@dataclass(frozen=True, eq=False)
class FrameBoxes:
    """One box for each of N times, in their order.

    Attributes:
        times: float64 [N], seconds from the first frame of the video.
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the video as it is shown (rotation applied).
        presence: float32 [N] in 0..1, the probability that the target is in the frame.
        visible: bool [N], False where presence is below the model's threshold.
        interpolated: bool [N], True where the box was not computed on this very frame.
    """

    times: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray
    visible: np.ndarray
    interpolated: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object of plain values a box."""
        return [
            {
                "time_s": round(float(self.times[i]), 6),
                "box": _pixels(self.boxes[i]),
                "presence": round(float(self.presence[i]), 6),
                "visible": bool(self.visible[i]),
                "interpolated": bool(self.interpolated[i]),
            }
            for i in range(len(self))
        ]


@dataclass(frozen=True, eq=False)
class Tube:
    """The boxes that were computed: one for each fine frame inside the span.

    Attributes:
        times: float64 [F], strictly increasing: the time of the video's frame that each box was computed on.
        boxes: float32 [F, 4], left, top, right, bottom in pixels of the video as it is shown (rotation applied).
        presence: float32 [F] in 0..1, the probability that the target is in the frame.
        visible: bool [F], False where presence is below the model's threshold.
    """

    times: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray
    visible: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def at(self, times: np.ndarray) -> FrameBoxes:
        """Return a box for each of the times [N]: between two fine frames by linear interpolation.

        Before the first and behind the last fine frame the nearest box is held. `visible` is that of the nearest fine
        frame; `interpolated` is False only where a fine frame was taken at that very time.
        """
        times = np.asarray(times, np.float64)
        boxes = np.stack([np.interp(times, self.times, self.boxes[:, side]) for side in range(4)], axis=-1)
        distance = np.abs(times[:, None] - self.times[None])  # [N, F]
        nearest = distance.argmin(axis=1)
        return FrameBoxes(
            times=times,
            boxes=boxes.astype(np.float32),
            presence=np.interp(times, self.times, self.presence).astype(np.float32),
            visible=self.visible[nearest],
            interpolated=distance.min(axis=1) > TIME_TOLERANCE_S,
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object of plain values a fine frame."""
        return [
            {
                "time_s": round(float(self.times[i]), 6),
                "box": _pixels(self.boxes[i]),
                "presence": round(float(self.presence[i]), 6),
                "visible": bool(self.visible[i]),
            }
            for i in range(len(self))
        ]


def tube_in_span(
    span: tuple[float, float],
    frames: FineFrames,
    *,
    shown_times: np.ndarray,
    boxes: np.ndarray,
    presence: np.ndarray,
    threshold: float,
) -> Tube:
    """Keep the fine frames that lie in the final span, or the one nearest to it if none does.

    Frames of the margin that were found to be outside are left out, since they hold no target that a box could fit.

    Args:
        span: start and end in seconds, as refined.
        frames: the fine frames that were looked at.
        shown_times: float64 [F], the time of the video's frame that stood for each of them.
        boxes: float32 [F, 4], xyxy in pixels.
        presence: float32 [F] in 0..1.
        threshold: presence from which a frame counts as visible.
    """
    inside = np.flatnonzero(in_span(frames.times, span))
    # In a slow or stuttering video one frame may stand for several places of the grid: it gets one box.
    times, first = np.unique(shown_times[inside], return_index=True)
    kept = inside[first]
    return Tube(times=times, boxes=boxes[kept], presence=presence[kept], visible=presence[kept] >= threshold)


@dataclass(frozen=True, eq=False)
class Grounding:
    """When and where a query's target is in a video, or that it is not there.

    Attributes:
        query: the query as it was asked.
        found: whether the target is in the video.
        span: start and end in seconds, half-open; None if not found.
        tube: the boxes as computed, one a fine frame; None if not found.
        boxes: one box for every frame of the video inside the span, of a track for every frame of the video; None if
            not found, or if only the span was asked for. So is `tube`.
        size: width and height of the video as it is shown, in pixels.
        coarse: rate and size at which the language model saw the video, and what limited them.
        answer: the language model's answer as text.
        named_span: the span that the answer names, before the presence scores moved its ends; None if not found.
        scores: `absent`, probability of the answer that the target is not there; `answer`, probability of the
            answer among all that the grammar allows; `presence`, mean over the tube (0 if not found).
        tokens: visual tokens computed for this query, `coarse` and `fine`; `dense`, what the whole fine grid at fine
            size would have been; `ratio`, (coarse + fine) / dense.
        timings: seconds a stage: `decode_video`, `vision_coarse` and `prefill` are those of the video, which queries
            share; `answer`, `decode_fine`, `vision_fine` and `spatial` those of the call, which the queries of a
            `ground_many` share; `total` is the call's.
        task: what was asked for, one of `bridge_stg.runtime.chain.tasks.TASKS`.
        taps: [T, Q, H], what the tapped layers of the language model know of the target: the hidden states of the
            bridging queries, from which the boxes are found, for heads of your own. None if not found. Not in the JSON.
    """

    query: str
    found: bool
    span: tuple[float, float] | None
    tube: Tube | None
    boxes: FrameBoxes | None
    size: tuple[int, int]
    coarse: CoarseChoice
    answer: str
    named_span: tuple[float, float] | None
    scores: Mapping[str, float]
    tokens: Mapping[str, float]
    timings: Mapping[str, float]
    task: str = "tube"
    taps: np.ndarray | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`; `schema` is the version of their layout."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "query": self.query,
            "found": self.found,
            "span": _seconds(self.span),
            "named_span": _seconds(self.named_span),
            "answer": self.answer,
            "size": {"width": self.size[0], "height": self.size[1]},
            "coarse": self.coarse.to_json(),
            "scores": {name: round(float(value), 6) for name, value in self.scores.items()},
            "tube": None if self.tube is None else self.tube.to_json(),
            "boxes": None if self.boxes is None else self.boxes.to_json(),
            "tokens": {k: round(v, 6) if isinstance(v, float) else int(v) for k, v in self.tokens.items()},
            "timings_s": {stage: round(float(value), 6) for stage, value in self.timings.items()},
        }


def _pixels(box: np.ndarray) -> list[float]:
    return [round(float(side), 2) for side in box]


def _seconds(span: tuple[float, float] | None) -> dict[str, float] | None:
    return None if span is None else {"start_s": round(span[0], 6), "end_s": round(span[1], 6)}
