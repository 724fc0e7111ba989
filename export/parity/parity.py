"""Compare exported graphs with the torch reference at every boundary of the chain, at several sizes of every dim.

Boundaries: visual_tokens and feature_map, logits, taps and kv, boxes and presence. What is compared at a size is named
by it, so that a failure tells where to look. Knows nothing of torch, whose outputs were recorded before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.export.parity.probes import Probe, run
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.parity.compare import (
    PRECISION_TOLERANCES,
    TOLERANCES,
    Boundary,
    compare,
    format_table,
    tolerance_of,
)
from bridge_stg.runtime.parity.golden import Tolerance

REPORT = "parity"


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

    @property
    def least_iou(self) -> float | None:
        """The smallest IoU of a box with the reference's; None if no boxes were compared."""
        return min((boundary.iou for boundary in self.boundaries if boundary.iou is not None), default=None)

    def __add__(self, other: Parity) -> Parity:
        """Return both together, in order."""
        return Parity(self.boundaries + other.boundaries, {**self.dependence, **other.dependence})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parity:
        """Read what `to_dict` returned."""
        return cls(tuple(_boundary(b) for b in values["boundaries"]), values["dependence"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        tolerances = {**TOLERANCES, **PRECISION_TOLERANCES}
        return {
            "reference": "torch, float32",
            "passed": not self.failures,
            "tolerances": {name: dataclasses.asdict(tolerance) for name, tolerance in tolerances.items()},
            "dependence": dict(self.dependence),
            "boundaries": [dataclasses.asdict(b) | {"passed": b.passed} for b in self.boundaries],
        }


def measure(probes: Iterable[Probe], sessions: Mapping[str, Session]) -> Parity:
    """Run every variant of a graph on its probes.

    Args:
        probes: of one graph.
        sessions: of that graph, by variant.
    """
    boundaries: list[Boundary] = []
    dependence: dict[str, float] = {}
    for probe in probes:
        dependence |= probe.dependence
        for variant, session in sessions.items():
            actual = run(session, probe.feeds, probe.past)
            for tensor, expected in probe.expected.items():
                name = f"{probe.graph}.{tensor} ({variant}; {probe.dims})"
                tolerance = tolerance_of(session.graph.precision, tensor)
                boundaries.append(compare(name, expected, actual[tensor], tolerance=tolerance, boxes=tensor == "boxes"))
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
    if first.iou is not None:
        found, allowed = f"{found}, IoU {first.iou:.4f}", f"{allowed}, IoU from {first.tolerance.least_iou:g} on"
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
    parity = Parity.from_dict(report)
    boundaries = parity.boundaries
    worst: dict[str, Boundary] = {}
    for boundary in boundaries:
        name = _without_sizes(boundary.name)
        if name not in worst or boundary.rel_l2 >= worst[name].rel_l2:
            worst[name] = dataclasses.replace(boundary, name=name)
    moved = ", ".join(f"{name} {share:.2f}" for name, share in parity.dependence.items())
    iou = (
        ""
        if parity.least_iou is None
        else f"\nThe smallest IoU of a box with the reference's is {parity.least_iou:.4f}."
    )
    return (
        f"{format_table(list(worst.values()))}\n"
        f"Each is the worst of several sizes ({len(boundaries)} comparisons), against {report['reference']}.{iou}\n"
        f"Other inputs move the reference, relative to its norm, by: {moved}"
    )


def _without_sizes(name: str) -> str:
    return name.split(";")[0] + ")"


def _boundary(values: Mapping[str, Any]) -> Boundary:
    fields = {field.name: values[field.name] for field in dataclasses.fields(Boundary) if field.name in values}
    return Boundary(**{**fields, "shape": tuple(fields["shape"]), "tolerance": Tolerance(**fields["tolerance"])})
