"""The result of a query: a grounding with its tube of boxes. Knows nothing of sessions and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import bridge_stg
from bridge_stg.runtime.chain.spans import TIME_TOLERANCE_S, FineFrames, in_span
from bridge_stg.runtime.video.token_budget import CoarseChoice

if TYPE_CHECKING:
    from bridge_stg.runtime.backends.choose import ChosenBackend

SCHEMA = 2
"""Version of the JSON of results (docs/results.md); increases when a field is renamed, removed or redefined."""
VIDEO_STAGES = ("decode_video", "vision_coarse", "prefill")
"""Stages that are computed once per video and shared by its queries."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """The target's box at each of N times.

    Attributes:
        times: float64 [N], seconds from the first frame of the video.
        boxes: float32 [N, 4], left, top, right, bottom in pixels of the video as displayed (upright, square pixels).
        presence: float32 [N] in 0..1, the probability that the target is in the frame.
        visible: bool [N], False where presence is below the model's threshold.
    """

    times: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray
    visible: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object of plain values per box."""
        return [
            {
                "time_s": round(float(self.times[i]), 6),
                "box": [round(float(side), 2) for side in self.boxes[i]],
                "presence": round(float(self.presence[i]), 6),
                "visible": bool(self.visible[i]),
            }
            for i in range(len(self))
        ]


@dataclass(frozen=True, eq=False)
class FrameBoxes(Boxes):
    """Boxes for frames of the video.

    Attributes:
        interpolated: bool [N], True where the box was not computed on this very frame.
    """

    interpolated: np.ndarray

    def to_json(self) -> list[dict[str, Any]]:
        """Return one object of plain values per box."""
        return [{**row, "interpolated": bool(flag)} for row, flag in zip(super().to_json(), self.interpolated)]


@dataclass(frozen=True, eq=False)
class Tube(Boxes):
    """The computed boxes: one for each fine frame inside the span, at the strictly increasing times of these frames."""

    def at(self, times: np.ndarray) -> FrameBoxes:
        """Return a box for each of the times [N], by linear interpolation between two fine frames.

        Before the first and after the last fine frame the nearest box is repeated. `visible` is that of the nearest
        fine frame; `interpolated` is False only at the times of fine frames.
        """
        times = np.asarray(times, np.float64)
        boxes = np.stack([np.interp(times, self.times, self.boxes[:, side]) for side in range(4)], axis=-1)
        distance = np.abs(times[:, None] - self.times[None])  # [N, F]
        return FrameBoxes(
            times=times,
            boxes=boxes.astype(np.float32),
            presence=np.interp(times, self.times, self.presence).astype(np.float32),
            visible=self.visible[distance.argmin(axis=1)],
            interpolated=distance.min(axis=1) > TIME_TOLERANCE_S,
        )


def tube_in_span(
    span: tuple[float, float],
    frames: FineFrames,
    *,
    shown_times: np.ndarray,
    boxes: np.ndarray,
    presence: np.ndarray,
    threshold: float,
) -> Tube:
    """Keep the fine frames in the refined span, or the one nearest to it if there is none.

    `shown_times` float64 [F] are the times of the video's frames that were shown for the fine frames, `boxes` float32
    [F, 4] are xyxy in pixels, and a target with `presence` [F] of at least `threshold` is visible.
    """
    inside = np.flatnonzero(in_span(frames.times, span))
    # In a slow or stuttering video one frame may be shown at several grid times: it gets one box.
    times, first = np.unique(shown_times[inside], return_index=True)
    kept = inside[first]
    return Tube(times=times, boxes=boxes[kept], presence=presence[kept], visible=presence[kept] >= threshold)


