"""The result of a calibration as plain values, from which the report is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CalibrationResult:
    """Everything that a calibration measured and decided. All but `cases` are JSON values; null is "not measured".

    An interval is `{"value", "low", "high"}`: the value and its 95 % bootstrap interval. Metrics are in 0..1 (`m_tIoU`,
    `m_vIoU` of tubes, `mIoU` of spans, `IoU` of images, `AO` of tracks), drops in points of 1/100.

    Attributes:
        source: the float bundle: `name`, `fingerprint`, `precision` (graph → precision), `bytes`.
        recipe: `name`, `graphs` (graph → fields of its GraphRecipe), `kept` (graph → blocks left in float), `method`
            (how ranges were chosen: a name, or "least error"), `max_drop`, `max_changed`, `minimal`, `seed`.
        samples: by use, `calibration`, `select` and `evaluate` (null where not given), each `file`, `sha256`, `count`,
            `kinds` (task → count), `labelled`, and in their order `entries` (each `id`, `kind`, `media`, `sha256`).
        warnings: sentences.
        machine: `processor`, `cores`, `flags` (CPU flags of vector arithmetic), `self_test` (the sentence of
            `saturation_test`), `system`, `python`.
        tools: package → version.
        target: `backend`, `version`, `variants` (graph → variant) of all measurements.
        graphs: one entry per graph: `graph`, `precision`, `recipe`, `int8` (whether it is quantized), `why` (a sentence
            with the measurement of its gate, or with the reason), `bytes` and `seconds` (each `float` and `int8`;
            seconds of the recorded calls, side by side), `forced`, `blocks` (each `block`, `bytes`, `float_bytes`,
            `kept`).
        stages: seconds by stage of the same clips, `{"float": {stage: seconds}, "int8": {…}, "clips": n}`, `total` too.
        peak_bytes: peak memory `{"float": …, "int8": …}` of a subprocess that did nothing else; null without one.
        drift: one entry per boundary, the worst of the recorded calls: `graph`, `tensor`, `cosine`, `max_abs`,
            `rel_l2`, `iou`.
        choice: scores on the selection samples: `labelled`, `samples`, `judged_on` ("select" or "calibration"),
            `judgement` (scores of the quantized bundle, see below), `float` (scores of the float bundle).
        evaluation: as `choice`, on the evaluation samples; null if none were given. Scores are `label`, `samples`,
            `failed`, `labelled`, `metrics` and `drops` (name → interval), `answer_agreement` (share of samples),
            `box_iou` (mean IoU with the float bundle's boxes where both have one), `tube_iou` (vIoU with the float
            bundle's tubes), `seconds_median`.
        sensitivity: one entry per block, most sensitive first: `block`, `graph`, `proxy` (relative error of its
            matmuls' outputs), `drop` (points lost with it alone quantized; null: not measured), `changed` (share of
            tubes lost with it alone quantized: 1 − vIoU with the float bundle's; null), `kept`.
        trials: trials of the search, in order: `kept` (blocks in float), `drop`, `changed` (percent of answers),
            `within`.
        cases: the worst cases of `evaluation` (else of `choice`): `id`, `why`, `query`, `media`, `scores` (label →
            score), and `picture`, PNG bytes or None with `problem`.
        seconds: seconds by step of the calibration itself.
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
        """Return the values by attribute, for `report.write_calibration_report`."""
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}
