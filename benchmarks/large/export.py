"""Export a random checkpoint of a real model's size, and measure peak memory, time, disk, parity and one query.

The checkpoint has the shapes of a published model and random bf16 weights, written tensor by tensor. `bridge-stg
export` and the query run in subprocesses. Results go to benchmarks/results/export_<shape>_<dtype>.json; the table of
docs/performance.md is made from all of these files.

Usage: python benchmarks/large/export.py SHAPE [--dtype fp16] [--variant standard] [--folder /tmp/large] [--keep]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from shapes import SHAPES, write_checkpoint

from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.subprocess import run_in_subprocess

RESULTS, TABLE = Path("benchmarks/results"), Path("docs/performance.md")
MARKS = ("<!-- export_large: begin -->", "<!-- export_large: end -->")
QUERIES = ("the red square", "a blue ball that moves to the left")
BAR = 1.3, 1.5e9
"""Allowed peak memory of an export: a multiple of the weights, plus a constant in bytes."""


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.option("--dtype", type=click.Choice(("fp32", "fp16", "bf16")), default="fp16", show_default=True)
@click.option("--variant", "variants", multiple=True, default=("standard", "primitive"), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/large"), show_default=True)
@click.option("--keep/--no-keep", default=False, help="Keep checkpoint and bundle.")
@click.option("--query/--no-query", default=True, help="Run a query on the bundle, on CPU.")
def main(shape: str, dtype: str, variants: tuple[str, ...], folder: Path, keep: bool, query: bool) -> None:
    """Make a checkpoint of SHAPE, export it, run a query, and write the measurements."""
    checkpoint, bundle = folder / shape, folder / f"{shape}_{dtype}"
    made = None
    began = time.monotonic()
    if not (checkpoint / "config.json").is_file():
        write_checkpoint(shape, checkpoint)
        made = round(time.monotonic() - began, 1)
    began = time.monotonic()
    options = [option for variant in variants for option in ("--variant", variant)]
    command = [sys.executable, "cli.py", "export", checkpoint, "--out", bundle, "--dtype", dtype, "--overwrite"]
    subprocess.run([str(part) for part in (*command, *options)], check=True)
    seconds = time.monotonic() - began
    report, parity = (read(bundle / "reports" / f"{name}.json") for name in ("export", "parity"))
    result: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "variants": list(variants),
        "checkpoint_bytes": size_of(checkpoint),
        "checkpoint_seconds": made,
        "weight_bytes": report["weight_bytes"],
        "bundle_bytes": size_of(bundle),
        "peak_rss_bytes": report["peak_rss_bytes"],
        "allowed_peak_bytes": int(BAR[0] * report["weight_bytes"] + BAR[1]),
        "replay_peak_rss_bytes": report["replay_peak_rss_bytes"],
        "estimate": report["estimate"],
        "seconds": round(seconds, 1),
        "stages": report["seconds"],
        "replay_seconds": report["replay_seconds"],
        "parity": summary(parity),
        "query": run_in_subprocess("export:ask", str(bundle), purpose="queries the bundle")
        if query and dtype != "bf16"
        else None,
        "machine": describe("torch", "transformers", "onnx", "onnxruntime", "numpy"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"export_{shape}_{dtype}.json").write_text(text + "\n", encoding="utf-8")
    fill_table()
    click.echo(text)
    if not keep:
        shutil.rmtree(bundle)
        shutil.rmtree(checkpoint)


def summary(parity: dict[str, Any]) -> dict[str, Any]:
    """Return the worst relative error of each boundary and the smallest box IoU."""
    worst: dict[str, float] = {}
    for boundary in parity["boundaries"]:
        name = boundary["name"].split(" ")[0]
        worst[name] = max(worst.get(name, 0.0), boundary["rel_l2"])
    ious = [boundary["iou"] for boundary in parity["boundaries"] if boundary.get("iou") is not None]
    return {"rel_l2": worst, "least_iou": min(ious), "dependence": parity["dependence"], "passed": parity["passed"]}


def ask(bundle: str) -> dict[str, Any]:
    """Run two queries on a clip and one on its mirror image in onnxruntime; return times and peak memory."""
    from bridge_stg.runtime import Grounder
    from bridge_stg.runtime.host.memory import peak_bytes

    began = time.monotonic()
    with Grounder.load(bundle) as grounder:
        loaded, load_peak = time.monotonic() - began, peak_bytes()
        began = time.monotonic()
        boxes = [grounder.ground(clip(mirrored), query, allow_none=False).boxes.boxes
                 for query, mirrored in ((QUERIES[0], False), (QUERIES[1], False), (QUERIES[0], True))]  # fmt: skip
        query_seconds = time.monotonic() - began
    first, other_query, other_frames = (np.asarray(found) / [128, 96, 128, 96] for found in boxes)
    return {
        "load_seconds": round(loaded, 1),
        "load_peak_rss_bytes": load_peak,
        "seconds_a_query": round(query_seconds / 3, 1),
        "peak_rss_bytes": peak_bytes(),
        "box_moved_by_other_query": moved(first, other_query),
        "box_moved_by_other_frames": moved(first, other_frames),
    }


def moved(first: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference of a box coordinate, in frame widths or heights."""
    count = min(len(first), len(other))
    return round(float(np.abs(first[:count] - other[:count]).max()), 4)


def clip(mirrored: bool) -> Any:
    """Yield (seconds, RGB) of a red square that crosses a shaded background."""
    y, x = np.mgrid[0:96, 0:128]
    for index in range(12):
        frame = np.stack([x * 2, y * 255 // 96, (x + y) % 256], -1).astype(np.uint8)
        frame[30:54, 8 + index * 7 : 32 + index * 7] = (220, 30, 30)
        yield index / 8, np.ascontiguousarray(frame[:, ::-1] if mirrored else frame)


def read(file: Path) -> dict[str, Any]:
    """Return the contents of a JSON file."""
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values


def size_of(folder: Path) -> int:
    """Return the total size of all files below a folder in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def fill_table() -> None:
    """Write every result into the table of docs/performance.md."""
    columns = ("model", "precision", "weights", "export: peak", "allowed", "time", "disk", "replay: peak",
               "worst relative error", "box IoU", "query: load, peak")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for file in sorted(RESULTS.glob("export_*_*.json")):
        r = read(file)
        ran = r["query"]
        query = "–" if ran is None else f"{ran['load_seconds']:.0f} s, {gigabytes(ran['peak_rss_bytes'])}"
        rows.append(
            f"| {r['shape']} | {r['dtype']} | {gigabytes(r['weight_bytes'])} | {gigabytes(r['peak_rss_bytes'])} "
            f"| {gigabytes(r['allowed_peak_bytes'])} | {r['seconds'] / 60:.1f} min | {gigabytes(r['bundle_bytes'])} "
            f"| {gigabytes(r['replay_peak_rss_bytes'])} | {max(r['parity']['rel_l2'].values()):.1e} "
            f"| {r['parity']['least_iou']:.4f} | {query} |"
        )
    text = TABLE.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    TABLE.write_text(f"{before}{MARKS[0]}\n" + "\n".join(rows) + f"\n{MARKS[1]}{after}", encoding="utf-8")


def gigabytes(count: float) -> str:
    """Format a number of bytes in GB."""
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
