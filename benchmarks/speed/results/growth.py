"""Measure how the cost of this runtime grows with frames, tube length, queries per video, batch and resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings
from speed.runners import Runner
from speed.workload.clips import QUERIES, clip

AXES: Mapping[str, Sequence[int]] = {
    "frames": (8, 16, 32, 64, 128),
    "tube": (8, 16, 32, 64, 128),
    "queries": (1, 2, 4, 8, 16),
    "batch": (1, 2, 4, 8, 16),
    "resolution": (128, 192, 256, 352, 512),
}
"""Values of each axis: coarse frames; coarse frames of the tube in a clip of 128; queries on a video of 32 frames; rows
of a decode step; width and height in pixels of a video of 16 frames."""

UNITS = {
    "frames": "coarse frames", "tube": "coarse frames in the tube", "queries": "queries on one video",
    "batch": "rows of a decode step", "resolution": "pixels of a frame",
}  # fmt: skip


def answer_ids(spec: ModelSpec, tokenizer: Tokenizer, frames: int, groups: tuple[int, int]) -> list[int]:
    """Return the ids of the answer for groups (first, last) of a clip of `frames` coarse frames."""
    each = spec.vision.temporal_patch_size
    times = (np.arange(frames) / spec.frames.coarse_fps).reshape(-1, each).mean(1)
    return AnswerGrammar(tokenizer, spec.prompt, time_strings(times, spec.prompt), allow_none=False).answer_ids(groups)


def cases(spec: ModelSpec, tokenizer: Tokenizer, folder: Path, axes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the points to measure: `axis`, `x`, the `row` to run and its `inputs`."""
    each = spec.vision.temporal_patch_size

    def inputs_of(frames: int, length: int, count: int = 1, size: tuple[int, int] = (384, 216)) -> dict[str, Any]:
        groups = frames // each
        taken = max(1, length // each)
        first = (groups - taken) // 2
        return {
            "clip": np.array(str(clip(folder / "clips", spec, frames, size=size))),
            "queries": np.array(QUERIES),
            "answer_ids": np.array(answer_ids(spec, tokenizer, frames, (first, first + taken - 1)), np.int64),
            "count": np.array(count),
        }

    for axis in axes:
        for x in AXES[axis]:
            if axis == "batch":
                ids = np.random.default_rng(0).integers(0, min(spec.language.vocab_size, 150_000), (x, 256 + 8))
                yield {
                    "axis": axis,
                    "x": x,
                    "row": "batch",
                    "inputs": {"prefix_ids": ids[:, :256], "step_ids": ids[:, 256:]},
                }
                continue
            inputs = {
                "frames": lambda x=x: inputs_of(x, 4),
                "tube": lambda x=x: inputs_of(128, x),
                "queries": lambda x=x: inputs_of(32, 8, x),
                "resolution": lambda x=x: inputs_of(16, 4, size=(x, x)),
            }[axis]()
            yield {"axis": axis, "x": x**2 if axis == "resolution" else x, "row": "queries", "inputs": inputs}


def measure_growth(
    runner: Runner,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    folder: Path,
    measured: list[dict[str, Any]],
    *,
    axes: Sequence[str],
    repeat: int,
    save: Callable[[], Any],
    progress: Callable[[str], Any],
    late: Callable[[], bool] = lambda: False,
) -> None:
    """Measure the points missing in `measured`, and append them, until `late`; the fastest of `repeat` runs counts."""
    known = {(point["axis"], point["x"]) for point in measured}
    inputs, outputs = folder / "growth_in.npz", folder / "growth_out.npz"
    for case in cases(spec, tokenizer, folder, axes):
        if (case["axis"], case["x"]) in known or late():
            continue
        progress(f"growth: {case['axis']} {case['x']}")
        np.savez(inputs, **case["inputs"])
        request = {"do": "run", "row": case["row"], "inputs": str(inputs), "repeat": repeat, "outputs": str(outputs)}
        answer = runner.ask(request, timeout_s=1200)
        point = {"axis": case["axis"], "x": case["x"], "seconds": min(answer["seconds"])}
        with np.load(outputs, allow_pickle=False) as arrays:
            if "details" in arrays:
                import json

                details = json.loads(str(arrays["details"]))
                point |= {key: details[key] for key in ("calls", "language_steps", "graphs", "tokens")}
        measured.append(point)
        save()


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Fit y ∝ x^power by least squares on logarithms; return the power, or None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = (np.log(np.array(values, np.float64)) for values in zip(*points, strict=True))
    return round(float(np.polyfit(x, y, 1)[0]), 3)


def last_step(points: Sequence[tuple[float, float]]) -> float | None:
    """Return the power between the last two points, where constant costs matter least."""
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    return round(math.log(y1 / y0) / math.log(x1 / x0), 3)


def summary(measured: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the fitted powers and the unit of each axis."""
    found: dict[str, dict[str, Any]] = {}
    for axis in AXES:
        points = [(point["x"], point["seconds"]) for point in measured if point["axis"] == axis]
        if points:
            found[axis] = {"exponent": exponent(points), "last_step": last_step(points), "unit": UNITS[axis]}
            steps = [point.get("language_steps") for point in measured if point["axis"] == axis]
            if axis == "tube":
                found[axis]["language_steps"] = steps
    return found