@dataclass(frozen=True, eq=False)
class Grounding:
    """When and where a query's target is in a video, or that it is absent.

    Attributes:
        query: the query as given by the caller.
        found: whether the target is in the video.
        span: start and end in seconds, half-open; None if not found.
        tube: the boxes as computed, one per fine frame; None if not found, or for the task `span`.
        boxes: one box for every frame of the video inside the span (of a track: for every frame of the video); None
            if `tube` is None.
        size: width and height of the video as it is shown, in pixels.
        coarse: rate and size of the frames for the language model, and what limited them.
        answer: the language model's answer as text.
        named_span: the span that the answer names, before the presence scores moved its ends; None if not found.
        scores: `absent`, probability of the answer that the target is absent; `answer`, probability of the answer among
            all that the grammar allows (of a text answer, the geometric mean of its tokens' probabilities);
            `presence`, mean over the tube (0 if not found; text heads: 1 in all frames that the answer lists).
        tokens: visual tokens computed for this query, `coarse` and `fine`; `dense`, tokens of the whole fine grid at
            fine size; `ratio`, (coarse + fine) / dense.
        timings: seconds per stage. `decode_video`, `vision_coarse` and `prefill` belong to the video and are shared by
            its queries; `answer`, `decode_fine`, `vision_fine`, `spatial` (bridge heads) and `boxes` (`two-step`)
            belong to the call and are shared by the queries of a `ground_many`; `total` is the call's, plus the stages
            of the video if it was opened before the call, so it is at least the sum of the others.
        heads: what computed the answer, one of `bridge_stg.runtime.bundle.spec.HEADS`.
        mode: of a text answer, `joint` (all boxes in one answer), `two-step` (the span, then a box per frame), `span`
            or `image`; else empty.
        decoding: counts of a text answer: `calls` of the language model, `tokens` of the answer, of these `forced` by
            the grammar; `drafted` tokens and of these `accepted`; `truncated`, answers that
            `max_tokens` cut.
        clock: where the times of the frames come from, one of `bridge_stg.runtime.video.decoder.CLOCKS`.
        stream: index of the video stream that was read; None if the file has only one, or is no video file.
        task: the task, one of `bridge_stg.runtime.chain.tasks.TASKS`.
        unknown_words: words of the query, casefolded, that the bundle says its model does not know; see
            `ModelSpec.unknown_words`.
        taps: [T, Q, H], hidden states of the bridging queries in the tapped layers, from which the boxes are computed;
            input for your own heads. None if not found. Not in the JSON.
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
    timings: Mapping[str, float] = field(default_factory=dict)
    heads: str = "bridge"
    mode: str = ""
    decoding: Mapping[str, int] = field(default_factory=dict)
    clock: str = "timestamps"
    stream: int | None = None
    task: str = "tube"
    unknown_words: tuple[str, ...] = ()
    taps: np.ndarray | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `json.dump`; `schema` is the version of the format."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "query": self.query,
            "unknown_words": list(self.unknown_words),
            "found": self.found,
            "span": span_json(self.span),
            "named_span": span_json(self.named_span),
            "answer": self.answer,
            "heads": self.heads,
            "mode": self.mode,
            "decoding": dict(self.decoding),
            "size": {"width": self.size[0], "height": self.size[1]},
            "coarse": self.coarse.to_json(),
            "clock": self.clock,
            "stream": self.stream,
            "scores": {name: round(float(value), 6) for name, value in self.scores.items()},
            "tube": None if self.tube is None else self.tube.to_json(),
            "boxes": None if self.boxes is None else self.boxes.to_json(),
            "tokens": {k: round(v, 6) if isinstance(v, float) else int(v) for k, v in self.tokens.items()},
            "timings_s": {stage: round(float(value), 6) for stage, value in self.timings.items()},
        }


def span_json(span: tuple[float, float] | None) -> dict[str, float] | None:
    """Return a span in seconds as plain values."""
    return None if span is None else {"start_s": round(span[0], 6), "end_s": round(span[1], 6)}


def program_json() -> dict[str, str]:
    """Return name and version of this program as plain values."""
    return {"name": "bridge-stg", "version": bridge_stg.__version__}


def origin_json(
    *, bundle: Mapping[str, str] | None, engine: ChosenBackend | None, source: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what results come from, as plain values: schema version, program, bundle, engine, source and options.

    `bundle` has its `name` and `fingerprint`; None: unknown. `source` is without password.
    """
    return {
        "schema": SCHEMA,
        "program": program_json(),
        "bundle": None if bundle is None else dict(bundle),
        "engine": None if engine is None else engine.to_json(),
        "source": source,
        "options": dict(options),
    }
