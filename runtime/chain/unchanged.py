"""Frames that show what another one shows: the encoder sees one of them.

A still camera, a slide or a video whose own rate is below the sampling rate gives the same pixels again and again.
"""

from __future__ import annotations

import zlib

import numpy as np


def deduplicate_frames(groups: np.ndarray, *, patch: int, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Choose which groups of frames are encoded, and which of these stands for each group.

    Args:
        groups: uint8 [G, …, height, width, 3].
        patch: side of the encoder's patches, which divides height and width.
        tolerance: 0: groups that are equal byte for byte share one. Above: a group shares that of the last group that
            was chosen, if in no patch of any channel the mean absolute difference of their pixels (0 to 255) is above
            it; so a slow change adds up until it is seen.

    Returns:
        Places of the chosen groups [K], increasing, and for every group its place among these [G].
    """
    chosen: list[int] = []
    place_of = np.zeros(len(groups), np.int64)
    seen: dict[int, list[int]] = {}
    for g, group in enumerate(groups):
        if tolerance > 0:
            same = chosen[-1:] if chosen and _largest_change(group, groups[chosen[-1]], patch) <= tolerance else []
        else:
            # A sum of some rows finds the candidates; whether they are equal is looked up in full.
            alike = seen.setdefault(zlib.crc32(group[..., ::8, :, :].tobytes()), [])
            same = [other for other in alike if np.array_equal(groups[other], group)][:1]
            if not same:
                alike.append(g)
        if same:
            place_of[g] = chosen.index(same[0])
        else:
            place_of[g] = len(chosen)
            chosen.append(g)
    return np.array(chosen, np.int64), place_of


def _largest_change(group: np.ndarray, other: np.ndarray, patch: int) -> float:
    """Return the largest mean absolute difference of any patch of any channel, for groups […, height, width, 3]."""
    height, width = group.shape[-3:-1]
    change = np.abs(group.astype(np.int16) - other)
    patches = change.reshape(-1, height // patch, patch, width // patch, patch, 3)
    return float(patches.mean(axis=(2, 4), dtype=np.float32).max())
