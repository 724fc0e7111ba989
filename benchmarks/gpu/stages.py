"""Measure stage times and parity of the whole chain on every backend of this machine.

Usage: python benchmarks/gpu/stages.py [--bundle DIR] [--clip FILE] [--runs 5] [--out FILE.json]. Native TensorRT needs
engines: `python cli.py build BUNDLE --target this` first. If golden cases fail on a backend, it is listed, its times do
not count, and the exit code is 1.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge_stg.demo.bundle import demo_bundle
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.choose import open_sessions
from bridge_stg.runtime.backends.registry import BACKENDS
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.chain.boxes import box_iou
from bridge_stg.runtime.chain.results import Grounding
from bridge_stg.runtime.errors import EngineError
from bridge_stg.runtime.host.machine import describe, machine
from bridge_stg.runtime.parity.compare import replay
from bridge_stg.runtime.parity.verify import graph_of

CLIPS = Path(__file__).resolve().parents[2] / "assets/demo/clips"


def boundaries(bundle: Bundle, backend: str) -> dict[str, Any]:
    """Replay the golden cases on a backend; return the worst boundary of each graph and the failed boundaries."""
    sessions = open_sessions(bundle, backend=backend)
    try:
        found = replay(bundle, sessions)
    finally:
        for session in sessions.values():
            session.close()
    worst: dict[str, Any] = {}
    for boundary in found:
        if boundary.dtype.startswith("float"):
            figures = {"rel_l2": boundary.rel_l2, "cosine": boundary.cosine, "at": boundary.name}
            graph = graph_of(boundary)
            worst[graph] = max(worst.get(graph, figures), figures, key=lambda entry: entry["rel_l2"])
    failed = [boundary.name for boundary in found if not boundary.passed]
    return {"worst": worst, "compared": len(found), "failed": failed}


def timed(grounder: Grounder, clips: list[tuple[Path, str]], runs: int) -> tuple[dict[str, float], list[Grounding]]:
    """Ground each clip once to warm up, then `runs` times; return the median seconds per stage and the answers."""
    answers = [grounder.ground(clip, query) for clip, query in clips]
    stages: dict[str, list[float]] = {}
    for _ in range(runs):
        for clip, query in clips:
            for stage, seconds in grounder.ground(clip, query).timings.items():
                stages.setdefault(stage, []).append(seconds)
    return {stage: round(statistics.median(seconds), 5) for stage, seconds in stages.items()}, answers


def agreement(answers: list[Grounding], reference: list[Grounding]) -> dict[str, Any]:
    """Compare answers with those of the first backend: share of equal texts, and smallest box IoU."""
    overlaps = [1.0]
    for ours, theirs in zip(answers, reference, strict=True):
        if ours.boxes is not None and theirs.boxes is not None and len(ours.boxes) == len(theirs.boxes):
            overlaps.append(float(box_iou(ours.boxes.boxes, theirs.boxes.boxes).min()))
    same = [ours.answer == theirs.answer for ours, theirs in zip(answers, reference, strict=True)]
    return {"same_answers": float(np.mean(same)), "least_box_iou": min(overlaps)}


@click.command()
@click.option("--bundle", "path", type=click.Path(path_type=Path), help="Default: the demo bundle.")
@click.option(
    "--clip",
    "clips",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Clip with its query in a .txt of the same name.",
)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/gpu_stages.json"), show_default=True)
def main(path: Path | None, clips: tuple[Path, ...], runs: int, out: Path) -> None:
    """Measure every backend, and write the figures as JSON."""
    bundle = Bundle.load(path or demo_bundle())
    pairs = [(clip, clip.with_suffix(".txt").read_text().strip()) for clip in clips or sorted(CLIPS.glob("*.mp4"))]
    found = machine()
    report: dict[str, Any] = {}
    reference: list[Grounding] = []
    for backend in reversed(BACKENDS):  # the CPU first: the others are compared with its answers
        if backend.version() is None or (backend.on_gpu and not found.devices):
            report[backend.name] = {"left_out": "not installed" if backend.version() is None else "no GPU"}
            continue
        try:
            parity = boundaries(bundle, backend.name)
            with Grounder.load(bundle.path, backend=backend.name) as grounder:
                seconds, answers = timed(grounder, pairs, runs)
                target = None if grounder.target is None else grounder.target.to_json()
        except EngineError as error:
            report[backend.name] = {"left_out": str(error)}
            continue
        reference = reference or answers
        report[backend.name] = {
            "target": target, "parity": parity, **agreement(answers, reference), "seconds": seconds
        }  # fmt: skip
    devices = [asdict(device) for device in found.devices]
    about = {**describe("numpy", "av"), "devices": devices, "driver": found.driver, "cuda": found.cuda}
    document = {"bundle": bundle.manifest.fingerprint, "runs": runs, "backends": report, "machine": about}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    click.echo(table(report))
    click.echo(f"wrote {out}")
    sys.exit(any(entry["parity"]["failed"] for entry in report.values() if "parity" in entry))


def table(report: dict[str, Any]) -> str:
    """Return the report as a table with parity and times per backend."""
    stages = list(dict.fromkeys(stage for entry in report.values() for stage in entry.get("seconds", {})))
    lines = [f"{'backend':26} {'parity':18} {'IoU':>7} " + " ".join(f"{stage:>14}" for stage in stages)]
    for name, entry in report.items():
        if "left_out" in entry:
            lines.append(f"{name:26} left out: {entry['left_out']}")
            continue
        worst = max(figures["rel_l2"] for figures in entry["parity"]["worst"].values())
        verdict = f"{'FAILED' if entry['parity']['failed'] else 'ok'} ({worst:.1e})"
        times = " ".join(f"{entry['seconds'].get(stage, float('nan')):14.4f}" for stage in stages)
        lines.append(f"{name:26} {verdict:18} {entry['least_box_iou']:7.4f} {times}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
