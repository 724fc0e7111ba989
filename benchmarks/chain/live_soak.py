"""Measure memory, cost per frame and the longest window rebuild while watching an hour of stream at full speed.

The stream repeats the sample clips at 8 frames per second. Usage:
python benchmarks/chain/live_soak.py [--bundle DIR] [--seconds 3600] [--out FILE.json]
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge_stg.runtime import Grounder, LiveStats
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import return_freed_memory
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.playback import play

FPS = 8
MODEL_S = ("encode_s", "extend_s", "rebuild_s", "answer_s")


def stream(seconds: float, clips: list[Path]) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (time, frame) for `seconds` of stream, all frames in the size of the first clip."""
    frames: list[np.ndarray] = []
    for clip in clips:
        with play(clip) as video:
            frames += [frame for _, frame in video.frames]
    frames = [resize(frame, frames[0].shape[:2]) for frame in frames]
    for i, frame in enumerate(itertools.islice(itertools.cycle(frames), int(seconds * FPS))):
        yield i / FPS, frame


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cost_ms(before: LiveStats, now: LiveStats) -> dict[str, float]:
    """Return the model's milliseconds per coarse frame between two moments, by part."""
    frames = now.coarse_frames - before.coarse_frames
    parts = {part: 1000 * (getattr(now, part) - getattr(before, part)) / frames for part in MODEL_S}
    return {part: round(value, 3) for part, value in {**parts, "all": sum(parts.values())}.items()}


def by_third(samples: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Return the median of a cost over the first and over the last third of the samples."""
    values = [sample[name]["all"] if isinstance(sample[name], dict) else sample[name] for sample in samples]
    third = len(values) // 3
    halves = {"first_third": values[:third], "last_third": values[-third:]}
    return {part: round(float(np.median(costs)), 3) for part, costs in halves.items()}


def peak_memory(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return the peak memory of the first and last sample, and the largest of all."""
    most = [sample["resident_bytes"]["most"] for sample in samples]
    return {"first": most[0], "largest": max(most), "last": most[-1], "largest_to_first": round(max(most) / most[0], 5)}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), default=Path("build/demo/bundle"), show_default=True)
@click.option("--seconds", default=3600.0, show_default=True, help="Length of the stream.")
@click.option("--every", "every_s", default=1.0, show_default=True)
@click.option("--window", "window_s", default=16.0, show_default=True)
@click.option("--query", default="the blue bird", show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--return-freed/--keep-freed", default=True, help="Return freed memory at once, as `watch` does.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/live_soak.json"))
def main(
    bundle: Path,
    seconds: float,
    every_s: float,
    window_s: float,
    query: str,
    threads: int | None,
    return_freed: bool,
    out: Path,
) -> None:
    """Watch the stream and write the figures as JSON. The first tenth of the stream is the warm-up."""
    returns_freed = return_freed and return_freed_memory()
    clips = sorted(Path("assets/demo/clips").glob("*.mp4"))
    step_s, warm_up_s = seconds / 60, seconds / 10
    began, samples, events, next_s = time.perf_counter(), [], 0, step_s
    resident: list[int] = []
    with (
        Grounder.load(bundle, threads=threads) as grounder,
        grounder.watch(stream(seconds, clips), [query], every_s=every_s, window_s=window_s) as watch,
    ):
        before, spent_before = watch.stats, time.process_time()
        for update in watch:
            events += len(update.events)
            resident.append(resident_bytes())
            if update.known_s >= next_s:
                now, spent = watch.stats, time.process_time()
                frames, groups = now.coarse_frames - before.coarse_frames, now.groups - before.groups
                samples.append(
                    {
                        "stream_s": update.known_s,
                        "resident_bytes": {"least": min(resident), "most": max(resident)},
                        "cost_ms": cost_ms(before, now),
                        "process_ms": round(1000 * (spent - spent_before) / frames, 3),
                        "tokens_a_group": round((now.prefilled_tokens - before.prefilled_tokens) / groups, 2),
                    }
                )
                before, spent_before, next_s, resident = now, spent, next_s + step_s, []
        stats = watch.stats
    warm = [sample for sample in samples if sample["stream_s"] >= warm_up_s]
    figures = {
        "stream_s": seconds,
        "wall_s": round(time.perf_counter() - began, 1),
        "process_s": round(time.process_time(), 1),
        "options": {"every_s": every_s, "window_s": window_s, "queries": [query], "threads": threads},
        "return_freed": returns_freed,
        "stats": stats.to_json(),
        "events": events,
        "most_resident_bytes_of_each_step": peak_memory(warm),
        "model_ms_a_coarse_frame": by_third(warm, "cost_ms"),
        "process_ms_a_coarse_frame": by_third(warm, "process_ms"),
        "rebuild_spike_ms": round(1000 * stats.longest_rebuild_s, 1),
        "rebuild_mean_ms": round(1000 * stats.rebuild_s / max(stats.rebuilds, 1), 1),
        "over_time": samples,
        "machine": describe("onnxruntime", "numpy", "av"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    click.echo(json.dumps({name: value for name, value in figures.items() if name != "over_time"}, indent=1))


if __name__ == "__main__":
    main()
