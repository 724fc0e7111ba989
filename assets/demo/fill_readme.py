"""Write the figures of assets/demo/figures.json into README.md, between its markers.

Usage: python assets/demo/fill_readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FIGURES, README = Path("assets/demo/figures.json"), Path("README.md")


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
        row("name and colour, span as answered (presence moves no end)", figures["span_as_answered"]),
        *(row(f"control: {name}", scores) for name, scores in figures["controls"].items()),
        "",
        f"Absent targets: AUROC {figures['absent_auroc']:.3f}; `none` is answered for "
        f"{figures['absent_recognized']:.0%} of what is not there and {1 - figures['present_found']:.0%} of what is. "
        f"Asked for the other thing, the tube overlaps the first one's by {figures['swapped_query_vIoU']:.3f}. "
        f"The two passes compute {figures['visual_tokens_ratio']:.0%} of the visual tokens of a dense fine pass.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the markers."""
    text = README.read_text(encoding="utf-8")
    filled = f"<!-- figures:begin -->\n{table(json.loads(FIGURES.read_text(encoding='utf-8')))}\n<!-- figures:end -->"
    pattern = re.compile("<!-- figures:begin -->.*<!-- figures:end -->", re.S)
    README.write_text(pattern.sub(lambda _: filled, text), encoding="utf-8")


if __name__ == "__main__":
    main()
