"""Make the result file, tables and plots from the same figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from speed.measure import median
from speed.results.growth import AXES, UNITS, summary
from speed.results.ratios import MEANINGS, PEER_MEANING, Limits, chain_overhead, met, share_of_limit

STAGES_PLOT, GROWTH_PLOT = "speed_stages.svg", "speed_growth.svg"
MARKS = ("<!-- speed: begin -->", "<!-- speed: end -->")
ALL_ROWS = "all rows: "
"""Begins the reason of a runner without any figure."""
PLOTTED = ("vision", "prefill", "prefill_text", "decode", "end_to_end")
TITLES = {
    "vision": "vision, s", "prefill": "prefill, s", "prefill_text": "prefill of text, s",
    "first_token": "first token, s", "decode": "decode, tokens/s", "bridge": "bridging step, ms",
    "spatial": "spatial decoder, s", "end_to_end": "end to end, s", "peak": "peak memory", "load": "load, s",
}  # fmt: skip


def flat_rows(
    rows: Mapping[str, Any], runners: Mapping[str, Any], facts: Mapping[str, Any], limits: Limits
) -> list[Any]:
    """Return one object per measured row.

    Args:
        rows: measured figures by key and row.
        runners: each runner's answer to `load` by key.
        facts: model/frames → the backbone's `vision_config` and `text_config`, and the input `sizes`: `groups`, `rows`,
            `columns`, `length`.
        limits: limits of the machine.
    """
    found = []
    for key, of_runner in rows.items():
        model, frames, label = key.split("/")
        engine, _, precision = label.rpartition("_")
        for row, figures in of_runner.items():
            taken = median(figures)
            entry: dict[str, Any] = {"model": model, "frames": int(frames), "runner": engine, "precision": precision}
            entry |= {"row": row, "seconds": None if taken is None else round(taken, 6)}
            entry |= {
                k: figures[k] for k in ("tokens", "peak_bytes", "parity", "error", "text_alone") if figures.get(k)
            }
            entry["rounds"] = [round(value, 6) for value in figures["seconds"]]
            entry["cpu_seconds"] = [round(value, 4) for value in figures.get("cpu_seconds", [])]
            share = share_of_limit(row, taken, figures, facts.get(f"{model}/{frames}"), precision, limits)
            if share is not None:
                entry["of_limit"] = share
            if figures.get("details"):
                entry["details"] = figures["details"][-1]
                entry["first_token"] = round(median_of(one["first_token"] for one in figures["details"]), 6)
                if row == "end_to_end":
                    entry["chain_overhead"] = chain_overhead(rows, label, model=model, frames=int(frames))
            entry["runs"] = runners.get(f"{model}/{label}", {}).get("precision")
            found.append(entry)
    return found


def median_of(values: Any) -> float:
    """Return the median of numbers."""
    import statistics

    return statistics.median(values)


def table(model: str, frames: int, rows: Sequence[Mapping[str, Any]], runners: Mapping[str, Any]) -> list[str]:
    """Return the Markdown table of one model and frame count: one line per runner, one column per stage."""
    mine = [row for row in rows if row["model"] == model and row["frames"] == frames]
    columns = ["vision", "prefill", "prefill_text", "first_token", "decode", "bridge", "spatial", "end_to_end"]
    lines = [
        "| runner | " + " | ".join(TITLES[c] for c in (*columns, "peak", "load")) + " | parity: worst cosine, box IoU |"
    ]
    lines.append("|---|" + "--:|" * (len(columns) + 2) + "---|")
    labels = dict.fromkeys((row["runner"], row["precision"]) for row in mine if "@" not in row["runner"])
    for runner, precision in labels:
        own = {row["row"]: row for row in mine if (row["runner"], row["precision"]) == (runner, precision)}
        loaded = runners.get(f"{model}/{runner}_{precision}", {})
        cells = [cell(column, own) for column in columns]
        peak = max((row.get("peak_bytes") or 0 for row in own.values()), default=0)
        cells.append(f"{peak / 1e9:.2f} GB" if peak else "–")
        cells.append(f"{loaded['load_s']:.1f}" if "load_s" in loaded else "–")
        lines.append(f"| {runner} {precision} | " + " | ".join(cells) + f" | {parity_cell(own)} |")
    return lines


def cell(column: str, own: Mapping[str, Mapping[str, Any]]) -> str:
    """Format one figure with its share of the machine's limit, if known."""
    if column == "first_token":
        value = own.get("end_to_end", {}).get("first_token")
        return "–" if value is None else f"{value:.2f}"
    found = own.get(column)
    if column == "prefill" and found is not None and found.get("text_alone"):
        return "–"
    if column == "prefill_text" and found is None and own.get("prefill", {}).get("text_alone"):
        found = own["prefill"]
    if found is None or found["seconds"] is None:
        return "–" if found is None or "error" not in found else "failed"
    seconds = found["seconds"]
    share = f" ({found['of_limit']:.0%})" if "of_limit" in found else ""
    if column == "decode":
        return f"{found['tokens'] / seconds:.1f}{share}"
    return f"{seconds * 1000:.1f}" if column == "bridge" else f"{seconds:.3g}{share}"


