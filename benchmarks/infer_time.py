"""Time `infer` as a whole process on a sample clip: from start to result, video decoding included.

Usage: python benchmarks/infer_time.py [--bundle DIR] [--runs 5] [--out FILE.json]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
from machine import describe


def timed(command: list[str]) -> float:
    """Run a command to its end and return its seconds."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("build/demo/bundle"), show_default=True)
@click.option("--runs", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/infer_time.json"))
def main(bundle: Path, runs: int, out: Path) -> None:
    """Write median and range of each command as JSON; the import of the runtime beside it."""
    commands = {"import bridge_stg.runtime": [sys.executable, "-c", "import bridge_stg.runtime"]}
    for clip in sorted(Path("assets/demo/clips").glob("*.mp4")):
        query = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
        commands[f"infer {clip.name}"] = [sys.executable, "cli.py", "infer", str(clip), query, "--bundle", str(bundle)]
    seconds = {name: [timed(command) for _ in range(runs)] for name, command in commands.items()}
    figures = {
        name: {"median_s": round(statistics.median(s), 3), "min_s": round(min(s), 3), "max_s": round(max(s), 3)}
        for name, s in seconds.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"runs": runs, "seconds": figures, "machine": describe("onnxruntime", "numpy", "av")}, indent=2)
    out.write_text(text + "\n", encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
    main()
