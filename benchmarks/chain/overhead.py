"""Measure the overhead outside the graphs, the cost of more queries on one video, and of unused cache positions.

Wall and CPU seconds (all threads; steadier on a shared machine) of one query and of several queries on one video, of
each graph and of reading the video; the fastest of `--runs` counts. Results go to benchmarks/results/chain.json.

Usage: python benchmarks/chain/overhead.py --model NAME BUNDLE CLIP [--model …] [--queries 8] [--runs 3]
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge_stg.runtime import Grounder
from bridge_stg.runtime.backends.session import Session
from bridge_stg.runtime.host.machine import describe

QUERIES = ("the red circle", "the blue square that moves", "the green triangle", "the yellow star", "the white ring",
           "the black cross", "the orange disc", "the one on the left")  # fmt: skip
UNUSED_POSITIONS = (0, 256, 512, 1536)
GRAPHS = ("vision_encoder", "language_model", "spatial_decoder")


class Clock:
    """Sums wall and CPU seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        began = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds[name][0] += time.perf_counter() - began[0]
            self.seconds[name][1] += time.process_time() - began[1]


def timed_queries(grounder: Grounder, clip: str, count: int) -> dict[str, Any]:
    """Open a video and run `count` queries together; return seconds per graph and in total."""
    clock, fine = Clock(), []
    for name in GRAPHS:
        session: Any = grounder.sessions[name]

        def infer(feeds: Mapping[str, Any], *, cache: Any = None, session: Any = session, name: str = name) -> Any:
            if name == "spatial_decoder":
                fine.append(len(feeds["feature_map"]))
            with clock.of(name):
                return type(session).infer(session, feeds, cache=cache)

        session.infer = infer
    try:
        with clock.of("total"), grounder.open(clip) as video:
            found = video.ground_many(QUERIES[:count], allow_none=False)
    finally:
        for name in GRAPHS:
            del grounder.sessions[name].infer  # type: ignore[attr-defined]
    seconds = {name: {"wall_s": round(wall, 4), "cpu_s": round(cpu, 4)} for name, (wall, cpu) in clock.seconds.items()}
    read_s = found[0].timings["decode_video"] + found[0].timings.get("decode_fine", 0.0)
    rest_s = clock.seconds["total"][0] - sum(clock.seconds[name][0] for name in GRAPHS) - read_s
    rest_cpu_s = clock.seconds["total"][1] - sum(clock.seconds[name][1] for name in GRAPHS)
    return {
        "queries": count,
        "fine_frames": sum(fine),
        "seconds": seconds,
        "reading_video_wall_s": round(read_s, 4),
        "rest_of_total_wall": round(rest_s / clock.seconds["total"][0], 4),
        "rest_and_video_of_total_cpu": round(rest_cpu_s / clock.seconds["total"][1], 4),
    }


def step_by_capacity(session: Session, spec: Any, *, cached: int, rows: int) -> dict[str, float]:
    """Return the milliseconds of one decode step after `cached` tokens by cache capacity, fastest of 6."""
    language, levels = spec.language, 1 + spec.vision.deepstack_levels
    feeds = {
        "input_ids": np.full((rows, 1), 7),
        "visual_index": np.zeros((rows, 1), np.int64),
        "visual_tokens": np.zeros((levels, 2, language.hidden_size), np.float32),
        "positions": np.full((3, rows, 1), cached),
        "cache_position": np.full(rows, cached),
        "output_index": np.zeros((rows, 1), np.int64),
    }
    least = -(-(cached + 1) // 256) * 256
    caches = {least + more: session.allocate_cache(batch=rows, capacity=least + more) for more in UNUSED_POSITIONS}
    best = dict.fromkeys(caches, float("inf"))
    for _ in range(6):
        for capacity, cache in caches.items():
            began = time.perf_counter()
            session.infer(feeds, cache=cache)
            best[capacity] = min(best[capacity], time.perf_counter() - began)
    return {str(capacity): round(1000 * seconds, 2) for capacity, seconds in best.items()}


@click.command()
@click.option("--model", "models", type=(str, Path, Path), multiple=True, required=True, help="NAME BUNDLE CLIP")
@click.option("--queries", default=8, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--cached", default=1480, show_default=True, help="Tokens in the cache before a step.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/chain.json"))
def main(models: tuple[tuple[str, Path, Path], ...], queries: int, runs: int, cached: int, out: Path) -> None:
    """Measure every model, and write the results."""
    found: dict[str, Any] = {}
    for name, bundle, clip in models:
        with Grounder.load(bundle) as grounder:
            best: dict[int, dict[str, Any]] = {}
            for _ in range(runs):
                for count in (1, queries):
                    row = timed_queries(grounder, str(clip), count)
                    before = best.get(count)
                    if before is None or row["seconds"]["total"]["cpu_s"] < before["seconds"]["total"]["cpu_s"]:
                        best[count] = row
            one, many = (best[count]["seconds"]["total"] for count in (1, queries))
            steps = {
                f"{rows} rows": step_by_capacity(
                    grounder.sessions["language_model"], grounder.spec, cached=cached, rows=rows
                )
                for rows in (1, queries)
            }
            found[name] = {
                "asked": list(best.values()),
                "many_over_one": {kind: round(many[kind] / one[kind], 3) for kind in one},
                "step_ms_by_capacity": steps,
            }
            click.echo(f"{name}: {json.dumps(found[name])}")
    result = {
        "runs": runs,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "models": found,
        "machine": describe("onnxruntime", "numpy", "av"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
