"""Compare arrays at the chain's boundaries with a reference, and replay a bundle's golden cases on this machine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bridge_stg.runtime.backends.session import KVCache, Session
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.bundle.manifest import GraphSpec
from bridge_stg.runtime.chain.boxes import box_cxcywh_to_xyxy, box_iou
from bridge_stg.runtime.errors import BundleError, EngineError
from bridge_stg.runtime.parity.golden import GoldenCall, GoldenCase, Tolerance, read_case

TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(max_abs=1e-3, rel_l2=1e-4),
    "float16": Tolerance(max_abs=2e-2, rel_l2=1e-2),
}
"""Tolerance by the dtype of the compared tensor; integers and booleans must be equal."""

PRECISION_TOLERANCES: Mapping[str, Tolerance] = {
    "fp16": Tolerance(max_abs=5e-2, rel_l2=2e-2),
    "bf16": Tolerance(max_abs=0.25, rel_l2=8e-2),
    "int8": Tolerance(max_abs=0.5, rel_l2=0.25),
    "int4": Tolerance(max_abs=1.0, rel_l2=0.5),
    "fp8": Tolerance(max_abs=0.5, rel_l2=0.25),
    "nvfp4": Tolerance(max_abs=1.0, rel_l2=0.5),
}
"""Tolerance by a graph's precision, for every output: fp32 outputs also carry the errors of earlier matmuls."""

LEAST_IOU: Mapping[str, float] = {"fp16": 0.99, "bf16": 0.9, "int8": 0.7, "int4": 0.5, "fp8": 0.7, "nvfp4": 0.5}
"""Smallest IoU of a graph's boxes with the reference's, by the graph's precision."""

IOU_SIDE = 0.1  # boxes with a smaller side (share of the frame) have no IoU: tiny rounding would lower it too far

BOX_SHARE = 0.1  # share of the tolerance of other tensors that box coordinates get

_EXACT = Tolerance(max_abs=0.0, rel_l2=0.0)


@dataclass(frozen=True)
class Boundary:
    """Difference of one tensor from its reference."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    max_abs: float  # largest difference
    rel_l2: float  # norm of the difference over the reference's norm
    cosine: float  # of the angle between both
    scale: float  # the reference's largest magnitude
    tolerance: Tolerance
    problem: str = ""  # why they cannot be compared; then the figures are infinite (cosine: 0)
    iou: float | None = None  # smallest IoU of boxes

    @property
    def passed(self) -> bool:
        """Whether the tensor is within its tolerance; `max_abs` counts per unit of max(1, scale)."""
        if self.problem or (self.iou is not None and self.iou < self.tolerance.least_iou):
            return False
        allowed = self.tolerance.max_abs * max(1.0, self.scale)
        return self.max_abs <= allowed and self.rel_l2 <= self.tolerance.rel_l2


def tolerance_of(precision: str, tensor: str) -> Tolerance | None:
    """Return the tolerance of one tensor of a graph with lowered precision; None: use the tensor's dtype, as in fp32.

    Only the first word of the precision counts (`bf16 twin` → `bf16`).
    """
    precision = precision.split(maxsplit=1)[0]
    tolerance = PRECISION_TOLERANCES.get(precision)
    if tolerance is None or tensor != "boxes":
        return tolerance
    return replace(tolerance, max_abs=BOX_SHARE * tolerance.max_abs, least_iou=LEAST_IOU[precision])


def compare(
    name: str, reference: np.ndarray, actual: np.ndarray, *, tolerance: Tolerance | None = None, boxes: bool = False
) -> Boundary:
    """Compare one tensor with its reference, in float64; of boxes [..., 4] cxcywh, compute the smallest IoU too.

    Without a tolerance, the entry of `TOLERANCES` for the dtype of `actual` applies.
    """
    dtype = str(actual.dtype)
    tolerance = tolerance or TOLERANCES.get(dtype, _EXACT)
    if problem := _problem(reference, actual):
        return Boundary(name, dtype, actual.shape, np.inf, np.inf, 0.0, 0.0, tolerance, problem)
    x, y = reference.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    finite = np.isfinite(x)
    x, y = x[finite], y[finite]
    norm_x, norm_y, difference = (float(np.linalg.norm(v)) for v in (x, y, x - y))
    return Boundary(
        name=name,
        dtype=dtype,
        shape=actual.shape,
        max_abs=float(np.abs(x - y).max(initial=0.0)),
        rel_l2=difference / norm_x if norm_x else (0.0 if difference == 0 else float("inf")),
        cosine=float(x @ y) / (norm_x * norm_y) if norm_x and norm_y else float(norm_x == norm_y),
        scale=float(np.abs(x).max(initial=0.0)),
        tolerance=tolerance,
        iou=_least_iou(reference, actual) if boxes and finite.all() else None,
    )


def _least_iou(reference: np.ndarray, actual: np.ndarray) -> float | None:
    first, second = (boxes.astype(np.float64).reshape(-1, 4) for boxes in (reference, actual))
    large = first[:, 2:].min(-1) >= IOU_SIDE
    if not large.any():
        return None
    return float(box_iou(box_cxcywh_to_xyxy(first[large]), box_cxcywh_to_xyxy(second[large])).min())


def as_contract(graph: GraphSpec, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cast fp32 reference inputs to the dtypes of a graph's contract, which may be fp16."""
    dtypes = {tensor.name: tensor.dtype for tensor in graph.inputs}
    return {
        name: array.astype(dtypes[name]) if array.dtype.kind == "f" and name in dtypes else array
        for name, array in arrays.items()
    }


