"""Measure size, stage times, memory and held-out metrics of the demo in every precision.

Missing bundles are exported (fp16) or calibrated (the others), with all blocks quantized: no block is put back to
float. Metrics are those of `evaluate`, computed in one subprocess per precision, which also reports its peak memory;
stage times are taken in one process, the precisions in turn. Answers are kept, so a run that was stopped continues.
Results go to benchmarks/results/precision_demo.json; the table of the documentation is printed.

Usage: python benchmarks/accuracy/precision.py --bundle build/demo/bundle --samples build/calibration/calibration.jsonl
    --evaluate build/tasks/tube.jsonl [--folder build/precision] [--clips 200]
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bridge_stg.calibration.calibrate import calibrate
from bridge_stg.calibration.options import Options
from bridge_stg.calibration.scoring.scores import score_model
from bridge_stg.evaluation.datasets.jsonl import read_jsonl
from bridge_stg.evaluation.run.evaluate import bundle_model
from bridge_stg.evaluation.samples import Sample
from bridge_stg.runtime import Grounder
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess

RECIPES = {"int8": "w8a8", "int4": "w4", "fp8": "fp8", "nvfp4": "nvfp4"}
PRECISIONS = ("fp32", "fp16", *RECIPES)
CHECKPOINT = Path("assets/demo/checkpoint")
DECIDING = 4
"""Samples of the trial that a calibration cannot do without."""
FILE = click.Path(exists=True, path_type=Path)


@click.command()
@click.option("--bundle", type=FILE, default=Path("build/demo/bundle"), show_default=True, help="The fp32 bundle.")
@click.option("--samples", type=FILE, required=True, help="Calibration samples.")
@click.option("--evaluate", "evaluated", type=FILE, required=True, help="Samples to score the result on.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/precision"), show_default=True)
@click.option("--clips", default=200, show_default=True, help="Number of samples to score.")
@click.option("--timed", default=12, show_default=True, help="Number of clips to time; 0: no times, no memory.")
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/precision_demo.json"))
def main(
    bundle: Path, samples: Path, evaluated: Path, folder: Path, clips: int, timed: int, threads: int, out: Path
) -> None:
    """Make the missing bundles, score and time all of them, and write the results."""
    folder.mkdir(parents=True, exist_ok=True)
    bundles = {name: bundle if name == "fp32" else folder / name for name in PRECISIONS}
    make_missing(bundles, samples, folder / "work", threads)
    job = {"clips": clips, "threads": threads, "memory": timed > 0}
    found = {name: measured_in_subprocess(bundles, name, evaluated, folder, job) for name in PRECISIONS}
    seconds = stage_seconds(bundles, evaluated, clips=timed, threads=threads) if timed else {}
    result: dict[str, Any] = {
        "clips": found["fp32"]["samples"],
        "timed_clips": timed,
        "threads": threads,
        "precisions": {name: {**found[name], "seconds": seconds.get(name)} for name in PRECISIONS},
        "machine": describe("onnxruntime", "onnx", "numpy"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(table(result["precisions"]))


def make_missing(bundles: dict[str, Path], samples: Path, work: Path, threads: int) -> None:
    """Export or calibrate each missing bundle; the calibrations share their intermediate files."""
    for name, path in bundles.items():
        if (path / "manifest.json").is_file():
            continue
        if name == "fp16":
            command = ["export", CHECKPOINT, "--out", path, "--dtype", "fp16"]
            subprocess.run([sys.executable, "cli.py", *map(str, command)], check=True)
            continue
        first = work.with_name("first.jsonl")  # without labels: with limits that every trial keeps, they decide nothing
        first.write_text("".join(samples.read_text(encoding="utf-8").splitlines(keepends=True)[:DECIDING]), "utf-8")
        options = Options(
            recipe=RECIPES[name], max_drop=100.0, max_changed=100.0, confirm=0, max_trials=2, threads=threads,
            force_int8=("vision_encoder", "language_model"),  # even if the speed gate would keep them in float
        )  # fmt: skip
        calibrate(
            bundles["fp32"], path, samples=samples, media=samples.parent, select=first, own_tubes=True, options=options,
            work=work,
        )  # fmt: skip


def measured_in_subprocess(
    bundles: dict[str, Path], name: str, evaluated: Path, folder: Path, options: dict[str, Any]
) -> dict[str, Any]:
    """Score one precision in a subprocess."""
    places = {"fp32": bundles["fp32"], "bundle": bundles[name], "samples": evaluated, "answers": folder / "answers"}
    job = {**options, "name": name, "places": {place: str(path) for place, path in places.items()}}
    values: dict[str, Any] = run_in_subprocess("precision:measure", job, purpose=f"measures {name}")
    return values


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Return metrics, agreement with fp32, size and peak memory of one bundle; answers are stored in `answers`."""
    name, threads = job["name"], job["threads"]
    first, path, evaluated, answers = (Path(job["places"][key]) for key in ("fp32", "bundle", "samples", "answers"))
    dataset = read_jsonl([evaluated], evaluated.parent)
    dataset = dataclasses.replace(dataset, samples=dataset.samples[: job["clips"]])
    options: dict[str, Any] = {"backend": "auto", "variant": None, "threads": threads}
    memory = peak_memory(path, dataset.samples[:4], threads) if job["memory"] else None
    found = score_model(bundle_model(path, name, **options), dataset, folder=answers)
    if name != "fp32":
        reference = score_model(bundle_model(first, "fp32", **options), dataset, folder=answers)
        found = score_model(bundle_model(path, name, **options), dataset, folder=answers, reference=reference)
    manifest = Bundle.load(path).manifest
    return {
        "samples": found.samples,
        "failed": found.failed,
        **{metric: round(interval.value, 4) for metric, interval in found.metrics.items()},
        "points_lost": {metric: round(drop.value, 2) for metric, drop in found.drops.items()},
        "answer_agreement": 1.0 if found.answer_agreement is None else found.answer_agreement,
        "box_iou": found.box_iou,
        "bytes": graph_bytes(path),
        "graphs": {
            graph: {"precision": next(iter(variants.values())).precision, "variants": list(variants)}
            for graph, variants in manifest.graphs.items()
        },
        "peak_bytes": memory,
    }


