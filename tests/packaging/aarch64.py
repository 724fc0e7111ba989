"""Run the wheel on an emulated aarch64 machine and compare its answer with this machine's: `make aarch64-test`.

Usage, as root on Debian or Ubuntu: python -m tests.packaging.aarch64 [--folder build/aarch64] [--suite bookworm]
[--mirror URL] [--python python3]. The system's folder is made once, by debootstrap; every run installs the wheel of
this checkout with binary wheels of aarch64, from the index that pip is configured for, checks the demo bundle there,
answers about its sample clip, and runs tests of the runtime. Mounts belong to the process that needs them, so none is
left behind.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
from packaging.requirements import Requirement

from bridge_stg.demo.bundle import SAMPLE, SOURCE_TREE, demo_bundle
from bridge_stg.runtime.chain.boxes import box_iou

PROGRAMS = {"debootstrap": "debootstrap", "qemu-aarch64-static": "qemu-user-static", "update-binfmts": "binfmt-support"}
"""Programs that the emulation needs, and their packages."""
BINFMT = Path("/proc/sys/fs/binfmt_misc")
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in range(34, 16, -1)] + ["manylinux2014_aarch64"]
"""Of wheels that pip may take: Debian 12 has glibc 2.36, Ubuntu 22.04 has 2.35."""
EXTRAS = ("cpu", "calibrate")
VARIANT, VARIANT_OF_3_10 = "ort-cpu", "primitive"  # the last onnxruntime for Python 3.10 lacks opset 24
QUERY = "the white dog"
LEAST_IOU = 0.999
TESTS = ("device", "chain", "video/test_decoder.py", "video/test_frame.py::test_the_same_bytes_on_every_machine")
"""Of tests/runtime: they open no graph, and need no torch. Others of HDR take minutes each."""
TEST_PACKAGES = ("pytest", "packaging", *(f"{name}; python_version < '3.11'" for name in ("exceptiongroup", "tomli")))
LEFT_OUT = ("chain/test_tokenizer.py",)  # needs torch
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/tmp", "PYTHONPATH": "/site", "OMP_NUM_THREADS": "2",
    "QEMU_CPU": "cortex-a72",  # with `max`, numpy's matmul warns of overflows that are none
}  # fmt: skip
# Without /sys: onnxruntime crashes under qemu-user where it can read the processors' folders.
ENTER = 'mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"'
PRIVATE = ("unshare", "--mount", "--propagation", "private")


def missing() -> str | None:
    """Return what this machine lacks, as a sentence with what to do; None if it can emulate."""
    if sys.platform != "linux":
        return "it needs Linux: binaries of another processor are run by its kernel and qemu-user"
    lacks = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if lacks:
        return f"{', '.join(lacks)} not installed: apt-get install --no-install-recommends {' '.join(lacks)}"
    return "mounting and chroot need root: run it with sudo, or in a privileged container" if os.geteuid() else None


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in the checkout; raise CalledProcessError if it fails."""
    return subprocess.run([str(part) for part in command], cwd=SOURCE_TREE, check=True, text=True, **options)


def inside(root: Path, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program of the emulated system, in mounts of its own."""
    environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
    return run(*PRIVATE, "sh", "-c", ENTER, root, "env", "-i", "-C", "/work", *environment, *command, **options)


def emulate() -> None:
    """Have the kernel start aarch64 binaries with qemu."""
    if not (BINFMT / "register").exists():
        run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if not (BINFMT / "qemu-aarch64").exists():
        run("update-binfmts", "--enable", "qemu-aarch64")


def system(folder: Path, suite: str, mirror: str) -> Path:
    """Return the root of the emulated system, made if it is not complete."""
    root, done = folder / "root", folder / f"made-{suite}"
    if not done.exists():
        if mounted := [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if f" {root}" in line]:
            raise SystemExit(f"aarch64: not removing {root}: {', '.join(mounted)} is mounted; unmount it first")
        for old in (root, *folder.glob("made-*")):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        packages = "python3,ca-certificates"
        run(*PRIVATE, "debootstrap", "--arch=arm64", "--variant=minbase", f"--include={packages}", suite, root, mirror)
        (root / "work").mkdir()
        done.touch()
    return root


def requirements(python: str) -> list[str]:
    """Return what the runtime and its tests need there, without markers: pip reads them for its own Python."""
    project = tomllib.loads((SOURCE_TREE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    there = {"python_version": python, "platform_machine": "aarch64"}
    wanted = map(Requirement, (*texts, *TEST_PACKAGES))
    return [f"{one.name}{one.specifier}" for one in wanted if one.marker is None or one.marker.evaluate(there)]


def install(root: Path, folder: Path, python: str) -> str:
    """Put the wheel of this checkout and what it needs into the system; return its Python's version."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    version = inside(root, python, "-c", program, stdout=subprocess.PIPE).stdout.strip()
    pip, wheels = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"), folder / "wheel"
    archive, source = folder / "source.tar", folder / "source"
    for old in (wheels, source, root / "site"):
        shutil.rmtree(old, ignore_errors=True)
    source.mkdir()
    files = run("git", "ls-files", stdout=subprocess.PIPE).stdout
    run("tar", "-cf", archive, "-T", "-", input=files)
    run("tar", "-xf", archive, "-C", source)
    archive.unlink()
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source)
    shutil.rmtree(source)
    target = ["--target", root / "site", "--no-compile", "--only-binary=:all:", "--python-version", version]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    same = version == f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = ["-c", SOURCE_TREE / "constraints.txt"] if same else []  # they are of the Python that develops this
    run(*pip, "install", *target, *pins, *requirements(version))
    run(*pip, "install", *target, "--no-deps", *wheels.glob("*.whl"))
    return version


