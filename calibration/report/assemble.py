"""Build the result of a calibration from what its steps measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.inputs import Inputs
from bridge_stg.calibration.options import Options
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.report.result import CalibrationResult
from bridge_stg.calibration.scoring.saturation_test import SaturationTest
from bridge_stg.calibration.scoring.scores import Scores, worst_cases
from bridge_stg.calibration.scoring.speed_gate import Gate, graph_bytes
from bridge_stg.calibration.search.block_sizes import size_of_blocks
from bridge_stg.calibration.search.search import Choice
from bridge_stg.calibration.search.sensitivity import Sensitivity
from bridge_stg.calibration.search.trials import FLOAT, QUANTIZED
from bridge_stg.evaluation.report.pictures import case_picture
from bridge_stg.export.graph.blocks import QUANTIZED_FORMS
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.parity.compare import Boundary, tolerance_of
from bridge_stg.runtime.parity.golden import read_case
from bridge_stg.runtime.parity.tolerances import MARGIN

PACKAGES = ("bridge-stg", "numpy", "onnx", "onnx-ir", "onnxruntime")
ScorePair = tuple[Scores, Scores]
"""Scores of the float and of the quantized bundle, on the same samples."""


def assemble(
    *,
    inputs: Inputs,
    options: Options,
    bundle: Bundle,
    recipe: Recipe,
    requested: Recipe,
    saturation: SaturationTest,
    gates: Mapping[str, Gate],
    drift: Sequence[Boundary],
    stages: Mapping[str, Any],
    peaks: Mapping[str, int | None],
    ranked: Sequence[Sensitivity],
    choice: Choice,
    tried: Sequence[Mapping[str, Any]],
    selected: ScorePair,
    evaluation: ScorePair | None,
    seconds: Mapping[str, float],
    session: Mapping[str, Any],
    warnings: Sequence[str],
) -> CalibrationResult:
    """Return the result of a calibration from its inputs and from what its steps returned, in their order."""
    source, machine = inputs.bundle, describe(*PACKAGES)
    backend = choose(bundle, backend=session["backend"], variant=session["variant"])
    kept = {name: list(chosen.keep_float) for name, chosen in recipe.graphs.items() if chosen.keep_float}
    return CalibrationResult(
        source={
            "name": source.path.resolve().name.lstrip("."),
            "fingerprint": source.manifest.fingerprint,
            "precision": {name: next(iter(v.values())).precision for name, v in source.manifest.graphs.items()},
            "bytes": sum(graph_bytes(source, name) for name in source.manifest.graphs),
        },
        recipe={
            "name": requested.name,
            "graphs": {name: dataclasses.asdict(chosen) for name, chosen in recipe.graphs.items()},
            "kept": kept,
            "method": options.method or "least error",
            "max_drop": options.max_drop,
            "max_changed": options.max_changed,
            "minimal": choice.minimal,
            "seed": options.seed,
        },
        samples={
            "calibration": inputs.calibration.to_dict(),
            "select": None if inputs.select is None else inputs.select.to_dict(),
            "evaluate": None if inputs.evaluate is None else inputs.evaluate.to_dict(),
        },
        warnings=list(dict.fromkeys([*warnings, *drift_warnings(bundle)])),
        tools=machine.pop("packages"),
        machine={"processor": machine.pop("cpu")} | machine | {"self_test": saturation.sentence},
        target={"backend": backend.backend, "version": backend.version, "variants": dict(backend.variants)},
        graphs=_graph_rows(inputs, bundle, recipe, requested, gates),
        stages=stages,
        peak_bytes=peaks,
        drift=drift_rows(drift),
        choice=_score_values(selected) | {"judged_on": "calibration" if inputs.select is None else "select"},
        evaluation=None if evaluation is None else _score_values(evaluation),
        sensitivity=[dataclasses.asdict(one) | {"kept": one.block in choice.kept} for one in ranked],
        trials=tried,
        cases=_case_rows(evaluation or selected, inputs.evaluate or inputs.selection),
        seconds=seconds,
    )


def drift_rows(boundaries: Sequence[Boundary]) -> list[dict[str, Any]]:
    """Return the worst differences over all recorded calls, one row per graph and tensor."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for boundary in boundaries:
        call, _, tensor = boundary.name.rpartition(".")
        graph = call.rpartition("/")[2].rpartition("_")[0]
        new = {"graph": graph, "tensor": tensor, "cosine": 1.0, "max_abs": 0.0, "rel_l2": 0.0, "iou": None}
        row = worst.setdefault((graph, tensor), new)
        row["cosine"] = min(row["cosine"], boundary.cosine)
        for name in ("max_abs", "rel_l2"):
            row[name] = max(row[name], getattr(boundary, name))
        if boundary.iou is not None:
            row["iou"] = boundary.iou if row["iou"] is None else min(row["iou"], boundary.iou)
    return list(worst.values())


