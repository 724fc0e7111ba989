"""The report of a calibration as one HTML page: no script, no network, readable on a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bridge_stg.calibration.report.sensitivity_plot import KEPT, MARK, QUANTIZED, sensitivity_svg
from bridge_stg.evaluation.report.page import STYLE
from bridge_stg.evaluation.report.pictures import TRUE, colour_of

USES = {"calibration": "Calibrated on", "select": "Chosen on", "evaluate": "Judged on"}
PLOTTED, LISTED = 40, 200

EXTRA = """
.warning { border-left: 4px solid rgb(245,150,0); padding: 6px 12px; margin: 8px 0; background: var(--card); }
.long td, .long th { white-space: normal; text-align: left; min-width: 4em; } .long code { font-size: .85em; }
"""


def html_page(values: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the page: `values` as in calibration.json, `cases` with their pictures as PNG bytes."""
    title = f"Calibration of {values['source']['name']}: {values['recipe']['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _lead(values),
        *(f"<p class=warning>{escape(warning)}</p>" for warning in values["warnings"]),
        _metrics("Judged on clips that nothing was chosen by", values["evaluation"]),
        _metrics("What the choice went by", values["choice"]),
        _graphs(values),
        _stages(values),
        _drift(values["drift"]),
        _sensitivity(values),
        _trials(values["trials"]),
        _cases(cases),
        _samples(values["samples"]),
        _machine(values),
    ]
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{EXTRA}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _lead(values: Mapping[str, Any]) -> str:
    recipe = values["recipe"]
    kept = sum(len(blocks) for blocks in recipe["kept"].values())
    quantized = [graph["graph"] for graph in values["graphs"] if graph["int8"]]
    return (
        f"<p>In integers: {escape(', '.join(quantized) or 'nothing')}. Blocks that stay in float: {kept}. Ranges: "
        f"{escape(str(recipe['method']))}. A loss of {recipe['max_drop']} points was allowed.</p>"
        f"<p class=note>From a bundle with fingerprint {escape(str(values['source']['fingerprint'])[:16])}…</p>"
    )


def _metrics(title: str, part: Mapping[str, Any] | None) -> str:
    if not part:
        return ""
    judged, before = part["judgement"], part["float"] or {"metrics": {}}
    rows = []
    for name, interval in judged["metrics"].items():
        first, drop = before["metrics"].get(name), judged["drops"].get(name)
        rows.append(
            [escape(name), _interval(first, "{:.4f}"), _interval(interval, "{:.4f}"), _interval(drop, "{:+.2f}")]
        )
    for key, label in (("answer_agreement", "same answer"), ("box_iou", "box IoU with float"),
                       ("tube_iou", "tube IoU with float")):  # fmt: skip
        if judged.get(key) is not None:
            rows.append([label, "", f"{judged[key]:.4f}", ""])
    rows.append(["failed", str(before.get("failed", "–")), str(judged["failed"]), ""])
    truth = "annotations" if part["labelled"] else "the float bundle's own tubes (there were no labels)"
    note = f"{part['samples']} samples, against {truth}. Small: 95 % bootstrap interval over samples."
    return f"<h2>{title}</h2><p class=note>{escape(note)}</p>" + _table(["", "float", "INT8", "lost, points"], rows)


def _graphs(values: Mapping[str, Any]) -> str:
    rows = []
    for graph in values["graphs"]:
        blocks = graph["blocks"]
        stored = sum(block["bytes"] for block in blocks if not block["kept"])
        replaced = sum(block["float_bytes"] for block in blocks if not block["kept"])
        seconds = graph["seconds"] or {"float": None, "int8": None}
        rows.append(
            [
                escape(graph["graph"]),
                escape(graph["precision"]),
                _megabytes(graph["bytes"]["float"]),
                _megabytes(graph["bytes"]["int8"]),
                _ratio(graph["bytes"]["int8"], graph["bytes"]["float"]),
                _ratio(stored, replaced),
                _milliseconds(seconds["float"]),
                _milliseconds(seconds["int8"]),
                f"{sum(block['kept'] for block in blocks)} of {len(blocks)}",
            ]
        )
    head = ["graph", "precision", "float", "INT8", "INT8 / float", "quantized blocks alone", "float, ms", "INT8, ms",
            "blocks in float"]  # fmt: skip
    note = "Times are those of the same recorded calls, side by side in one run on the machine named below."
    why = "".join(f"<p><b>{escape(graph['graph'])}</b>: {escape(graph['why'])}.</p>" for graph in values["graphs"])
    return f"<h2>Graphs</h2><p class=note>{note}</p>" + _table(head, rows) + why