def _problem(reference: np.ndarray, actual: np.ndarray) -> str:
    """Return why two arrays cannot be compared, or "". Infinities must be equal; NaN is allowed in neither array."""
    if reference.shape != actual.shape:
        return f"shape {list(actual.shape)}, expected {list(reference.shape)}"
    if (reference.dtype.kind == "f") != (actual.dtype.kind == "f"):
        return f"dtype {actual.dtype}, expected {reference.dtype}"
    if reference.dtype.kind != "f":
        return ""
    for side, values in (("reference", reference), ("result", actual)):
        if count := int(np.isnan(values).sum()):
            return f"{count} NaN in the {side}"
    infinite = np.isinf(reference)
    if not (np.array_equal(infinite, np.isinf(actual)) and np.array_equal(reference[infinite], actual[infinite])):
        return "infinities on one side only"
    return ""


def format_table(boundaries: Sequence[Boundary]) -> str:
    """Format boundaries as a text table: one line each, with the figures and the verdict."""
    rows = [("boundary", "dtype", "shape", "max abs", "rel L2", "cosine", "")]
    for b in boundaries:
        verdict = "ok" if b.passed else f"FAILED {b.problem}".rstrip()
        shape = "×".join(map(str, b.shape)) or "scalar"
        rows.append((b.name, b.dtype, shape, f"{b.max_abs:.2e}", f"{b.rel_l2:.2e}", f"{b.cosine:.6f}", verdict))
    columns = zip(*rows, strict=True)
    alignments = [f"{side}{max(map(len, cells))}" for side, cells in zip("<<<>>><", columns, strict=True)]
    return "\n".join("  ".join(map(format, row, alignments)).rstrip() for row in rows)


def replay(
    cases: Bundle | Iterable[Path],
    sessions: Mapping[str, Session],
    *,
    graphs: Collection[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Boundary]:
    """Run every recorded call of golden cases; return one boundary per output, named `case/graph_i.tensor`.

    A recorded call with past_* gets a cache filled with them. Without past_* it continues with the cache of the graph's
    earlier calls of the case, empty at first; if the number of rows changes, each row begins with that cache's first
    positions, up to the smallest cache_position. Recorded present_* are compared with the cache after the call.

    Args:
        cases: a bundle, or folders of cases.
        sessions: open session per graph.
        graphs: graphs to replay; None: all.
        progress: called with `case/graph_i` before each call.
    """
    found: list[Boundary] = []
    for case in map(read_case, cases.golden_cases() if isinstance(cases, Bundle) else cases):
        caches: dict[str, KVCache] = {}
        for call in case.calls if graphs is None else (call for call in case.calls if call.graph in graphs):
            if call.graph not in sessions:
                raise EngineError("engine.no_session", f"golden case {case.name!r}: no session for {call.graph!r}.")
            if progress is not None:
                progress(f"{case.name}/{call.name}")
            found += _replay_call(case, call, sessions[call.graph], caches)
    return found


def _replay_call(case: GoldenCase, call: GoldenCall, session: Session, caches: dict[str, KVCache]) -> list[Boundary]:
    inputs, expected = call.load()
    past_names = session.graph.cache.past_names if session.graph.cache is not None else ()
    past = {name: inputs.pop(name) for name in past_names if name in inputs}
    cache: KVCache | None = None
    if past:
        cache = caches[call.graph] = _cache_with(session, past)
    elif past_names:
        cache = caches[call.graph] = _next_cache(case, call, session, inputs, caches.get(call.graph))
    outputs = session.infer(as_contract(session.graph, inputs), cache=cache)
    if cache is not None:
        buffers = cache.read()
        for old in past_names:
            if (new := old.replace("past_", "present_", 1)) in expected:
                outputs[new] = buffers[old][:, :, : expected[new].shape[2]]  # an engine's buffers may be larger
    found = []
    for name, value in expected.items():
        if name not in outputs:
            raise BundleError("bundle.bad_golden_case", f"{call.path}: graph {session.graph} has no output {name!r}.")
        tolerance, boundary = case.tolerance_of(call.graph, name), f"{case.name}/{call.name}.{name}"
        actual = np.asarray(outputs[name])
        found.append(compare(boundary, value, actual, tolerance=tolerance, boxes=name == "boxes"))
    return found


def _cache_with(session: Session, past: Mapping[str, np.ndarray]) -> KVCache:
    batch, _, capacity, _ = next(iter(past.values())).shape
    cache = session.allocate_cache(batch=batch, capacity=capacity)
    missing = cache.capacity - capacity  # an engine's capacity may be fixed
    padded = {name: np.pad(buffer, ((0, 0), (0, 0), (0, missing), (0, 0))) for name, buffer in past.items()}
    cache.write(as_contract(session.graph, padded))
    return cache


def _next_cache(
    case: GoldenCase, call: GoldenCall, session: Session, inputs: Mapping[str, np.ndarray], before: KVCache | None
) -> KVCache:
    positions = inputs.get("cache_position")
    if positions is None or (before is None and case.about.cache_capacity is None):
        text = f"{call.path}: needs in.cache_position, and either in.past_* or cache_capacity in case.json."
        raise BundleError("bundle.bad_golden_case", text)
    if before is not None and before.batch == len(positions):
        return before
    capacity = before.capacity if before is not None else int(case.about.cache_capacity or 0)
    cache = session.allocate_cache(batch=len(positions), capacity=capacity)
    if before is not None and (length := int(positions.min())):
        cache.copy_prefix(before, length)
    return cache
