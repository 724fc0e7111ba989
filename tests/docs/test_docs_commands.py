"""README and docs: every command line in them is one that the command line takes."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import click
import pytest

from bridge_stg.cli import app
from bridge_stg.runtime.errors import BridgeError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
PROGRAMS = (("python", "cli.py"), ("bridge-stg",))


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def command_of(line: str) -> list[str] | None:
    """The arguments of a line that calls this program; None: it calls something else."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    while words and (re.fullmatch(r"\w+=\S+", words[0]) or words[0] in ("sudo", "-u", "bridge")):
        words = words[1:]
    if words:
        words[0] = Path(words[0]).name
    program = next((p for p in PROGRAMS if tuple(words[: len(p)]) == p), None)
    return None if program is None else words[len(program) :]


def commands(page: Path) -> list[list[str]]:
    found = []
    for text in blocks(page, "", "sh"):
        found += [command_of(line) for line in text.replace("\\\n", " ").splitlines()]
    for quoted in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)):
        found.append(command_of(quoted.replace("…", "X")))
    for text in blocks(page, "ini"):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str  # type: ignore[assignment, method-assign]
        unit.read_string(text)
        found.append(command_of(unit["Service"]["ExecStart"]))
    return [command for command in found if command and command != ["X"]]


def check(arguments: list[str]) -> None:
    """Let click read a command line without running it."""
    context = click.Context(app, info_name="bridge-stg")
    if arguments[0].startswith("-"):
        app.make_context("bridge-stg", arguments[:1], resilient_parsing=True)
        return
    command = app.get_command(context, arguments[0])
    assert command is not None, f"there is no command {arguments[0]}"
    command.make_context(arguments[0], arguments[1:], parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_taken(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        try:
            check(arguments)
        except click.exceptions.Exit:
            pass  # --help and --targets end here
        except (click.ClickException, BridgeError) as error:
            whole = len(arguments) > 1  # in a sentence a command may be named alone
            assert not whole, f"{page.name}: {shlex.join(arguments)}: {error}"


def test_they_are_found() -> None:
    found = {str(page.relative_to(ROOT)): len(commands(page)) for page in PAGES}
    assert found["README.md"] >= 12 and found["docs/deployment.md"] >= 14 and found["docs/engines.md"] >= 4
    with pytest.raises(click.UsageError, match="no-such-option"):
        check(["verify", "bundle", "--no-such-option"])


def test_every_command_is_described() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in app.list_commands(click.Context(app)) if f"cli.py {name}" not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_programs_and_targets_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for program in re.findall(r"\bpython3? ((?:[\w-]+/)+\w+\.py)", text):
        assert (ROOT / program).is_file(), f"{page.name} runs {program}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)", text, re.MULTILINE):
        assert "".join(target) in targets, f"{page.name} makes {''.join(target)}"