def peak_memory(path: Path, samples: Sequence[Sample], threads: int) -> int:
    """Load a bundle, ground a few clips, and return the peak memory of this process in bytes."""
    with Grounder.load(path, threads=threads) as grounder:
        for sample in samples:
            grounder.ground(str(sample.media), sample.query, allow_none=False)
    return peak_bytes()


def graph_bytes(path: Path) -> int:
    """Return the size of all graphs and weights of a bundle in bytes, all variants."""
    return sum(file.stat().st_size for file in (path / "graphs").rglob("*") if file.is_file())


def stage_seconds(
    bundles: dict[str, Path], evaluated: Path, *, clips: int, threads: int
) -> dict[str, dict[str, float]]:
    """Return the median seconds per stage and precision; each clip runs in all precisions in turn, in one process."""
    samples = [sample for sample in read_jsonl([evaluated], evaluated.parent).samples if sample.media is not None][
        : clips + 1
    ]
    grounders = {name: Grounder.load(path, threads=threads) for name, path in bundles.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in bundles}
    for place, sample in enumerate(samples):
        for name, grounder in grounders.items():
            found = grounder.ground(str(sample.media), sample.query, allow_none=False)
            if place:  # the first clip is the warm-up
                for stage, seconds in found.timings.items():
                    taken[name].setdefault(stage, []).append(seconds)
    for grounder in grounders.values():
        grounder.close()
    return {
        name: {stage: round(statistics.median(values), 5) for stage, values in stages.items()}
        for name, stages in taken.items()
    }


def table(precisions: dict[str, dict[str, Any]]) -> str:
    """Return a table of docs/calibration.md: metrics, agreement with fp32, bytes, and seconds if they were measured."""
    head = [
        "precision",
        "vision / language model",
        "m_tIoU",
        "m_vIoU",
        "same answer",
        "box IoU with fp32",
        "graphs' bytes",
    ]
    timed = all(found["seconds"] for found in precisions.values())
    head += ["vision, s", "prefill, ms", "answer, ms", "total, s"] if timed else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, found in precisions.items():
        forms = " / ".join(found["graphs"][graph]["precision"] for graph in ("vision_encoder", "language_model"))
        box_iou = "–" if found["box_iou"] is None else f"{found['box_iou']:.4f}"
        cells = [name, forms, f"{found['m_tIoU']:.3f}", f"{found['m_vIoU']:.3f}", f"{found['answer_agreement']:.1%}"]
        cells += [box_iou, f"{found['bytes'] / 1e6:.1f} MB"]
        if timed:
            seconds = found["seconds"]
            cells.append(f"{seconds['vision_coarse'] + seconds['vision_fine']:.2f}")
            cells += [f"{seconds[stage] * 1e3:.0f}" for stage in ("prefill", "answer")]
            cells.append(f"{seconds['total']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