def fill(root: Path, bundle: Path) -> None:
    """Copy the bundle, the clip and the tests into the system's working folder, and write its list of processors."""
    cpu = root / "sys/devices/system/cpu"
    cpu.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present"):  # without these, onnxruntime 1.23 aborts at its import
        (cpu / name).write_text("0-1\n")
    for name, origin in {"bundle": bundle, "assets": SOURCE_TREE / "assets", "tests": SOURCE_TREE / "tests"}.items():
        shutil.rmtree(root / "work" / name, ignore_errors=True)
        shutil.copytree(origin, root / "work" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml"):
        shutil.copy(SOURCE_TREE / name, root / "work")


def answer(python: Callable[..., object], bundle: Path, variant: str, folder: Path, seconds: dict[str, float]) -> None:
    """Replay the golden cases, and ground the sample clip into `folder`/result.json."""
    begun = time.monotonic()
    python("cli.py", "verify", bundle, "--variant", variant)
    seconds["verify"], begun = time.monotonic() - begun, time.monotonic()
    options = ("--bundle", bundle, "--json", folder / "result.json", "--quiet")
    python("cli.py", "infer", SAMPLE, QUERY, *options)
    seconds["infer"] = time.monotonic() - begun


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], float]:
    """Compare two documents of `infer --json`; return the fields that differ, and the smallest IoU of the boxes."""
    (one,), (other,) = ours["results"], theirs["results"]
    differ = [name for name in ("answer", "span", "named_span", "tokens", "coarse", "size") if one[name] != other[name]]
    if ours["bundle"]["fingerprint"] != theirs["bundle"]["fingerprint"]:
        differ.append("bundle")
    times = [[box["time_s"] for box in result["tube"]] for result in (one, other)]
    if times[0] != times[1] or not times[0]:
        return [*differ, "times of the boxes"], 0.0
    boxes = [np.array([box["box"] for box in result["tube"]]) for result in (one, other)]
    least = float(box_iou(*boxes).min())
    return differ if least >= LEAST_IOU else [*differ, f"boxes (IoU {least:.4f}, at least {LEAST_IOU})"], least


def main() -> int:
    """Return 0 if the emulated machine agrees, 1 if it does not, 2 if this machine cannot emulate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=SOURCE_TREE / "build/aarch64")
    parser.add_argument("--suite", default="bookworm", help="release of Debian or Ubuntu")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="archive of packages")
    parser.add_argument("--python", default="python3", help="Python in the system; put others below FOLDER/root")
    options = parser.parse_args()
    if problem := missing():
        print(f"aarch64: {problem}", file=sys.stderr)
        return 2
    folder, seconds = options.folder.resolve(), {"here": {}, "aarch64": {}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        emulate()
        root = system(folder, options.suite, options.mirror)
        version = install(root, folder, options.python)
        bundle = demo_bundle().resolve()
        fill(root, bundle)
        print(f"aarch64: Python {version}, set up in {time.monotonic() - begun:.0f} s", flush=True)
        variant = VARIANT_OF_3_10 if version == "3.10" else VARIANT
        answer(lambda *command: run(sys.executable, *command), bundle, variant, folder, seconds["here"])
        there = functools.partial(inside, root, options.python)
        answer(there, Path("bundle"), variant, Path("/work"), seconds["aarch64"])
        begun = time.monotonic()
        tests = [f"tests/runtime/{name}" for name in TESTS] + [f"--ignore=tests/runtime/{name}" for name in LEFT_OUT]
        there("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        seconds["aarch64"]["tests"] = time.monotonic() - begun
    except subprocess.CalledProcessError as error:
        print(f"aarch64: failed with {error.returncode}: {' '.join(error.cmd)}", file=sys.stderr)
        return 1
    except OSError as error:  # the folder cannot be made, or another program is missing
        print(f"aarch64: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    ours, theirs = (json.loads((place / "result.json").read_bytes()) for place in (root / "work", folder))
    differ, least = differences(ours, theirs)
    for name, figures in seconds.items():
        print(f"{name}: " + ", ".join(f"{step} {spent:.0f} s" for step, spent in figures.items()))
    print(f"{len(ours['results'][0]['tube'])} boxes, least IoU {least:.6f}")
    print(f"differs: {', '.join(differ)}" if differ else "The same bundle, span, tokens and boxes.")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
