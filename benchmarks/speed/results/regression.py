"""Compare the demo's speed ratios with those recorded for this CPU, within the noise of both measurements.

Ratios are measured, not seconds, since those of one run depend little on the machine's other work: this runtime against
eager torch stage by stage, int8 against fp32, and how the cost grows. All runners take turns; every round gives each
ratio once. A ratio that is worse is measured again by new processes, and counts if it is worse again.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.machine import describe
from speed.measure import REFERENCE, Results, key_of, make_inputs, measure
from speed.results.growth import cases
from speed.runners import own_runners, start
from speed.workload.bundles import Model, request_of

RECORD = Path("benchmarks/results/check_demo.json")
ROUNDS, FRAMES, SIZE = 7, 32, (384, 216)
STAGES = ("vision", "prefill", "decode", "bridge", "spatial", "end_to_end")
GROWTH = {"frames": (64, 128), "tube": (8, 128), "batch": (1, 8)}
"""Axis of `growth.AXES` → the two values whose costs are compared."""
LEAST_MARGIN = 0.05
"""A change of less than this share is never reported."""

Rounds = Mapping[str, Sequence[float]]
"""Cost of this runtime over that of what it is compared with, by ratio, one value per round."""


@dataclass(frozen=True)
class Ratio:
    """A cost relative to another in the same run: less is better.

    Attributes:
        value: median over the rounds.
        noise: robust standard deviation of one round, as a share of the value.
    """

    value: float
    noise: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Ratio:
        """Return the ratio of several rounds."""
        logs = [math.log(value) for value in rounds]
        middle = statistics.median(logs)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in logs)
        return cls(round(math.exp(middle), 4), round(spread, 4))

    def worse_than(self, recorded: Ratio) -> bool:
        """Return whether this ratio exceeds a recorded one by more than twice the noise of both."""
        return math.log(self.value / recorded.value) > margin(self, recorded)


def margin(now: Ratio, recorded: Ratio) -> float:
    """Return the share by which two ratios may differ."""
    return max(LEAST_MARGIN, 2 * math.hypot(now.noise, recorded.noise))


def check_demo(model: Model, *, rounds: int | None, threads: int, update: bool, record: Path = RECORD) -> int:
    """Measure the demo's ratios and compare or record them; return the command's exit status.

    Args:
        model: the demo, with bundles in fp32 and int8.
        rounds: number of rounds; None: `ROUNDS`.
        threads: threads per runner.
        update: record the ratios for this CPU instead of comparing them.
        record: file of recorded ratios by CPU.

    Returns:
        0: no ratio is worse than recorded; 1: some are; 2: none are recorded for this CPU.
    """
    machine = describe("onnxruntime", "numpy", "torch", "transformers")
    cpu = f"{machine['cpu']}, {threads} threads, {' '.join(machine['flags'])}"  # type: ignore[arg-type]
    records: dict[str, Any] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if cpu not in records and not update:
        click.echo(f"{record} has no ratios of this CPU ({cpu}). Record those of a commit to compare with: --update")
        return 2
    now = {name: Ratio.of(values) for name, values in measured(model, rounds or ROUNDS, threads).items()}
    if update:
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        ratios = {name: asdict(ratio) for name, ratio in now.items()}
        records[cpu] = {"measured": at, "machine": machine, "rounds": rounds or ROUNDS, "ratios": ratios}
        with replacing(record) as temporary:
            temporary.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        click.echo(f"recorded {len(now)} ratios of {cpu} in {record}")
        return 0
    recorded = {name: Ratio(**values) for name, values in records[cpu]["ratios"].items()}
    worse = worse_ratios(now, recorded)
    if worse:
        click.echo(f"worse, measured again: {', '.join(worse)}", err=True)
        again = {name: Ratio.of(values) for name, values in measured(model, rounds or ROUNDS, threads).items()}
        worse = [name for name in worse if name in worse_ratios(again, recorded)]
        now |= {name: again[name] for name in worse}
    click.echo("\n".join(table(now, recorded, worse)))
    return int(bool(worse))


def worse_ratios(now: Mapping[str, Ratio], recorded: Mapping[str, Ratio]) -> list[str]:
    """Return the names of the ratios that are worse than recorded. One that is not recorded is new, and passes."""
    return [name for name, ratio in now.items() if name in recorded and ratio.worse_than(recorded[name])]


def table(now: Mapping[str, Ratio], recorded: Mapping[str, Ratio], worse: Sequence[str]) -> list[str]:
    """Return one line per ratio: cost now and recorded, the change, what is allowed, and a verdict."""
    lines = [f"{'cost, less is better':36} {'now':>8} {'recorded':>9} {'change':>8} {'allowed':>8}"]
    for name, ratio in now.items():
        before = recorded.get(name)
        if before is None:
            lines.append(f"{name:36} {ratio.value:8.3f} {'–':>9}")
            continue
        change, allowed = ratio.value / before.value - 1, math.exp(margin(ratio, before)) - 1
        verdict = "  WORSE" if name in worse else ""
        lines.append(f"{name:36} {ratio.value:8.3f} {before.value:9.3f} {change:+8.1%} {allowed:+8.1%}{verdict}")
    return lines


def measured(model: Model, rounds: int, threads: int) -> Rounds:
    """Measure all ratios, each once per round."""
    inputs = {FRAMES: make_inputs(model.checkpoint, model.work, FRAMES, SIZE)}
    own = own_runners(("fp32", "int8"), ("torch_eager", "ours"))
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "state.json")
        measure(
            request_of(model), own, inputs, results, rounds={FRAMES: rounds}, threads=threads, work=model.work,
            rows=(*STAGES, "queries"), progress=lambda text: click.echo(text, err=True),
        )  # fmt: skip
    return ratios_of(results, model.name) | growth_of(model, rounds, threads)


def ratios_of(results: Results, model: str) -> dict[str, list[float]]:
    """Return the ratios of each round: stages in fp32 and int8, and eight queries.

    Raises:
        ClickException: a runner failed.
    """

    def rounds(label: str, row: str) -> list[float]:
        found = results.rows.get(key_of(model, FRAMES, label), {}).get(row, {})
        if "error" in found or not found.get("seconds"):
            error = found.get("error") or results.runners.get(f"{model}/{label}", {}).get("error", "it did not run")
            raise click.ClickException(f"{label}, {row}: {error}")
        return list(found["seconds"])

    def over(label: str, row: str, other: str, other_row: str) -> list[float]:
        return [a / b for a, b in zip(rounds(label, row), rounds(other, other_row), strict=True)]

    found = {f"{row}: fp32 over torch": over("ours_fp32", row, REFERENCE, row) for row in STAGES}
    found |= {f"{row}: int8 over fp32": over("ours_int8", row, "ours_fp32", row) for row in STAGES}
    return found | {"8 queries over 1": over("ours_int8", "queries_8", "ours_int8", "queries_1")}


def growth_of(model: Model, rounds: int, threads: int) -> dict[str, list[float]]:
    """Return how much more the larger value of each axis of `GROWTH` costs in int8, round by round."""
    spec = own_runners(("int8",), ("ours",))[0]
    tokenizer = Tokenizer.from_file(model.bundles["int8"] / "tokenizer.json")
    chosen = [
        case for case in cases(model.spec, tokenizer, model.work, tuple(GROWTH)) if case["x"] in GROWTH[case["axis"]]
    ]
    seconds: dict[tuple[str, int], list[float]] = {(case["axis"], case["x"]): [] for case in chosen}
    runner = start(spec, request_of(model), threads=threads, log=model.work / "logs" / "growth.log")
    try:
        for turn in range(1 + rounds):  # the first warms up
            for case in chosen:
                click.echo(f"{model.name}, {case['axis']} {case['x']}, {turn}/{rounds}", err=True)
                file = model.work / f"check_{case['axis']}_{case['x']}.npz"
                if not turn:
                    np.savez(file, **case["inputs"])
                request = {"do": "run", "row": case["row"], "inputs": str(file), "repeat": 1, "outputs": None}
                taken = runner.ask(request, timeout_s=600)["seconds"][0]
                if turn:
                    seconds[case["axis"], case["x"]].append(taken)
    finally:
        runner.end()
    return {
        f"{axis}: {large} over {small}": [
            b / a for a, b in zip(seconds[axis, small], seconds[axis, large], strict=True)
        ]
        for axis, (small, large) in GROWTH.items()
    }
