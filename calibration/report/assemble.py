"""Put together what the steps of a calibration found, as the plain values of its report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_stg.calibration.collect.samples import CalibrationSet
from bridge_stg.calibration.inputs import Inputs
from bridge_stg.calibration.judge.judge import Judgement, worst_cases
from bridge_stg.calibration.judge.saturation_test import SaturationTest
from bridge_stg.calibration.judge.speed_gate import Gate, graph_bytes
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.report.result import CalibrationResult
from bridge_stg.calibration.search.block_sizes import size_of_blocks
from bridge_stg.calibration.search.search import Choice
from bridge_stg.calibration.search.sensitivity import Sensitivity
from bridge_stg.calibration.search.trials import FLOAT, INTEGERS
from bridge_stg.evaluation.report.pictures import case_picture
from bridge_stg.runtime.backends.choose import choose
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.parity.compare import Boundary

PACKAGES = ("bridge-stg", "numpy", "onnx", "onnx-ir", "onnxruntime")
Pair = tuple[Judgement, Judgement]
"""In float and in INT8, on the same samples."""


@dataclass(frozen=True, eq=False)
class Findings:
    """What the steps found; see `CalibrationResult` for what becomes of it.

    Attributes:
        inputs: what was given.
        options: of the calibration, a dataclass.
        bundle: the quantized one.
        recipe: that it was made with.
        asked: the recipe that was asked for, before gates and choice.
        self_test: of the CPU's integer products.
        gates: by graph; those that were not asked to be quantized have none.
        drift: of the recorded calls.
        stages: seconds by stage.
        peaks: memory by label.
        ranked: the blocks.
        choice: which of them stay in float.
        tried: the trials of the search.
        judged: on the samples of the choice.
        evaluation: on those that judge the result.
        seconds: by step.
        engine: `backend`, `variant` and `threads`.
        warnings: sentences.
    """

    inputs: Inputs
    options: Any
    bundle: Bundle
    recipe: Recipe
    asked: Recipe
    self_test: SaturationTest
    gates: Mapping[str, Gate]
    drift: Sequence[Boundary]
    stages: Mapping[str, Any]
    peaks: Mapping[str, int | None]
    ranked: Sequence[Sensitivity]
    choice: Choice
    tried: Sequence[Mapping[str, Any]]
    judged: Pair
    evaluation: Pair | None
    seconds: Mapping[str, float]
    engine: Mapping[str, Any]
    warnings: Sequence[str]


def assemble(found: Findings) -> CalibrationResult:
    """Return the values of the report."""
    source, options, inputs = found.inputs.bundle, found.options, found.inputs
    target = choose(found.bundle, backend=found.engine["backend"], variant=found.engine["variant"])
    kept = {name: list(found.recipe.of(name).keep_float) for name in found.recipe.graphs}
    judged_on = inputs.evaluate if inputs.evaluate is not None else inputs.chosen_on
    machine = describe(*PACKAGES)
    return CalibrationResult(
        source={
            "name": source.path.resolve().name.lstrip("."),
            "fingerprint": source.manifest.fingerprint,
            "precision": {name: next(iter(v.values())).precision for name, v in source.manifest.graphs.items()},
            "bytes": sum(graph_bytes(source, name) for name in source.manifest.graphs),
        },
        recipe={
            "name": found.asked.name,
            "graphs": {name: dataclasses.asdict(chosen) for name, chosen in found.recipe.graphs.items()},
            "kept": {name: blocks for name, blocks in kept.items() if blocks},
            "method": options.method or "least error",
            "max_drop": options.max_drop,
            "max_changed": options.max_changed,
            "minimal": found.choice.minimal,
            "seed": options.seed,
        },
        samples={
            "calibration": inputs.calibration.to_dict(),
            "select": None if inputs.select is None else inputs.select.to_dict(),
            "evaluate": None if inputs.evaluate is None else inputs.evaluate.to_dict(),
        },
        warnings=list(dict.fromkeys(found.warnings)),
        tools=machine.pop("packages"),
        machine={"processor": machine.pop("cpu")} | machine | {"self_test": found.self_test.sentence},
        target={"backend": target.backend, "version": target.version, "variants": dict(target.variants)},
        graphs=[_graph(found, name) for name in found.bundle.manifest.graphs],
        stages=found.stages,
        peak_bytes=found.peaks,
        drift=drift_rows(found.drift),
        choice=_judged(found.judged) | {"judged_on": "calibration" if inputs.select is None else "select"},
        evaluation=None if found.evaluation is None else _judged(found.evaluation),
        sensitivity=[dataclasses.asdict(one) | {"kept": one.block in found.choice.kept} for one in found.ranked],
        trials=found.tried,
        cases=_cases(found.evaluation or found.judged, judged_on),
        seconds=found.seconds,
    )


def drift_rows(boundaries: Sequence[Boundary]) -> list[dict[str, Any]]:
    """Return the worst of each boundary over all recorded calls, by graph and tensor."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for boundary in boundaries:
        call, _, tensor = boundary.name.rpartition(".")
        graph = call.rpartition("/")[2].rpartition("_")[0]
        row = worst.setdefault(
            (graph, tensor),
            {"graph": graph, "tensor": tensor, "cosine": 1.0, "max_abs": 0.0, "rel_l2": 0.0, "iou": None},
        )
        row["cosine"] = min(row["cosine"], boundary.cosine)
        for figure in ("max_abs", "rel_l2"):
            row[figure] = max(row[figure], getattr(boundary, figure))
        if boundary.iou is not None:
            row["iou"] = boundary.iou if row["iou"] is None else min(row["iou"], boundary.iou)
    return list(worst.values())


