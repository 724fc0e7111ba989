"""Whether what the runtime needs can be had as binary wheels for the Jetson: asked of pip, which asks its index.

A machine without an index cannot answer; the test then says so, and has checked nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(34, 16, -1)] + ["manylinux2014_aarch64"]
"""What JetPack 6 takes: Ubuntu 22.04 has glibc 2.35. JetPack 7 takes later ones too."""

EXTRAS = {"3.10": ("cpu", "calibrate"), "3.12": ("cpu", "calibrate")}
"""Engines from wheels, and what `build` and `calibrate` need. TensorRT is JetPack's, or the vendor's index has it."""

CUDA = {"3.10": "cuda-python>=12.6.2,<13", "3.12": "cuda-python>=12.6.2"}
"""As docs/deployment.md installs it: JetPack 6 has a driver of CUDA 12."""


def requirements(python: str, *extras: str) -> list[str]:
    """What applies on that machine, without markers: pip reads them for the Python that runs it (pypa/pip#11664)."""
    there = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": "aarch64",
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "implementation_name": "cpython",
    }  # fmt: skip
    texts = [*PROJECT["dependencies"], *(t for extra in extras for t in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(text) for text in texts]
    kept = [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate(there)]
    return [f"{requirement.name}{requirement.specifier}" for requirement in kept]


def pip(folder: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "20", "--only-binary=:all:"]
    return subprocess.run(
        [*command, "--target", str(folder), *arguments], capture_output=True, text=True, timeout=timeout, cwd=folder
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """Whether an index answers, with the plainest question there is."""
    try:
        return pip(tmp_path_factory.mktemp("probe"), "--no-deps", "click", timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("python", list(EXTRAS))
def test_wheels_for_arm(python: str, index: bool, tmp_path: Path, record_property: Any) -> None:
    if not index:
        record_property("package_index", "not reached, so nothing was checked")
        warnings.warn("no package index can be reached: wheels for linux-aarch64 were not checked", stacklevel=1)
        return
    wanted = requirements(python, *EXTRAS[python])
    assert "numpy>=1.26" in wanted and not any(";" in text for text in wanted)
    options = [f"--platform={platform}" for platform in PLATFORMS]
    done = pip(tmp_path, *options, "--python-version", python, "--implementation", "cp", *wanted, CUDA[python])
    assert done.returncode == 0, f"{' '.join(wanted)}\n{done.stderr}"
    chosen = json.loads(done.stdout)["install"]
    files = [entry["download_info"]["url"].rpartition("/")[2] for entry in chosen]
    assert all(file.endswith(".whl") and ("aarch64" in file or file.endswith("-any.whl")) for file in files), files
    assert {"numpy", "onnxruntime", "av", "tokenizers", "cuda-bindings"} <= {
        entry["metadata"]["name"].lower() for entry in chosen
    }
    record_property("wheels", ", ".join(sorted(files)))


def test_a_package_without_wheels_is_noticed(index: bool, tmp_path: Path) -> None:
    if index:
        options = [f"--platform={platform}" for platform in PLATFORMS]
        done = pip(tmp_path, *options, "--python-version", "3.10", "--implementation", "cp", "onnxruntime>=1.24")
        assert done.returncode != 0 and "No matching distribution" in done.stderr
