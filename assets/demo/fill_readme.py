"""Write the figures of assets/demo/figures.json and tasks.json into README.md, between its markers.

Those of text_figures.json, if it exists, go into docs/text_heads.md.

Usage: python assets/demo/fill_readme.py [REPORTS]

REPORTS, if given, contains one output folder of `python cli.py evaluate jsonl` per task, named after the task, with the
checkpoint as first and the bundle as second model; tasks.json is made from it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

FIGURES, TASKS, README = Path("assets/demo/figures.json"), Path("assets/demo/tasks.json"), Path("README.md")
TEXT_FIGURES, TEXT_HEADS = Path("assets/demo/text_figures.json"), Path("docs/text_heads.md")
NAMES = {
    "tube": "when and where (`tube`)",
    "span": "only when (`span`)",
    "image": "a box in an image (`image`)",
    "track": "from a first box, without a query (`track`)",
}


def row(name: str, scores: dict[str, Any]) -> str:
    """Return one line of the table."""
    if not scores:
        return f"| {name} | – | – | – | – | 0 |"
    values = " | ".join(f"{scores[key]:.3f}" for key in ("m_tIoU", "m_vIoU", "vIoU@0.3", "vIoU@0.5"))
    return f"| {name} | {values} | {scores['clips']} |"


def table(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| queries | m_tIoU | m_vIoU | vIoU@0.3 | vIoU@0.5 | clips |",
        "|---|---|---|---|---|---|",
        row("**by name and colour**", figures["named"]),
        row("**decided by motion only**", figures["motion"]),
        row("name and colour, span margin 0", figures["margin_0"]),
        row("name and colour, span as answered (not adjusted by presence)", figures["span_as_answered"]),
        *(row(f"control: {name}", scores) for name, scores in figures["controls"].items()),
        "",
        f"Absent targets: AUROC {figures['absent_auroc']:.3f}; the answer is `none` for "
        f"{figures['absent_recognized']:.0%} of absent and {1 - figures['present_found']:.0%} of present targets. "
        f"With the query of another object, the tube's vIoU with the first object is "
        f"{figures['swapped_query_vIoU']:.3f}. "
        f"The two passes compute {figures['visual_tokens_ratio']:.0%} of the visual tokens of a dense fine pass.",
    ]
    return "\n".join(lines)


def collect(reports: Path) -> dict[str, Any]:
    """Return each task's sample counts, figures of checkpoint and bundle, and the largest difference between them."""
    tasks = {}
    for task in NAMES:
        report = json.loads((reports / task / "report.json").read_text(encoding="utf-8"))
        checkpoint, bundle = (report["figures"][model][task] for model in report["models"])
        counts = ("samples", "failed")
        tasks[task] = {
            **{name: checkpoint[name] for name in counts},
            "checkpoint": {k: round(v, 4) for k, v in checkpoint.items() if k not in counts},
            "bundle": {k: round(v, 4) for k, v in bundle.items() if k not in counts},
            "largest_difference": max(abs(bundle[k] - v) for k, v in checkpoint.items() if k not in counts),
        }
    return tasks


def tasks_table(tasks: dict[str, Any]) -> str:
    """Return the figures of the four tasks as Markdown."""
    lines = ["| task | figures of the fp32 bundle | samples | largest difference to eager torch |", "|---|---|---|---|"]
    for task, found in tasks.items():
        figures = ", ".join(f"{name} {value:.3f}" for name, value in found["bundle"].items())
        lines.append(f"| {NAMES[task]} | {figures} | {found['samples']} | {found['largest_difference']:.1e} |")
    return "\n".join(lines)


def text_table(figures: dict[str, Any]) -> str:
    """Return the figures of both heads, by the length of tubes, as Markdown."""
    lines = [
        "| tubes | heads | m_tIoU | m_vIoU | calls of the language model | answer tokens | seconds | clips |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in next(iter(figures["tubes"].values())):
        for way, by_length in figures["tubes"].items():
            found = by_length[length]
            tokens = f"{found['tokens']:.0f}" if found["tokens"] else "–"
            scores = f"{found['m_tIoU']:.3f} | {found['m_vIoU']:.3f} | {found['calls']:.1f} | {tokens}"
            lines.append(f"| {length} | {way} | {scores} | {found['seconds']:.2f} | {found['clips']} |")
    image = figures["image"]
    lines += [
        "",
        f"A box in an image (`image`, {image['images']} images): Acc@0.5 {image['Acc@0.5']:.3f}, mean IoU "
        f"{image['mean_IoU']:.3f}. Absent targets: AUROC {figures['absent_auroc']:.3f}; the "
        f"answer is an empty list for {figures['absent_recognized']:.0%} of absent and "
        f"{1 - figures['present_found']:.0%} of present targets.",
    ]
    return "\n".join(lines)


def fill(text: str, marker: str, content: str) -> str:
    """Return the text with `content` between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    pattern = re.compile(f"<!-- {marker}:begin -->.*<!-- {marker}:end -->", re.S)
    return pattern.sub(lambda _: f"<!-- {marker}:begin -->\n{content}\n<!-- {marker}:end -->", text)


def main() -> None:
    """Update README.md between the markers."""
    if len(sys.argv) > 1:
        TASKS.write_text(json.dumps(collect(Path(sys.argv[1])), indent=2) + "\n", encoding="utf-8")
    text = fill(README.read_text(encoding="utf-8"), "figures", table(json.loads(FIGURES.read_text(encoding="utf-8"))))
    if TEXT_FIGURES.exists():
        content = text_table(json.loads(TEXT_FIGURES.read_text(encoding="utf-8")))
        TEXT_HEADS.write_text(fill(TEXT_HEADS.read_text(encoding="utf-8"), "figures", content), encoding="utf-8")
    README.write_text(fill(text, "tasks", tasks_table(json.loads(TASKS.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main()
