"""The command line: what it prints; every fault of its user is one line with a code, and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import click
import numpy as np
import pytest

import bridge_stg
from bridge_stg import cli
from bridge_stg.demo import bundle as demo_bundle
from bridge_stg.runtime.backends.choose import ChosenBackend
from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.video.token_budget import CoarseChoice
from bridge_stg.runtime.visualize.annotate import encode_h264

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 48)
TIMES = np.arange(20) / 10


class FakeVideo:
    """Answers every query with the same tube; a ghost is not found."""

    def __enter__(self) -> FakeVideo:
        return self

    def __exit__(self, *exception: object) -> None:
        return

    def ground_many(self, queries: Sequence[str], **options: Any) -> list[Grounding]:
        options["progress"]("answer", 1, len(queries))
        return [self.ground(query) for query in queries]

    def ground(self, query: str) -> Grounding:
        times = TIMES[4:16:2]
        presence = np.linspace(0.4, 1, len(times)).astype(np.float32)
        boxes = np.tile(np.array([10, 10, 30, 30], np.float32), (len(times), 1))
        tube = Tube(times=times, boxes=boxes, presence=presence, visible=presence >= 0.5)
        found = query != "the ghost"
        return Grounding(
            query=query,
            found=found,
            span=(0.4, 1.6) if found else None,
            tube=tube if found else None,
            boxes=tube.at(TIMES[4:16]) if found else None,
            size=SIZE,
            coarse=CoarseChoice(fps=2.0, size=(64, 48), groups=8, tokens=64, max_visual_tokens=None),
            answer="",
            named_span=None,
            scores={"absent": 0.25, "answer": 0.5, "presence": 0.7},
            tokens={"coarse": 64, "fine": 128, "dense": 1024, "ratio": 0.1875},
            timings={"answer": 0.01, "total": 0.25},
        )


class FakeGrounder(FakeVideo):
    """Records how it was loaded and opened."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    verified = True
    target = ChosenBackend("tensorrt", "10.15.1", {"language_model": "standard"}, "Orin (SM 87)", "requested")

    @classmethod
    def load(cls, path: Any, **options: Any) -> FakeGrounder:
        cls.calls.append((path, options))
        return cls()

    def open(self, video: str, **options: Any) -> FakeVideo:
        self.calls.append((video, options))
        return FakeVideo()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(FakeGrounder, "calls", [])
    monkeypatch.setattr(Grounder, "load", FakeGrounder.load)
    return FakeGrounder.calls


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    from PIL import Image

    encode_h264(((float(t), Image.new("RGB", SIZE, (60, 90, 70))) for t in TIMES), tmp_path / "clip.mp4")
    return tmp_path / "clip.mp4"