def parity_cell(own: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the worst cosine of all rows, and the box IoU end to end or else of the spatial decoder."""
    found = [row.get("parity") or {} for row in own.values()]
    cosines = [one["worst_cosine"] for one in found if "worst_cosine" in one]
    boxes = (own.get("end_to_end") or own.get("spatial") or {}).get("parity") or {}
    parts = [f"{min(cosines):.5f}" if cosines else "–", f"{boxes['iou']:.3f}" if "iou" in boxes else "–"]
    return ", ".join(parts)


def ratio_table(result: Mapping[str, Any]) -> list[str]:
    """Return the Markdown table of the ratios and their targets."""
    lines = ["| ratio | measured | target | | meaning |", "|---|--:|--:|---|---|"]
    peers = False
    for name, value in result["ratios"].items():
        target = result["targets"].get(name)
        wanted = "" if target is None else " ".join(f"{'≥' if k == 'least' else '≤'} {v:g}" for k, v in target.items())
        said = (
            ""
            if target is None
            else {True: "reached", False: "**not reached**", None: "not measured"}[met(value, target)]
        )
        meaning = MEANINGS.get(name) or ("the same" if peers else PEER_MEANING)
        peers |= name not in MEANINGS
        lines.append(f"| `{name}` | {'–' if value is None else f'{value:.3g}'} | {wanted} | {said} | {meaning} |")
    return lines


def growth_table(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the Markdown table of cost growth."""
    lines = [
        "| what grows | seconds | power | power of the last doubling | steps of the language model |",
        "|---|---|--:|--:|---|",
    ]
    for axis, found in summary(measured).items():
        points = [point for point in measured if point["axis"] == axis]
        times = ", ".join(f"{point['x']}: {point['seconds']:.2f}" for point in points)
        steps = ", ".join(str(step) for step in found.get("language_steps", []))
        lines.append(f"| {UNITS[axis]} | {times} | {found['exponent']} | {found['last_step']} | {steps or '–'} |")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """Return the text between the marks of docs/performance.md."""
    machine, limits = result["machine"], result["limits"]
    parts = [
        f"Machine: {machine['cpu']}, {result['threads']} threads, {', '.join(machine['flags'])}. Memory is read at "
        f"{limits['bandwidth'] / 1e9:.1f} GB/s; matmuls reach {limits['fp32'] / 1e9:.0f} GF/s in fp32 and "
        f"{limits['int8'] / 1e9:.0f} G operations/s in int8, {limits['int8'] / limits['fp32']:.1f} × as many. Measured "
        f"{result['measured']}.",
        "",
        *ratio_table(result),
        "",
        f"![Time of each stage, runner by runner](images/{STAGES_PLOT})",
    ]
    for model, frames in dict.fromkeys((row["model"], row["frames"]) for row in result["rows"]):
        parts += [
            "",
            f"### {model}, {frames} coarse frames",
            "",
            *table(model, frames, result["rows"], result["runners"]),
        ]
    if result["growth"]:
        parts += ["", "### Cost as work grows", "", f"![Cost of growing work](images/{GROWTH_PLOT})", ""]
        parts += growth_table(result["growth"])
    if result["missing"]:
        measured = {(row["model"], f"{row['frames']} frames") for row in result["rows"]}
        parts += ["", "Not measured:", "", *missing_list(result["missing"], measured)]
    return "\n".join(parts)


def missing_list(missing: Mapping[str, str], measured: Collection[tuple[str, str]]) -> list[str]:
    """Return a line for each group of runners of one model and number of frames that lack the same for one reason.

    Args:
        missing: `model/runner, N frames` → what is missing, and why.
        measured: (model, `N frames`) of which some runner has figures; of others the runners are not named.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, reason in missing.items():
        model, _, rest = name.rpartition("/")
        runner, _, frames = rest.partition(", ")
        groups.setdefault((model, frames, reason), []).append(runner)
    lines = []
    for (model, frames, reason), runners in groups.items():
        nothing = frames and (model, frames) not in measured and reason.startswith(ALL_ROWS)
        names = "all runners" if nothing else ", ".join(runners)
        where = f"{', '.join(filter(None, (model, frames)))}: " if model else ""
        lines.append(f"- {where}{names}: {reason.removeprefix(ALL_ROWS)}")
    return lines


def fill_in(document: Path, text: str) -> None:
    """Write text between the marks of a document.

    Raises:
        ValueError: the document does not contain the marks.
    """
    text_now = document.read_text(encoding="utf-8")
    if MARKS[0] not in text_now or MARKS[1] not in text_now:
        raise ValueError(f"{document}: expected a line {MARKS[0]} and a line {MARKS[1]} to write between")
    before, after = text_now.split(MARKS[0])[0], text_now.split(MARKS[1])[1]
    document.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def plots(result: Mapping[str, Any], folder: Path, *, model: str, frames: int) -> list[Path]:
    """Write the plots that have figures as SVG; return their files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "speed", "font.size": 9})
    written = [_plot_stages(result, folder / STAGES_PLOT, model, frames)]
    if result["growth"]:
        written.append(_plot_growth(result["growth"], folder / GROWTH_PLOT))
    return [path for path in written if path is not None]


