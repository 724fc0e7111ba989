"""The command line: what it prints, and that every fault of its user is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

import bridge_stg
from bridge_stg import cli
from bridge_stg.demo import bundle as demo_bundle
from bridge_stg.runtime.backends.choose import ChosenBackend
from bridge_stg.runtime.chain.results import Grounding, Tube
from bridge_stg.runtime.errors import BridgeError, Interrupted
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.video.token_budget import CoarseChoice
from bridge_stg.runtime.visualize.annotate import encode_h264

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 48)
TIMES = np.arange(20) / 10


class FakeVideo:
    """Answers every query with the same tube; `none` if the query is about a ghost."""

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

    calls: list[tuple[Any, ...]] = []
    verified = True
    target = ChosenBackend("tensorrt", "10.15.1", {"language_model": "standard"}, "Orin (SM 87)", "asked for")

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


def complaint(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2 and one line; return that line."""
    assert cli.run([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    line = output.err.rstrip("\n").splitlines()[-1]  # click shows how the command is used before it
    assert line.startswith("Error: ") and "Traceback" not in output.err
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
        "coarse frames: 2 a second at 64 × 48 pixels, 8 groups, 64 tokens",
        "engine: tensorrt 10.15.1 on Orin (SM 87), standard",
    ):
        assert part in shown
    assert fake[0] == (Path("b"), {"backend": "auto", "variant": "primitive", "threads": 1, "wait": False})
    assert fake[1][1]["deadline_s"] == 9 and fake[1][1]["max_visual_tokens"] == 90
    document = json.loads(outputs["r.json"].read_text())
    assert [result["query"] for result in document["results"]] == ["the dog"]
    assert len(document["results"][0]["boxes"]) == 12
    assert document["results"][0]["coarse"]["fps"] == 2
    assert (document["engine"]["backend"], document["engine"]["reason"]) == ("tensorrt", "asked for")
    assert sorted(path.name for path in clip.parent.iterdir()) == ["a.mp4", "clip.mp4", "r.json", "s.png"]


def test_infer_says_that_a_bundle_is_unverified(
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


def test_table_says_what_bound_the_coarse_frames() -> None:
    from bridge_stg.commands.tables import grounding_table

    coarse = CoarseChoice(0.25, (48, 32), 1, 6, 6, ("max_visual_tokens", "max_positions"))
    table = grounding_table(dataclasses.replace(FakeVideo().ground("the dog"), coarse=coarse))
    limits = "6 of 6 tokens; limited by max_visual_tokens, max_positions"
    assert f"coarse frames: 0.25 a second at 48 × 32 pixels, 1 group, {limits}\n" in table


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
    ("arguments", "part"),
    [
        (["infer"], "Missing argument 'VIDEO'"),
        (["infer", "CLIP"], "Missing argument 'QUERY...'"),
        (["infer", "CLIP", "q", "--threads", "0"], "--threads"),
        (["infer", "CLIP", "q", "--threads", "100000"], "--threads"),
        (["infer", "CLIP", "q", "--deadline", "0"], "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "soon"], "--deadline"),
        (["infer", "CLIP", "q", "--deadline", "nan"], "'nan' is not a number"),
        (["infer", "CLIP", "q", "--json", "r.txt"], "should end in .json"),
        (["infer", "CLIP", "q", "--annotate", "a.avi"], "should end in .mp4 or .png"),
        (["infer", "CLIP", "q", "--sheet", "s.jpg"], "should end in .png"),
        (["infer", "CLIP", "q", "--sheet", "nowhere/s.png"], "folder 'nowhere' does not exist"),
        (["infer", "CLIP", "q", "--sheet", "folder.png"], "is a folder"),
        (["infer", "CLIP", "q", "--annotate", "CLIP"], "is the video itself"),
        (["infer", "CLIP", "q", "--annotate", "a.png"], "what is grounded is a video"),
        (["infer", "CLIP", "q", "--annotate", "a.png", "--sheet", "./a.png"], "as --annotate and as --sheet"),
        (["infer", "CLIP", "q", "p", "--annotate", "a.mp4"], "draw one query"),
        (["infer", "CLIP", "q", "--nonsense"], "--nonsense"),
        (["infer", "CLIP", "q", "--bundle", "nowhere"], "nowhere: does not exist"),
        (["infer", "CLIP", "q", "--bundle", "CLIP"], "is a file, expected the folder of a bundle"),
        (["infer", "CLIP", "q", "--bundle", "folder.png"], "no manifest.json"),
        (["inspect", "nowhere"], "nowhere"),
        (["verify", "folder.png"], "manifest.json"),
        (["export", "nowhere"], "Missing option '--out'"),
        (["export", "nowhere", "--out", "b", "--variant", "fp4"], "fp4"),
        (["export", "nowhere", "--out", "folder.png"], "--overwrite"),
        (["train-demo", "--vision-steps", "0"], "--vision-steps"),
        (["evaluate-demo", "--out", "nowhere/f.json"], "nowhere"),
        (["evaluate-demo", "--out", "f.json", "--clips", "0"], "--clips"),
        (["nonsense"], "nonsense"),
    ],
)
def test_faults_of_the_user(
    arguments: list[str],
    part: str,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(clip.parent)
    Path("folder.png").mkdir()
    assert part in complaint([str(clip) if a == "CLIP" else a for a in arguments], capsys)
    assert sorted(path.name for path in clip.parent.iterdir()) == ["clip.mp4", "folder.png"]


def test_every_bridge_error_is_one_line(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (Interrupted("deadline_s=1 passed\n during answer"), *(kind("why") for kind in _kinds(BridgeError))):

        def fail(*arguments: object, error: BridgeError = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(FakeGrounder, "open", fail)
        line = complaint(["infer", "v.mp4", "q", "--bundle", "b"], capsys)
        assert line == f"Error: {' '.join(str(error).split())}"


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
    line = complaint(["infer", "v.mp4", "q", "--bundle", "b"], capsys)
    assert f"package {module.partition('.')[0]}. " in line and f'pip install "bridge-stg{extra}"' in line


def test_missing_module_of_our_own_is_not_hidden(fake: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "Interrupted" in capsys.readouterr().err


def test_unwritable_file_is_one_line(
    fake: list[Any], clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    line = complaint(["infer", clip, "q", "--bundle", "b", "--json", clip.parent / "r.json"], capsys)
    assert line == f"Error: {clip.parent / 'r.json'}: No space left on device"
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    line = complaint(["infer", clip, "q", "--bundle", "b", "--sheet", clip.parent / "s.png"], capsys)
    assert line == f"Error: {clip.parent / 's.png'}: No space left on device"


def test_names_that_are_no_unicode(fake: list[Any], clip: Path) -> None:
    name, out = os.fsdecode(b"a\xff.mp4"), clip.parent / "r.json"
    assert cli.run(["infer", name, "q", "--bundle", "b", "--json", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["video"] == name


class TestDemoBundle:
    """Which bundle `infer` takes when none is named."""

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
        assert "--bundle" in complaint(["infer", "v.mp4", "q"], capsys)

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        Path("assets/demo/checkpoint").mkdir(parents=True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert 'pip install "bridge-stg[cpu,export]"' in complaint(["infer", "v.mp4", "q"], capsys)


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
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
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
    for command in cli.app.commands:
        assert cli.run([command, "--help"]) == 0
        assert "Usage: bridge-stg" in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert bridge_stg.__version__ in capsys.readouterr().out
