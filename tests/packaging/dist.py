"""Build the archives of the commit that is checked out, check them, and install the wheel: `make dist`.

Usage: python tests/packaging/dist.py dist/ 3.10 3.12

Writes the source distribution, the wheel, a bill of materials (CycloneDX) of the wheel with onnxruntime, and
SHA256SUMS. The wheel is built twice, from two copies, and must have the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINKED = ("runtime", "export", "calibration", "evaluation")
"""Folders at the root that the wheel has in its package."""
IMPORTS = f"import bridge_stg, {', '.join(f'bridge_stg.{name}' for name in LINKED)}"


def run(*command: object, **options: str) -> str:
    """Run a program and return what it writes to stdout; end with its errors if it fails."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **options}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"dist: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(commit: str, folder: Path) -> tuple[Path, Path]:
    """Build the source distribution of a commit, and the wheel from that; return both."""
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extraction_filter = getattr(tarfile, "tar_filter", None)  # Python 3.11.0 to 3.11.3 have no filters
        files.extractall(folder / "source")
    when = run("git", "log", "-1", "--format=%ct", commit).strip()
    out = folder / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, folder / "source", SOURCE_DATE_EPOCH=when)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def check_contents(commit: str, source: Path, wheel: Path) -> None:
    """End unless the source distribution has the commit's files, and the wheel the packages and the licences."""
    tracked = set(run("git", "ls-tree", "-r", "--name-only", commit).splitlines())
    with tarfile.open(source) as archive:
        missing = tracked - {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted(missing):
        sys.exit(f"dist: {source.name} lacks {', '.join(missing[:5])} ({len(missing)} files)")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {name for name in tracked if name.startswith(LINKED) and name.endswith(".py")}
    if missing := sorted(modules - {name.removeprefix("bridge_stg/") for name in names}):
        sys.exit(f"dist: {wheel.name} lacks {', '.join(missing[:5])} ({len(missing)} files)")
    if not {"LICENSE", "NOTICE"} <= {name.rpartition("/")[2] for name in names if ".dist-info/" in name}:
        sys.exit(f"dist: {wheel.name} lacks LICENSE or NOTICE")


def interpreter(version: str) -> str:
    """Return a Python of a version such as 3.10: on the path, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for found in (f"python{version}", *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        if shutil.which(found) and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0:
            return str(found)
    sys.exit(f"dist: Python {version} was not found; install it, e.g. with: pyenv install {version}")


def install(wheel: Path, version: str, folder: Path) -> Path:
    """Install the wheel with onnxruntime into a new environment, and start it there; return its Python."""
    run(interpreter(version), "-m", "venv", folder)
    python = folder / "bin" / "python"
    name, number = wheel.name.split("-")[:2]  # not by its path, which would get into the bill of materials
    run(python, "-m", "pip", "install", "-q", "--find-links", wheel.parent, f"{name}[cpu]=={number}")
    run(python, "-m", "pip", "check")
    run(python, "-c", IMPORTS)
    print(f"Python {version}: {run(folder / 'bin' / 'bridge-stg', '--version').strip()}")
    run(folder / "bin" / "bridge-stg", "doctor")
    return python


def main(out: Path, versions: list[str]) -> None:
    """Build, check and install; then put the files into `out`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, commit = Path(temporary), run("git", "rev-parse", "HEAD").strip()
        (source, wheel), (_, again) = (build(commit, folder / name) for name in ("1", "2"))
        if wheel.read_bytes() != again.read_bytes():
            sys.exit(f"dist: two builds of {wheel.name} differ")
        run(sys.executable, "-m", "twine", "check", "--strict", source, wheel)
        check_contents(commit, source, wheel)
        for version in versions:
            python = install(wheel, version, folder / version)
        bom = wheel.with_suffix(".cdx.json")
        run(sys.executable, "-m", "cyclonedx_py", "environment", python, "--output-reproducible", "-o", bom)
        files = [source, wheel, bom]
        sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
        out.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, out)
        (out / "SHA256SUMS").write_text(sums, encoding="utf-8")
    print(sums, end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
