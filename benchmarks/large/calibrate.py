"""Calibrate a bundle of a real model's size, and measure peak memory and time of each step, and the size.

BUNDLE comes from large/export.py --keep. Its weights are random, so no metric is evaluated; the benchmark shows that
statistics, ranges and quantized weights are streamed. Each step runs in a subprocess. Results go to
benchmarks/results/calibrate_<bundle>_<recipe>.json.

Usage: python benchmarks/large/calibrate.py BUNDLE --samples build/calibration/calibration.jsonl [--recipe w4]
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import click
import onnx_ir as ir

from bridge_stg.calibration.collect.collect import INT4_ROWS, collect
from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.calibration.quantize.bundle import quantize_bundle
from bridge_stg.calibration.quantize.scales import compute_scales
from bridge_stg.calibration.recipes import RECIPES
from bridge_stg.export.graph.blocks import Matmul, find_matmuls
from bridge_stg.runtime.bundle.bundle import Bundle
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess

RESULTS = Path("benchmarks/results")
STEPS = ("collect", "quantize")


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--samples", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="w4", show_default=True)
@click.option("--count", default=4, show_default=True, help="Number of samples to run through the chain.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/large"), show_default=True)
@click.option("--keep/--no-keep", default=False, help="Keep the quantized bundle and the statistics.")
def main(bundle: Path, samples: Path, recipe: str, count: int, folder: Path, keep: bool) -> None:
    """Calibrate BUNDLE step by step, and write the measurements."""
    work, out = folder / f"{bundle.name}-{recipe}.calibration", folder / f"{bundle.name}-{recipe}"
    work.mkdir(parents=True, exist_ok=True)
    steps = {}
    for step in STEPS:
        paths = {"bundle": str(bundle), "samples": str(samples), "work": str(work), "out": str(out)}
        job = {"step": step, "recipe": recipe, "count": count, "paths": paths}
        steps[step] = run_in_subprocess("calibrate:run_step", job, purpose=f"runs the step {step}")
    before, after = (Bundle.load(path).manifest for path in (bundle, out))
    result = {
        "bundle": bundle.name,
        "recipe": recipe,
        "samples": count,
        "steps": steps,
        "graphs": {
            graph: {
                "precision": [next(iter(manifest.graphs[graph].values())).precision for manifest in (before, after)],
                "bytes": [weight_bytes(path, graph) for path in (bundle, out)],
            }
            for graph in before.graphs
        },
        "ratio": round(total(out) / total(bundle), 4),
        "machine": describe("onnxruntime", "onnx", "numpy"),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"calibrate_{bundle.name}_{recipe}.json").write_text(text + "\n", encoding="utf-8")
    click.echo(text)
    if not keep:
        shutil.rmtree(out)
        shutil.rmtree(work)


def run_step(job: dict[str, Any]) -> dict[str, Any]:
    """Run one step of a calibration in this process; return its seconds and peak memory."""
    began = time.monotonic()
    paths = {name: Path(path) for name, path in job["paths"].items()}
    source = Bundle.load(paths["bundle"])
    taken = read_samples(paths["samples"], paths["samples"].parent, limit=job["count"])
    chosen = RECIPES[job["recipe"]]
    more = {graph: INT4_ROWS for graph, of_graph in chosen.graphs.items() if of_graph.weights == "int4"}
    statistics = collect(source, taken, folder=paths["work"] / "statistics", low_memory=True, more_rows=more)
    if job["step"] == "quantize":
        matmuls: list[Matmul] = []
        for graph, of_graph in chosen.graphs.items():
            if of_graph.activations == "int8":
                variant = next(iter(source.manifest.graphs[graph]))
                matmuls += find_matmuls(ir.load(source.graph_path(graph, variant)), graph)
        scales = compute_scales(statistics, matmuls, chosen, folder=paths["work"] / "scales")
        quantize_bundle(
            source, paths["out"], recipe=chosen, ranges=scales.ranges, smoothing=scales.smoothing, int4=scales.int4,
            overwrite=True,
        )  # fmt: skip
    return {"seconds": round(time.monotonic() - began, 1), "peak_bytes": peak_bytes()}


def weight_bytes(bundle: Path, graph: str) -> int:
    """Return the size of a graph's weights in bytes."""
    return sum(file.stat().st_size for file in (bundle / "graphs" / graph).glob("*.data"))


def total(bundle: Path) -> int:
    """Return the size of all graphs and their weights in bytes."""
    return sum(file.stat().st_size for file in (bundle / "graphs").rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