def drift_warnings(bundle: Bundle) -> list[str]:
    """Return a warning for each quantized graph that differs from its golden cases more than its precision should."""
    worst: dict[str, float] = {}
    for case in map(read_case, bundle.golden_cases()):
        for key, tolerance in case.about.tolerance.items():
            name, _, tensor = key.partition(".")
            variants = bundle.manifest.graphs.get(name)  # None: the key is a tensor alone, of float graphs
            usual = tolerance_of(next(iter(variants.values())).precision, tensor) if variants else None
            if usual is not None and tolerance.rel_l2 > MARGIN * usual.rel_l2:
                worst[name] = max(worst.get(name, 0.0), tolerance.rel_l2 / MARGIN)
    return [
        f"the quantized {name} differs from torch on the golden cases by up to {error:.2g} of an output's norm, which "
        "is unusual: blank, few or uniform samples do not show the range of its activations"
        for name, error in worst.items()
    ]


def _graph_rows(
    inputs: Inputs, bundle: Bundle, recipe: Recipe, requested: Recipe, gates: Mapping[str, Gate]
) -> list[dict[str, Any]]:
    sizes = size_of_blocks(bundle)
    rows = []
    for name, variants in bundle.manifest.graphs.items():
        gate, precision = gates.get(name), next(iter(variants.values())).precision
        if gate is not None and recipe.of(name).quantizes and not gate.open:  # two measurements of a noisy machine
            why = f"{gate.sentence}; it was faster when its gate was measured, so the difference is within noise"
        elif gate is not None:
            why = gate.why
        else:
            left = requested.of(name).quantizes
            why = "none of its blocks is left to quantize" if left else "the recipe leaves it in float"
        rows.append(
            {
                "graph": name,
                "precision": precision,
                "recipe": recipe.of(name).name,
                "int8": precision.split()[0] in QUANTIZED_FORMS,
                "why": why,
                "forced": gate is not None and gate.forced,
                "bytes": {"float": graph_bytes(inputs.bundle, name), "int8": graph_bytes(bundle, name)},
                "seconds": None if gate is None else {"float": gate.float_seconds, "int8": gate.int8_seconds},
                "blocks": [
                    {"block": block, "bytes": size.stored_bytes, "float_bytes": size.fp32_bytes,
                     "kept": not size.quantized}
                    for block, size in sizes.items()
                    if size.graph == name
                ],
            }
        )  # fmt: skip
    return rows


def _score_values(pair: ScorePair) -> dict[str, Any]:
    before, after = (scores.to_dict() for scores in pair)
    return {"labelled": after["labelled"], "samples": after["samples"], "judgement": after, "float": before}


def _case_rows(pair: ScorePair, samples: CalibrationSet) -> list[dict[str, Any]]:
    """Return the worst cases with their pictures, or with the reason why they have none."""
    before, after = pair
    by_id = {sample.id: sample for sample in samples.dataset.samples}
    cases = []
    for case in worst_cases(after, before):
        sample = by_id[case["id"]]
        picture, problem = None, ""
        try:
            picture = case_picture(sample, {FLOAT: before.rows[sample.id], QUANTIZED: after.rows[sample.id]})
        except BridgeError as error:  # a video that cannot be read failed in both bundles too
            problem = str(error)
        about = {"query": sample.query, "media": sample.media_name, "picture": picture, "problem": problem}
        cases.append({**case, **about})
    return cases
