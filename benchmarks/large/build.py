"""Compile the language model of a large bundle ahead of time, and measure peak memory, time and engine size.

Make the bundle first: python benchmarks/large/export.py qwen3_vl_2b --keep. `bridge-stg build` compiles it in a
subprocess. The result goes to benchmarks/results/build_<bundle>.json; it does not include speed on a GPU.

Usage: python benchmarks/large/build.py build/large/qwen3_vl_2b_fp16 [--target rtx-ampere] [--graph language_model]
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

from bridge_stg.runtime.host.machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from bridge_stg.export.engines.layers import plan_summary
from bridge_stg.runtime.backends.tensorrt.engine_cache import EngineEntry, read_engines
from bridge_stg.runtime.bundle.bundle import Bundle

RESULTS = Path("benchmarks/results")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--target", default="rtx-ampere", show_default=True)
@click.option("--graph", default="language_model", show_default=True)
@click.option("--variant", default="standard", show_default=True)
@click.option("--keep/--no-keep", default=False, help="Keep the engine.")
def main(bundle: Path, target: str, graph: str, variant: str, keep: bool) -> None:
    """Compile a graph of BUNDLE, and write the measurements."""
    options = ["--target", target, "--graph", graph, "--variant", variant, "--overwrite", "--no-check-memory"]
    began = time.monotonic()
    subprocess.run([sys.executable, "cli.py", "build", str(bundle), *options], check=True)
    seconds = time.monotonic() - began
    graph_spec = Bundle.load(bundle).graph(graph, variant)
    entry = max(read_engines(Bundle.load(bundle), graph_spec), key=lambda e: str(e.built["finished"]))
    result = {"bundle": bundle.name, "command_seconds": round(seconds, 1), **measured(entry)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"build_{bundle.name}.json").write_text(text + "\n", encoding="utf-8")
    click.echo(text)
    if not keep:
        shutil.rmtree(entry.folder)


def measured(entry: EngineEntry) -> dict[str, Any]:
    """Return the measurements in an engine's build record."""
    weights, peak = int(entry.built["weight_bytes"]), int(entry.built["peak_memory_bytes"])
    return {
        "target": entry.target,
        "graph": entry.graph,
        "variant": entry.variant,
        "precision": entry.precision,
        "tensorrt": f"{entry.key.family} {entry.key.version}",
        "profiles": entry.profiles,
        "capacity": entry.capacity,
        "weight_bytes": weights,
        "engine_bytes": entry.size,
        "seconds": entry.built["seconds"],
        "peak_memory_bytes": peak,
        "peak_over_weights": round(peak / weights, 2),
        "layers": plan_summary(entry.built["layers"]),
        "machine": describe("onnx", "numpy"),
    }


if __name__ == "__main__":
    main()