def _stages(values: Mapping[str, Any]) -> str:
    stages, peak = values["stages"], values["peak_bytes"]
    if not stages:
        return ""
    names = list(dict.fromkeys([*stages.get("float", {}), *stages.get("int8", {})]))
    rows = [
        [escape(name), *(_milliseconds(stages.get(kind, {}).get(name)) for kind in ("float", "int8")),
         _ratio(stages.get("int8", {}).get(name), stages.get("float", {}).get(name))]
        for name in names
    ]  # fmt: skip
    if any(peak.get(kind) for kind in ("float", "int8")):
        sizes = [_megabytes(peak.get(kind)) for kind in ("float", "int8")]
        rows.append(["memory at the peak", *sizes, _ratio(peak.get("int8"), peak.get("float"))])
    note = f"Of {stages['clips']} clips, end to end." if "clips" in stages else ""
    return f"<h2>Stages</h2><p class=note>{note}</p>" + _table(["", "float, ms", "INT8, ms", "INT8 / float"], rows)


def _drift(boundaries: Sequence[Mapping[str, Any]]) -> str:
    if not boundaries:
        return ""
    rows = [
        [escape(f"{b['graph']}: {b['tensor']}"), _number(b["cosine"], "{:.6f}"), _number(b["max_abs"], "{:.4g}"),
         _number(b["rel_l2"], "{:.2e}"), _number(b["iou"], "{:.4f}")]
        for b in boundaries
    ]  # fmt: skip
    note = "How far each graph's outputs are from float on the same inputs; the worst of the recorded calls."
    head = ["boundary", "cosine", "max error", "relative error", "least box IoU"]
    return f"<h2>Drift at the boundaries</h2><p class=note>{note}</p>" + _table(head, rows)


def _sensitivity(values: Mapping[str, Any]) -> str:
    blocks = values["sensitivity"]
    if not blocks:
        return ""
    legend = "".join(
        f'<span><span class=key style="background:{colour}"></span>&#8288;{name}</span>'
        for colour, name in (
            (QUANTIZED, "in INT8"),
            (KEPT, "stays in float"),
            (MARK, "points lost with it alone in INT8"),
        )
    )
    note = (
        f"Most sensitive first; {min(PLOTTED, len(blocks))} of {len(blocks)} blocks. Bars: relative error of the "
        "outputs of a block's products on recorded activations (logarithmic). Marks: the metric itself (linear)."
    )
    return (
        f"<h2>Sensitivity</h2><p class=note>{note}</p><p class=legend>{legend}</p>"
        f'<div class=wide><div style="min-width:680px">{sensitivity_svg(blocks[:PLOTTED])}</div></div>'
    )


def _trials(trials: Sequence[Mapping[str, Any]]) -> str:
    if not trials:
        return ""
    rows = [
        [str(place), escape(", ".join(trial["kept"]) or "none"), _number(trial["drop"], "{:+.2f}"),
         _number(trial["changed"], "{:.1f} %"), "yes" if trial["within"] else "no"]
        for place, trial in enumerate(trials, 1)
    ]  # fmt: skip
    head = ["trial", "blocks in float", "lost, points", "answers changed", "within the limit"]
    return "<h2>What was tried</h2>" + _table(head, rows, long=True)


