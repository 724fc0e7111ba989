"""Compare exported graphs with the torch reference at every boundary of the chain, at several sizes of every dim.

Boundaries are visual_tokens and feature_map, logits, taps and kv, boxes and presence. The name of a comparison has its
sizes. Knows nothing of torch, whose outputs were recorded before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge_stg.export.parity.probes import RandomCase, run
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.bundle.reports import read_report
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.parity import compare as tolerances
from bridge_stg.runtime.parity.compare import Boundary, compare, format_table, tolerance_of

REPORT = "parity"


@dataclass(frozen=True)
class Parity:
    """Comparisons of exported graphs with torch.

    Attributes:
        boundaries: one comparison per tensor, size and variant.
        dependence: change of the reference with other inputs of the same size, relative to its norm, by `graph.tensor`.
            Near 0, agreement has no meaning.
    """

    boundaries: tuple[Boundary, ...]
    dependence: Mapping[str, float]

    @property
    def failures(self) -> list[Boundary]:
        """Boundaries that exceed their tolerance."""
        return [boundary for boundary in self.boundaries if not boundary.passed]

    @property
    def least_iou(self) -> float | None:
        """Smallest IoU of a box with that of the reference; None if no boxes were compared."""
        return min((boundary.iou for boundary in self.boundaries if boundary.iou is not None), default=None)

    def __add__(self, other: Parity) -> Parity:
        """Return the comparisons of both."""
        return Parity(self.boundaries + other.boundaries, {**self.dependence, **other.dependence})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parity:
        """Read the result of `to_dict`."""
        boundaries = ({key: value for key, value in b.items() if key != "passed"} for b in values["boundaries"])
        return cls(tuple(from_json(Boundary, b, "boundaries") for b in boundaries), values["dependence"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        known = {**tolerances.TOLERANCES, **tolerances.PRECISION_TOLERANCES}
        return {
            "reference": "torch, float32",
            "passed": not self.failures,
            "tolerances": {name: dataclasses.asdict(tolerance) for name, tolerance in known.items()},
            "dependence": dict(self.dependence),
            "boundaries": [dataclasses.asdict(b) | {"passed": b.passed} for b in self.boundaries],
        }


def measure(cases: Iterable[RandomCase], sessions: Mapping[str, Session]) -> Parity:
    """Run every variant of a graph on its random-input cases, with the sessions of the graph by variant."""
    boundaries: list[Boundary] = []
    dependence: dict[str, float] = {}
    for case in cases:
        dependence |= case.dependence
        for variant, session in sessions.items():
            actual = run(session, case.feeds, case.past)
            for tensor, expected in case.expected.items():
                name = f"{case.graph}.{tensor} ({variant}; {case.dims})"
                tolerance = tolerance_of(session.graph.precision, tensor)
                boundaries.append(compare(name, expected, actual[tensor], tolerance=tolerance, boxes=tensor == "boxes"))
    return Parity(tuple(boundaries), dependence)


def require(parity: Parity) -> None:
    """Raise EngineError if a boundary exceeds its tolerance, with the first one in the order of the chain."""
    if not parity.failures:
        return
    first, count = parity.failures[0], len(parity.failures)
    found = first.problem or f"largest difference {first.max_abs:.2e}, relative error {first.rel_l2:.2e}"
    allowed = f"{first.tolerance.max_abs:g} per unit and {first.tolerance.rel_l2:g}"
    if first.iou is not None:
        found, allowed = f"{found}, IoU {first.iou:.4f}", f"{allowed}, IoU of at least {first.tolerance.least_iou:g}"
    where = (
        f"the exported graphs differ from torch at {count} of {len(parity.boundaries)} boundaries, first {first.name}"
    )
    advice = "Nothing was written. Check the versions of packages against the project's constraints.txt"
    raise EngineError("export.parity", f"{where}: {found}; allowed: {allowed}. {advice}")


def parity_table(bundle: Path | str) -> str:
    """Return the parity report of a bundle as a text table, with the worst size of each boundary."""
    report = read_report(bundle, REPORT)
    parity = Parity.from_dict(report)
    worst: dict[str, Boundary] = {}
    for boundary in (compared := parity.boundaries):
        name = boundary.name.partition(";")[0] + ")"
        if name not in worst or boundary.rel_l2 >= worst[name].rel_l2:
            worst[name] = dataclasses.replace(boundary, name=name)
    moved = ", ".join(f"{name} {share:.2f}" for name, share in parity.dependence.items())
    least = parity.least_iou
    iou = "" if least is None else f"\nThe smallest IoU of a box with the reference's is {least:.4f}."
    return (
        f"{format_table(list(worst.values()))}\n"
        f"Each is the worst of several sizes ({len(compared)} comparisons), against {report['reference']}.{iou}\n"
        f"For comparison, other inputs change the reference by: {moved}"
    )
