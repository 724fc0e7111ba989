"""The vision encoder's two uses: coarse visual tokens for the language model, fine feature maps for the decoder.

Frames go through in chunks of groups, which bounds the encoder's memory whatever the video's length and resolution.
Letters: G groups of P frames, h x w patches a frame, N visual tokens, D deepstack levels, C channels, F fine frames.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.frames import Samples
from bridge_stg.runtime.limits import Limits
from bridge_stg.runtime.positions import vision_tables
from bridge_stg.runtime.session import Session
from bridge_stg.runtime.spec import ChainSpec

Report = Callable[[int, int], None]


def merged_grid(frames: np.ndarray, spec: ChainSpec) -> tuple[int, int]:
    """Return rows and columns of visual tokens of a group, for frames [..., height, width, 3] in pixels."""
    side = spec.vision.patch_size * spec.vision.merge_size
    return frames.shape[-3] // side, frames.shape[-2] // side


def coarse_tokens(session: Session, spec: ChainSpec, frames: np.ndarray, *, report: Report) -> np.ndarray:
    """Return visual tokens [1+D, N+1, H] of groups uint8 [G, P, height, width, 3]; row 0 of N+1 is all zero."""
    chunks = [tokens for tokens, _ in _encode(session, spec, frames, report=report)]
    return np.concatenate([np.zeros_like(chunks[0][:, :1]), *chunks], axis=1)


def fine_maps(session: Session, spec: ChainSpec, frames: np.ndarray, *, report: Report) -> np.ndarray:
    """Return feature maps [F, h, w, C] of single frames uint8 [F, height, width, 3].

    Each frame is repeated P times, so that one group is one frame.
    """
    groups = np.broadcast_to(frames[:, None], (len(frames), spec.vision.temporal_patch_size, *frames.shape[1:]))
    maps = np.concatenate([feature_map for _, feature_map in _encode(session, spec, groups, report=report)])
    if not np.isfinite(maps).all():
        raise EngineError(
            "vision_encoder returned a feature_map that is not finite; its precision does not suit this model or "
            "machine: choose another variant, and compare it with the bundle's golden cases"
        )
    return maps


def _encode(
    session: Session, spec: ChainSpec, frames: np.ndarray, *, report: Report
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield visual tokens [1+D, n, H] and feature maps [g, h, w, C] of chunks of g groups."""
    patch = spec.vision.patch_size
    rows, columns = frames.shape[2] // patch, frames.shape[3] // patch
    tables = vision_tables(spec.vision, rows, columns)
    size = max(1, min(spec.frames.encoder_chunk_groups, spec.frames.encoder_chunk_patches // (rows * columns)))
    for start in range(0, len(frames), size):
        report(start, len(frames))
        chunk = np.ascontiguousarray(frames[start : start + size])
        outputs = session.infer({"frames": chunk, **tables})
        yield outputs["visual_tokens"], outputs["feature_map"]
    report(len(frames), len(frames))


class FineFeatures:
    """The fine feature maps of one video, computed when asked for and kept by their place on its fine grid.

    Safe to use from many threads: one at a time decodes and encodes, since the video has one reading position.

    Args:
        session: the vision encoder.
        read: returns the fine frames shown at the given times; called by one thread at a time.
        grid: float64 [K], the video's fine grid in seconds.
        budget_bytes: what the kept maps may hold together; the longest unused go first.
    """

    def __init__(
        self,
        session: Session,
        spec: ChainSpec,
        *,
        read: Callable[[np.ndarray, Limits], Samples],
        grid: np.ndarray,
        budget_bytes: int,
    ) -> None:
        self._session, self._spec = session, spec
        self._read = read
        self._grid = grid
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._kept: OrderedDict[int, tuple[np.ndarray, float]] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, indices: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Return feature maps [F, h, w, C] and the times [F] of the frames shown, for places [F] of the grid."""
        with limits.stage("vision_fine"), limits.hold(self._lock):
            found = {int(i): self._kept[int(i)] for i in indices if int(i) in self._kept}
            missing = np.array([int(i) for i in indices if int(i) not in found], np.int64)
            if missing.size:
                with limits.stage("decode_fine"):
                    limits.report(0, missing.size)
                    samples = self._read(self._grid[missing], limits)
                    limits.report(missing.size, missing.size)
                maps = fine_maps(self._session, self._spec, samples.frames, report=limits.report)
                for i, feature_map, time in zip(missing, maps, samples.times, strict=True):
                    # A copy, since a view would keep the maps of the whole call alive.
                    found[int(i)] = (feature_map.copy(), float(time))
            for i, entry in found.items():
                self._keep(i, entry)
        return np.stack([found[int(i)][0] for i in indices]), np.array([found[int(i)][1] for i in indices])

    def clear(self) -> None:
        """Let go of all maps."""
        with self._lock:
            self._kept.clear()
            self._held_bytes = 0

    def _keep(self, index: int, entry: tuple[np.ndarray, float]) -> None:
        replaced = self._kept.pop(index, None)
        self._held_bytes -= 0 if replaced is None else replaced[0].nbytes
        self._kept[index] = entry
        self._held_bytes += entry[0].nbytes
        while self._held_bytes > self._budget_bytes:
            _, (dropped, _) = self._kept.popitem(last=False)
            self._held_bytes -= dropped.nbytes
