"""Commands that errors give to install packages: one function writes them, and pyproject.toml has their extras."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tomllib

from bridge_stg.cli import EXTRAS
from bridge_stg.runtime.backends.choose import BACKENDS
from bridge_stg.runtime.host import packages
from bridge_stg.runtime.host.packages import install_command

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("bridge_stg", "calibration", "evaluation", "export", "runtime", "examples")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def test_every_hint_names_an_extra() -> None:
    named = {*EXTRAS, *(backend.extra for backend in BACKENDS)} - {""}
    calls = 0
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "install_command":
                calls += 1
                named |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    assert calls >= 12 and {"cpu", "calibrate", "export"} <= named <= set(PROJECT["optional-dependencies"])


def test_no_other_text_names_the_package_with_an_extra() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    assert not [file for file in (*FILES, *pages) if "bridge-stg[" in file.read_text(encoding="utf-8")]


def test_the_command_fits_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert install_command("cpu", "serve") == 'pip install -e ".[cpu,serve]"' and install_command().endswith('-e "."')
    monkeypatch.chdir(tmp_path)
    assert install_command("cpu") == f'pip install -e "{ROOT}[cpu]"'
    monkeypatch.setattr(packages, "CHECKOUT", tmp_path)
    assert install_command("cpu") == 'pip install "bridge-stg[cpu]"'
