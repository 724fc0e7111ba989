"""Measure how m_tIoU and m_vIoU of the demo on held-out clips change with fewer visual tokens, and the time saved.

Two settings vary: the token budget of the prompt (`max_visual_tokens`: smaller frames, then fewer of them), and the
tolerance below which a group of nearly equal frames is not encoded again (`unchanged_tolerance`). All settings run on
the same clips; losses are paired per clip with the default setting and have a 95 % bootstrap confidence interval.
Results go to benchmarks/results/token_budget.json.

Usage:
python benchmarks/accuracy/token_budget.py --tasks build/tasks/tube.jsonl [--bundle build/demo/bundle] [--clips 40]
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from bridge_stg.calibration.scoring.scores import Scores, score_model
from bridge_stg.evaluation.datasets.jsonl import read_jsonl
from bridge_stg.evaluation.run.evaluate import Model, bundle_model
from bridge_stg.evaluation.samples import Dataset
from bridge_stg.runtime import Grounder, Grounding
from bridge_stg.runtime.host.machine import describe

BUDGETS = (None, 192, 128, 64, 32)
TOLERANCES = (2.0, 8.0, 32.0)
FILE = click.Path(exists=True, path_type=Path)


@dataclass
class Spent:
    """Tokens, groups and CPU seconds of the calls under one setting, one entry per clip."""

    tokens: list[int] = field(default_factory=list)
    encoded: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    coarse_cpu_s: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, float]:
        """Return means, and the median CPU seconds of coarse vision, prefill and answer; empty for a resumed run."""
        if not self.tokens:
            return {}
        return {
            "visual_tokens": round(statistics.mean(self.tokens), 1),
            "groups": round(statistics.mean(self.groups), 2),
            "groups_encoded": round(statistics.mean(self.encoded), 2),
            "coarse_cpu_s": round(statistics.median(self.coarse_cpu_s), 4),
        }


class Saving:
    """A grounder with one setting that records how many groups and tokens its graphs process."""

    def __init__(self, grounder: Grounder, budget: int | None, spent: Spent) -> None:
        self._grounder, self._budget, self._spent = grounder, budget, spent

    def ground(self, video: Any, query: str, **options: Any) -> Grounding:
        """Answer one query; the coarse CPU time is that of everything before the spatial pass."""
        session: Any = self._grounder.sessions["vision_encoder"]
        infer, encoded = type(session).infer, 0

        def counted(feeds: Any, *, cache: Any = None) -> Any:
            nonlocal encoded
            encoded += len(feeds["frames"])
            return infer(session, feeds, cache=cache)

        session.infer = counted
        try:
            began = time.process_time()
            with self._grounder.open(video, max_visual_tokens=self._budget) as opened:
                self._spent.encoded.append(encoded)
                opened.span(query, **options)
                self._spent.coarse_cpu_s.append(time.process_time() - began)
                found = opened.ground(query, **options)
        finally:
            del session.infer
        self._spent.tokens.append(found.coarse.tokens)
        self._spent.groups.append(found.coarse.groups)
        return found


def setting(path: Path, label: str, spent: Spent, *, budget: int | None, tolerance: float, threads: int) -> Model:
    """Return a bundle with one setting as a model to evaluate."""
    plain = bundle_model(path, label, threads=threads)

    @contextmanager
    def opened() -> Iterator[Saving]:
        with Grounder.load(path, threads=threads, unchanged_tolerance=tolerance) as grounder:
            yield Saving(grounder, budget, spent)

    return Model(label, {**plain.identity, "budget": budget, "tolerance": tolerance}, opened)


@click.command()
@click.option("--bundle", type=FILE, default=Path("build/demo/bundle"), show_default=True)
@click.option("--tasks", type=FILE, required=True, help="Held-out clips with labelled tubes, JSON lines.")
@click.option("--clips", default=40, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("build/token_budget"), show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("benchmarks/results/token_budget.json"))
def main(bundle: Path, tasks: Path, clips: int, folder: Path, threads: int, out: Path) -> None:
    """Evaluate the clips with every setting, and write accuracy and cost of each."""
    dataset = read_jsonl([tasks], tasks.parent)
    dataset = Dataset(**{**vars(dataset), "samples": dataset.samples[:clips]})
    rows: list[dict[str, Any]] = []
    reference: Scores | None = None
    settings = [(budget, 0.0) for budget in BUDGETS] + [(None, tolerance) for tolerance in TOLERANCES]
    for budget, tolerance in settings:
        spent = Spent()
        label = f"{budget or 'all'}-{tolerance:g}"
        model = setting(bundle, label, spent, budget=budget, tolerance=tolerance, threads=threads)
        found = score_model(model, dataset, folder=folder, reference=reference)
        reference = reference or found
        given = {"max_visual_tokens": budget, "unchanged_tolerance": tolerance}
        rows.append({**given, **described(found), **spent.to_json()})
        click.echo(json.dumps(rows[-1]))
    result = {"clips": len(dataset.samples), "threads": threads, "settings": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "machine": describe("onnxruntime", "numpy")}, indent=2) + "\n", "utf-8")


def described(found: Scores) -> dict[str, Any]:
    """Return metrics, and the points lost against the reference with their confidence interval."""
    return {
        "failed": found.failed,
        **{metric: round(interval.value, 4) for metric, interval in found.metrics.items()},
        "points_lost": {
            metric: {name: round(getattr(drop, name), 2) for name in ("value", "low", "high")}
            for metric, drop in found.drops.items()
        },
    }


if __name__ == "__main__":
    main()
