"""Measure all runners of one model on the same inputs in turn: times, memory and parity of every row.

Each result is saved at once, so an interrupted run resumes. A failed runner is recorded with its error; the others
continue.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.host.files import replacing
from speed.parity import parity
from speed.runners import Runner, RunnerError, RunnerSpec, start

ROWS = ("vision", "prefill", "prefill_text", "decode", "bridge", "spatial", "end_to_end", "queries")
REFERENCE = "torch_eager_fp32"
LONG_S, MOST_REPEATS = 1.0, 5
"""A row that takes less than `LONG_S` seconds is repeated, at most `MOST_REPEATS` times."""

WARM = ("end_to_end", "queries")
"""Rows that earlier rows have already warmed up, so their first turn counts."""

Progress = Callable[[str], Any]
Late = Callable[[], bool]


class Results:
    """Results in a JSON file, saved after each measurement.

    Attributes:
        runners: key → the runner's answer to `load`, or `error`.
        rows: key → row → seconds of each round, tokens, peak memory, parity, details; or `error`.
        facts: model/frames → configuration and input sizes, from which operations are counted.
        missing: name → reason, for everything that was not measured.
        limits: the machine's limits, one entry per measurement.
        cold_start: precision → seconds of single `infer` processes.
        growth: measured points of all axes.
        code: hash of the code that was measured.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        saved = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.runners: dict[str, dict[str, Any]] = saved.get("runners", {})
        self.rows: dict[str, dict[str, dict[str, Any]]] = saved.get("rows", {})
        self.facts: dict[str, dict[str, Any]] = saved.get("facts", {})
        self.missing: dict[str, str] = saved.get("missing", {})
        self.limits: list[dict[str, Any]] = saved.get("limits", [])
        self.cold_start: dict[str, list[float]] = saved.get("cold_start", {})
        self.growth: list[dict[str, Any]] = saved.get("growth", [])
        self.code: str = saved.get("code", "")

    def save(self) -> None:
        """Write the file atomically."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as temporary:
            saved = {name: value for name, value in vars(self).items() if name != "file"}
            text = json.dumps(saved, indent=1)
            temporary.write_text(text + "\n", encoding="utf-8")

    def forget(self, models: Sequence[str], frames: Sequence[int], *, growth: bool) -> None:
        """Drop the results of these models at these frame counts, and the limits, which belong to a run."""
        dropped = {f"{model}/{count}" for model in models for count in frames}
        self.rows = {key: rows for key, rows in self.rows.items() if key.rpartition("/")[0] not in dropped}
        self.runners = {key: loaded for key, loaded in self.runners.items() if key.partition("/")[0] not in models}
        self.limits, self.cold_start = [], {} if "demo" in models else self.cold_start
        if growth:
            self.growth = []
        self.save()

    def row(self, key: str, row: str) -> dict[str, Any]:
        """Return the figures of a row, created empty if missing."""
        return self.rows.setdefault(key, {}).setdefault(row, {"seconds": []})


def key_of(model: str, frames: int, label: str) -> str:
    """Return the key of a runner's rows."""
    return f"{model}/{frames}/{label}"


def make_inputs(checkpoint: Path, folder: Path, frames: int, size: tuple[int, int]) -> Path:
    """Return the folder of the inputs for one frame count; a subprocess records them if they are missing."""
    inputs = folder / "inputs" / f"{size[0]}x{size[1]}_{frames}"
    if not (inputs / "end_to_end.npz").is_file():
        program = Path(__file__).with_name("workload") / "inputs.py"
        command = [sys.executable, program, checkpoint, inputs, frames, *size]
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    with np.load(inputs / "end_to_end.npz", allow_pickle=False) as recorded:
        for count in (1, 8):
            np.savez(inputs / f"queries_{count}.npz", **{**dict(recorded), "count": np.array(count)})
    return inputs


def measure(
    model: Mapping[str, Any],
    specs: Sequence[RunnerSpec],
    inputs: Mapping[int, Path],
    results: Results,
    *,
    rounds: Mapping[int, int],
    threads: int,
    work: Path,
    rows: Sequence[str] = ROWS,
    progress: Progress = lambda text: None,
    timeout_s: float = 1200,
    late: Late = lambda: False,
) -> None:
    """Start the runners of one model, and measure every row at every frame count, round robin.

    Args:
        model: `name`, `checkpoint`, `folder` and `bundles` of the protocol's `load` request.
        specs: runners in the order of their turns, reference first, since the others are compared with its outputs.
        inputs: input folder by number of coarse frames.
        results: receives the measurements.
        rounds: number of rounds by number of coarse frames.
        threads: threads per runner.
        work: folder for logs and outputs.
        rows: rows to measure.
        progress: called with a line of text before each step.
        timeout_s: limit for one answer in seconds.
        late: whether the run's time has ended; then no other runner or row is begun.
    """
    name = model["name"]
    runners: list[Runner] = []
    try:
        for spec in specs:
            if late() or all(done(results, name, frames, spec, rounds[frames], rows) for frames in inputs):
                continue
            progress(f"{name}: loading {spec.label}")
            try:
                runner = start(spec, model, threads=threads, log=work / "logs" / f"{name}_{spec.label}.log")
            except RunnerError as error:
                results.runners[f"{name}/{spec.label}"] = {"error": str(error)}
            else:
                results.runners[f"{name}/{spec.label}"] = {k: v for k, v in runner.loaded.items() if k != "ok"}
                runners.append(runner)
            results.save()
        for frames, folder in inputs.items():
            for row in rows:
                for file in sorted(folder.glob(f"{row}.npz")) or sorted(folder.glob(f"{row}_*.npz")):
                    if late():
                        return
                    turns(runners, name, frames, row, file, results, rounds[frames], work, progress, timeout_s)
    finally:
        for runner in runners:
            runner.end()