def _cases(cases: Sequence[Mapping[str, Any]]) -> str:
    if not cases:
        return ""
    labels = list(cases[0]["scores"])
    keys = "".join(
        f'<span><span class=key style="background:rgb{colour}"></span>&#8288;{escape(name)}</span>'
        for colour, name in [(TRUE, "truth"), *((colour_of(i), label) for i, label in enumerate(labels))]
    )
    return f"<h2>Worst cases</h2><p class=legend>{keys}</p><div class=cases>{''.join(map(_case, cases))}</div>"


def _case(case: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{escape(label)} {_number(score, '{:.3f}')}" for label, score in case["scores"].items())
    picture = f"<p class=note>No picture: {escape(str(case.get('problem', '')))}</p>"
    if case.get("picture") is not None:
        data = base64.b64encode(case["picture"]).decode()
        picture = f'<img alt="frames with boxes, and a timeline" src="data:image/png;base64,{data}">'
    return (
        f"<figure><figcaption>“{escape(case['query'])}”: {escape(case['why'])}<br><span class=note>"
        f"{escape(case['media'])} · {escape(case['id'])} · {scores}</span></figcaption>{picture}</figure>"
    )


def _samples(samples: Mapping[str, Any]) -> str:
    parts = ["<h2>Samples</h2>"]
    for use, title in USES.items():
        found = samples.get(use)
        if not found:
            parts.append(f"<p>{title}: nothing.</p>")
            continue
        kinds = ", ".join(f"{count} {escape(kind)}" for kind, count in found["kinds"].items())
        labels = "with labels" if found["labelled"] else "without labels"
        entries = "".join(
            f"<tr><td>{place}</td><td>{escape(str(entry['id']))}</td><td>{escape(str(entry['media']))}</td>"
            f"<td><code>{escape(str(entry['sha256'])[:16])}…</code></td></tr>"
            for place, entry in enumerate(found["entries"][:LISTED], 1)
        )
        more = f"<p class=note>and {found['count'] - LISTED} more, in calibration.json</p>" if (
            len(found["entries"]) > LISTED) else ""  # fmt: skip
        parts.append(
            f"<p>{title} {found['count']} samples {labels} ({kinds}) of {escape(str(found['file']))} "
            f"<span class=note>sha256 {escape(str(found['sha256'])[:16])}…</span></p><details><summary>in this order"
            f"</summary><div class=wide><table class=long><tr><th><th>id<th>media<th>sha256</tr>{entries}</table></div>"
            f"{more}</details>"
        )
    return "".join(parts)


def _machine(values: Mapping[str, Any]) -> str:
    machine, target = values["machine"], values["target"]
    variants = ", ".join(f"{graph} {variant}" for graph, variant in target["variants"].items())
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores"],
        ["flags", ", ".join(machine["flags"]) or "none of those that matter for INT8"],
        ["INT8 self-test", machine.get("self_test") or "not made"],
        ["system", f"{machine['system']}, Python {machine['python']}"],
        ["engine", f"{target['backend']} {target['version']}: {variants}"],
        ["tools", ", ".join(f"{name} {version}" for name, version in values["tools"].items())],
        ["the calibration took", ", ".join(f"{name} {taken:.0f} s" for name, taken in values["seconds"].items())],
    ]
    return "<h2>Where this was measured</h2>" + _table([], [[key, escape(str(text))] for key, text in rows], long=True)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, long: bool = False) -> str:
    """Return a table of cells that are HTML already; the cells of a long one are sentences."""
    top = "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table{' class=long' if long else ''}>{top}<tbody>{body}</tbody></table></div>"


def _interval(interval: Mapping[str, float] | None, form: str) -> str:
    if interval is None:
        return "–"
    low, high = form.format(interval["low"]), form.format(interval["high"])
    return f"{form.format(interval['value'])}<small>{low} … {high}</small>"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _megabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:.2f} MB"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.1f}"


def _ratio(after: float | None, before: float | None) -> str:
    return "–" if not before or after is None else f"{after / before:.3f}"
