"""Compare exported graphs with the torch reference at every boundary of the chain, at several sizes of every dim.

Boundaries: visual_tokens and feature_map, logits, taps and kv, boxes and presence. Inputs are random but of the kind
that the chain feeds. What is compared at a size is named by it, so that a failure tells where to look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.eager import TorchSession
from bridge_stg.model import BridgeSTG
from bridge_stg.runtime.compare import TOLERANCES, Boundary, compare, format_table
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.manifest import CacheSpec
from bridge_stg.runtime.positions import vision_tables
from bridge_stg.runtime.reports import read_report
from bridge_stg.runtime.session import Session
from bridge_stg.runtime.spec import ChainSpec

Arrays = dict[str, np.ndarray]

REPORT = "parity"

SIZES: Mapping[str, Sequence[Mapping[str, int]]] = {
    "vision_encoder": (
        {"G": 1, "rows": 2, "columns": 3},
        {"G": 3, "rows": 4, "columns": 2},
        {"G": 2, "rows": 3, "columns": 5},
        {"G": 5, "rows": 1, "columns": 1},
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


@dataclass(frozen=True)
class Parity:
    """What was measured.

    Attributes:
        boundaries: one a tensor, size and variant.
        dependence: by `graph.tensor`, how far other inputs of the same size move the reference, relative to its norm.
            Near 0, agreement says nothing.
    """

    boundaries: tuple[Boundary, ...]
    dependence: Mapping[str, float]

    @property
    def failures(self) -> list[Boundary]:
        """Boundaries that exceed their tolerance."""
        return [boundary for boundary in self.boundaries if not boundary.passed]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "reference": "torch, float32",
            "passed": not self.failures,
            "tolerances": {dtype: dataclasses.asdict(tolerance) for dtype, tolerance in TOLERANCES.items()},
            "dependence": dict(self.dependence),
            "boundaries": [dataclasses.asdict(b) | {"passed": b.passed} for b in self.boundaries],
        }


def measure(model: BridgeSTG, sessions: Mapping[str, Mapping[str, Session]], *, seed: int = 0) -> Parity:
    """Run every variant of every graph beside torch.

    Args:
        model: the reference, in eval mode.
        sessions: by graph and variant.
        seed: of the random inputs.
    """
    boundaries: list[Boundary] = []
    dependence: dict[str, float] = {}
    for name, variants in sessions.items():
        reference = TorchSession(name, model)
        for index, sizes in enumerate(SIZES[name]):
            feeds, past = feeds_of(name, model.spec, sizes, np.random.default_rng([seed, index]))
            expected = run(reference, feeds, past)
            if index == 1:
                others, _ = feeds_of(name, model.spec, sizes, np.random.default_rng([seed + 1, index]))
                moved = run(reference, others, past)
                dependence |= {f"{name}.{k}": _moved(expected[k], moved[k]) for k in expected}
            dims = ", ".join(f"{dim} {size}" for dim, size in sizes.items())
            for variant, session in variants.items():
                actual = run(session, feeds, past)
                boundaries += [compare(f"{name}.{k} ({variant}; {dims})", expected[k], actual[k]) for k in expected]
    return Parity(tuple(boundaries), dependence)


def require(parity: Parity) -> None:
    """Raise if a boundary exceeds its tolerance.

    Raises:
        EngineError: the message names the first such boundary in the order of the chain.
    """
    if not parity.failures:
        return
    first, count = parity.failures[0], len(parity.failures)
    found = first.problem or f"largest difference {first.max_abs:.2e}, relative error {first.rel_l2:.2e}"
    allowed = f"{first.tolerance.max_abs:g} per unit and {first.tolerance.rel_l2:g}"
    raise EngineError(
        f"the exported graphs differ from torch at {count} of {len(parity.boundaries)} boundaries, first at "
        f"{first.name}: {found}; allowed are {allowed}. Nothing was written. Check the versions of torch, onnxscript "
        "and onnxruntime against the project's constraints.txt."
    )


def parity_table(bundle: Path | str) -> str:
    """Return the boundaries in a bundle's parity report as a text table, the worst size of each, and what it rests on.

    Raises:
        BundleError: the report is missing or was changed.
    """
    report = read_report(bundle, REPORT)
    boundaries = [_boundary(values) for values in report["boundaries"]]
    worst: dict[str, Boundary] = {}
    for boundary in boundaries:
        name = _without_sizes(boundary.name)
        if name not in worst or boundary.rel_l2 >= worst[name].rel_l2:
            worst[name] = dataclasses.replace(boundary, name=name)
    moved = ", ".join(f"{name} {share:.2f}" for name, share in report["dependence"].items())
    return (
        f"{format_table(list(worst.values()))}\n"
        f"Each is the worst of several sizes ({len(boundaries)} comparisons), against {report['reference']}.\n"
        f"Other inputs move the reference, relative to its norm, by: {moved}"
    )


def run(session: Session, feeds: Arrays, past: Arrays | None) -> Arrays:
    """Run one call and return its outputs; of a graph with a cache, `kv` [2·layers, B, kv_heads, S, head_dim] too."""
    if past is None:
        return session.infer(feeds)
    batch, _, capacity, _ = next(iter(past.values())).shape
    cache = session.allocate_cache(batch=batch, capacity=capacity)
    cache.write(past)
    outputs = session.infer(feeds, cache=cache)
    return {**outputs, "kv": np.stack(list(cache.read().values()))}


def feeds_of(
    name: str, spec: ChainSpec, sizes: Mapping[str, int], rng: np.random.Generator
) -> tuple[Arrays, Arrays | None]:
    """Return random inputs of one graph at some sizes, and what its KV cache holds before the call (None: no cache)."""
    if name == "vision_encoder":
        return _vision_feeds(spec, sizes, rng), None
    if name == "language_model":
        return _language_feeds(spec, sizes, rng)
    return _spatial_feeds(spec, sizes, rng), None


def _vision_feeds(spec: ChainSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
    vision = spec.vision
    rows, columns = sizes["rows"] * vision.merge_size, sizes["columns"] * vision.merge_size
    shape = (sizes["G"], vision.temporal_patch_size, rows * vision.patch_size, columns * vision.patch_size, 3)
    return {"frames": rng.integers(0, 256, shape, np.uint8), **vision_tables(vision, rows, columns)}


def _language_feeds(spec: ChainSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> tuple[Arrays, Arrays]:
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


def _spatial_feeds(spec: ChainSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Arrays:
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


def _moved(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(reference - other) / max(float(np.linalg.norm(reference)), 1e-12))


def _without_sizes(name: str) -> str:
    return name.split(";")[0] + ")"


def _boundary(values: Mapping[str, Any]) -> Boundary:
    fields = {field.name: values[field.name] for field in dataclasses.fields(Boundary)}
    tolerance = dataclasses.replace(next(iter(TOLERANCES.values())), **fields["tolerance"])
    return Boundary(**{**fields, "shape": tuple(fields["shape"]), "tolerance": tolerance})
