"""Create the virtual environments of the peers: python benchmarks/speed/peers/install.py [NAME ...].

Each is created once from `requirements/NAME.txt`, which pins every version, and again when that file changes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements"
VENVS = HERE.parents[2] / "build" / "bench" / "venvs"
SECONDS = {"llama_cpp": 3600}
"""Time limit of an installation in seconds; llama.cpp is compiled."""
ENVIRONMENT = {
    # Compile only the libraries, for the instructions of this machine.
    "llama_cpp": {
        "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF "
        "-DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=ON -DLLAMA_CURL=OFF"
    },
}


class InstallError(Exception):
    """A peer could not be installed; the message gives the reason in one line."""


def peers(folder: Path = REQUIREMENTS) -> list[str]:
    """Return the names of all peers."""
    return sorted(path.stem for path in folder.glob("*.txt") if "." not in path.stem)


def install(name: str, *, requirements: Path = REQUIREMENTS, venvs: Path = VENVS) -> Path:
    """Return the Python of a peer's environment; create it if it is missing or differs from the requirements.

    A second file `NAME.nodeps.txt` lists packages that are installed without their dependencies, which are not needed
    here.

    Raises:
        InstallError: the peer is unknown, or a package does not install.
    """
    files = [path for path in (requirements / f"{name}.txt", requirements / f"{name}.nodeps.txt") if path.exists()]
    if requirements / f"{name}.txt" not in files:
        raise InstallError(f"unknown peer {name!r}; known: {', '.join(peers(requirements)) or 'none'}")
    environment = {**os.environ, **ENVIRONMENT.get(name, {})}
    wanted = hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()
    folder = venvs / name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [
        [*pip, *(["--no-deps"] if ".nodeps" in path.name else []), "--requirement", str(path)] for path in files
    ]
    for command in commands:
        _run(name, command, environment)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _run(name: str, command: Sequence[str], environment: dict[str, str]) -> None:
    limit = SECONDS.get(name, 1800)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InstallError(f"{name}: not installed within {limit} seconds") from error
    if done.returncode:
        printed = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in printed if line.lower().startswith("error")] or printed or ["pip printed nothing"]
        raise InstallError(f"{name}: {errors[0][:500]}")


def main(names: Sequence[str]) -> int:
    """Install the named peers, or all, continuing after a failure; return 1 if any failed."""
    failed = 0
    for name in names or peers():
        try:
            print(f"{name}: {install(name)}")
        except InstallError as error:
            print(f"not installed: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