def complaint(arguments: Sequence[object], capsys: pytest.CaptureFixture[str], *, code: str) -> str:
    """Run a command that must fail, check its exit code, its line on stderr and its JSON, and return the line."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    line = output.err.rstrip("\n").splitlines()[-1]  # after a usage error's usage
    found = re.fullmatch(r"Error: (.*) \[([a-z_.]+)\]", line)
    assert found and found[2] == (code or found[2]) and "Traceback" not in output.err
    shown = [json.loads(text) for text in output.out.splitlines()]
    assert shown == ([{"error": {"code": found[2], "message": found[1]}}] if "--json" in arguments else [])
    return line


def test_infer_prints_and_writes(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {name: clip.parent / name for name in ("r.json", "a.mp4", "s.png")}
    files = ["--json", outputs["r.json"], "--annotate", outputs["a.mp4"], "--sheet", outputs["s.png"]]
    options = ["--threads", "1", "--variant", "primitive", "--deadline", "9", "--no-allow-none", "--bundle", "b"]
    options += ["--max-visual-tokens", "90"]
    assert cli.run([str(a) for a in ["infer", clip, "the dog", *files, *options]]) == 0
    shown = capsys.readouterr().out
    for part in (
        '"the dog" in 64 × 48',
        "from 0.40 s to 1.60 s",
        "low presence",
        "interpolated",
        "64 coarse + 128 fine",
        "coarse frames: 2 per second at 64 × 48 pixels, 8 groups, 64 tokens",
        "backend: tensorrt 10.15.1 on Orin (SM 87), standard",
    ):
        assert part in shown
    assert fake[0] == (Path("b"), {"backend": "auto", "variant": "primitive", "threads": 1, "wait": False})
    assert fake[1][1]["deadline_s"] == 9 and fake[1][1]["max_visual_tokens"] == 90
    document = json.loads(outputs["r.json"].read_text())
    assert [result["query"] for result in document["results"]] == ["the dog"]
    assert len(document["results"][0]["boxes"]) == 12
    assert document["results"][0]["coarse"]["fps"] == 2
    assert (document["engine"]["backend"], document["engine"]["reason"]) == ("tensorrt", "requested")
    assert sorted(path.name for path in clip.parent.iterdir()) == ["a.mp4", "clip.mp4", "r.json", "s.png"]


def test_infer_reports_an_unverified_bundle(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b"]) == 0
    assert "unverified" not in capsys.readouterr().err
    monkeypatch.setattr(FakeGrounder, "verified", False)
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b"]) == 0
    assert "unverified" in capsys.readouterr().err


def test_infer_takes_several_queries(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["infer", str(clip), "the dog", "the ghost", "--bundle", "b", "--json", str(clip.parent / "r.json")]
    assert cli.run(arguments) == 0
    assert "not in this video (probability 0.25)" in capsys.readouterr().out
    results = json.loads((clip.parent / "r.json").read_text())["results"]
    assert [result["found"] for result in results] == [True, False]


def test_table_names_the_limits_of_the_coarse_frames() -> None:
    from bridge_stg.commands.tables import grounding_table

    coarse = CoarseChoice(0.25, (48, 32), 1, 6, 6, ("max_visual_tokens", "max_positions"))
    table = grounding_table(dataclasses.replace(FakeVideo().ground("the dog"), coarse=coarse))
    limits = "6 of 6 tokens; limited by max_visual_tokens, max_positions"
    assert f"coarse frames: 0.25 per second at 48 × 32 pixels, 1 group, {limits}\n" in table


def test_table_shows_at_most_twelve_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    from bridge_stg.commands.tables import grounding_table

    result = FakeVideo().ground("the dog")
    assert result.boxes is not None and result.tube is not None
    long = result.tube.at(np.linspace(0.4, 1.6, 500))
    object.__setattr__(result, "boxes", long)
    rows = [line for line in grounding_table(result).splitlines() if line.startswith("     ")]
    assert len(rows) == 1 + 12
    assert rows[1].split()[0] == "0.40" and rows[-1].split()[0] == "1.60"


@pytest.mark.parametrize(
    ("arguments", "code", "value"),
    [
        (["infer"], "options.missing", "VIDEO"),
        (["infer", "CLIP"], "options.missing", "QUERY"),
        (["infer", "CLIP", "q", "--threads", "0"], "options.invalid", "--threads"),
        (["infer", "CLIP", "q", "--threads", "100000"], "options.invalid", "--threads"),
        (["infer", "CLIP", "q", "--deadline", "0"], "options.invalid", "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "soon"], "options.invalid", "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "nan"], "options.invalid", "'nan'"),
        (["infer", "CLIP", "q", "--json", "r.txt"], "options.invalid", ".json"),
        (["infer", "CLIP", "q", "--annotate", "a.avi"], "options.invalid", ".mp4 or .png"),
        (["infer", "CLIP", "q", "--sheet", "s.jpg"], "options.invalid", ".png"),
        (["infer", "CLIP", "q", "--sheet", "nowhere/s.png"], "options.invalid", "'nowhere'"),
        (["infer", "CLIP", "q", "--sheet", "folder.png"], "options.invalid", "'folder.png'"),
        (["infer", "CLIP", "q", "--track", "1,2,3"], "options.invalid", "'1,2,3'"),
        (["infer", "CLIP", "q", "--track", "1,2,3,4", "--task", "span"], "options.conflict", "--track"),
        (["infer", "CLIP", "q", "--task", "span", "--sheet", "s.png"], "options.conflict", "--sheet"),
        (["infer", "CLIP", "q", "--annotate", "CLIP"], "output.is_input", "clip.mp4"),
        (["infer", "CLIP", "q", "--annotate", "a.png"], "", "a.png"),
        (["infer", "CLIP", "q", "--annotate", "a.png", "--sheet", "./a.png"], "options.conflict", "a.png"),
        (["infer", "CLIP", "q", "p", "--annotate", "a.mp4", "--json", "r.json"], "options.conflict", "--annotate"),
        (["infer", "CLIP", "q", "--nonsense"], "options.unknown", "--nonsense"),
        (["infer", "CLIP", "q", "--nonsense", "--json", "r.json"], "options.unknown", "--nonsense"),
        (["infer", "CLIP", "q", "--bundle", "nowhere", "--json", "r.json"], "", "nowhere"),
        (["infer", "CLIP", "q", "--bundle", "CLIP"], "", "clip.mp4"),
        (["infer", "CLIP", "q", "--bundle", "folder.png"], "", "manifest.json"),
        (["inspect", "nowhere"], "", "nowhere"),
        (["verify", "folder.png"], "", "manifest.json"),
        (["verify", "b", "--against", "c"], "options.conflict", "--bisect"),
        (["doctor", "--json", "more"], "options.usage", "more"),
        (["export", "nowhere"], "options.missing", "--out"),
        (["export", "nowhere", "--out", "b", "--variant", "fp4"], "options.invalid", "fp4"),
        (["export", "nowhere", "--out", "folder.png"], "output.exists", "--overwrite"),
        (["export", "nowhere", "--out", "b", "--samples", "s"], "options.conflict", "--int8"),
        (["serve", "b", "--live", "a=0", "--live", "a=1"], "options.conflict", "--live"),
        (["serve", "b", "--api-key-env", "UNSET_KEY"], "options.invalid", "UNSET_KEY"),
        (["train-demo", "--vision-steps", "0"], "options.invalid", "--vision-steps"),
        (["evaluate-demo", "--out", "nowhere/f.json"], "options.invalid", "nowhere"),
        (["evaluate-demo", "--out", "f.json", "--clips", "0"], "options.invalid", "--clips"),
        (["nonsense"], "options.usage", "nonsense"),
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
    assert value in complaint([str(clip) if a == "CLIP" else a for a in arguments], capsys, code=code)
    assert sorted(path.name for path in clip.parent.iterdir()) == ["clip.mp4", "folder.png"]


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
        ("onnxruntime", "[cpu]"),
        ("torch", "[export]"),
        ("transformers.models", "[export]"),
        ("skimage", "[train]"),
        ("av", ""),
    ],
)
def test_missing_package_is_named_with_its_extra(
    module: str, extra: str, fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(FakeGrounder, "open", fail)
    line = complaint(["infer", "v.mp4", "q", "--bundle", "b"], capsys, code="host.missing_package")
    assert f"package {module.partition('.')[0]}. " in line and f'pip install "bridge-stg{extra}"' in line


def test_missing_module_of_this_package_is_not_hidden(fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'bridge_stg.nonsense'", name="bridge_stg.nonsense")

    monkeypatch.setattr(FakeGrounder, "open", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.run(["infer", "v.mp4", "q", "--bundle", "b"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, click.Abort])
def test_interruption_leaves_nothing(
    error: type[BaseException],
    fake: list[Any],
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("bridge_stg.runtime.visualize.annotate.FramePainter.paint", fail)
    out = clip.parent / "a.mp4"
    assert cli.run(["infer", str(clip), "q", "--bundle", "b", "--annotate", str(out)]) == 130
    assert [path.name for path in clip.parent.iterdir()] == ["clip.mp4"]
    assert "[call.cancelled]" in capsys.readouterr().err


def test_unwritable_file_is_one_line(
    fake: list[Any], clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    line = complaint(["infer", clip, "q", "--bundle", "b", "--json", clip.parent / "r.json"], capsys, code="host.file")
    assert line == f"Error: {clip.parent / 'r.json'}: No space left on device [host.file]"
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    line = complaint(["infer", clip, "q", "--bundle", "b", "--sheet", clip.parent / "s.png"], capsys, code="host.file")
    assert line == f"Error: {clip.parent / 's.png'}: No space left on device [host.file]"


def test_names_that_are_no_unicode(fake: list[Any], clip: Path) -> None:
    name, out = os.fsdecode(b"a\xff.mp4"), clip.parent / "r.json"
    assert cli.run(["infer", name, "q", "--bundle", "b", "--json", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["video"] == name


class TestDemoBundle:
    """The bundle of `infer` without --bundle."""

    @pytest.fixture(autouse=True)
    def empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(demo_bundle, "SOURCE_TREE", tmp_path / "nowhere")

    @staticmethod
    def put(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")

    def test_built_before_cached(self, tmp_path: Path) -> None:
        cached = tmp_path / "cache" / "bridge-stg" / bridge_stg.__version__ / "demo"
        self.put(cached)
        assert demo_bundle.demo_bundle() == cached
        self.put(tmp_path / "build/demo/bundle")
        assert demo_bundle.demo_bundle() == Path("build/demo/bundle")

    def test_nothing_to_export_from(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--bundle" in complaint(["infer", "v.mp4", "q"], capsys, code="")

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        Path("assets/demo/checkpoint").mkdir(parents=True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        line = complaint(["infer", "v.mp4", "q"], capsys, code="")
        assert 'pip install "bridge-stg[cpu,export]"' in line


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
    assert done.stdout == "0\n" and done.stderr == "" and done.returncode == 1


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
           "serve": "--max-seconds", "train": "--questions"}  # fmt: skip
    for name, option in old.items():
        command = cli.app.get_command(click.Context(cli.app), name)
        assert command is not None and any(option in parameter.opts for parameter in command.params)
