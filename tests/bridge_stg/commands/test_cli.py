"""The command line: every fault of its user is one line with a code, and exit code 2; commands are imported late."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest

import bridge_stg
from bridge_stg import cli
from bridge_stg.commands import progress
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.packages import install_command
from tests.bridge_stg.commands.fake_grounder import FakeGrounder, complaint
from tests.evaluation.validation import validate

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        (["infer"], "options.missing", "SOURCE"),
        (["infer", "CLIP"], "options.missing", "QUERY"),
        (["infer", "CLIP", "q", "--threads", "0"], "options.invalid", "--threads"),
        (["infer", "CLIP", "q", "--threads", "100000"], "options.invalid", "--threads"),
        (["infer", "CLIP", "q", "--deadline", "0"], "options.invalid", "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "soon"], "options.invalid", "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "nan"], "options.invalid", "'nan'"),
        (["infer", "CLIP", "q", "--json", "r.txt"], "output.bad_suffix", ".json"),
        (["infer", "CLIP", "q", "--annotate", "a.avi"], "output.bad_suffix", ".mp4, .png or"),
        (["infer", "CLIP", "q", "--sheet", "s.jpg"], "output.bad_suffix", ".png"),
        (["infer", "CLIP", "q", "--sheet", "nowhere/s.png"], "output.no_folder", "nowhere"),
        (["infer", "CLIP", "q", "--sheet", "folder.png"], "output.is_folder", "folder.png"),
        (["infer", "CLIP", "q", "--track", "1,2,3"], "options.invalid", "'1,2,3'"),
        (["infer", "CLIP", "q", "--track", "1,2,3,4", "--task", "span"], "options.conflict", "--first-box"),
        (["infer", "CLIP", "--task", "track"], "options.missing", "--first-box"),
        (["infer", "CLIP", "q", "--task", "span", "--sheet", "s.png"], "options.conflict", "--sheet"),
        (["infer", "CLIP", "q", "--annotate", "CLIP"], "output.is_input", "clip.mp4"),
        (["infer", "CLIP", "q", "--annotate", "a.png"], "output.bad_suffix", "a.png"),
        (["infer", "CLIP", "q", "--annotate", "a.png", "--sheet", "./a.png"], "options.conflict", "a.png"),
        (["infer", "CLIP", "q", "--json", "a.json", "--state", "./a.json"], "options.conflict", "a.json"),
        (["infer", "CLIP", "q", "--json", "a.json", "--jsonl", "a.json.search.jsonl"], "options.conflict", "--state"),
        (["infer", "CLIP", "q", "--window", "whole", "--no-cuts"], "options.conflict", "--no-cuts"),
        (["infer", "CLIP", "q", "--top", "99999999999"], "options.invalid", "--top"),
        (["infer", "CLIP", "CLIP", "q"], "options.conflict", "clip.mp4"),
        (["infer", ".", "q", "--json", "r.json"], "options.conflict", "--json"),
        (["infer", "*.mp4", "--query", "q", "--sheet", "s.png"], "options.conflict", "--sheet"),
        (["infer", "-", "q", "--state", "s"], "options.conflict", "--state"),
        (["infer", "*.avi", "q"], "video.not_found", "*.avi"),
        (["infer", "folder.png", "q"], "video.not_found", "folder.png"),
        (["infer", "CLIP", "--queries", "nowhere.txt"], "query.no_file", "nowhere.txt"),
        (["infer", "CLIP", "q", "--json", "-", "--jsonl", "-"], "options.conflict", "--jsonl"),
        (["infer", "foo://camera/1", "q"], "live.bad_source", "foo://camera/1"),
        (["infer", "CLIP", "q", "--nonsense"], "options.unknown", "--nonsense"),
        (["infer", "CLIP", "q", "--nonsense", "--json", "r.json"], "options.unknown", "--nonsense"),
        (["infer", "CLIP", "q", "--bundle", "nowhere", "--json", "r.json"], "bundle.not_found", "nowhere"),
        (["infer", "CLIP", "q", "--bundle", "CLIP"], "bundle.not_found", "clip.mp4"),
        (["infer", "CLIP", "q", "--bundle", "folder.png"], "bundle.not_found", "manifest.json"),
        (["inspect", "nowhere"], "bundle.not_found", "nowhere"),
        (["verify", "folder.png"], "bundle.not_found", "manifest.json"),
        (["verify", "b", "--against", "c"], "options.conflict", "--bisect"),
        (["doctor", "--json", "more"], "options.usage", "more"),
        (["export", "nowhere"], "options.missing", "--out"),
        (["export", "nowhere", "--out", "b", "--variant", "fp4"], "options.invalid", "fp4"),
        (["export", "nowhere", "--out", "folder.png"], "output.exists", "--overwrite"),
        (["export", "nowhere", "--out", "b", "--samples", "s"], "options.conflict", "--int8"),
        (["serve", "b", "--live", "a=0", "--live", "a=1"], "options.conflict", "--live"),
        (["serve", "b", "--api-key-env", "UNSET_KEY"], "options.invalid", "UNSET_KEY"),
        (["calibrate", "b", "--samples", "s", "--out", "o", "--seed", "-1"], "options.invalid", "--seed"),
        (["train-demo", "--vision-steps", "0"], "options.invalid", "--vision-steps"),
        (["train-demo", "--text-steps", "1"], "options.conflict", "--heads text"),
        (["train-demo", "--heads", "text", "--vision-steps", "1"], "options.conflict", "--text-steps"),
        (["evaluate-demo", "--out", "f.json", "--text-bundle", "b", "--checkpoint", "c"], "options.conflict", "--text"),
        (["evaluate-demo", "--out", "nowhere/f.json"], "output.no_folder", "nowhere"),
        (["evaluate-demo", "--out", "f.json", "--clips", "0"], "options.invalid", "--clips"),
        (["nonsense"], "options.usage", "nonsense"),
        (["infr", "CLIP", "q"], "options.usage", "infer"),
        (["infer", "CLIP", "q", "--index", "CLIP/i"], "output.no_folder", "clip.mp4"),
        (["export", "nowhere", "--out", "CLIP/b"], "output.no_folder", "clip.mp4"),
    ],
)
def test_faults_of_the_user(
    *,
    arguments: list[str],
    code: str,
    value: str,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(clip.parent)
    Path("folder.png").mkdir()
    assert value in complaint([a.replace("CLIP", str(clip)) for a in arguments], capsys, code=code)
    assert sorted(path.name for path in clip.parent.iterdir()) == ["clip.mp4", "folder.png"]


def test_an_output_is_not_in_a_bundle(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = clip.parent / "b" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text('{"schema_version": 2, "fingerprint": "f"}')
    line = complaint(["infer", str(clip), "q", "--json", str(manifest)], capsys, code="output.is_input")
    assert str(manifest) in line and "fingerprint" in manifest.read_text()


def test_every_bridge_error_is_one_line(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in _kinds(BridgeError):

        def fail(*arguments: object, kind: type[BridgeError] = kind, **options: object) -> None:
            error = kind.__new__(kind)
            BridgeError.__init__(error, "call.deadline", "deadline_s=1 passed\n during “answer”")
            raise error

        monkeypatch.setattr(FakeGrounder, "open", fail)
        for more in ([], ["--json", "r.json"]):
            line = complaint(["infer", "v.mp4", "q", "--bundle", "b", *more], capsys, code="call.deadline")
            assert line == "Error: deadline_s=1 passed during “answer” [call.deadline]"


def test_a_query_may_look_like_an_option(fake: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["infer", "--bundle", "b", "--task", "span", "--sheet", "s.png", "--", "v.mp4", "--json"]) == 2
    assert capsys.readouterr().out == ""


def _kinds(kind: type[BridgeError]) -> list[type[BridgeError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in _kinds(child))]


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("onnxruntime", ["cpu"]),
        ("torch", ["export"]),
        ("transformers.models", ["export"]),
        ("skimage", ["train"]),
        ("av", []),
    ],
)
def test_missing_package_is_named_with_its_extra(
    module: str, extra: list[str], fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(FakeGrounder, "open", fail)
    line = complaint(["infer", "v.mp4", "q", "--bundle", "b"], capsys, code="host.missing_package")
    assert f"package {module.partition('.')[0]}. " in line and install_command(*extra) in line


def test_migrate_says_what_the_bundle_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(Path(__file__).parents[2] / "runtime" / "bundle" / "schema_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for word in ("now", "already"):
        assert cli.run(["migrate", str(tmp_path / "bundle")]) == 0
        assert f"{word} has schema version" in capsys.readouterr().out
    complaint(["migrate", str(tmp_path)], capsys, code="bundle.not_found")


def test_missing_module_of_this_package_is_not_hidden(fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'bridge_stg.nonsense'", name="bridge_stg.nonsense")

    monkeypatch.setattr(FakeGrounder, "open", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.run(["infer", "v.mp4", "q", "--bundle", "b"])


def test_verbose_quiet_and_json_logs(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(FakeGrounder, "verified", False)
    infer = ["infer", "v.mp4", "q", "--bundle", "b"]
    logged = {}
    for option in ("", "-v", "-q", "--log-json"):
        assert cli.run([*infer, *option.split()]) == 0
        shown = capsys.readouterr()
        assert shown.out.startswith('"q" in')
        logged[option] = shown.err.splitlines()
    assert len(logged[""]) == 1 and "unverified" in logged[""][0]
    assert len(logged["-v"]) > 3 and any("loaded b in" in line for line in logged["-v"])
    assert logged["-q"] == []
    (record,) = map(json.loads, logged["--log-json"])
    assert (record["level"], record["logger"], record["message"]) == ("warning", "bridge_stg.commands", logged[""][0])
    assert record["time"].startswith("20") and record["time"].endswith("Z")
    validate(record, "log_line")
    assert cli.run(["--log-json", *infer, "-q", "--nonsense"]) == 2
    (record,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (record["level"], record["code"]) == ("error", "options.unknown")
    validate(record, "log_line")


def test_a_shell_completes_options_and_files() -> None:
    for words, expected in (
        ("infer --seco", "plain,--seconds"),
        ("infer v", "file,v"),
        ("infer v q --json r", "file,r"),
    ):
        variables = {"_BRIDGE_STG_COMPLETE": "bash_complete", "COMP_WORDS": f"bridge-stg {words}"}
        count = str(len(words.split()))
        environment = {**os.environ, **variables, "COMP_CWORD": count}
        done = shell(f"cd {ROOT}; {sys.executable} cli.py", env=environment)
        assert done.stdout.split() == [expected]


def shell(command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, **options
    )


def test_shim_runs_from_another_folder(tmp_path: Path) -> None:
    done = shell(f"{sys.executable} {ROOT / 'cli.py'} infer nowhere.mp4 'a dog' --bundle nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: nowhere") and done.stderr.count("\n") == 1


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    script = tmp_path / "many.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bridge_stg import cli\n"
        "import click\n"
        "@cli.app.command()\n"
        "def many():\n"
        "    for i in range(200000): click.echo(i)\n"
        "cli.main()\n"
    )
    done = shell(f"{sys.executable} {script} many | head -1", env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert done.stdout == "0\n" and done.stderr == "" and done.returncode == 0


WORK = f"""
import sys
import time
sys.path.insert(0, {str(ROOT)!r})
import contextlib, os, pathlib, time, click
from bridge_stg import cli
from bridge_stg.commands import progress
from bridge_stg.runtime.host.files import replacing
from bridge_stg.runtime.host.subprocess import run_in_subprocess

