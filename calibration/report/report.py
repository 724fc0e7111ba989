"""The report of a calibration in its bundle: reports/calibration.json and calibration.html; and as text."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_stg.evaluation.report.pictures import TRUE, colour_of
from bridge_stg.evaluation.report.render import render
from bridge_stg.evaluation.report.report import json_values
from bridge_stg.runtime.bundle.reports import write_report

NAME = "calibration"
LISTED, PLOTTED = 8, 40
"""Blocks that the table of the terminal lists, and that the plot of the page shows."""

DECADES = 4
"""Range of the plot's logarithmic axis; the smallest errors need no bar."""


def write_calibration_report(bundle_path: str | os.PathLike[str], values: Mapping[str, Any]) -> Path:
    """Write the values of `CalibrationResult.to_dict` into a bundle, each file atomically. Return the JSON file."""
    return write_report(bundle_path, NAME, report_values(values), html_page(values))


def html_page(values: Mapping[str, Any]) -> str:
    """Return the page of the values of `CalibrationResult.to_dict`."""
    plain, cases = report_values(values), values["cases"]
    labels = cases[0]["scores"] if cases else ()
    colours = [("truth", TRUE), *((label, colour_of(place)) for place, label in enumerate(labels))]
    return render(
        "calibration/report/page.html.j2", values=plain, cases=cases,
        plot=_sensitivity_plot(plain["sensitivity"][:PLOTTED]),
        colours=[(label, f"rgb{colour}") for label, colour in colours],
    )  # fmt: skip


def _sensitivity_plot(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the labels of the axis, and the blocks with the lengths of `bar` (error) and `mark` (loss) in 0..1."""
    top = math.ceil(math.log10(max([block["proxy"] for block in blocks if block["proxy"]], default=1.0)))
    most = max([abs(block["drop"]) for block in blocks if block["drop"] is not None], default=0.0) or 1.0
    rows = []
    for block in blocks:
        bar = (math.log10(block["proxy"]) - top + DECADES) / DECADES if block["proxy"] else 0.0
        rows.append({**block, "bar": min(max(bar, 0.0), 1.0), "mark": max(block["drop"] or 0.0, 0.0) / most})
    return {"ticks": [f"{100 * 10.0 ** (top - place):g} %" for place in range(DECADES, -1, -1)], "rows": rows}


def report_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as JSON has them: no pictures, no NaN."""
    cases = [{name: part for name, part in case.items() if name != "picture"} for case in values["cases"]]
    plain: dict[str, Any] = json_values({**values, "cases": cases})
    return plain


def table_text(values: Mapping[str, Any]) -> str:
    """Return the result as plain text: warnings, graphs, metrics, and the blocks that stay in float."""
    lines = [f"warning: {warning}" for warning in values["warnings"]]
    lines += ["", f"{'graph':18}{'precision':>18}{'MB':>16}{'ms':>20}"]
    for graph in values["graphs"]:
        sizes = pair(graph["bytes"], 1e-6, "{:.2f}")
        times = pair(graph["seconds"], 1e3, "{:.1f}")
        lines.append(f"{graph['graph']:18}{graph['precision']:>18}{sizes:>16}{times:>20}")
        if not graph["int8"]:
            lines.append(f"    in float: {graph['why']}")
    for name, part in (("selected on", values["choice"]), ("evaluated on", values["evaluation"])):
        if part:
            lines += ["", *score_lines(name, part)]
    kept = [block["block"] for block in values["sensitivity"] if block["kept"]]
    most = ", ".join(kept[:LISTED]) + (f" and {len(kept) - LISTED} more" if len(kept) > LISTED else "")
    lines += ["", f"blocks that stay in float: {most or 'none'}"]
    return "\n".join(lines)


def score_lines(name: str, part: Mapping[str, Any]) -> list[str]:
    """Return the lines of one set of scores: metrics in float and INT8, losses, agreement of the answers."""
    after, before = part["judgement"], part["float"]
    truth = "labels" if part["labelled"] else "the float bundle's own tubes"
    lines = [f"{name} {part['samples']} samples, against {truth}:"]
    for metric, interval in after["metrics"].items():
        drop = after["drops"].get(metric)
        lost = f"  loses {drop['value']:+.2f} points ({drop['low']:+.2f} … {drop['high']:+.2f})" if drop else ""
        first = before["metrics"].get(metric) if before else None
        float_value = f"{first['value']:.4f} → " if first else ""
        lines.append(f"  {metric:8} {float_value}{interval['value']:.4f}{lost}")
    shares = [("answers agree", after.get("answer_agreement")), ("box IoU", after.get("box_iou")),
             ("tube IoU", after.get("tube_iou"))]  # fmt: skip
    lines.append("  " + ", ".join(f"{label} {value:.4f}" for label, value in shares if value is not None))
    return lines


def pair(values: Mapping[str, Any] | None, factor: float, form: str) -> str:
    """Return a pair of numbers as `float → int8`, with a dash for a number that was not measured."""
    found = values or {}
    return " → ".join(
        "–" if found.get(name) is None else form.format(factor * found[name]) for name in ("float", "int8")
    )