def _graph(found: Findings, name: str) -> dict[str, Any]:
    """Return what the report says of one graph."""
    before, after = graph_bytes(found.inputs.bundle, name), graph_bytes(found.bundle, name)
    chosen, gate = found.recipe.of(name), found.gates.get(name)
    spec = next(iter(found.bundle.manifest.graphs[name].values()))
    if gate is not None and chosen.quantizes and not gate.open:  # measured again, and the machine is a noisy one
        why = f"{gate.finding}; it was faster when its gate was measured, so the two are close here"
    elif gate is not None:
        why = gate.why
    elif found.asked.of(name).quantizes:
        why = "nothing of it is left to quantize"
    else:
        why = "the recipe leaves it in float"
    sizes = size_of_blocks(found.bundle).blocks
    blocks = [
        {"block": block, "bytes": size.stored_bytes, "float_bytes": size.fp32_bytes, "kept": not size.quantized}
        for block, size in sizes.items()
        if size.graph == name
    ]
    return {
        "graph": name,
        "precision": spec.precision,
        "recipe": chosen.name,
        "int8": spec.precision.split()[0] in ("int8", "int4"),
        "why": why,
        "forced": gate is not None and gate.forced,
        "bytes": {"float": before, "int8": after},
        "seconds": None if gate is None else {"float": gate.float_seconds, "int8": gate.int8_seconds},
        "blocks": blocks,
    }


def _judged(pair: Pair) -> dict[str, Any]:
    before, after = pair
    return {
        "labelled": after.labelled,
        "samples": after.samples,
        "judgement": after.to_dict(),
        "float": before.to_dict(),
    }


def _cases(pair: Pair, samples: CalibrationSet) -> list[dict[str, Any]]:
    """Return the worst cases with their pictures, or with the reason why there is none."""
    before, after = pair
    by_id = {sample.id: sample for sample in samples.dataset.samples}
    cases = []
    for case in worst_cases(after, before):
        sample = by_id[case["id"]]
        rows = {FLOAT: before.rows[sample.id], INTEGERS: after.rows[sample.id]}
        try:
            picture, problem = case_picture(sample, rows), ""
        except Exception as error:  # a medium that cannot be read failed both bundles too
            picture, problem = None, str(error)
        cases.append(
            {**case, "query": sample.query, "media": sample.media_name, "picture": picture, "problem": problem}
        )
    return cases
