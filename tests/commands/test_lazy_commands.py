"""Commands are imported when they are asked for, and are all there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from bridge_stg import cli
from bridge_stg.commands.lazy import LazyCommands

ROOT = Path(__file__).resolve().parents[2]


def test_a_command_is_imported_on_first_use_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_commands.py").write_text(
        "import click\n@click.command()\ndef late():\n    'Come late.'\n    click.echo('here')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = LazyCommands({"late": "some_commands:late"})
    group = click.Group(commands=commands)
    assert list(commands) == ["late"] and "some_commands" not in sys.modules
    assert commands.get("other") is None and "some_commands" not in sys.modules
    with pytest.raises(KeyError):
        commands["other"]
    assert group.main(["late"], standalone_mode=False) is None and "some_commands" in sys.modules
    assert commands["late"] is commands.get("late") is next(iter(commands.values()))
    assert [name for name, command in commands.items() if command.name == "late"] == ["late"]
    del sys.modules["some_commands"]


def test_every_command_is_listed_and_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("export", "infer", "build", "calibrate", "evaluate", "infer-many", "serve", "watch", "doctor"):
        assert cli.app.commands[name].name == name and f"  {name} " in shown


def test_the_command_line_starts_without_what_only_some_commands_need() -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport bridge_stg.cli\nprint(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {
        "numpy",
        "av",
        "PIL",
        "onnxruntime",
        "tokenizers",
        "tqdm",
        "importlib.metadata",
        "bridge_stg.commands.evaluate",
    }
    assert not heavy & loaded
