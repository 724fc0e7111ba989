"""The sdist and the wheel built from it, installed into a clean environment, run from another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bridge_stg", "runtime", "export", "calibration", "evaluation")


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, without following links and without bytecode."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__" and not Path(parent, name).is_symlink()]
        yield from (Path(parent, name) for name in files)


def run(*command: object, cwd: Path, timeout: float = 300, **environment: str) -> str:
    """Run a program without PYTHONPATH and return what it wrote to stdout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist without a network, in a copy of the checkout: setuptools leaves build folders."""
    source, out = tmp_path_factory.mktemp("checkout") / "source", tmp_path_factory.mktemp("sdist")
    left_out = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    shutil.copy(ROOT / ".gitignore", source)
    program = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", program, out, cwd=source)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source_archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, as pip does for who installs that."""
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    run(sys.executable, "-m", "pip", "wheel", *options, source_archive, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean environment that holds the wheel alone, and borrows the tests' own packages for its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    library = Path(
        run(folder / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    run(
        sys.executable,
        "-m",
        "pip",
        f"--python={folder / 'bin/python'}",
        "install",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # Behind the environment's own packages, and as a plain path: .pth files in there, such as that of an editable
    # installation of this project, are not followed.
    (library / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder


def test_sdist_is_the_checkout(source_archive: Path) -> None:
    with tarfile.open(source_archive) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers() if not member.isdir()}
    for folder in ("runtime", "export", "calibration", "evaluation"):
        assert members[f"bridge_stg/{folder}"].linkname == f"../{folder}"
    for name in ("constraints.txt", "Makefile", "cli.py", "setup.py", ".gitignore", "README.md"):
        assert name in members
    for folder in ("docs", "examples", "tests", "benchmarks", "assets", "containers", *FOLDERS):
        assert not {file.relative_to(ROOT).as_posix() for file in walk(ROOT / folder)} - set(members)


def test_wheel_holds_every_file_under_one_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"bridge_stg", "optimum"}
    # The folder that optimum shares with other packages holds one file of ours, whose name no other has.
    assert {name for name in names if name.startswith("optimum")} == {"optimum/commands/register/bridge_stg_export.py"}
    for folder in FOLDERS:
        inside = "" if folder == "bridge_stg" else "bridge_stg/"
        files = [file for file in walk(ROOT / folder) if "optimum_commands" not in file.parts]
        assert not {f"{inside}{file.relative_to(ROOT).as_posix()}" for file in files} - names
    assert {"LICENSE", "NOTICE"} <= {name.rpartition("/")[2] for name in names}


def test_console_script_and_imports_from_another_folder(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin/python"
    lines = "import bridge_stg.runtime, bridge_stg.export, bridge_stg.evaluation, bridge_stg.calibration as last"
    files = run(python, "-c", f"{lines}; print(bridge_stg.runtime.__file__, last.__file__)", cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(environment) for file in files)
    assert "Usage: bridge-stg" in run(environment / "bin/bridge-stg", "--help", cwd=tmp_path)
    done = subprocess.run(
        [environment / "bin/bridge-stg", "infer", "nowhere.mp4", "the dog"],
        cwd=tmp_path, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("Error: ")


def test_optimum_cli_has_the_export_command(environment: Path, tmp_path: Path) -> None:
    optimum = (environment / "bin/python", "-m", "optimum.commands.optimum_cli", "export")
    assert "bridge-stg" in run(*optimum, "--help", cwd=tmp_path)
    shown = run(*optimum, "bridge-stg", "--help", cwd=tmp_path)
    own = run(environment / "bin/bridge-stg", "export", "--help", cwd=tmp_path)
    general = {"--help", "--verbose", "--quiet", "--log-json"}
    options = set(re.findall(r"--[a-z-]+", own)) - general
    assert {"--out", "--overwrite", "--variant"} <= options <= set(re.findall(r"--[a-z-]+", shown))
    arguments = ("nowhere", "--variant", "standard", "--out", tmp_path / "b", "--overwrite")
    done = subprocess.run(
        [*optimum, "bridge-stg", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("Error: nowhere"), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_optimum_cli_exports_a_checkpoint(environment: Path, tmp_path: Path) -> None:
    from bridge_stg.checkpoint.checkpoint import save_checkpoint
    from bridge_stg.demo.tiny_model import write_demo_tokenizer
    from tests.export.conftest import random_model

    write_demo_tokenizer(tmp_path / "tokenizer.json")
    save_checkpoint(random_model(), tmp_path / "checkpoint", tokenizer=tmp_path / "tokenizer.json")
    optimum = (environment / "bin/python", "-m", "optimum.commands.optimum_cli", "export", "bridge-stg")
    run(
        *optimum,
        tmp_path / "checkpoint",
        "--out",
        tmp_path / "bundle",
        "--variant",
        "standard",
        cwd=tmp_path,
        timeout=900,
    )
    assert "replayed" in run(environment / "bin/bridge-stg", "verify", tmp_path / "bundle", cwd=tmp_path)
