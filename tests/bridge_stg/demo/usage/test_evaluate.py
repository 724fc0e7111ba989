"""Each benchmark's files, in their published layout, through `evaluate` on the demo bundle."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation.official import ALL, video

ROOT = Path(__file__).parents[4]
TASKS = {
    "vidstg": {"tube", "tube / declarative", "tube / interrogative"},
    "hc-stvg-v1": {"tube"},
    "hc-stvg-v2": {"tube"},
    "charades-sta": {"span"},
    "refcoco": {"image"},
    "got-10k": {"track"},
    "jsonl": {"tube", "span", "span / events", "image", "track"},
}
WITHOUT_TORCH = """
import sys
sys.path.insert(0, {root!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "safetensors", "skimage"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
from bridge_stg.cli import main
main()
"""


@pytest.mark.parametrize("name", ALL)
def test_official_files_on_the_bundle_without_torch(demo_bundle: Path, tmp_path: Path, name: str) -> None:
    files = ALL[name](tmp_path, video)
    command = [sys.executable, "-c", WITHOUT_TORCH.format(root=str(ROOT)), "evaluate", name]
    command += [part for path in files.annotations for part in ("--annotations", str(path))]
    command += ["--media", str(files.media), "--model", str(demo_bundle), "--out", str(tmp_path / "out")]
    command += ["--split", files.split] if files.split else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["failed"] == {"bundle": []}
    figures = report["figures"]["bundle"]
    assert set(figures) == TASKS[name]
    assert all(0 <= value <= 1 for part in figures.values() for value in part.values() if isinstance(value, float))
    assert "<img" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_checkpoint_beside_its_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    files = ALL["jsonl"](tmp_path, video)
    command = [sys.executable, str(ROOT / "cli.py"), "evaluate", "jsonl", "--annotations", str(files.annotations[0])]
    command += ["--media", str(files.media), "--model", str(ROOT / "assets/demo/checkpoint")]
    command += ["--model", str(demo_bundle), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["failed"] == {"checkpoint": [], "bundle": []}
    first, second = report["figures"].values()
    for part, values in first.items():
        assert second[part] == pytest.approx(values, abs=1e-3), part
    assert report["differences"]["bundle"]["mean_absolute"] < 1e-3
