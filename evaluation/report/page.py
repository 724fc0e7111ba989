"""The report as one HTML page: no script, no network, readable on a phone. Knows nothing of benchmarks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from bridge_stg.evaluation.report.pictures import TRUE, colour_of

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e22; --grey: #686e78; --pale: #e2e5ea; --page: #fff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaee; --grey: #9aa1ac; --pale: #343a44; --page: #15171b; --card: #1e2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1100px; color: var(--ink); background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 4px; } h2 { font-size: 1.15rem; margin: 32px 0 8px; }
p { margin: 4px 0; } .note { color: var(--grey); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: 5px 8px; text-align: right; border-bottom: 1px solid var(--pale); }
td { white-space: nowrap; } th { vertical-align: bottom; overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
td small { color: var(--grey); display: block; line-height: 1.1; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; background: var(--card); border-radius: 8px; }
figcaption { font-size: .9rem; } h3 { font-size: 1rem; margin: 16px 0 8px; }
.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 12px; }
svg, img { display: block; width: 100%; height: auto; } img { border-radius: 4px; margin-top: 8px; max-width: 606px; }
svg text { fill: var(--grey); font-size: 12px; } svg line { stroke: var(--pale); }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .35em; }
.legend span { margin-right: 1em; white-space: nowrap; }
details { margin: 8px 0; } summary { cursor: pointer; } li { font-size: .9rem; }
"""
LISTED = 200


