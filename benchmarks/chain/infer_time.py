"""Time whole `infer` processes on sample clips, imports and video decoding included.

Commands run in turn, so that other load on the machine affects all of them equally; wall and CPU seconds of each are
recorded. Bytecode is cached, as for an installed package. `--before DIR` names another checkout to compare with; it
must print the same results. `--realtime` (Linux, as root) runs the commands with real-time priority.

Usage:
python benchmarks/chain/infer_time.py [--bundle NAME=DIR]… [--before DIR] [--runs 7] [--realtime] [--out FILE.json]
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from bridge_stg.runtime.host.machine import describe

ROOT = Path(__file__).resolve().parents[2]
PAUSE_S = 0.3
"""Pause between two commands; Linux throttles real-time processes that use more than 0.95 s of each second."""
Timed = tuple[float, float, str]
RESULT = re.compile(r"^  seconds, .*\n?", re.MULTILINE)
"""The lines of `infer`'s output that differ between runs."""


def timed(
    command: Sequence[str], folder: Path, environment: dict[str, str], realtime: bool
) -> tuple[float, float, str]:
    """Run a command; return its wall seconds, CPU seconds and output."""

    def set_priority() -> None:
        if realtime:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))

    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=set_priority,  # noqa: PLW1509 - this program has no threads
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return wall_s, used.ru_utime + used.ru_stime, RESULT.sub("", printed)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and range, rounded to milliseconds."""
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def commands(bundles: dict[str, Path]) -> dict[str, list[str]]:
    """Return the commands to time, by name."""
    made = {"import bridge_stg.runtime": ["-c", "import cli, bridge_stg.runtime"]}
    for name, bundle in bundles.items():
        for clip in sorted((ROOT / "assets/demo/clips").glob("*.mp4")):
            query = clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
            given = ["cli.py", "infer", str(clip), query, "--bundle", str(bundle.resolve())]
            made[f"infer {clip.name}, {name}"] = given
    return made


@click.command()
@click.option("--bundle", "given", multiple=True, metavar="NAME=DIR", help="Default: fp32=build/demo/bundle.")
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="A checkout to compare with.")
@click.option("--runs", default=7, show_default=True)
@click.option("--realtime", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/infer_time.json")
def main(given: tuple[str, ...], before: Path | None, runs: int, realtime: bool, out: Path) -> None:
    """Write median and range of each command's wall and CPU seconds as JSON."""
    bundles = {name: Path(path) for name, _, path in (text.partition("=") for text in given)}
    todo = commands(bundles or {"fp32": Path("build/demo/bundle")})
    trees = {"before": before.resolve(), "after": ROOT} if before else {"after": ROOT}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for name, command in todo.items():
            runs_of: dict[str, list[Timed]] = {tree: [] for tree in trees}
            for count in range(runs + 1):  # the first run fills the bytecode and file caches
                for tree, folder in trees.items():
                    time.sleep(PAUSE_S)
                    measured = timed([sys.executable, *command], folder, environment, realtime)
                    if count:
                        runs_of[tree].append(measured)
            printed = {text for measured in runs_of.values() for _, _, text in measured}
            if len(printed) > 1:
                raise click.ClickException(f"{name}: the results are not the same:\n" + "\n".join(printed))
            found[name] = {
                tree: {
                    "wall_s": spread([wall_s for wall_s, _, _ in measured]),
                    "cpu_s": spread([cpu_s for _, cpu_s, _ in measured]),
                }
                for tree, measured in runs_of.items()
            }
            click.echo(f"{name}: {json.dumps(found[name])}")
    result = {
        "runs": runs,
        "realtime": realtime,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "same_results": True,
        "seconds": found,
        "machine": describe("onnxruntime", "numpy", "av"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
