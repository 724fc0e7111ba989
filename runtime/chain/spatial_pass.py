"""The spatial pass: from fine frames and taps to boxes and presence, many queries of one video per call.

Knows nothing of text. Letters: B queries, F fine frames, T taps, Q bridging queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bridge_stg.runtime.backends.session import Session, check_finite, largest, smallest
from bridge_stg.runtime.chain.spans import FineFrames
from bridge_stg.runtime.chain.vision_pass import FeatureMaps
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.host.limits import Limits

Key = TypeVar("Key")

MAX_ROWS = 16
"""Most queries of one call of the spatial decoder; bounds the memory of its attention maps."""


@dataclass(frozen=True, eq=False)
class SpatialQuery:
    """A query whose span is known, as input of the spatial decoder.

    Attributes:
        frames: the fine frames in which to find the target.
        taps: [T, Q, H], hidden states of the query's bridging queries.
    """

    frames: FineFrames
    taps: Array


@dataclass(frozen=True, eq=False)
class Located:
    """The spatial decoder's result for one query.

    Attributes:
        frames: the fine frames of the query.
        shown_times: float64 [F], the time of the video's frame that was shown for each fine frame.
        boxes: float32 [F, 4], cxcywh in 0..1.
        presence: float32 [F] in 0..1.
    """

    frames: FineFrames
    shown_times: np.ndarray
    boxes: np.ndarray
    presence: np.ndarray


def locate(
    session: Session,
    features: FeatureMaps,
    grid: np.ndarray,
    queries: Mapping[Key, SpatialQuery],
    *,
    max_frames: int,
    limits: Limits,
) -> dict[Key, Located]:
    """Run the spatial decoder for every query, in calls of queries that share frames or have few.

    `grid` float64 [K] is the video's fine grid in seconds. A call has at most `max_frames` frames, which must be at
    least those of any one query. The results have the keys of the queries.
    """
    located: dict[Key, Located] = {}
    most_frames, most_rows = min(max_frames, largest(session, "F")), min(MAX_ROWS, largest(session, "B"))
    for batch in batches(queries, most_frames, most_rows):
        limits.check()
        # As np.unique, which would import numpy.ma: 7 ms of a process's first answer.
        frames = np.flatnonzero(np.bincount(np.concatenate([queries[key].frames.indices for key in batch])))
        # An engine may need more frames than there are: the last one is repeated, and masked.
        padding = np.repeat(frames[-1:], max(0, smallest(session, "F") - len(frames)))
        padded = np.concatenate([frames, padding])
        maps, shown_times = features.at(padded, limits)
        mask = np.stack([np.isin(padded, queries[key].frames.indices) for key in batch])  # [B, F]
        mask[:, len(frames) :] = False
        with limits.stage("spatial"):
            limits.report(len(located), len(queries))
            outputs = session.infer(
                {
                    "feature_map": maps,  # [F, h, w, C]
                    "taps": arrays.stack([queries[key].taps for key in batch], axis=1),  # [T, B, Q, H]
                    "frame_times": grid[padded].astype(np.float32),  # [F]
                    "frame_mask": mask,
                }
            )
            for row, key in enumerate(batch):
                boxes, presence = outputs["boxes"][row, mask[row]], outputs["presence"][row, mask[row]]
                check_finite("spatial_decoder", boxes=boxes, presence=presence)
                located[key] = Located(queries[key].frames, shown_times[mask[row]], boxes, presence)
            limits.report(len(located), len(queries))
    return located


def batches(queries: Mapping[Key, SpatialQuery], max_frames: int, max_rows: int = MAX_ROWS) -> Iterator[list[Key]]:
    """Yield keys of queries whose frames are at most `max_frames` together, sorted by their first frame."""
    batch: list[Key] = []
    union: set[int] = set()
    for key in sorted(queries, key=lambda key: int(queries[key].frames.indices[0])):
        frames = set(queries[key].frames.indices.tolist())
        if batch and (len(union | frames) > max_frames or len(batch) >= max_rows):
            yield batch
            batch, union = [], set()
        batch.append(key)
        union |= frames
    if batch:
        yield batch
