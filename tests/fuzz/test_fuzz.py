"""300 damaged inputs of every kind that a user can hand in: no traceback, no hang, no memory over 2 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.targets import kinds, make_media, make_model_files, make_texts

SEED, INPUTS, PROCESSES = 0, 300, 2
ROOT = Path(__file__).parents[2]


def run(intact: Path, seed: int, first: int, end: int) -> list[dict[str, Any]]:
    """Read inputs in a process, and in another one after each that ended it; return the findings."""
    findings: list[dict[str, Any]] = []
    while first < end:
        command = [sys.executable, "-m", "tests.fuzz.run", str(intact), *map(str, (seed, first, end))]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        findings += [line for line in lines if "finding" in line]
        if done.returncode == 0:
            break
        last = lines[-1] if lines else {"number": first}
        findings.append({**last, "finding": f"exit code {done.returncode}: {done.stderr[-3000:]}"})
        first = last["number"] + 1
    return findings


@pytest.mark.slow
def test_damaged_inputs(tmp_path: Path, exported: Any, checkpoint: Path) -> None:
    make_media(tmp_path)
    make_texts(tmp_path)
    make_model_files(tmp_path, exported.path, checkpoint)
    end = len(kinds(tmp_path)) + INPUTS
    step = -(-end // PROCESSES)
    with ThreadPoolExecutor(PROCESSES) as threads:
        found = threads.map(lambda first: run(tmp_path, SEED, first, min(first + step, end)), range(0, end, step))
        findings = [finding for some in found for finding in some]
    assert not findings, "\n\n".join(f"{one['number']} {one['kind']}: {one['finding']}" for one in findings)
