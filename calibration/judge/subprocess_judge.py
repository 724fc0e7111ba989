"""Ask a bundle its samples in a process of its own, where two large models would not fit into memory together.

The second process writes the file of rows that the first one then reads, so that nothing else passes between them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.evaluation.run.evaluate import bundle_model, evaluate
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess

PEAK = "peak.json"


def judge_in_subprocess(
    bundle: Path,
    label: str,
    *,
    samples: Path,
    media: Path | None,
    chosen: list[str] | None,
    folder: Path,
    limit: int | None,
    options: Mapping[str, Any],
) -> None:
    """Fill `folder`/samples/LABEL.jsonl with the first `limit` samples.

    Args:
        bundle: to be asked.
        label: its name.
        samples: the file of samples.
        media: the folder of their media; None: that of the file.
        chosen: only samples with these ids; None: all.
        folder: of the rows; the memory that was held at most goes to `PEAK` there.
        limit: None: all.
        options: `backend`, `variant` and `threads`.

    Raises:
        BridgeError: the evaluation failed.
        EngineError: the process failed; see `run_in_subprocess`.
    """
    job = {
        "bundle": str(bundle), "label": label, "samples": str(samples), "media": None if media is None else str(media),
        "chosen": chosen, "folder": str(folder), "limit": limit, "options": dict(options),
    }  # fmt: skip
    run_in_subprocess(
        "bridge_stg.calibration.judge.subprocess_judge:evaluate_job",
        job,
        purpose=f"evaluates {label}",
        advice="Close other programs and run the same command again: it continues at the sample",
    )


def evaluate_job(job: Mapping[str, Any]) -> None:
    """Run a job of `judge_in_subprocess`."""
    folder = Path(job["folder"])
    dataset = read_samples(Path(job["samples"]), None if job["media"] is None else Path(job["media"])).dataset
    model = bundle_model(Path(job["bundle"]), job["label"], **job["options"])
    evaluate(dataset.only(job["chosen"]), [model], folder, limit=job["limit"])
    (folder / PEAK).write_text(json.dumps(peak_bytes()), encoding="utf-8")
