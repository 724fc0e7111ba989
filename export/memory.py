"""Estimate the memory and disk that an export needs, and check that this machine has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bridge_stg.checkpoint.weight_store import WeightStore
from bridge_stg.export.parity.probes import PROBE_SIZES
from bridge_stg.export.tracing.precision import Precision
from bridge_stg.export.tracing.streaming import RESIDENT_BYTES
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.files import require_space
from bridge_stg.runtime.host.memory import available_bytes, gigabytes

BASE_BYTES = 11 * 10**8
"""Memory of the export process for any model: torch, transformers, a traced graph (docs/performance.md)."""
REPLAY_BASE_BYTES = 200 * 10**6
"""Memory of the replay process without weights."""
COPIES = {"fp32": 1.1, "fp16": 4.0, "bf16": 4.0}
"""Peak memory of onnxruntime on CPU while it loads a graph, as a multiple of the graph's weights: it computes lower
precisions in fp32 from a copy, whose matrices it packs into new memory."""
LOW_MEMORY_COPIES = {"fp32": 1.1, "fp16": 2.2, "bf16": 2.2}
"""The same without a second copy of the weights: it casts and packs one matrix at a time in every call."""
PREFIXES = (("model.visual.",), ("model.language_model.", "lm_head.", "bridging."), ("spatial_decoder.",))
"""Prefixes of the weights of each graph."""
RECORDS_BYTES = 64 * 10**6
"""Golden cases and the small tensors of random-input cases on disk."""


@dataclass(frozen=True)
class Estimate:
    """Needs of an export, in bytes.

    Attributes:
        weights: weights of the bundle's graphs.
        disk: peak size of the bundle's folder.
        export: peak memory of this process.
        replay: peak memory of the process that replays a graph while this one goes on; 0 without a replay.
        lean_replay: the same without a second copy of the weights, which is slower.
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
    """Estimate the needs of an export, with a replay of the bundle if `verify`, from the checkpoint's tensors."""
    counts = {key: tensor.length // tensor.dtype.itemsize for key, tensor in store.items()}
    weights = int(sum(counts.values()) * precision.dtype.itemsize)
    resident = 4 * sum(counts.values())
    merged = max((tensor.length for tensor in store.values() if tensor.delta is not None), default=0)
    export = BASE_BYTES + weights // 4 + 3 * merged + (resident if verify and resident <= RESIDENT_BYTES else 0)
    if not verify:
        return Estimate(weights, weights, export, 0)
    largest = max(sum(n for key, n in counts.items() if key.startswith(names)) for names in PREFIXES)
    replay, low_memory = (
        REPLAY_BASE_BYTES + int(copies * largest * precision.dtype.itemsize)
        for copies in (COPIES[precision.name], LOW_MEMORY_COPIES[precision.name])
    )
    language = spec.language
    position = 2 * language.num_layers * language.kv_heads * language.head_dim * 4
    # The KV caches in the language model's random-input cases, before and after the call.
    caches = sum(2 * sizes["B"] * sizes["S"] * position for sizes in PROBE_SIZES["language_model"])
    return Estimate(weights, weights + RECORDS_BYTES + caches, export, replay, low_memory)


def require_room(needed: Estimate, out: Path) -> bool:
    """Check that memory and disk are sufficient, before anything is written.

    Returns whether the replay must work without a second copy of the weights; raises EngineError if memory is not
    sufficient, and HostError if the disk is not.
    """
    require_space(out, needed.disk, purpose="the export")
    left = available_bytes()
    if left is None:
        return False
    if left < needed.export + needed.lean_replay:
        replay, advice = "", "close other programs, or use a machine with more"
        if left >= needed.export:
            replay = f" and {gigabytes(needed.lean_replay)} for the replay"
            advice += ", or leave the comparison out with --no-verify"
        message = (
            f"the export needs about {gigabytes(needed.export)} of memory{replay}; {gigabytes(left)} are available"
        )
        raise EngineError("export.out_of_memory", f"{message}; {advice}")
    return left < needed.export + needed.replay