def done(results: Results, model: str, frames: int, spec: RunnerSpec, rounds: int, rows: Sequence[str]) -> bool:
    """Return whether a runner has no rows left to measure at this frame count."""
    return unmeasured(results, model, frames, spec, rounds, rows) == []


def unmeasured(
    results: Results, model: str, frames: int, spec: RunnerSpec, rounds: int, rows: Sequence[str]
) -> list[str] | None:
    """Return a runner's rows that have not been measured `rounds` times, or None if it has not been loaded."""
    loaded = results.runners.get(f"{model}/{spec.label}", {})
    if not loaded or "error" in loaded:
        return None
    measured = results.rows.get(key_of(model, frames, spec.label), {})
    wanted = [row for row in rows if row in loaded["rows"] and (spec.rows is None or row in spec.rows)]
    names = [name for row in wanted for name in (("queries_1", "queries_8") if row == "queries" else (row,))]
    if "vision" not in loaded["rows"] and "prefill_text" in loaded["rows"]:
        names = [name for name in names if name != "prefill"]
    return [
        name
        for name in names
        if name not in measured or not ("error" in measured[name] or len(measured[name]["seconds"]) >= rounds)
    ]


def turns(
    runners: list[Runner],
    model: str,
    frames: int,
    row: str,
    file: Path,
    results: Results,
    rounds: int,
    work: Path,
    progress: Progress,
    timeout_s: float,
) -> None:
    """Measure one row: every runner warms up once, then they take turns; the first outputs are compared."""
    name = file.stem
    outputs = work / "outputs" / f"{model}_{frames}"
    outputs.mkdir(parents=True, exist_ok=True)
    repeats: dict[str, int] = {}
    for turn in range(row in WARM, rounds + 1):
        for runner in list(runners):
            label = runner.spec.label
            if not measures(runner, row):
                continue
            found = results.row(key_of(model, frames, label), name)
            if "error" in found or len(found["seconds"]) >= rounds:
                continue
            progress(f"{model}, {frames} frames, {name}, {label}" + (f", {turn}/{rounds}" if turn else ", warm-up"))
            out = outputs / f"{name}_{label}.npz"
            request = {"do": "run", "row": row, "inputs": str(chosen_input(runner, row, file)), "repeat": 1}
            request["repeat"] = repeats.get(label, 1) if turn else 1
            first = row in WARM or not turn
            request["outputs"] = str(out) if first else None
            try:
                answer = runner.ask(request, timeout_s=timeout_s)
            except RunnerError as error:
                found["error"] = str(error)
                if runner.process.poll() is not None:
                    runners.remove(runner)
            else:
                keep(found, answer, out if request["outputs"] else None, turn, row)
                found["beside"] = runner.spec.compared_with
                found["text_alone"] = Path(request["inputs"]).stem == "prefill_text"
                slowest = max(answer["seconds"])
                repeats[label] = max(1, min(MOST_REPEATS, int(LONG_S / max(slowest, 1e-6))))
                if first and "parity" not in found and row != "queries":
                    reference = outputs / f"{Path(request['inputs']).stem}_{REFERENCE}.npz"
                    found["parity"] = compared(row, out, reference)
            results.save()


def keep(found: dict[str, Any], answer: Mapping[str, Any], out: Path | None, turn: int, row: str) -> None:
    """Add an answer to a row's figures. The first turn includes warm-up and compilation."""
    found["tokens"], found["peak_bytes"] = answer["tokens"], answer["peak_bytes"]
    found["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if turn:
        found["seconds"].append(statistics.median(answer["seconds"]))
        if "cpu_seconds" in answer:  # of all threads; hardly affected by other load
            found.setdefault("cpu_seconds", []).append(statistics.median(answer["cpu_seconds"]))
    else:
        found["first_s"] = answer["seconds"][0]
    if out is not None and row in WARM:
        with np.load(out, allow_pickle=False) as arrays:
            if "details" in arrays and turn:
                found.setdefault("details", []).append(json.loads(str(arrays["details"])))


def compared(row: str, out: Path, reference: Path) -> dict[str, Any]:
    """Compare the arrays of two files; return an error if the reference is missing."""
    if not reference.is_file():
        return {"error": "the reference did not run"}
    with np.load(out, allow_pickle=False) as mine, np.load(reference, allow_pickle=False) as theirs:
        return parity(row, dict(mine), dict(theirs))


def measures(runner: Runner, row: str) -> bool:
    """Return whether this runner measures a row. A peer without a vision encoder prefills only text."""
    text_only = row == "prefill" and "vision" not in runner.rows
    return row in runner.rows and not (text_only and "prefill_text" in runner.rows)


def chosen_input(runner: Runner, row: str, file: Path) -> Path:
    """Return the input file of a row for this runner."""
    if row == "prefill" and "vision" not in runner.rows:
        return file.with_name("prefill_text.npz")
    return file


def median(found: Mapping[str, Any]) -> float | None:
    """Return the median seconds of a row, or None if it has none."""
    return statistics.median(found["seconds"]) if found.get("seconds") else None
