"""The spatial pass: from named spans and taps to boxes and presence, many queries of one video a call.

Knows nothing of text. Letters: B queries, F fine frames, T taps, Q bridging queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.backends.session import Session, largest, smallest
from bridge_stg.runtime.chain.spans import FineFrames
from bridge_stg.runtime.chain.vision_pass import FineFeatures
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.limits import Limits

MAX_ROWS = 16
"""Queries of one call of the spatial decoder; bounds the memory of its attention maps."""


@dataclass(frozen=True, eq=False)
class SpatialQuery:
    """A query whose target was found in time, on its way to the spatial decoder.

    Attributes:
        frames: the fine frames to look at.
        taps: [T, Q, H], hidden states of its bridging queries.
    """

    frames: FineFrames
    taps: Array


@dataclass(frozen=True, eq=False)
class Located:
    """What the spatial decoder says of one query's target.

    Attributes:
        shown_times: float64 [F], the time of the video's frame that stood for each fine frame.
        boxes: float32 [F, 4], cxcywh in 0..1.
        presence: float32 [F] in 0..1.
    """

    shown_times: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray


def locate(
    session: Session,
    features: FineFeatures,
    grid: np.ndarray,
    queries: Sequence[SpatialQuery],
    *,
    max_frames: int,
    limits: Limits,
) -> list[Located]:
    """Run the spatial decoder for every query, in calls of queries that look at the same or few frames.

    Args:
        features: the video's fine feature maps.
        grid: float64 [K], the video's fine grid in seconds.
        max_frames: most frames of one call, not less than those of any one query.
    """
    located: dict[int, Located] = {}
    for batch in _batches(queries, min(max_frames, largest(session, "F")), min(MAX_ROWS, largest(session, "B"))):
        limits.check()
        frames = np.unique(np.concatenate([queries[i].frames.indices for i in batch]))
        # An engine may begin at more frames than there are: the last one is repeated, and masked.
        padding = np.repeat(frames[-1:], max(0, smallest(session, "F") - len(frames)))
        padded = np.concatenate([frames, padding])
        maps, shown_times = features.at(padded, limits)
        mask = np.stack([np.isin(padded, queries[i].frames.indices) for i in batch])  # [B, F]
        mask[:, len(frames) :] = False
        with limits.stage("spatial"):
            limits.report(len(located), len(queries))
            outputs = session.infer(
                {
                    "feature_map": maps,  # [F, h, w, C]
                    "taps": arrays.stack([queries[i].taps for i in batch], axis=1),  # [T, B, Q, H]
                    "frame_times": grid[padded].astype(np.float32),  # [F]
                    "frame_mask": mask,
                }
            )
            for row, i in enumerate(batch):
                boxes, presence = outputs["boxes"][row, mask[row]], outputs["presence"][row, mask[row]]
                _check_finite(boxes, presence)
                located[i] = Located(shown_times=shown_times[mask[row]], boxes=boxes, presence=presence)
            limits.report(len(located), len(queries))
    return [located[i] for i in range(len(queries))]


def _batches(queries: Sequence[SpatialQuery], max_frames: int, max_rows: int = MAX_ROWS) -> Iterator[list[int]]:
    """Yield indices of queries whose frames, taken together, are at most `max_frames`; in order of time."""
    batch: list[int] = []
    union: set[int] = set()
    for i in sorted(range(len(queries)), key=lambda i: int(queries[i].frames.indices[0])):
        frames = set(queries[i].frames.indices.tolist())
        if batch and (len(union | frames) > max_frames or len(batch) >= max_rows):
            yield batch
            batch, union = [], set()
        batch.append(i)
        union |= frames
    if batch:
        yield batch


def _check_finite(boxes: np.ndarray, presence: np.ndarray) -> None:
    if not (np.isfinite(boxes).all() and np.isfinite(presence).all()):
        raise EngineError(
            "spatial_decoder returned boxes or presence that are not finite; its precision does not suit this model or "
            "machine: choose another variant, and compare it with the bundle's golden cases"
        )
