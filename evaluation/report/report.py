"""Write report.json and report.html from the result rows of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.report.pictures import TRUE, case_picture, colour_of
from bridge_stg.evaluation.report.render import number, render
from bridge_stg.evaluation.run.evaluate import Evaluation
from bridge_stg.evaluation.samples import Sample
from bridge_stg.evaluation.scoring import MAIN
from bridge_stg.runtime.bundle.reports import SCHEMA
from bridge_stg.runtime.host.files import replacing

SAME = 1e-3
"""Samples whose scores differ by at most this count as equal."""
BINS = 20
WORST = 6
"""Cases to show for each model."""


def write_report(evaluation: Evaluation, out: Path) -> dict[str, Any]:
    """Write report.json and report.html, each completely or not at all, and return the content of the former."""
    values = report_values(evaluation)
    samples, cases = {sample.id: sample for sample in evaluation.found}, []
    for case in values["worst"]:
        found = {label: rows[case["id"]] for label, rows in evaluation.rows.items() if case["id"] in rows}
        cases.append(case_values(samples[case["id"]], found, case))
    colours = {label: f"rgb{colour_of(place)}" for place, label in enumerate(values["figures"])}
    texts = {
        "report.json": json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.html": render(
            "evaluation/report/page.html.j2", values=values, cases=cases, colours=colours, truth_colour=f"rgb{TRUE}"
        ),
    }
    for name, text in texts.items():
        with replacing(out / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return values


def report_values(evaluation: Evaluation) -> dict[str, Any]:
    """Return the report as plain values; a metric without samples, such as AUROC without absent targets, is None."""
    rows = evaluation.rows
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": evaluation.dataset.name,
        "split": evaluation.dataset.split,
        "annotations": evaluation.dataset.annotations,
        "models": evaluation.models,
        "samples": len(evaluation.found) + len(evaluation.missing),
        "missing": sorted({sample.media_name for sample in evaluation.missing}),
        "missing_samples": len(evaluation.missing),
        "finished": {label: len(found) for label, found in rows.items()},
        "figures": evaluation.metrics,
        "differences": {label: _differences(rows, label) for label in list(rows)[1:]},
        "scores": {label: _histogram(_main_scores(found), 0.0, 1.0) for label, found in rows.items()},
        "failed": {
            label: [{"id": name, "error": row["error"]} for name, row in found.items() if "error" in row]
            for label, found in rows.items()
        },
        "seconds_median": {
            label: float(np.median([row["seconds"] for row in found.values()])) if found else None
            for label, found in rows.items()
        },
        "worst": _worst(rows),
    }
    return {name: json_values(value) for name, value in values.items()}


def table_text(values: Mapping[str, Any]) -> str:
    """Return the metrics as plain text: one block per part, one line per metric, one column per model."""
    lines: list[str] = []
    labels = list(values["figures"])
    parts = list(dict.fromkeys(part for label in labels for part in values["figures"][label]))
    width = max([12, *map(len, labels)])
    for part in parts:
        lines.append(f"{part:24}" + "".join(f"  {label:>{width}}" for label in labels))
        names = dict.fromkeys(name for label in labels for name in values["figures"][label].get(part, {}))
        for name in names:
            found = (values["figures"][label].get(part, {}).get(name) for label in labels)
            cells = (number(value, "" if isinstance(value, int) else ".4f") for value in found)
            lines.append(f"  {name:22}" + "".join(f"  {cell:>{width}}" for cell in cells))
    if values["missing"]:
        lines.append(f"{len(values['missing'])} media were not found ({values['missing_samples']} samples left out)")
    return "\n".join(lines)


def _main_scores(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the score by which samples are compared, by id; samples without ground truth are omitted."""
    found = {name: row["scores"].get(MAIN[row["task"]]) for name, row in rows.items()}
    return {name: score for name, score in found.items() if score is not None}


def _differences(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], label: str) -> dict[str, Any]:
    """Compare a model with the first one, sample by sample: its main score minus the first model's."""
    reference = next(iter(rows))
    first, second = _main_scores(rows[reference]), _main_scores(rows[label])
    change = {name: second[name] - first[name] for name in first if name in second}
    values = np.asarray(list(change.values()))
    return {
        "reference": reference,
        "samples": len(values),
        "same": float((np.abs(values) <= SAME).mean()) if len(values) else None,
        "mean": float(values.mean()) if len(values) else None,
        "mean_absolute": float(np.abs(values).mean()) if len(values) else None,
        "lowest": float(values.min()) if len(values) else None,
        "highest": float(values.max()) if len(values) else None,
        "histogram": _histogram(change, -1.0, 1.0),
    }


def _histogram(scores: Mapping[str, float], low: float, high: float) -> dict[str, Any]:
    bins = BINS if low == 0 else 2 * BINS + 1  # an odd number, so that "no difference" is one bin
    counts, edges = np.histogram(np.clip(list(scores.values()), low, high), bins=bins, range=(low, high))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}


def _worst(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Choose the lowest scores of the first model, then each other model's largest drops from it."""
    labels = list(rows)
    scores = {label: _main_scores(found) for label, found in rows.items()}
    first = scores[labels[0]] if labels else {}
    cases: dict[str, str] = {}
    for name in sorted(first, key=lambda name: (first[name], rows[labels[0]][name]["index"]))[:WORST]:
        cases[name] = f"lowest scores of {labels[0]}"
    for label in labels[1:]:
        loss = {name: first[name] - score for name, score in scores[label].items() if name in first}
        for name in sorted(loss, key=lambda name: -loss[name])[:WORST]:
            if loss[name] > SAME:
                cases.setdefault(name, f"largest losses of {label} against {labels[0]}")
    return [
        {"id": name, "why": why, "scores": {label: scores[label].get(name) for label in labels}}
        for name, why in cases.items()
    ]


def case_values(sample: Sample, rows: Mapping[str, Mapping[str, Any]], case: Mapping[str, Any]) -> dict[str, Any]:
    """Return a case for the page: the sample, its picture with the rows by model as PNG bytes, or why it has none."""
    try:
        picture, problem = case_picture(sample, rows), ""
    except Exception as error:  # noqa: BLE001 - what cannot be read failed the models too, and the report shows it
        picture, problem = None, str(error)
    errors = {label: row["error"] for label, row in rows.items() if "error" in row}
    return {**case, "id": sample.id, "query": sample.query, "media": sample.media_name, "group": sample.group,
            "task": sample.task, "picture": picture, "problem": problem, "errors": errors}  # fmt: skip


def json_values(value: Any) -> Any:
    """Return a value with None for NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_values(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [json_values(part) for part in value]
    return value