@cli.app.command()
@click.argument("out", type=pathlib.Path)
@click.option("--sleep", type=float, default=0)
@click.option("--confused", is_flag=True)
def work(out, sleep, confused):
    with contextlib.ExitStack() as stack, replacing(out) as temporary:
        if confused:
            stack.callback(int, "not a number")
        click.echo("working")
        click.echo("working", err=True)
        os.fstat(1), os.fstat(2)
        temporary.write_text("done")
        if sleep:
            run_in_subprocess("time:sleep", sleep, purpose="sleeps")
    click.echo("wrote it")
cli.main()
"""


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "2> >(true) | true"])
def test_a_stream_that_nobody_reads_does_not_fail_the_work(streams: str, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    out = tmp_path / "out.txt"
    command = f"set -o pipefail; (sleep 0.2; {sys.executable} {tmp_path / 'work.py'} work {out}) {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and out.read_text() == "done" and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.txt", "work.py"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the child in /proc")
@pytest.mark.parametrize(
    ("name", "code", "options"),
    [("SIGINT", 130, []), ("SIGTERM", 143, []), ("SIGHUP", 129, []), ("SIGTERM", 143, ["--confused"])],
)
def test_a_signal_ends_a_command_and_leaves_nothing(name: str, code: int, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    command = [sys.executable, str(tmp_path / "work.py"), "work", str(tmp_path / "out.txt"), "--sleep", "60", *options]
    heard = partial(signal.signal, getattr(signal, name), signal.SIG_DFL)  # `nohup pytest` ignores SIGHUP
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,  # noqa: PLW1509
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "working\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not (child := children.read_text().split()):
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=30)
    assert process.returncode == code and said.strip().endswith("[call.cancelled]") and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["work.py"]
    state = Path(f"/proc/{child[0]}/stat")
    while state.exists() and ") Z" not in state.read_text():  # killed, but perhaps not waited for
        time.sleep(0.01)


AT_EXIT = """
import atexit, os, signal, sys
from bridge_stg import cli
from bridge_stg.commands import progress
atexit.register(lambda: os.kill(os.getpid(), signal.{name}))
sys.argv = ["bridge-stg", "--version"]
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_the_exit_prints_no_traceback(name: str) -> None:
    command = [sys.executable, "-c", AT_EXIT.format(name=name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -getattr(signal, name) and not done.stderr and "bridge-stg" in done.stdout


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command} " in listed
        assert cli.run([command, "--help"]) == 0
        assert f"Usage: bridge-stg {command} " in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert bridge_stg.__version__ in capsys.readouterr().out


def test_commands_are_imported_on_first_use_only() -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bridge_stg import cli\n"
        "print(*sorted(sys.modules))\n"
        "cli.run(['build', '--help'])\n"
        "print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, after = (set(line.split()) for line in (done.stdout.splitlines()[0], done.stdout.splitlines()[-1]))
    heavy = {"numpy", "av", "PIL", "onnxruntime", "tokenizers", "tqdm", "importlib.metadata", "torch", "onnx"}
    assert not heavy & before and "bridge_stg.commands.build" not in before
    assert not heavy & after and "bridge_stg.commands.build" in after and "bridge_stg.commands.evaluate" not in after


def test_an_unknown_command_does_not_exist() -> None:
    context = click.Context(cli.app)
    assert cli.app.get_command(context, "nonsense") is None
    assert cli.app.list_commands(context) == sorted(cli.COMMANDS)


def test_old_names_of_options_are_accepted() -> None:
    old = {"build": "--again", "evaluate": "--engine", "infer-many": "--engine", "watch": "--jsonl",
           "serve": "--max-seconds"}  # fmt: skip
    for name, option in old.items():
        command = cli.app.get_command(click.Context(cli.app), name)
        assert command is not None and any(option in parameter.opts for parameter in command.params)


def test_progress_is_shown_after_its_delay_while_nothing_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "REFRESH_S", 0.01)
    progress.configure_log()
    with progress.ProgressBar(delay_s=0.05) as bar:
        bar("load_model", 0)
        assert capsys.readouterr().err == ""
        time.sleep(0.2)
        assert "load model: 00:00" in capsys.readouterr().err
        bar("decode_video", 1, 4)
        bar("vision", 0, 4)
        bar("decode_video", 3, 4)
        assert "decode video:  75%" in capsys.readouterr().err
    progress.set_level(logging.ERROR)
    with progress.ProgressBar() as bar:
        bar("decode_video", 1, 4)
    assert "decode" not in capsys.readouterr().err
    progress.set_level(logging.INFO)
