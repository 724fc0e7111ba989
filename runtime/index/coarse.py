"""The coarse frames of a whole video file in a cache: their visual tokens, and what reading the file found out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.index.index import VisualCache
from bridge_stg.runtime.video.file import FileFacts, VideoFile
from bridge_stg.runtime.video.source import CoarseFrames
from bridge_stg.runtime.video.token_budget import Budget, CoarseChoice

KIND = "coarse"


ARRAYS = ("times", "pts", "keys", "prints")
"""The fields of `FileFacts` that are arrays."""


def facts_to_arrays(facts: FileFacts, **values: Any) -> dict[str, np.ndarray]:
    """Return facts, and other plain values, as arrays."""
    fields = asdict(facts)
    arrays = {name: fields.pop(name) for name in ARRAYS}
    return {**arrays, "values": np.frombuffer(json.dumps({"facts": fields, **values}).encode(), np.uint8)}


def facts_from_arrays(arrays: Mapping[str, np.ndarray]) -> tuple[FileFacts, dict[str, Any]]:
    """Return the facts and the other values of `facts_to_arrays`."""
    values = json.loads(arrays["values"].tobytes())
    fields = values.pop("facts")
    return FileFacts(**{**fields, "size": tuple(fields["size"]), **{name: arrays[name] for name in ARRAYS}}), values


def put_coarse(cache: VisualCache, key: Mapping[str, Any], source: VideoFile, tokens: np.ndarray) -> None:
    """Store the visual tokens [1+D, N+1, H] of a file that has been read. Raises HostError as `VisualCache.put` does.

    `key` has all that changes the choice of frames.
    """
    coarse = source.coarse()
    arrays = facts_to_arrays(source.facts, interval_s=coarse.interval_s, choice=asdict(coarse.choice))
    cache.put(KIND, key, {**arrays, "coarse_times": coarse.times, "tokens": tokens})


def get_coarse(
    cache: VisualCache, key: Mapping[str, Any], path: str, spec: ModelSpec, *, budget: Budget
) -> tuple[VideoFile, np.ndarray] | None:
    """Return the file, which is opened when a fine frame is read, and its visual tokens; None if they are not stored.

    The file's coarse frames have no pixels. Raises HostError as `VisualCache.get` does.
    """
    found = cache.get(KIND, key)
    if found is None:
        return None
    facts, values = facts_from_arrays(found)
    choice, times = CoarseChoice.from_values(values["choice"]), found["coarse_times"]
    coarse = CoarseFrames(
        frames=np.zeros((0, times.shape[1], *choice.size[::-1], 3), np.uint8),
        times=times,
        interval_s=values["interval_s"],
        duration_s=facts.duration_s,
        choice=choice,
    )
    return VideoFile(path, spec, budget=budget, known=(facts, coarse)), found["tokens"]
