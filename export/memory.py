"""Memory and disk: what a process has taken, what a machine has left, and what an export is going to need."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.parity.probes import PROBE_SIZES
from bridge_stg.export.tracing.precision import Precision
from bridge_stg.export.tracing.streaming import RESIDENT_BYTES
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host import memory as host_memory
from bridge_stg.runtime.host.memory import gigabytes

CGROUP = host_memory.CGROUP
BASE_BYTES = 10**9
"""What the export process takes whatever the model: torch, transformers, a traced graph (docs/performance.md)."""
REPLAY_BASE_BYTES = 200 * 10**6
"""Of the second process, beside the weights."""
COPIES = {"fp32": 2.0, "fp16": 4.0, "bf16": 4.0}
"""Bytes that onnxruntime holds a byte of a graph's weights at the worst moment of loading it on CPU: it packs matrices
anew, and it computes lower precisions in fp32, from a copy."""
LEAN_COPIES = 2.2
"""The same where it keeps no second copy, and casts and packs one matrix at a time at every call."""
RECORDS_BYTES = 64 * 10**6
"""Golden cases and the small tensors of probes on disk."""


@dataclass(frozen=True)
class Estimate:
    """What an export is going to need, in bytes.

    Attributes:
        weights: of the bundle's graphs.
        disk: below the bundle's folder, at the worst moment.
        export: memory of this process at its peak.
        replay: memory of the process that replays the bundle, which runs while this one waits; 0: none does.
        lean_replay: the same if that process keeps no second copy of the weights, which is slower.
    """

    weights: int
    disk: int
    export: int
    replay: int
    lean_replay: int = 0

    def __str__(self) -> str:
        replay = f" and {gigabytes(self.replay)} for the replay" if self.replay else ""
        return (
            f"about {gigabytes(self.export)} of memory{replay}, and {gigabytes(self.disk)} of disk, "
            f"for {gigabytes(self.weights)} of weights"
        )


def estimate(store: WeightStore, spec: ModelSpec, precision: Precision, *, verify: bool) -> Estimate:
    """Estimate an export from the sizes of a checkpoint's tensors.

    Args:
        store: the weights.
        spec: the model's geometry.
        precision: of the graphs.
        verify: whether the bundle is replayed.
    """
    counts = {key: tensor.length // tensor.dtype.itemsize for key, tensor in store.items()}
    weights = int(sum(counts.values()) * precision.dtype.itemsize)
    resident = 4 * sum(counts.values())
    merged = max((tensor.length for tensor in store.values() if tensor.delta is not None), default=0)
    export = BASE_BYTES + weights // 5 + 3 * merged + (resident if verify and resident <= RESIDENT_BYTES else 0)
    if not verify:
        return Estimate(weights, weights, export, 0)
    largest = max(_of_graph(name, counts) for name in ("vision_encoder", "language_model", "spatial_decoder"))
    replay, lean = (
        REPLAY_BASE_BYTES + int(copies * largest * precision.dtype.itemsize)
        for copies in (COPIES[precision.name], LEAN_COPIES)
    )
    return Estimate(weights, weights + RECORDS_BYTES + _caches(spec), export, replay, lean)


def require_room(needed: Estimate, out: Path) -> bool:
    """Stop before anything is written if memory or disk are not there.

    Returns:
        Whether the replay must do without a second copy of the weights.

    Raises:
        EngineError: the message says what is needed, what is there, and what to do.
    """
    folder = next(path for path in (out, *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed.disk:
        raise EngineError(
            f"{out}: the export needs {gigabytes(needed.disk)} of disk there, and {gigabytes(free)} are free; "
            "make room, choose another --out, or a smaller --dtype"
        )
    left = available_bytes()
    if left is None:
        return False
    if left < needed.export:
        raise EngineError(
            f"the export needs about {gigabytes(needed.export)} of memory, and {gigabytes(left)} are available; close "
            "other programs, or use a machine with more"
        )
    if left < needed.export + needed.lean_replay:
        raise EngineError(
            f"the export needs about {gigabytes(needed.export)} of memory, and the replay of the bundle beside it "
            f"{gigabytes(needed.lean_replay)}, but {gigabytes(left)} are available; close other programs, or leave the "
            "comparison out with --no-verify and run `verify` on a larger machine"
        )
    return left < needed.export + needed.replay


def available_bytes() -> int | None:
    """Return the memory that a process may still take; None: not known."""
    return host_memory.available_bytes(CGROUP)


def _of_graph(name: str, counts: Mapping[str, int]) -> int:
    """Return how many values the weights of a graph have."""
    beginnings = {
        "vision_encoder": ("model.visual.",),
        "language_model": ("model.language_model.", "lm_head.", "bridging."),
        "spatial_decoder": ("spatial_decoder.",),
    }[name]
    return sum(count for key, count in counts.items() if key.startswith(beginnings))


def _caches(spec: ModelSpec) -> int:
    """Return the bytes of the KV caches that the language model's probes record, before and after."""
    language = spec.language
    position = 2 * language.num_layers * language.kv_heads * language.head_dim * 4
    return sum(2 * sizes["B"] * sizes["S"] * position for sizes in PROBE_SIZES["language_model"])