def _plot_stages(result: Mapping[str, Any], path: Path, model: str, frames: int) -> Path | None:
    import matplotlib.pyplot as plt

    rows = [r for r in result["rows"] if (r["model"], r["frames"]) == (model, frames) and r["seconds"]]
    rows = [r for r in rows if "@" not in r["runner"]]
    stages = [stage for stage in PLOTTED if any(r["row"] == stage for r in rows)]
    if not stages:
        return None
    figure, axes = plt.subplots(1, len(stages), figsize=(3.1 * len(stages), 3.4), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        bars = sorted(
            ((r["seconds"], f"{r['runner']} {r['precision']}") for r in rows if r["row"] == stage), reverse=True
        )
        colours = ["#1f6f8b" if name.startswith("ours") else "#b9b9b9" for _, name in bars]
        axis.barh([name for _, name in bars], [value for value, _ in bars], color=colours)
        axis.set_title(f"{stage.replace('_', ' ')}, s")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{model}, {frames} coarse frames: shorter is faster", x=0.01, ha="left")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _plot_growth(measured: Sequence[Mapping[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    found = summary(measured)
    figure, axes = plt.subplots(1, len(found), figsize=(3.1 * len(found), 3.0), squeeze=False)
    for axis, (name, what) in zip(axes[0], found.items(), strict=True):
        points = sorted((point["x"], point["seconds"]) for point in measured if point["axis"] == name)
        x, y = zip(*points, strict=True)
        axis.loglog(x, y, "o-", color="#1f6f8b", label="measured")
        axis.loglog(x, [y[-1] * value / x[-1] for value in x], "--", color="#b9b9b9", label="in proportion")
        axis.set_xlabel(what["unit"])
        axis.set_title(f"{name}: power {what['exponent']}, last {what['last_step']}", fontsize=8)
        axis.set_xticks(x, [str(value) for value in x], fontsize=7)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds")
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


assert set(AXES) == set(UNITS)
