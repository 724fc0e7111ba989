"""The commands on a local Ray, over the demo bundle: the same answers as without it, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[4]
CLIPS = ROOT / "assets/demo/clips"


def command(*arguments: object, temporary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)],
        cwd=CLIPS, env=os.environ | {"TMPDIR": str(temporary)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_ray_answers_as_this_process_does(demo_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    clips = sorted(CLIPS.glob("*.mp4"))
    lines: list[dict[str, Any]] = [
        {"video": clip.name, "query": clip.with_suffix(".txt").read_text()} for clip in clips
    ]
    lines.append({"video": "gone.mp4", "query": "the red ball"})
    table = tmp_path / "table.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    annotations = tmp_path / "spans.jsonl"
    annotations.write_text("".join(json.dumps(line | {"span": [1.0, 3.0], "task": "span"}) + "\n" for line in lines))
    rows: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="t-") as temporary:  # short: the paths of Ray's sockets are in it
        for engine in ("local", "ray"):
            more = ["--workers", 2] if engine == "ray" else []
            # A relative path of media: workers have to find what this process finds.
            made = command(
                "infer-many", table, "--media", ".", "--bundle", demo_bundle, "--executor", engine, *more,
                "--out", tmp_path / f"{engine}.jsonl", temporary=Path(temporary),
            )  # fmt: skip
            assert made.returncode == 1 and f"{len(clips)} answered, 1 failed" in made.stdout, made.stderr
            assert "Traceback" not in made.stderr
            rows[engine] = [json.loads(line) for line in (tmp_path / f"{engine}.jsonl").read_text().splitlines()[1:]]
            made = command(
                "evaluate", "jsonl", "--annotations", annotations, "--media", ".", "--model", demo_bundle,
                "--executor", engine, "--out", tmp_path / engine, temporary=Path(temporary),
            )  # fmt: skip
            assert made.returncode == 0, made.stderr
        assert set(os.listdir(temporary)) <= {".ses"}  # onnxruntime's, with or without Ray
    for row in (row for found in rows.values() for row in found):
        row.pop("timings_s", None)
    for local, spread in zip(*(sorted(found, key=lambda row: row["index"]) for found in rows.values())):
        for name in ("scores", "boxes", "tube"):  # threads change the last digits
            assert (local.pop(name, None) is None) == (spread.pop(name, None) is None)
        assert local == spread
    reports = [json.loads((tmp_path / engine / "report.json").read_text()) for engine in ("local", "ray")]
    figures = [report["figures"]["bundle"]["span"] for report in reports]
    assert figures[0] == pytest.approx(figures[1]) and reports[0]["missing"] == ["gone.mp4"]
