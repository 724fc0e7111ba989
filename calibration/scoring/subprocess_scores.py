"""Evaluate a bundle in a subprocess, since memory may be too small for two large models.

The subprocess writes the rows, which the parent then reads from disk, and its peak memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.calibration.options import load_arguments
from bridge_stg.calibration.work_folder import read_json
from bridge_stg.evaluation.run.evaluate import bundle_model, evaluate
from bridge_stg.runtime.host.memory import peak_bytes
from bridge_stg.runtime.host.subprocess import run_in_subprocess

PEAK = "peak.json"


def evaluate_in_subprocess(
    limit: int | None,
    *,
    bundle: Path,
    label: str,
    samples: Path,
    media: Path | None,
    ids: Sequence[str] | None,
    folder: Path,
    options: Mapping[str, Any],
) -> None:
    """Write `folder`/samples/LABEL.jsonl with the first `limit` samples or all, and the peak memory into `PEAK`."""
    job = {
        "bundle": str(bundle), "label": label, "samples": str(samples), "media": None if media is None else str(media),
        "ids": ids, "folder": str(folder), "limit": limit, "options": dict(options),
    }  # fmt: skip
    advice = "Close other programs and run the same command again: it resumes at the next sample"
    run_in_subprocess(f"{__name__}:evaluate_job", job, purpose=f"evaluates {label}", advice=advice)


def evaluate_job(job: Mapping[str, Any]) -> None:
    """Run a job of `evaluate_in_subprocess`."""
    folder = Path(job["folder"])
    dataset = read_samples(Path(job["samples"]), None if job["media"] is None else Path(job["media"])).dataset
    model = bundle_model(Path(job["bundle"]), job["label"], **load_arguments(job["options"]))
    evaluate(dataset.only(job["ids"]), [model], folder, limit=job["limit"])
    (folder / PEAK).write_text(json.dumps(peak_bytes()), encoding="utf-8")


def peak_of(folder: Path) -> int | None:
    """Return the peak memory in bytes of the subprocess that wrote a folder; None without one."""
    peak: int | None = read_json(folder / PEAK, int | None)
    return peak