def html_page(values: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of a report: `values` as in report.json, `cases` with their pictures as PNG bytes."""
    labels = list(values["figures"])
    title = f"{values['benchmark']} · {values['split']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{values['samples']} samples; finished: {_counts(values['finished'])}.</p>",
        f"<p class=note>Annotations sha256 {values['annotations'][:16]}…</p>",
        *(_table(values, part) for part in _parts(values)),
        _charts(values),
        _cases(cases, labels),
        _missing(values),
        _failures(values),
    ]
    return (
        "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _parts(values: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(part for found in values["figures"].values() for part in found))


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{escape(label)} {count}" for label, count in counts.items())


def _table(values: Mapping[str, Any], part: str) -> str:
    """Return one part's figures: a row a metric, a column a model, beneath each figure its distance to the first's."""
    labels = list(values["figures"])
    found = {label: values["figures"][label].get(part, {}) for label in labels}
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    head = "".join(f"<th>{_key(colour_of(i))}{escape(label)}</th>" for i, label in enumerate(labels))
    rows = []
    for name in names:
        first = found[labels[0]].get(name)
        cells = "".join(_cell(found[label].get(name), first if i else None) for i, label in enumerate(labels))
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    return (
        f"<h2>{escape(part)}</h2><div class=wide><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, int):
        return f"<td>{value}</td>"
    change = "" if first is None or isinstance(first, int) else f"<small>{value - first:+.4f}</small>"
    return f"<td>{value:.4f}{change}</td>"


def _charts(values: Mapping[str, Any]) -> str:
    charts = []
    for i, (label, difference) in enumerate(values["differences"].items(), 1):
        if not difference["samples"]:
            continue
        caption = (
            f"<b>{escape(label)}</b> minus <b>{escape(difference['reference'])}</b>, sample by sample: "
            f"{difference['same']:.1%} of {difference['samples']} equal within 0.001, mean {difference['mean']:+.4f}, "
            f"from {difference['lowest']:+.3f} to {difference['highest']:+.3f}"
        )
        charts.append(_figure(histogram_svg(difference["histogram"], colour_of(i), signed=True), caption))
    for i, (label, histogram) in enumerate(values["scores"].items()):
        if sum(histogram["counts"]):
            caption = f"Scores of <b>{escape(label)}</b>"
            charts.append(_figure(histogram_svg(histogram, colour_of(i), signed=False), caption))
    if not charts:
        return ""
    note = "A sample's score is its vIoU (tube), the IoU of its span or box, or its average overlap (tracking)."
    return f"<h2>Differences and scores</h2><p class=note>{note}</p><div class=charts>{''.join(charts)}</div>"


def histogram_svg(histogram: Mapping[str, Any], colour: tuple[int, int, int], *, signed: bool) -> str:
    """Return a histogram as SVG. Heights are square roots of the counts, so that few outliers beside many show."""
    counts, edges = histogram["counts"], histogram["edges"]
    width, height, floor, top = 400, 170, 140, 18
    step, most = (width - 20) / len(counts), max(*counts, 1)
    bars = []
    for i, count in enumerate(counts):
        if count:
            tall = max(2.0, (floor - top) * (count / most) ** 0.5)
            bars.append(
                f'<rect x="{10 + i * step + 0.5:.2f}" y="{floor - tall:.2f}" width="{step - 1:.2f}" '
                f'height="{tall:.2f}" fill="rgb{colour}"><title>{edges[i]:+.3f} … {edges[i + 1]:+.3f}: {count}</title>'
                "</rect>"
            )
    marks = [(-1.0, "−1"), (-0.5, "−0.5"), (0.0, "0"), (0.5, "+0.5"), (1.0, "+1")] if signed else [
        (0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1")]  # fmt: skip
    places = [10 + (width - 20) * (at - edges[0]) / (edges[-1] - edges[0]) for at, _ in marks]
    ticks = "".join(
        f'<text x="{place:.1f}" y="{floor + 18}" text-anchor="middle">{name}</text>'
        for place, (_, name) in zip(places, marks)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role=img aria-label="histogram">{"".join(bars)}'
        f'<line x1="10" x2="{width - 10}" y1="{floor}" y2="{floor}"/>{ticks}'
        f'<text x="{width - 10}" y="12" text-anchor="end">highest bar: {most} samples (root scale)</text></svg>'
    )


def _figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _cases(cases: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> str:
    if not cases:
        return ""
    keys = f"<span>{_key(TRUE)}truth</span>" + "".join(
        f"<span>{_key(colour_of(i))}{escape(label)}</span>" for i, label in enumerate(labels)
    )
    parts = []
    for why in dict.fromkeys(case["why"] for case in cases):
        figures = "".join(_case(case) for case in cases if case["why"] == why)
        parts.append(f"<h3>{escape(why[:1].upper() + why[1:])}</h3><div class=cases>{figures}</div>")
    return f"<h2>Worst cases</h2><p class=legend>{keys}</p>{''.join(parts)}"


def _case(case: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{escape(label)} {_score(score)}" for label, score in case["scores"].items())
    errors = "".join(f"<br>{escape(label)} failed: {escape(text)}" for label, text in case["errors"].items())
    picture = f"<p class=note>No picture: {escape(case['problem'])}</p>"
    if case["picture"] is not None:
        data = base64.b64encode(case["picture"]).decode()
        picture = f'<img alt="frames with boxes, and a timeline" src="data:image/png;base64,{data}">'
    return (
        f"<figure><figcaption>“{escape(case['query'])}”<br><span class=note>{escape(case['media'])} · "
        f"{escape(case['id'])} · {scores}{errors}</span></figcaption>{picture}</figure>"
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _missing(values: Mapping[str, Any]) -> str:
    missing = values["missing"]
    if not missing:
        return ""
    head = f"{len(missing)} media were not found; {values['missing_samples']} samples are left out of every figure"
    return _listed("Missing media", head, [escape(name) for name in missing], "report.json")


def _failures(values: Mapping[str, Any]) -> str:
    found = [
        f"{escape(label)}: {escape(entry['id'])}: {escape(entry['error'])}"
        for label, entries in values["failed"].items()
        for entry in entries
    ]
    if not found:
        return ""
    return _listed("Failed samples", f"{len(found)} failures; each counts as a wrong answer", found, "report.json")


def _listed(title: str, head: str, lines: Sequence[str], where: str) -> str:
    more = f"<li>and {len(lines) - LISTED} more, in {where}" if len(lines) > LISTED else ""
    items = "".join(f"<li>{line}" for line in lines[:LISTED])
    return f"<h2>{title}</h2><details><summary>{head}</summary><ul>{items}{more}</ul></details>"


def _key(colour: tuple[int, int, int]) -> str:
    # The word joiner keeps the mark on the line of the name behind it.
    return f'<span class=key style="background:rgb{colour}"></span>&#8288;'
