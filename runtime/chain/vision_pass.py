"""The vision encoder's two passes: coarse visual tokens for the language model, fine feature maps for the decoder.

Frames are encoded in chunks of groups, which bounds the encoder's memory whatever the video's length and resolution.
Letters: G groups of P frames, h x w patches per frame, N visual tokens, D deepstack levels, C channels, F fine frames.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from functools import lru_cache, partial
from typing import Protocol

import numpy as np

from bridge_stg.runtime.backends.session import Session, check_finite, largest
from bridge_stg.runtime.bundle.contracts import TOKEN_GROUPS
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.threads import in_background
from bridge_stg.runtime.video.source import Samples

Report = Callable[[int, int], None]

FEATURE_BUDGET_BYTES = 2**28
"""Default for the most bytes of fine feature maps that are cached between calls."""


def merged_grid(frames: Array, spec: ModelSpec) -> tuple[int, int]:
    """Return rows and columns of visual tokens per group, for frames [..., height, width, 3] in pixels."""
    side = spec.vision.patch_size * spec.vision.merge_size
    return frames.shape[-3] // side, frames.shape[-2] // side


def coarse_tokens(session: Session, spec: ModelSpec, frames: Array, *, report: Report, tolerance: float = 0.0) -> Array:
    """Return visual tokens [1+D, N+1, H] of groups uint8 [G, P, height, width, 3]; row 0 of N+1 is all zero.

    Groups that do not change are encoded once; see `deduplicate_frames` for the tolerance.
    """
    frames, places = _deduplicated(frames, spec, tolerance)
    chunks = [tokens for tokens, _ in _encode(session, spec, frames, report=report)]
    if places is not None:
        rows, columns = merged_grid(frames, spec)
        size = rows * columns
        groups = [chunk[:, at : at + size] for chunk in chunks for at in range(0, chunk.shape[1], size)]
        chunks = [groups[place] for place in places]
    tokens: Array = arrays.join(chunks, axis=1, zeros_before=1)
    return tokens


def fine_maps(session: Session, spec: ModelSpec, frames: Array, *, report: Report) -> Array:
    """Return feature maps [F, h, w, C] of single frames uint8 [F, height, width, 3].

    Each frame is repeated P times, so that one group is one frame; equal frames are encoded once.
    """
    frames, places = _deduplicated(frames, spec)
    groups = arrays.repeat_new_axis(frames, spec.vision.temporal_patch_size)
    chunks = _encode(session, spec, groups, report=report, tokens=False)
    maps: Array = arrays.join([feature_map for _, feature_map in chunks], axis=0)
    check_finite("vision_encoder", feature_map=maps)
    if places is not None:
        maps = arrays.stack([maps[int(place)] for place in places])
    return maps


def _deduplicated(frames: Array, spec: ModelSpec, tolerance: float = 0.0) -> tuple[Array, np.ndarray | None]:
    """Return the frames to encode, and the place of each frame among them; None if all are encoded."""
    if not isinstance(frames, np.ndarray):
        return frames, None
    chosen, places = deduplicate_frames(frames, patch=spec.vision.patch_size, tolerance=tolerance)
    return (frames, None) if len(chosen) == len(frames) else (frames[chosen], places)


def deduplicate_frames(groups: np.ndarray, *, patch: int, tolerance: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Choose which groups of frames to encode, and which of these to use for each group.

    A still camera, a slide or a video whose own rate is below the sampling rate repeats its pixels.

    Args:
        groups: uint8 [G, …, height, width, 3].
        patch: side of the encoder's patches, which divides height and width.
        tolerance: largest mean absolute difference (0 to 255) of any patch of any channel at which a group is replaced
            by the last chosen one; so a slow change adds up. 0: only groups that are equal byte for byte are replaced.

    Returns:
        Indices of the chosen groups [K], increasing, and the place of every group among these [G].
    """
    chosen: list[int] = []
    place_of = np.zeros(len(groups), np.int64)
    seen: dict[int, list[int]] = {}
    for g, group in enumerate(groups):
        if tolerance > 0:
            same = chosen[-1:] if chosen and _largest_change(group, groups[chosen[-1]], patch) <= tolerance else []
        else:
            # A checksum of some rows finds the candidates, which are then compared in full.
            candidates = seen.setdefault(zlib.crc32(group[..., ::8, :, :].tobytes()), [])
            same = [other for other in candidates if np.array_equal(groups[other], group)][:1]
            if not same:
                candidates.append(g)
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


