"""pip finds wheels for every extra, for x86-64 and 64-bit Arm, from the oldest supported Python to the newest.

Only metadata is downloaded. The index has TensorRT itself as source packages that fetch NVIDIA's wheels when they are
built, and pip resolves other platforms from wheels only; wheels without content stand in for those packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CELLS = [(python, arch) for python in ("3.10", "3.11", "3.12", "3.13") for arch in ("x86_64", "aarch64")]
GLIBC = 35
"""Minor version of the glibc of Ubuntu 22.04, which JetPack 6 is."""

ABSENT: dict[str, Callable[[str, str], bool]] = {
    "rtx": lambda python, arch: arch == "aarch64",
    "rtx-provider": lambda python, arch: arch == "aarch64" or python == "3.10",
    "gpu": lambda python, arch: arch == "aarch64" and python == "3.10",
    **dict.fromkeys(("export", "optimum", "train", "docs", "dev"), lambda python, arch: python == "3.10"),
}
"""Extras that need a package which does not exist there: docs/deployment.md says so."""

ENGINES = ("cpu", "tensorrt", "rtx", "rtx-provider", "calibrate")
"""What a device needs, resolved together for every cell; the others are resolved for the oldest and newest Python."""

APART = ("gpu", "jetpack6")
"""Extras that may need another CUDA than the others."""

SOURCES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-libs")
"""Source packages of TensorRT; only its bindings, `tensorrt-cu13-bindings`, are wheels."""

PIP = """
import json, sys
from pip._vendor.packaging import markers
found = markers.default_environment() | json.loads(sys.argv.pop(1))
markers.default_environment = lambda: dict(found)
from pip._internal.cli.main import main
sys.exit(main())
"""
"""pip itself evaluates markers for the Python that runs it, also with --platform (pypa/pip#11664)."""


def environment(python: str, arch: str) -> dict[str, str]:
    return {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": arch,
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
    }  # fmt: skip


def requirements(extra: str, there: dict[str, str]) -> Iterator[str]:
    """Yield what an extra needs on that machine, without markers; extras of this project are followed."""
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.marker is not None and not requirement.marker.evaluate(there):
            continue
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from requirements(other, there)
        else:
            requirement.marker = None
            yield str(requirement)


class Pip:
    """A current pip, which resolves from metadata alone, and the folder of the wheels that stand in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.standing_in = folder, folder / "wheels"
        command = [sys.executable, "-m", "pip", "install", "-q", "--retries", "1", "--timeout", "20", "pip>=25"]
        done = subprocess.run([*command, "--target", str(folder / "pip")], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"this test needs a package index, and pip reached none: {done.stderr}"
        self.standing_in.mkdir()
        (pin,) = [
            line.partition("==")[2].strip()
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.startswith("tensorrt==")
        ]
        for name in SOURCES:
            requires = f"Requires-Dist: tensorrt-cu13-bindings=={pin}\n" if name == "tensorrt" else ""
            info = f"{name.replace('-', '_')}-{pin}.dist-info"
            with zipfile.ZipFile(self.standing_in / f"{name.replace('-', '_')}-{pin}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {pin}\n{requires}")
                wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
                wheel.writestr(f"{info}/RECORD", "")

    def resolve(self, python: str, arch: str, wanted: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PIP, json.dumps(environment(python, arch)), "install", "--dry-run", "--quiet"]
        command += ["--ignore-installed", "--report", "-", "--only-binary=:all:", "--use-feature=fast-deps"]
        command += ["--retries", "1", "--timeout", "20"]
        command += ["--find-links", str(self.standing_in), "--target", str(self.folder / "none")]
        command += [f"--platform=manylinux_2_{minor}_{arch}" for minor in range(GLIBC, 16, -1)]
        command += [f"--platform=manylinux2014_{arch}", "--python-version", python, "--implementation", "cp"]
        environ = os.environ | {"PYTHONPATH": str(self.folder / "pip")}
        return subprocess.run([*command, *wanted], capture_output=True, text=True, timeout=300, env=environ)


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Pip:
    return Pip(tmp_path_factory.mktemp("pip"))


def chosen(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the version of each chosen distribution; every file must be a wheel."""
    entries = json.loads(done.stdout)["install"]
    assert all(entry["download_info"]["url"].endswith(".whl") for entry in entries)
    return {e["metadata"]["name"].lower().replace("_", "-"): e["metadata"]["version"] for e in entries}


@pytest.mark.slow
def test_every_extra_resolves(pip: Pip, record_property: Any) -> None:
    def wanted(cell: tuple[str, str], group: str) -> list[str]:
        extras = ENGINES if group == "engines" else [e for e in EXTRAS if e not in APART] if group == "all" else [group]
        there, present = environment(*cell), [e for e in extras if e not in ABSENT or not ABSENT[e](*cell)]
        needed = dict.fromkeys(text for extra in present or extras for text in requirements(extra, there))
        pins = ["-c", str(ROOT / "constraints.txt")] if group == "all" and cell[0] != "3.10" else []
        return [*PROJECT["dependencies"], *needed, *pins]

    jobs = [(cell, group) for cell in CELLS for group in ("engines", "gpu")]
    jobs += [(cell, "jetpack6") for cell in CELLS[:2]]
    jobs += [(cell, "all") for cell in (*CELLS[:2], *CELLS[-2:])]
    with ThreadPoolExecutor(max_workers=6) as pool:
        results = list(pool.map(lambda job: pip.resolve(*job[0], wanted(*job)), jobs))
    for (cell, group), done in zip(jobs, results, strict=True):
        what = f"{group} for Python {' on '.join(cell)}"
        if group in ABSENT and ABSENT[group](*cell):
            assert "No matching distribution" in done.stderr, f"{what} resolves now: update the table and the docs"
            continue
        assert done.returncode == 0, f"{what}: {' '.join(wanted(cell, group))}\n{done.stderr}"
        found = chosen(done)
        record_property(what, " ".join(f"{name}=={version}" for name, version in found.items()))
        compiler = {n for n in found if n.startswith("nvidia-cuda-nvrtc")}
        cuda12 = group == "jetpack6" or (cell[0] == "3.10" and (group == "gpu" or cell[1] == "aarch64"))
        assert compiler == ({"nvidia-cuda-nvrtc-cu12"} if cuda12 else {"nvidia-cuda-nvrtc"}), what
        assert found["cuda-bindings"].startswith("12." if cuda12 else "13."), what


def test_a_package_without_wheels_is_noticed(pip: Pip) -> None:
    done = pip.resolve("3.10", "aarch64", ["onnxruntime>=1.24"])
    assert done.returncode != 0 and "No matching distribution" in done.stderr
