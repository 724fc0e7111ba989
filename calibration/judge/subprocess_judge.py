"""Ask a bundle its samples in a process of its own, where two large models would not fit into memory together.

The second process writes the file of rows that the first one then reads, so that nothing else passes between them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge_stg.calibration.collect.samples import read_samples
from bridge_stg.evaluation.run.evaluate import bundle_model, evaluate
from bridge_stg.runtime.errors import BridgeError, EngineError
from bridge_stg.runtime.host.peak import peak_bytes

START = (
    "import json, sys; paths, job = json.loads(sys.argv[1]); sys.path[:] = paths; "
    "from bridge_stg.calibration.judge.subprocess_judge import main; sys.exit(main(job))"
)

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
        EngineError: the process failed; the message holds its last line.
    """
    job = {
        "bundle": str(bundle), "label": label, "samples": str(samples), "media": None if media is None else str(media),
        "chosen": chosen, "folder": str(folder), "limit": limit, "options": dict(options),
    }  # fmt: skip
    arguments = json.dumps([[path or "." for path in sys.path], job])
    done = subprocess.run(
        [sys.executable, "-c", START, arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode == 2 and lines:
        raise EngineError(lines[-1])
    if done.returncode < 0:
        why = "most likely it ran out of memory" if done.returncode == -9 else "its engine crashed"
        raise EngineError(
            f"the process that asks {label} was ended by signal {-done.returncode}: {why}. Close other programs and "
            "give the same command again: it goes on at the sample"
        )
    raise EngineError(f"the process that asks {label} failed: {lines[-1] if lines else f'code {done.returncode}'}")


def main(job: Mapping[str, Any]) -> int:
    """Do what `judge_in_subprocess` asks. Return the exit code."""
    folder = Path(job["folder"])
    try:
        dataset = read_samples(Path(job["samples"]), None if job["media"] is None else Path(job["media"])).dataset
        dataset = dataset.only(job["chosen"])
        model = bundle_model(Path(job["bundle"]), job["label"], **job["options"])
        evaluate(dataset, [model], folder, limit=job["limit"])
    except BridgeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    (folder / PEAK).write_text(json.dumps(peak_bytes()), encoding="utf-8")
    return 0
