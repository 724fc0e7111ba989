"""`make gpu-test` on a machine without a GPU: what it would check, what is missing, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def planned(*arguments: str, python: tuple[str, ...] = ("-S",)) -> subprocess.CompletedProcess[str]:
    """Run check.py without installed packages, as on a newly set up machine."""
    command = [sys.executable, *python, str(ROOT / "benchmarks/gpu/check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def has_gpu() -> bool:
    from bridge_stg.runtime.host.machine import machine

    return bool(machine().devices)


def test_it_lists_every_gpu_test_and_says_what_is_missing(has_gpu: bool) -> None:
    done = planned()
    marked = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu",
         "tests/bridge_stg/demo/chain/test_gpu.py"],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    collected = {line.rpartition("::")[2].partition("[")[0] for line in marked.stdout.splitlines() if "::" in line}
    assert collected and all(f"test_gpu.py::{name}" in done.stdout for name in collected)
    assert "benchmarks/gpu/stages.py" in done.stdout
    assert done.returncode == (0 if has_gpu else 2)
    assert has_gpu or ("missing: an NVIDIA GPU" in done.stderr and "Nothing was checked" in done.stderr)


def test_an_empty_wheel_folder_is_reported(tmp_path: Path) -> None:
    done = planned("--wheels", str(tmp_path))
    assert done.returncode == 2
    assert f"pip wheel -w {tmp_path}" in done.stderr


def test_marks_are_found_on_modules_classes_and_functions(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import pytest\npytestmark = [pytest.mark.gpu]\ndef test_one(): pass\n")
    (tmp_path / "test_b.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_two():\n    '''Two is right.'''\ndef test_three(): pass\n"
        "@pytest.mark.gpu\nclass TestFour:\n    def test_five(self): pass\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks/gpu')!r}); import check, pathlib; "
        f"print(dict(check.gpu_tests(pathlib.Path({str(tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    found = {"test_a.py::test_one": "one", "test_b.py::test_two": "Two is right.", "test_b.py::test_five": "five"}
    assert json.loads(done.stdout.replace("'", '"')) == found, done.stderr


def test_make_stops_before_it_installs(has_gpu: bool, tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make, "make is not installed"
    command = [make, "gpu-test", f"PYTHON={sys.executable}", f"GPU_VENV={tmp_path / 'venv'}", f"WHEELS={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 2 and "make gpu-test checks" in done.stdout
    assert not (tmp_path / "venv").exists()