def chunk_groups(session: Session, spec: ModelSpec, rows: int, columns: int) -> int:
    """Return how many groups of rows × columns patches to encode per call."""
    groups = min(spec.frames.encoder_chunk_groups, largest(session, "G"))
    patches = min(spec.frames.encoder_chunk_patches, session.preferences.encoder_patches)
    return max(1, min(groups, patches // (rows * columns)))


# The tables of a size are the same for every chunk of every video of that size.
_tables = lru_cache(maxsize=16)(vision_tables)


def _encode(
    session: Session, spec: ModelSpec, frames: Array, *, report: Report, tokens: bool = True
) -> Iterator[tuple[Array, Array | None]]:
    """Yield visual tokens [1+D, n, H] and feature maps [g, h, w, C] of chunks of g groups.

    Without `tokens`, n may be 0; a model with text heads alone has no feature maps (None).
    """
    patch = spec.vision.patch_size
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    fixed, size = dict(_tables(spec.vision, rows, columns)), chunk_groups(session, spec, rows, columns)
    if not tokens and TOKEN_GROUPS in session.preferences.optional_inputs:
        fixed[TOKEN_GROUPS] = np.zeros(1, np.int64)
    for start in range(0, len(frames), size):
        report(start, len(frames))
        chunk = arrays.contiguous(frames[start : start + size])
        outputs = session.infer({"frames": chunk, **fixed})
        yield outputs["visual_tokens"], outputs.get("feature_map")
    report(len(frames), len(frames))


def frame_tokens(session: Session, spec: ModelSpec, frames: Array, *, report: Report) -> Array:
    """Return visual tokens [F, 1+D, n, H] of single frames uint8 [F, height, width, 3], each repeated P times."""
    groups = arrays.repeat_new_axis(frames, spec.vision.temporal_patch_size)
    tokens = coarse_tokens(session, spec, groups, report=report)[:, 1:]  # [1+D, F·n, H]
    size = tokens.shape[1] // len(frames)
    stacked: Array = arrays.stack([tokens[:, at : at + size] for at in range(0, tokens.shape[1], size)])
    return stacked


def on_device(array: np.ndarray, session: Session) -> Array:
    """Return an array that was stored where the session's own outputs are."""
    return array if session.device is None else session.device.upload(array)


class FeatureMaps(Protocol):
    """The fine feature maps, or visual tokens, of one video: `FineFeatures`, or a view of those of a live stream."""

    @property
    def nbytes(self) -> int:
        """Bytes of the cached maps."""

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[Array, np.ndarray]:
        """Return feature maps [F, h, w, C] or visual tokens [F, 1+D, n, H] for indices [F] of the grid.

        The second value has the times [F] of the frames shown.
        """

    def clear(self) -> None:
        """Drop all maps."""


class Stored(Protocol):
    """Keeps feature maps between processes; see `bridge_stg.runtime.index.fine.StoredMaps`."""

    def get(self, indices: Iterable[int]) -> Mapping[int, tuple[np.ndarray, float]]:
        """Return the maps that are stored, and the times of their frames, by their index on the grid."""

    def put(self, entries: Mapping[int, tuple[np.ndarray, float]]) -> None:
        """Store maps and times."""


class FineFeatures:
    """The fine feature maps of one video, computed on demand and cached by their index on its fine grid.

    Safe to use from many threads: one at a time decodes and encodes, since the video has one reading position.

    Args:
        session: the vision encoder.
        spec: the model's sizes and rates.
        read: returns the frames at the given indices of the fine grid; called by one thread at a time.
        budget_bytes: maximum bytes of the cached maps; the least recently used are dropped first.
        as_tokens: whether to return visual tokens instead of feature maps.
        read_ahead: height and width of the frames, if another thread can read them while a chunk is encoded; None:
            all are read first.
        stored: where maps are looked up before they are computed, and stored after it; None: nowhere.
    """

    def __init__(
        self,
        session: Session,
        spec: ModelSpec,
        *,
        read: Callable[[np.ndarray, Limits], Samples],
        budget_bytes: int,
        as_tokens: bool = False,
        read_ahead: tuple[int, int] | None = None,
        stored: Stored | None = None,
    ) -> None:
        self._session, self._spec = session, spec
        self._encode = frame_tokens if as_tokens else fine_maps
        self._read, self._read_ahead, self._stored = read, read_ahead, stored
        self._budget_bytes = budget_bytes
        self._cached_bytes = 0
        self._cached: OrderedDict[int, tuple[Array, float]] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[Array, np.ndarray]:
        """Return the maps and times, computing those that are not cached; see `FeatureMaps`."""
        wanted = indices.tolist()
        with limits.stage("vision_fine"), limits.hold(self._lock):
            found = {i: self._cached[i] for i in wanted if i in self._cached}
            found |= self._from_disk([i for i in wanted if i not in found])
            missing = np.array([i for i in wanted if i not in found], np.int64)
            done = 0
            with closing(self._samples(missing, limits)) as chunks:
                for samples in chunks:
                    report = limits.report_from(done, missing.size)
                    maps = self._encode(self._session, self._spec, samples.frames, report=report)
                    for i, feature_map, time in zip(missing[done:].tolist(), maps, samples.times, strict=False):
                        # A copy, since a view would keep the maps of the whole call alive.
                        found[i] = (feature_map.copy(), float(time))
                    done += len(samples.times)
                    limits.report(done, missing.size)
            if self._stored is not None and missing.size:
                self._stored.put({i: (arrays.on_host(found[i][0]), found[i][1]) for i in missing.tolist()})
            for i, entry in found.items():
                self._keep(i, entry)
        return arrays.stack([found[i][0] for i in wanted]), np.array([found[i][1] for i in wanted])

    def _from_disk(self, indices: list[int]) -> dict[int, tuple[Array, float]]:
        """Return the maps that are stored, on the encoder's device."""
        if self._stored is None or not indices:
            return {}
        found = self._stored.get(indices).items()
        return {i: (on_device(feature_map, self._session), time) for i, (feature_map, time) in found}

    def _samples(self, missing: np.ndarray, limits: Limits) -> Generator[Samples, None, None]:
        """Read frames in the encoder's chunks, the next one in another thread while one is encoded."""
        size = max(missing.size, 1)
        if self._read_ahead is not None:
            patch = self._spec.vision.patch_size
            size = chunk_groups(self._session, self._spec, *(side // patch for side in self._read_ahead))
        chunks = [missing[start : start + size] for start in range(0, missing.size, size)]
        coming: Future[Samples] | None = None
        try:
            for number, places in enumerate(chunks):
                with limits.stage("decode_fine"):
                    limits.report(number * size, missing.size)
                    samples = self._read(places, limits) if coming is None else coming.result()
                    limits.report(number * size + places.size, missing.size)
                following = chunks[number + 1 : number + 2]
                coming = in_background(partial(self._read, following[0], limits)) if following else None
                yield samples
        finally:
            if coming is not None:  # the caller stopped: nobody may read the video until this has ended
                coming.exception()

    @property
    def nbytes(self) -> int:
        """Bytes of the cached maps."""
        return self._cached_bytes

    def forget(self, before: int) -> None:
        """Drop the maps of all indices below one, which a live window has moved past."""
        with self._lock:
            for index in [index for index in self._cached if index < before]:
                self._cached_bytes -= self._cached.pop(index)[0].nbytes

    def clear(self) -> None:
        """Drop all maps."""
        with self._lock:
            self._cached.clear()
            self._cached_bytes = 0

    def _keep(self, index: int, entry: tuple[Array, float]) -> None:
        if index in self._cached:
            self._cached_bytes -= self._cached.pop(index)[0].nbytes
        self._cached[index] = entry
        self._cached_bytes += entry[0].nbytes
        while self._cached_bytes > self._budget_bytes:
            _, (dropped, _) = self._cached.popitem(last=False)
            self._cached_bytes -= dropped.nbytes
