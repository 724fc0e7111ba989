"""Measure a bundle on this machine: loading, the first answer, every stage, tokens per second, and peak memory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.evaluation.stage_times import StageTimes
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.results import Grounding, origin_json
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.host.machine import describe
from bridge_stg.runtime.host.memory import gigabytes, peak_bytes, reset_peak

FRAMES = (8, 32, 128)
QUERY = "the red square"
SIZE = (216, 384)
"""Height and width of rendered frames, in pixels."""
RENDERED = "rendered frames"
TOKEN_STAGES = ("vision_coarse", "prefill", "answer")


def bench(
    bundle: Path, *, video: str | None = None, frames: Sequence[int] | None = None, query: str = QUERY, rounds: int = 5,
    progress: Callable[[str, int, int], Any] = lambda stage, done, total: None, **load_options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Load a bundle, ground a query in each video, and return what it took as plain values (docs/results.md).

    Args:
        bundle: the bundle's folder.
        video: the video to measure with; None: one rendered video for each of `frames`.
        frames: numbers of coarse frames of the rendered videos; None: those of `FRAMES` that the model reads at once.
        query: what to find; the answer is never that the target is absent, so that all stages run.
        rounds: measured calls per video, each of which reads and encodes the video anew, after one that is not counted.
        progress: called as progress(stage, done, total) before each call.
        load_options: keyword arguments of `Grounder.load`.

    Raises:
        BridgeError: the bundle cannot be loaded, the video cannot be read, the query is empty, or the model does not
            read so many frames at once.
    """
    with tempfile.TemporaryDirectory(prefix="bridge-stg-bench-") as folder:
        reset_peak()
        began = time.perf_counter()
        with Grounder.load(bundle, **load_options) as grounder:
            load_s = time.perf_counter() - began
            grounder.check_query(query)
            counts = [None] if video else _counts(grounder.spec, frames)
            calls, first_answer_s = len(counts) * (1 + rounds), 0.0
            rows: list[dict[str, Any]] = []
            for count in counts:
                path = video or str(_render(Path(folder) / f"{count}.mp4", grounder.spec, count or 1))
                times = StageTimes()
                for place in range(1 + rounds):
                    progress("bench", len(rows) * (1 + rounds) + place, calls)
                    called = time.perf_counter()
                    result = grounder.ground(path, query, allow_none=False)
                    if place:
                        times.add(result.timings)
                    else:
                        first_answer_s = first_answer_s or load_s + time.perf_counter() - called
                        reset_peak()
                rows.append(_row(grounder, result, times))
            options = {"query": query, "rounds": rounds, "heads": grounder.heads}
            origin = origin_json(
                bundle=grounder.bundle, engine=grounder.target, source=video or RENDERED, options=options
            )
    progress("bench", calls, calls)
    return {
        **origin,
        "machine": describe("onnxruntime", "numpy"),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "load_s": round(load_s, 4),
        "first_answer_s": round(first_answer_s, 4),
        "rows": rows,
    }


def table(measured: Mapping[str, Any]) -> str:
    """Return what `bench` measured as text."""
    machine, engine = measured["machine"], measured["engine"] or {"backend": "unknown", "version": "", "device": ""}
    name = (measured["bundle"] or {"name": "?"})["name"]
    lines = [
        f"{name} on {engine['backend']} {engine['version']}, {engine['device']}; "
        f"{machine['cpu']}, {machine['cores']} cores",
        f"load {measured['load_s']:.2f} s; first answer {measured['first_answer_s']:.2f} s after the start of loading",
    ]
    for row in measured["rows"]:
        tokens, rates = row["tokens"], row["tokens_per_s"]
        rate = ", ".join(f"{stage} {rates[stage]:.0f}" for stage in TOKEN_STAGES if stage in rates)
        lines += [
            "",
            f"{row['coarse_frames']} coarse frames: {tokens['coarse']} + {tokens['fine']} visual tokens, peak memory "
            f"{gigabytes(row['peak_bytes'])}",
            f"  {'stage':14} {'median':>9} {'p95':>9}",
            *(f"  {stage:14} {t['median_s']:8.3f}s {t['p95_s']:8.3f}s" for stage, t in row["stages"].items()),
            f"  tokens per second: {rate}",
        ]
    return "\n".join(lines)


def _counts(spec: ModelSpec, frames: Sequence[int] | None) -> Sequence[int]:
    """Return the numbers of coarse frames to measure. Raises BridgeError if the model reads fewer at once."""
    most = spec.frames.max_coarse_groups * spec.vision.temporal_patch_size
    if frames is not None and max(frames) > most:
        text = f"frames={','.join(map(str, frames))}: this model reads at most {most} coarse frames at once"
        raise BridgeError("options.out_of_range", text)
    return frames or [count for count in FRAMES if count <= most] or [most]


def _row(grounder: Grounder, result: Grounding, times: StageTimes) -> dict[str, Any]:
    """Return the figures of one video."""
    median, late = times.percentile(50), times.percentile(95)
    answer_tokens = result.decoding.get("tokens") or len(grounder.tokenizer.encode(result.answer))
    counts = {"vision_coarse": result.tokens["coarse"], "prefill": result.tokens["coarse"], "answer": answer_tokens}
    return {
        "coarse_frames": result.coarse.groups * grounder.spec.vision.temporal_patch_size,
        "tokens": {"coarse": int(result.tokens["coarse"]), "fine": int(result.tokens["fine"]), "answer": answer_tokens},
        "stages": {s: {"median_s": round(median[s], 5), "p95_s": round(late[s], 5)} for s in median},
        "tokens_per_s": {s: round(count / median[s], 1) for s, count in counts.items() if median.get(s)},
        "peak_bytes": peak_bytes(),
    }


def _render(path: Path, spec: ModelSpec, coarse_frames: int) -> Path:
    """Write a video of a texture that moves behind a red square, of as many coarse frames; return its path."""
    from PIL import Image

    from bridge_stg.runtime.visualize.annotate import encode_h264

    height, width = SIZE
    rough = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    texture = rough.repeat(8, axis=0).repeat(8, axis=1)
    rate = max(spec.frames.fine_fps, spec.frames.coarse_fps)
    count = round(coarse_frames / spec.frames.coarse_fps * rate)

    def images() -> Iterator[tuple[float, Image.Image]]:
        for i in range(count):
            frame = np.roll(texture, 5 * i, axis=1)
            frame[80:130, 20 + 200 * i // count :][:, :50] = (220, 30, 30)
            yield i / rate, Image.fromarray(frame)

    encode_h264(images(), path, lambda: count / rate)
    return path
