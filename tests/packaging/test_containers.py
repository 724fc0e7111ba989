"""The container recipes: each line has its reason, what it copies and installs exists, no network at run time."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "containers").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str
    reason: str


def instructions(file: Path) -> list[Instruction]:
    found: list[Instruction] = []
    reason: list[str] = []
    lines = file.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        if not line.strip():
            reason = []
        elif line.startswith("#"):
            reason.append(line.lstrip("# "))
        else:
            name, _, rest = line.partition(" ")
            found.append(Instruction(name, rest.strip(), " ".join(reason)))
    return found


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version.strip() for name, version in pairs}


def installed(file: Path) -> list[str]:
    """What `pip install` is asked for, options and their values left out."""
    wanted: list[str] = []
    for line in instructions(file):
        if line.name != "RUN":
            continue
        for command in line.rest.split("&&"):
            words = shlex.split(command)
            if len(words) > 1 and words[0].endswith("pip") and words[1] == "install":
                with_value = {i + 1 for i, word in enumerate(words) if word == "-c"}
                wanted += [w for i, w in enumerate(words[2:], 2) if not w.startswith("-") and i not in with_value]
    return wanted


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [file.name for file in RECIPES] == [
        "jetson-jp6.Dockerfile", "jetson-jp7.Dockerfile", "triton.Dockerfile", "x86.Dockerfile"
    ]  # fmt: skip


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
class TestRecipe:
    def test_every_instruction_has_its_reason(self, file: Path) -> None:
        for line in instructions(file):
            assert len(line.reason) > 20, f"{file.name}: {line.name} {line.rest} stands without a reason"

    def test_base_image_has_a_fixed_tag(self, file: Path) -> None:
        (base,) = [line.rest for line in instructions(file) if line.name == "FROM"]
        image, _, tag = base.rpartition(":")
        assert image.startswith("nvcr.io/nvidia/") and any(digit in tag for digit in "0123456789") and tag != "latest"

    def test_what_is_copied_exists_and_makes_the_wheel(self, file: Path) -> None:
        sources = [s for line in instructions(file) if line.name == "COPY" for s in line.rest.split()[:-1]]
        assert sources and all((ROOT / source).exists() for source in sources)
        folders = {link.name for link in (ROOT / "bridge_stg").iterdir() if link.is_symlink()} | {"setup.py"}
        needed = {folder.split("/")[0] for folder in folders} | {"pyproject.toml", "README.md", "LICENSE"}
        assert needed <= set(sources)
        if any("constraints.txt" in line.rest for line in instructions(file) if line.name == "RUN"):
            assert "constraints.txt" in sources

    def test_what_is_installed_agrees_with_the_project(self, file: Path) -> None:
        wanted = installed(file)
        extras = [match[1].split(",") for word in wanted if (match := re.fullmatch(r"/src\[(.*)\]", word))]
        assert len(extras) == 1 and set(extras[0]) <= set(EXTRAS)
        declared = [
            Requirement(text) for group in (PROJECT["project"]["dependencies"], *EXTRAS.values()) for text in group
        ]
        for word in wanted:
            if word.startswith("/src") or word == "pip":
                continue
            asked = Requirement(word)
            assert asked.name in {requirement.name for requirement in declared}
            assert str(asked.specifier), f"{word}: no version"

    def test_constraints_hold_for_its_python(self, file: Path) -> None:
        text = file.read_text(encoding="utf-8")
        python = Version(re.search(r"[Pp]ython[ -]?(3\.\d+)", text)[1])  # type: ignore[index]
        assert python in Requirement(f"x{PROJECT['project']['requires-python']}").specifier
        uses = any("-c /src/constraints.txt" in line.rest for line in instructions(file))
        assert uses == (python >= Version("3.11"))  # the pins are for these
        if uses:
            pins = pinned()
            (extras,) = [m[1].split(",") for w in installed(file) if (m := re.fullmatch(r"/src\[(.*)\]", w))]
            for text in (*PROJECT["project"]["dependencies"], *(t for extra in extras for t in EXTRAS[extra])):
                requirement = Requirement(text)
                environment = {"python_version": str(python), "platform_machine": "x86_64", "sys_platform": "linux"}
                applies = requirement.marker is None or requirement.marker.evaluate(environment)
                if applies and requirement.name in pins:
                    assert pins[requirement.name] in requirement.specifier, (
                        f"{text}: {pins[requirement.name]} is pinned"
                    )

    def test_nothing_is_fetched_at_run_time(self, file: Path) -> None:
        lines = instructions(file)
        start = " ".join(line.rest for line in lines if line.name in ("ENTRYPOINT", "CMD"))
        assert start and not re.search(r"\b(pip|apt|apt-get|curl|wget|git)\b", start)
        assert all(line.name != "ADD" for line in lines)
        assert not any(re.search(r"\b(curl|wget|git)\b", line.rest) for line in lines if line.name == "RUN")
