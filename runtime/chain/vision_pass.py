"""The vision encoder's two uses: coarse visual tokens for the language model, fine feature maps for the decoder.

Frames go through in chunks of groups, which bounds the encoder's memory whatever the video's length and resolution.
Letters: G groups of P frames, h x w patches a frame, N visual tokens, D deepstack levels, C channels, F fine frames.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import lru_cache, partial

import numpy as np

from bridge_stg.runtime.backends.session import Session, largest
from bridge_stg.runtime.bundle.contracts import TOKEN_GROUPS
from bridge_stg.runtime.bundle.spec import ModelSpec, VisionSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.chain.unchanged import deduplicate_frames
from bridge_stg.runtime.device import array_ops as arrays
from bridge_stg.runtime.device.array_ops import Array
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.host.threads import Background
from bridge_stg.runtime.video.source import Samples

Report = Callable[[int, int], None]


def merged_grid(frames: Array, spec: ModelSpec) -> tuple[int, int]:
    """Return rows and columns of visual tokens of a group, for frames [..., height, width, 3] in pixels."""
    side = spec.vision.patch_size * spec.vision.merge_size
    return frames.shape[-3] // side, frames.shape[-2] // side


def coarse_tokens(session: Session, spec: ModelSpec, frames: Array, *, report: Report, tolerance: float = 0.0) -> Array:
    """Return visual tokens [1+D, N+1, H] of groups uint8 [G, P, height, width, 3]; row 0 of N+1 is all zero.

    Groups that do not change are encoded once; see `unchanged.deduplicate_frames` for the tolerance.
    """
    places = None
    if isinstance(frames, np.ndarray):
        chosen, places = deduplicate_frames(frames, patch=spec.vision.patch_size, tolerance=tolerance)
        frames = frames if len(chosen) == len(frames) else frames[chosen]
    chunks = [tokens for tokens, _ in _encode(session, spec, frames, report=report)]
    if places is not None and len(frames) < len(places):
        rows, columns = merged_grid(frames, spec)
        size = rows * columns
        by_group = [chunk[:, at : at + size] for chunk in chunks for at in range(0, chunk.shape[1], size)]
        chunks = [by_group[place] for place in places]
    return arrays.join(chunks, axis=1, zeros_before=1)


def fine_maps(session: Session, spec: ModelSpec, frames: Array, *, report: Report) -> Array:
    """Return feature maps [F, h, w, C] of single frames uint8 [F, height, width, 3].

    Each frame is repeated P times, so that one group is one frame; frames that are equal are encoded once.
    """
    places = None
    if isinstance(frames, np.ndarray):
        chosen, places = deduplicate_frames(frames, patch=spec.vision.patch_size)
        frames = frames if len(chosen) == len(frames) else frames[chosen]
    groups = arrays.repeat_new_axis(frames, spec.vision.temporal_patch_size)
    chunks = _encode(session, spec, groups, report=report, tokens=False)
    maps = arrays.join([feature_map for _, feature_map in chunks], axis=0)
    if arrays.known_not_finite(maps):  # on a device it shows in the boxes
        raise EngineError(
            "vision_encoder returned a feature_map that is not finite; its precision does not suit this model or "
            "machine: choose another variant, and compare it with the bundle's golden cases"
        )
    if places is None or len(frames) == len(places):
        return maps
    return arrays.stack([maps[int(place)] for place in places])


def chunk_groups(session: Session, spec: ModelSpec, rows: int, columns: int) -> int:
    """Return how many groups of rows × columns patches go through the encoder in one call."""
    groups = min(spec.frames.encoder_chunk_groups, largest(session, "G"))
    patches = min(spec.frames.encoder_chunk_patches, getattr(session, "encoder_patches", sys.maxsize))
    return max(1, min(groups, patches // (rows * columns)))


@lru_cache(maxsize=16)
def _tables(spec: VisionSpec, rows: int, columns: int) -> dict[str, np.ndarray]:
    """The position tables of a size, which every chunk of every video of that size is fed."""
    return vision_tables(spec, rows, columns)


def _encode(
    session: Session, spec: ModelSpec, frames: Array, *, report: Report, tokens: bool = True
) -> Iterator[tuple[Array, Array]]:
    """Yield visual tokens [1+D, n, H] and feature maps [g, h, w, C] of chunks of g groups.

    Where no tokens are wanted, n may be 0.
    """
    patch = spec.vision.patch_size
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    fixed, size = dict(_tables(spec.vision, rows, columns)), chunk_groups(session, spec, rows, columns)
    if not tokens and TOKEN_GROUPS in getattr(session, "optional_inputs", ()):
        fixed[TOKEN_GROUPS] = np.zeros(1, np.int64)
    for start in range(0, len(frames), size):
        report(start, len(frames))
        chunk = arrays.contiguous(frames[start : start + size])
        outputs = session.infer({"frames": chunk, **fixed})
        yield outputs["visual_tokens"], outputs["feature_map"]
    report(len(frames), len(frames))


class FineFeatures:
    """The fine feature maps of one video, computed when asked for and kept by their place on its fine grid.

    Safe to use from many threads: one at a time decodes and encodes, since the video has one reading position.

    Args:
        session: the vision encoder.
        read: returns the frames at the given places of the fine grid; called by one thread at a time.
        budget_bytes: what the kept maps may hold together; the longest unused go first.
        read_ahead: height and width of the frames, where reading them is work that another thread can do while a
            chunk is encoded; None: they are read at once.
    """

    def __init__(
        self,
        session: Session,
        spec: ModelSpec,
        *,
        read: Callable[[np.ndarray, Limits], Samples],
        budget_bytes: int,
        read_ahead: tuple[int, int] | None = None,
    ) -> None:
        self._session, self._spec = session, spec
        self._read, self._read_ahead = read, read_ahead
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._kept: OrderedDict[int, tuple[Array, float]] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[Array, np.ndarray]:
        """Return feature maps [F, h, w, C] and the times [F] of the frames shown, for places [F] of the grid."""
        with limits.stage("vision_fine"), limits.hold(self._lock):
            found = {int(i): self._kept[int(i)] for i in indices if int(i) in self._kept}
            missing = np.array([int(i) for i in indices if int(i) not in found], np.int64)
            done = 0
            with closing(self._samples(missing, limits)) as parts:
                for samples in parts:
                    report = _counting_on(limits, done, missing.size)
                    maps = fine_maps(self._session, self._spec, samples.frames, report=report)
                    for i, feature_map, time in zip(missing[done:], maps, samples.times, strict=False):
                        # A copy, since a view would keep the maps of the whole call alive.
                        found[int(i)] = (feature_map.copy(), float(time))
                    done += len(samples.times)
                    limits.report(done, missing.size)
            for i, entry in found.items():
                self._keep(i, entry)
        return arrays.stack([found[int(i)][0] for i in indices]), np.array([found[int(i)][1] for i in indices])

    def _samples(self, missing: np.ndarray, limits: Limits) -> Generator[Samples, None, None]:
        """Read frames in the encoder's chunks, the next one in another thread while one is encoded."""
        size = max(missing.size, 1)
        if self._read_ahead is not None:
            patch = self._spec.vision.patch_size
            size = chunk_groups(self._session, self._spec, *(side // patch for side in self._read_ahead))
        parts = [missing[start : start + size] for start in range(0, missing.size, size)]
        coming: Background[Samples] | None = None
        try:
            for number, places in enumerate(parts):
                with limits.stage("decode_fine"):
                    limits.report(number * size, missing.size)
                    samples = self._read(places, limits) if coming is None else coming.result()
                    limits.report(number * size + places.size, missing.size)
                coming = Background(partial(self._read, parts[number + 1], limits)) if number + 1 < len(parts) else None
                yield samples
        finally:
            if coming is not None:  # the caller stopped: nobody may read the video until this has ended
                coming.wait()

    @property
    def nbytes(self) -> int:
        """What the kept maps hold now."""
        return self._held_bytes

    def forget(self, before: int) -> None:
        """Let go of the maps of all places before one: a window has moved past them."""
        with self._lock:
            for index in [index for index in self._kept if index < before]:
                self._held_bytes -= self._kept.pop(index)[0].nbytes

    def clear(self) -> None:
        """Let go of all maps."""
        with self._lock:
            self._kept.clear()
            self._held_bytes = 0

    def _keep(self, index: int, entry: tuple[Array, float]) -> None:
        replaced = self._kept.pop(index, None)
        self._held_bytes -= 0 if replaced is None else replaced[0].nbytes
        self._kept[index] = entry
        self._held_bytes += entry[0].nbytes
        while self._held_bytes > self._budget_bytes:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._held_bytes -= dropped.nbytes


def _counting_on(limits: Limits, done: int, total: int) -> Report:
    """Return a report of one part's frames that counts on behind those of earlier parts."""
    return lambda frames, _: limits.report(done + frames, total)
