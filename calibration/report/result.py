"""What a calibration found, in plain values: the report is written from it, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CalibrationResult:
    """Everything that a calibration found. All but `cases` are values that JSON has; null is "not measured".

    An interval is `{"value", "low", "high"}`: the figure and the 95 % bootstrap interval around it. Metrics are in
    0..1 (`m_tIoU`, `m_vIoU` of tubes, `mIoU` of spans, `IoU` of images, `AO` of tracks), drops in points of 1/100.

    Attributes:
        source: the bundle that was quantized: `name`, `fingerprint`, `precision` (of its graphs), `bytes`.
        recipe: `name`, `graphs` (graph → fields of its GraphRecipe), `kept` (graph → blocks left in float), `method`
            (how ranges were chosen: a name, or "least error"), `max_drop`, `max_changed`, `seed`.
        samples: by use, `calibration`, `select` and `evaluate` (null where not given), each `file`, `sha256`, `count`,
            `kinds` (task → count), `labelled`, and in their order `entries` (each `id`, `media`, `sha256`).
        warnings: sentences.
        machine: `processor`, `cores`, `flags` (CPU flags of vector arithmetic), `self_test` (the sentence of
            `saturation_test`), `system`, `python`.
        tools: package → version.
        target: `backend`, `version`, `variants` (graph → variant) that all was measured on.
        graphs: one a graph: `graph`, `precision`, `recipe`, `int8` (whether it was quantized), `why` (a sentence: what
            the gate found, or who asked), `bytes` and `seconds` (each `float` and `int8`; seconds are those of the
            recorded calls, side by side), `forced`, `blocks` (each `block`, `bytes`, `float_bytes`, `kept`).
        stages: seconds by stage of the same clips, `{"float": {stage: seconds}, "int8": {…}, "clips": n}`, `total` too.
        peak_bytes: memory at the peak, `{"float": …, "int8": …}`, of a process that did nothing else; null values.
        drift: one a boundary, worst of the recorded calls: `graph`, `tensor`, `cosine`, `max_abs`, `rel_l2`, `iou`.
        choice: what the automatic mode went by: `labelled`, `samples`, `judged_on` ("select" or "calibration"),
            `judgement` (see below) of what was chosen, `float`, the source's own.
        evaluation: as `choice`, on the clips that judge the result; null if none were given. A judgement is `label`,
            `samples`, `failed`, `labelled`, `metrics` and `drops` (name → interval), `answer_agreement` (share of
            samples), `box_iou` (mean IoU with the source's boxes where both have one), `tube_iou` (vIoU with the
            source's tubes), `seconds_median`.
        sensitivity: one a block, most sensitive first: `block`, `graph`, `proxy` (relative error of its products'
            outputs), `drop` (points that it costs alone in INT8; null: not confirmed), `changed` (share of tubes lost
            alone in INT8: 1 − vIoU with the source's; null), `kept`.
        trials: what the search tried, in order: `kept` (blocks in float), `drop`, `changed` (percent of answers),
            `within`.
        cases: the worst cases of `evaluation` (else of `choice`): `id`, `why`, `query`, `media`, `scores` (label →
            score), and `picture`, PNG bytes or None with `problem`.
        seconds: by stage of the calibration itself.
    """

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    samples: Mapping[str, Any]
    warnings: Sequence[str]
    machine: Mapping[str, Any]
    tools: Mapping[str, str]
    target: Mapping[str, Any]
    graphs: Sequence[Mapping[str, Any]]
    stages: Mapping[str, Any]
    drift: Sequence[Mapping[str, Any]]
    choice: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None
    sensitivity: Sequence[Mapping[str, Any]]
    trials: Sequence[Mapping[str, Any]]
    peak_bytes: Mapping[str, int | None] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the values by attribute, what `report.write_calibration_report` takes."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
