"""`make gpu-check` without a GPU: what it says, parts of wheels, steps that fail, and all of it on the stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def check(out: Path, *arguments: object, path: str = "") -> tuple[int, dict[str, Any], str]:
    """Run the check with a folder first on Python's path; return exit code, report and what was printed."""
    command = [sys.executable, "benchmarks/gpu/check.py", "--out", out, *arguments]
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    report: dict[str, Any] = json.loads((out / "report.json").read_bytes())
    assert all(f"<td>{name}</td>" in page for name in report["steps"])
    return done.returncode, report, done.stdout + done.stderr


def test_without_a_gpu_it_says_what_it_could_not_run(tmp_path: Path) -> None:
    (tmp_path / "bundles/int8").mkdir(parents=True)
    (tmp_path / "bundles/int8/manifest.json").write_text("{}")
    code, report, text = check(tmp_path / "out", "--bundles", tmp_path / "bundles")
    assert code == 2 and "Nothing was checked on a GPU" in text
    steps = report["steps"]
    assert {step["status"] for step in steps.values()} == {"left out"}
    assert {"arrays", "resize", "torch", "graphs", "int8 on eager-torch", "int8 on tensorrt"} <= steps.keys()
    places = [
        list(steps).index(f"int8 on {backend}") for backend in ("tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt")
    ]
    assert places == sorted(places)  # what is preferred runs before the time is over


@pytest.mark.parametrize(
    ("option", "value"),
    [("--out", "file"), ("--out", "file/out"), ("--bundles", "file"), ("--wheels", "file"),
     ("--seconds", "nan"), ("--seconds", "-5"), ("--seconds", "inf")],
)  # fmt: skip
def test_bad_options_are_named(option: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, Path(ROOT) / "benchmarks/gpu/check.py", "--pretend", "--out", "out", option, value]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and option in done.stderr and value in done.stderr
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wheels_come_in_parts(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    whole = wheels / "given-1.0-py3-none-any.whl"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("given.py", "VALUE = 7\n")
        archive.writestr("given-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: given\nVersion: 1.0\n")
        archive.writestr("given-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("given-1.0.dist-info/RECORD", "")
    content = whole.read_bytes()
    whole.unlink()
    for number in range(0, len(content), 100):
        (wheels / f"{whole.name}.part-{number // 100:03}").write_bytes(content[number : number + 100])
    _, report, _ = check(tmp_path / "out", "--wheels", wheels)
    assert report["steps"]["wheels"]["figures"] == {"wheels": [whole.name]}
    assert (tmp_path / "out/site/given.py").read_text() == "VALUE = 7\n"
    (wheels / f"{whole.name}.part-001").unlink()
    _, report, _ = check(tmp_path / "out", "--wheels", wheels)
    assert report["steps"]["wheels"]["status"] == "failed" and "given" in report["steps"]["wheels"]["problem"]


@pytest.mark.parametrize("numpy", ["raise ImportError('a damaged numpy')", "import time; time.sleep(60)"])
def test_a_step_that_fails_or_hangs_is_reported(numpy: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(numpy)
    arguments = ("--pretend", "--bundles", tmp_path, "--seconds", 3 if "sleep" in numpy else 60)
    code, report, _ = check(tmp_path / "out", *arguments, path=str(tmp_path))
    steps = report["steps"]
    assert code == 1 and steps["device"]["status"] == "failed"
    if "sleep" in numpy:
        assert "limit" in steps["device"]["problem"] and steps["arrays"]["status"] == "left out"
    else:
        assert "a damaged numpy" in steps["device"]["problem"] and steps["arrays"]["status"] == "failed"


@pytest.mark.slow
def test_all_of_it_on_the_stand_ins(demo_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles/fp32").symlink_to(demo_bundle)
    out = tmp_path / "out"
    code, report, text = check(out, "--pretend", "--bundles", tmp_path / "bundles", "--seconds", 390)
    steps = report["steps"]
    assert code == 0, text
    ran = {name for name, step in steps.items() if step["status"] == "passed"}
    assert ran >= {"device", "arrays", "resize", "streams", "graphs", *(
        f"fp32 on {name}" for name in ("onnxruntime", "eager-torch", "tensorrt", "tensorrt-rtx")
    )}  # fmt: skip
    for name in ran - {"device", "arrays", "resize", "streams", "graphs"}:
        figures = steps[name]["figures"]
        graphs = {"vision_encoder", "language_model", "spatial_decoder"}
        assert graphs == figures["parity"]["worst"].keys() and figures["seconds"]["total"] > 0
        assert all(boundary["rel_l2"] < 1e-4 for boundary in figures["parity"]["boundaries"].values())
        assert figures["beside_the_cpu"]["same_answer"] and figures["beside_the_cpu"]["least_iou"] > 0.99
