"""The sensitivity of blocks as SVG: the cheap proxy of each as a bar, what the metric confirmed as a mark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

KEPT, QUANTIZED, MARK = "rgb(255,45,190)", "rgb(40,150,240)", "rgb(245,150,0)"
LEFT, WIDTH, ROW, TOP, RIGHT = 330, 900, 20, 26, 90
DECADES = 4
"""The axis is logarithmic: blocks differ by orders of magnitude, and the smallest need no bar."""


def sensitivity_svg(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a block, in the order given. Bars: proxy, logarithmic; marks: points lost alone in INT8, linear."""
    proxies = [block["proxy"] for block in blocks if block["proxy"]]
    top = math.ceil(math.log10(max(proxies, default=1.0)))
    most = max([abs(block["drop"]) for block in blocks if block["drop"] is not None], default=0.0) or 1.0
    height = TOP + ROW * len(blocks) + 8
    room = WIDTH - LEFT - RIGHT
    parts = []
    for decade in range(DECADES + 1):
        x = LEFT + room * decade / DECADES
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{height - 6}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="14" text-anchor="middle">{_percent(10.0 ** (top - DECADES + decade))}</text>'
        )
    for place, block in enumerate(blocks):
        y = TOP + ROW * place
        colour = KEPT if block["kept"] else QUANTIZED
        length = _length(block["proxy"], top) * room
        title = escape(_said(block))
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(block["block"])}</text>'
            f'<rect x="{LEFT}" y="{y + 3}" width="{max(length, 1):.1f}" height="{ROW - 7}" fill="{colour}">'
            f"<title>{title}</title></rect>"
        )
        if block["drop"] is not None:
            x = LEFT + room * max(block["drop"], 0.0) / most
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y + ROW / 2 - 0.5}" r="4.5" fill="{MARK}" stroke="#fff">'
                f"<title>{title}</title></circle>"
                f'<text x="{WIDTH - RIGHT + 10}" y="{y + 13}">{block["drop"]:+.2f} pts</text>'
            )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="sensitivity of blocks">{"".join(parts)}</svg>'


def _length(proxy: float | None, top: int) -> float:
    return 0.0 if not proxy else min(max((math.log10(proxy) - top + DECADES) / DECADES, 0.0), 1.0)


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _said(block: Mapping[str, Any]) -> str:
    proxy = "not estimated" if block["proxy"] is None else f"output error {block['proxy']:.2%}"
    confirmed = "" if block["drop"] is None else f", alone in INT8 it costs {block['drop']:+.2f} points"
    return f"{block['block']}: {proxy}{confirmed}, {'float' if block['kept'] else 'INT8'}"
