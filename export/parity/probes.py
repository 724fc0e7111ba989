"""Probes: one call of one graph at given sizes, with random inputs of the kind that the chain feeds and what torch made
of them. Knows nothing of torch: a second process replays them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.manifest import CacheSpec
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.parity.compare import as_contract

Arrays = dict[str, np.ndarray]

PROBE_SIZES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "vision_encoder": (
        {"G": 1, "rows": 2, "columns": 3},
        {"G": 3, "rows": 4, "columns": 2},
        {"G": 2, "rows": 3, "columns": 5},
        {"G": 5, "rows": 1, "columns": 1},
        {"G": 1, "rows": 6, "columns": 9},
    ),
    "language_model": (
        {"B": 1, "L": 1, "K": 1, "S": 16, "V": 2},
        {"B": 2, "L": 9, "K": 3, "S": 40, "V": 7},
        {"B": 3, "L": 33, "K": 5, "S": 64, "V": 30},
        {"B": 1, "L": 48, "K": 2, "S": 48, "V": 41},
        {"B": 4, "L": 2, "K": 2, "S": 31, "V": 1},
    ),
    "spatial_decoder": (
        {"B": 1, "F": 1, "h": 4, "w": 6},
        {"B": 2, "F": 5, "h": 6, "w": 4},
        {"B": 3, "F": 12, "h": 10, "w": 8},
        {"B": 1, "F": 7, "h": 2, "w": 2},
    ),
}
"""Every free dim at three values or more. Rows and columns are merged patches; the caches' fill differs by row."""


@dataclass(frozen=True, eq=False)
class Probe:
    """One call.

    Attributes:
        graph: its name.
        sizes: of the free dims, for people.
        feeds: inputs but the cache.
        past: what the KV cache holds before the call; None: the graph has none.
        expected: the reference's outputs, and `kv` where there is a cache.
        dependence: by `graph.tensor`, how far other inputs of these sizes move the reference, relative to its norm; of
            one probe a graph.
    """

    graph: str
    sizes: Mapping[str, int]
    feeds: Arrays
    past: Arrays | None
    expected: Arrays
    dependence: Mapping[str, float] = field(default_factory=dict)

    @property
    def dims(self) -> str:
        """The sizes as text."""
        return ", ".join(f"{dim} {size}" for dim, size in self.sizes.items())

    def save(self, file: Path) -> None:
        """Write the probe as .npz."""
        about = {"graph": self.graph, "sizes": dict(self.sizes), "dependence": dict(self.dependence)}
        parts = {"in": self.feeds, "past": self.past or {}, "out": self.expected}
        arrays: dict[str, Any] = {
            f"{kind}.{name}": array for kind, part in parts.items() for name, array in part.items()
        }
        np.savez(file, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, file: Path) -> Probe:
        """Read what `save` wrote."""
        parts: dict[str, Arrays] = {"in": {}, "past": {}, "out": {}}
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            for key in arrays.files:
                kind, _, name = key.partition(".")
                if kind in parts:
                    parts[kind][name] = arrays[key]
        return cls(
            about["graph"], about["sizes"], parts["in"], parts["past"] or None, parts["out"], about["dependence"]
        )


def load_probes(folder: Path, graph: str) -> Iterator[Probe]:
    """Yield the probes of one graph that lie in a folder as <graph>_<i>.npz, in order."""
    index = 0
    while (file := folder / f"{graph}_{index}.npz").is_file():
        yield Probe.load(file)
        index += 1


def run(session: Session, feeds: Arrays, past: Arrays | None) -> Arrays:
    """Run one call and return its outputs; of a graph with a cache, `kv` [2·layers, B, kv_heads, S, head_dim] too.

    Inputs are brought to the dtypes of the session's contract.
    """
    feeds = as_contract(session.graph, feeds)
    if past is None:
        return session.infer(feeds)
    batch, _, capacity, _ = next(iter(past.values())).shape
    cache = session.allocate_cache(batch=batch, capacity=capacity)
    cache.write(as_contract(session.graph, past))
    outputs = session.infer(feeds, cache=cache)
    return {**outputs, "kv": np.stack(list(cache.read().values()))}


def feeds_of(
    name: str, spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator
) -> tuple[Arrays, Arrays | None]:
    """Return random inputs of one graph at some sizes, and what its KV cache holds before the call (None: no cache)."""
    if name == "vision_encoder":
        return _vision_feeds(spec, sizes, rng), None
    if name == "language_model":
        return _language_feeds(spec, sizes, rng)
    return _spatial_feeds(spec, sizes, rng), None


def _vision_feeds(spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    vision = spec.vision
    rows, columns = sizes["rows"] * vision.merge_size, sizes["columns"] * vision.merge_size
    shape = (sizes["G"], vision.temporal_patch_size, rows * vision.patch_size, columns * vision.patch_size, 3)
    return {"frames": rng.integers(0, 256, shape, np.uint8), **vision_tables(vision, rows, columns)}


def _language_feeds(spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Mixed text, visual tokens and bridging queries; each row's cache is filled to another depth."""
    language, (b, n, k, s, v) = spec.language, (sizes[dim] for dim in "BLKSV")
    visual = rng.integers(0, v, (b, n)) * rng.integers(0, 2, (b, n))
    ids = rng.integers(0, language.vocab_size + language.num_bridging_queries, (b, n))
    tokens = rng.standard_normal((1 + spec.vision.deepstack_levels, v, language.hidden_size), np.float32)
    tokens[:, 0] = 0
    start = np.linspace(0, s - n, b).astype(np.int64)[::-1].copy()
    feeds = {
        "input_ids": ids,
        "visual_index": visual,
        "visual_tokens": tokens,
        "positions": start[:, None] + np.arange(n) + rng.integers(0, 3, (3, b, n)),
        "cache_position": start,
        "output_index": rng.integers(0, n, (b, k)),
    }
    shape = (b, language.kv_heads, s, language.head_dim)
    cache = CacheSpec("in_place", language.num_layers, language.kv_heads, language.head_dim)
    return feeds, {name: rng.standard_normal(shape, np.float32) for name in cache.past_names}


def _spatial_feeds(spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    """RMS-normalised features and taps; every row sees other frames, and at least one."""
    language, (b, f, h, w) = spec.language, (sizes[dim] for dim in "BFhw")
    taps = (len(language.tapped_layers), b, language.num_bridging_queries, language.hidden_size)
    mask = rng.random((b, f)) < 0.7
    mask[np.arange(b), rng.integers(0, f, b)] = True
    return {
        "feature_map": rng.standard_normal((f, h, w, spec.vision.hidden_size), np.float32),
        "taps": rng.standard_normal(taps, np.float32),
        "frame_times": np.sort(rng.random(f, np.float32) * 8),
        "frame_mask": mask,
    }
