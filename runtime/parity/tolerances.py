"""Tolerances of a quantized bundle's golden cases, measured on the machine that makes it.

The precision alone does not determine them: one recipe causes an error of 0.01 in one model and of 0.2 in another.
"""

from __future__ import annotations

from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BridgeError, EngineError
from bridge_stg.runtime.parity.compare import LEAST_IOU, TOLERANCES, Boundary, tolerance_of
from bridge_stg.runtime.parity.golden import Tolerance
from bridge_stg.runtime.parity.verify import replay_variant

MARGIN = 2.0
"""Ratio of a tolerance to the measured difference: kernels of other machines round differently, which may double it."""

Tolerances = dict[str, dict[str, Tolerance]]
"""Golden case → `graph.tensor` → tolerance."""


def measure_tolerances(bundle: Bundle, source: Bundle) -> Tolerances:
    """Return tolerances of all outputs of quantized graphs, from replays of every variant that runs on this machine.

    No tolerance is below that of the source's precision.

    Raises:
        BridgeError: an output has values that are not finite.
        EngineError: no variant runs on this machine.
    """
    failure: EngineError | None = None
    replayed: dict[tuple[str, str, str], list[Boundary]] = {}
    for variant in dict.fromkeys(graph.variant for graph in bundle.manifest.all_graphs()):
        try:
            boundaries = replay_variant(bundle, variant, cases=source)
        except EngineError as error:
            failure = error
            continue
        for boundary in boundaries:
            case, _, rest = boundary.name.partition("/")
            call, _, tensor = rest.partition(".")
            replayed.setdefault((case, call.rpartition("_")[0], tensor), []).append(boundary)
    if failure is not None and not replayed:
        raise failure
    found: Tolerances = {}
    for (case, name, tensor), boundaries in replayed.items():
        before, after = (next(iter(one.manifest.graphs[name].values())).precision for one in (source, bundle))
        if before != after:
            found.setdefault(case, {})[f"{name}.{tensor}"] = _widest(boundaries, tolerance_of(before, tensor))
    return found


def _widest(boundaries: list[Boundary], least: Tolerance | None) -> Tolerance:
    for boundary in boundaries:
        if boundary.problem:
            what = f"{boundary.name}: the quantized graph returned {boundary.problem}; change samples or recipe"
            raise BridgeError("calibration.not_finite", what)
    least = least or TOLERANCES["float32"]
    lost = [MARGIN * (1 - boundary.iou) for boundary in boundaries if boundary.iou is not None]
    return Tolerance(
        max_abs=_rounded(max(least.max_abs, *(MARGIN * b.max_abs / max(1.0, b.scale) for b in boundaries))),
        rel_l2=_rounded(max(least.rel_l2, *(MARGIN * b.rel_l2 for b in boundaries))),
        least_iou=1 - min(1.0, _rounded(max(1 - LEAST_IOU["fp16"], *lost))) if lost else 0.0,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.1e}")
