"""Random-input cases: one call of one graph at given sizes, and the outputs of torch.

Inputs are random, but of the kind that the chain passes. Knows nothing of torch: a subprocess replays the cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.manifest import CacheSpec
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.positions import vision_tables
from bridge_stg.runtime.parity.compare import as_contract

Arrays = dict[str, np.ndarray]


def _sizes(dims: str, *sizes: tuple[int, ...]) -> Sequence[Mapping[str, int]]:
    return [dict(zip(dims.split(), values, strict=True)) for values in sizes]


PROBE_SIZES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "vision_encoder": _sizes("G rows columns", (1, 2, 3), (3, 4, 2), (2, 3, 5), (5, 1, 1), (1, 6, 9)),
    "language_model": _sizes(
        "B L K S V", (1, 1, 1, 16, 2), (2, 9, 3, 40, 7), (3, 33, 5, 64, 30), (1, 48, 2, 48, 41), (4, 2, 2, 31, 1)
    ),
    "spatial_decoder": _sizes("B F h w", (1, 1, 4, 6), (2, 5, 6, 4), (3, 12, 10, 8), (1, 7, 2, 2)),
}
"""Sizes by graph: every free dim has at least three values. Rows and columns are merged patches."""


@dataclass(frozen=True, eq=False)
class RandomCase:
    """One call.

    Attributes:
        graph: name of the graph.
        sizes: sizes of the free dims.
        feeds: inputs without the cache.
        past: content of the KV cache before the call; None if the graph has none.
        expected: outputs of the reference, and `kv` if the graph has a cache.
        dependence: change of the reference with other inputs of these sizes, relative to its norm, by `graph.tensor`;
            in one case per graph.
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
        """Write the case as .npz."""
        about = {"graph": self.graph, "sizes": dict(self.sizes), "dependence": dict(self.dependence)}
        parts = {"in": self.feeds, "past": self.past or {}, "out": self.expected}
        arrays: dict[str, Any] = {f"{kind}.{name}": a for kind, part in parts.items() for name, a in part.items()}
        np.savez(file, about=np.array(json.dumps(about)), **arrays)

    @classmethod
    def load(cls, file: Path) -> RandomCase:
        """Read the file of `save`."""
        parts: dict[str, Arrays] = {"in": {}, "past": {}, "out": {}}
        with np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            for key in arrays.files:
                kind, _, name = key.partition(".")
                if kind in parts:
                    parts[kind][name] = arrays[key]
        return cls(feeds=parts["in"], past=parts["past"] or None, expected=parts["out"], **about)


def load_cases(folder: Path, graph: str) -> Iterator[RandomCase]:
    """Yield the cases of one graph in a folder, <graph>_<i>.npz, in order."""
    files = (folder / f"{graph}_{index}.npz" for index in count())
    yield from map(RandomCase.load, takewhile(Path.is_file, files))


def run(session: Session, feeds: Arrays, past: Arrays | None) -> Arrays:
    """Run one call and return its outputs, with the cache as `kv` [2·layers, B, kv_heads, S, head_dim].

    Inputs are converted to the dtypes of the session's contract.
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
    """Return random inputs of one graph, and the content of its KV cache before the call (None: it has no cache)."""
    if name == "language_model":
        return _language_feeds(spec, sizes, rng)
    return (_vision_feeds if name == "vision_encoder" else _spatial_feeds)(spec, sizes, rng), None


def _vision_feeds(spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    vision = spec.vision
    rows, columns = sizes["rows"] * vision.merge_size, sizes["columns"] * vision.merge_size
    shape = (sizes["G"], vision.temporal_patch_size, rows * vision.patch_size, columns * vision.patch_size, 3)
    return {"frames": rng.integers(0, 256, shape, np.uint8), **vision_tables(vision, rows, columns)}


def _language_feeds(spec: ModelSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Return text, visual tokens and bridging queries, with a cache that is filled to another depth in each row."""
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
    """Return normalized features and taps; every row sees other frames, and at least one."""
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
