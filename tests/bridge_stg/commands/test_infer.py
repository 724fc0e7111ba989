"""The command `infer`: what it prints and writes, and the bundle that it takes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import av
import click
import numpy as np
import pytest
from PIL import Image

import bridge_stg
from bridge_stg import cli
from bridge_stg.demo import bundle as demo_bundle
from bridge_stg.runtime import TextOptions
from bridge_stg.runtime.bundle.spec import KnowsSpec, TextSpec
from bridge_stg.runtime.host.packages import install_command
from bridge_stg.runtime.visualize.canvas import COLOURS
from tests.bridge_stg.commands import fake_grounder
from tests.bridge_stg.commands.fake_grounder import FakeGrounder, complaint
from tests.evaluation.validation import validate
from tests.fakes.live_chain import live_grounder
from tests.fakes.live_chain import stream as bright_stream


def test_infer_prints_and_writes(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {name: clip.parent / name for name in ("r.json", "a.mp4", "s.png")}
    files = ["--json", outputs["r.json"], "--annotate", outputs["a.mp4"], "--sheet", outputs["s.png"]]
    options = ["--threads", "1", "--variant", "primitive", "--deadline", "9", "--no-allow-none", "--bundle", "b"]
    options += ["--max-visual-tokens", "90", "--stream", "0"]
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
    loading = {"backend": "auto", "variant": "primitive", "threads": 1, "kv_budget_bytes": None}
    assert fake[0] == (Path("b"), {**loading, "heads": None, "text": TextOptions()})
    assert 8 < fake[1][1]["deadline_s"] <= 9 and fake[1][1]["max_visual_tokens"] == 90
    assert fake[1][1]["stream"] == 0
    document = json.loads(outputs["r.json"].read_text())
    validate(document, "document")
    assert document["bundle"] == FakeGrounder.bundle and document["options"]["max_visual_tokens"] == 90
    assert [result["query"] for result in document["results"]] == ["the dog"]
    assert len(document["results"][0]["boxes"]) == 12
    assert document["results"][0]["coarse"]["fps"] == 2
    assert (document["engine"]["backend"], document["engine"]["reason"]) == ("tensorrt", "requested")
    assert sorted(path.name for path in clip.parent.iterdir()) == ["a.mp4", "clip.mp4", "r.json", "s.png"]


def test_infer_draws_all_queries_and_notes_letters_without_a_font(
    fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge_stg.runtime.visualize.fonts.font_file", lambda letters: None)
    out = clip.parent / "s.png"
    assert cli.run(["infer", str(clip), "the dog", "日本の車", "--bundle", "b", "--sheet", str(out)]) == 0
    assert "本" in capsys.readouterr().err
    with Image.open(out) as image:
        page = np.asarray(image)
    assert all((page == colour).all(-1).any() for colour in COLOURS[:2])


def test_infer_names_a_stream_that_does_not_exist(
    fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["infer", clip, "q", "--bundle", "b", "--stream", "3", "--annotate", clip.parent / "a.mp4"]
    assert "0 (h264" in complaint(arguments, capsys, code="video.bad_stream")
    assert not (clip.parent / "a.mp4").exists()


def test_infer_reports_an_unverified_bundle(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b"]) == 0
    assert "unverified" not in capsys.readouterr().err
    monkeypatch.setattr(FakeGrounder, "verified", False)
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b"]) == 0
    assert "unverified" in capsys.readouterr().err


def test_infer_refuses_an_untrained_bundle(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TextSpec(tube="{query}", span="{query}", image="{query}")
    for spec, hinted in ((FakeGrounder.spec, False), (dataclasses.replace(FakeGrounder.spec, text=text), True)):
        monkeypatch.setattr(FakeGrounder, "spec", dataclasses.replace(spec, trained=False))
        line = complaint(["infer", "v.mp4", "q", "--bundle", "b"], capsys, code="bundle.untrained")
        assert "b is untrained" in line and "--untrained" in line and ("--heads text" in line) == hinted
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b", "--untrained"]) == 0
    assert capsys.readouterr().err.count("b is untrained") == 1
    monkeypatch.setattr(FakeGrounder, "heads", "text")
    assert cli.run(["infer", "v.mp4", "q", "--bundle", "b"]) == 0
    assert "untrained" not in capsys.readouterr().err


def test_infer_names_words_that_the_model_does_not_know(
    fake: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knows = KnowsSpec("It knows dogs.", ("the", "dog"))
    monkeypatch.setattr(FakeGrounder, "spec", dataclasses.replace(FakeGrounder.spec, knows=knows))
    assert cli.run(["infer", "v.mp4", "the dog", "--bundle", "b"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.run(["infer", "v.mp4", "the cat", "the Man and the CAT", "--bundle", "b"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "cat, man, and." in line and line.endswith("It knows dogs.")
    many = [f"w{chr(97 + i)}" for i in range(12)]
    assert cli.run(["infer", "v.mp4", " ".join(many), "--bundle", "b"]) == 0
    assert f"{many[9]} and 2 more." in capsys.readouterr().err


def test_infer_takes_several_queries(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["infer", str(clip), "the dog", "the ghost", "--bundle", "b", "--json", str(clip.parent / "r.json")]
    assert cli.run(arguments) == 0
    assert "not in this video (probability 0.25)" in capsys.readouterr().out
    results = json.loads((clip.parent / "r.json").read_text())["results"]
    assert [result["found"] for result in results] == [True, False]


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
    infer = ["infer", clip, "q", "--bundle", "b"]
    line = complaint([*infer, "--json", clip.parent / "r.json"], capsys, code="output.disk_full")
    assert line == f"Error: {clip.parent / 'r.json'}: No space left on device [output.disk_full]"
    monkeypatch.setattr("PIL.Image.Image.save", fail)
    line = complaint([*infer, "--sheet", clip.parent / "s.png"], capsys, code="output.disk_full")
    assert line == f"Error: {clip.parent / 's.png'}: No space left on device [output.disk_full]"


def test_infer_says_how_text_heads_answered(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--heads", "text", "--mode", "two-step", "--no-grammar", "--max-tokens", "99"]
    assert cli.run(["infer", str(clip), "the dog", "--bundle", "b", *options]) == 0
    assert fake[0][1]["heads"] == "text"
    assert fake[0][1]["text"] == TextOptions(mode="two-step", grammar=False, max_tokens=99)
    shown = capsys.readouterr().out
    assert "mode joint, 90 tokens in 7 language-model calls (20 forced, 60 of 70 drafted accepted); cut by" in shown
    (header,) = [line for line in shown.splitlines() if "left" in line]
    assert header.split() == ["time", "left", "top", "right", "bottom"]


def test_infer_leaves_out_counts_without_information(
    fake: list[Any], clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = fake_grounder.COUNTS
    for counts, expected in (
        ({"drafted": 0, "accepted": 0, "truncated": 0}, "90 tokens in 7 language-model calls (20 forced)\n"),
        ({"forced": 0, "truncated": 0}, "90 tokens in 7 language-model calls (60 of 70 drafted accepted)\n"),
        ({"forced": 0, "drafted": 0, "accepted": 0}, "90 tokens in 7 language-model calls; cut by --max-tokens\n"),
    ):
        monkeypatch.setattr(fake_grounder, "COUNTS", usual | counts)
        assert cli.run(["infer", str(clip), "the dog", "--bundle", "b", "--heads", "text"]) == 0
        assert expected in capsys.readouterr().out


def test_ask_streams_its_answer(fake: list[Any], clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bundle", "b", "--max-tokens", "9", "--max-visual-tokens", "90", "--stream", "0", "--deadline", "5"]
    more = ["--threads", "2", "--index", "i", "--index-mb", "5"]
    assert cli.run(["ask", str(clip), "What happens?", *options, *more]) == 0
    assert capsys.readouterr().out == "A red car – 🚗\n"
    (bundle, given), index = fake[0], {"index": Path("i"), "max_index_bytes": 5_000_000}
    assert bundle == Path("b") and given.items() >= {"backend": "auto", "variant": None, "threads": 2, **index}.items()
    limits = {"max_tokens": 9, "max_visual_tokens": 90, "stream": 0, "deadline_s": pytest.approx(5, abs=1)}
    assert fake[1] == (str(clip), "What happens?", limits)
    line = complaint(["ask", str(clip), "nothing", "--bundle", "b"], capsys, code="query.needs_text_heads")
    assert "nothing" in line


def test_names_that_are_no_unicode(fake: list[Any], clip: Path) -> None:
    name, out = os.fsdecode(b"a\xff.mp4"), clip.parent / "r.json"
    assert cli.run(["infer", name, "q", "--bundle", "b", "--json", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["source"] == name


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
        assert "--bundle" in complaint(["infer", "v.mp4", "q"], capsys, code="bundle.not_given")

    def test_without_torch(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        Path("assets/demo/checkpoint").mkdir(parents=True)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        line = complaint(["infer", "v.mp4", "q"], capsys, code="bundle.not_given")
        assert install_command("cpu", "export") in line


def test_a_search_finds_all_occurrences_and_joins_its_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video, out = tmp_path / "long.mp4", tmp_path / "out.json"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _, frame in bright_stream(70, bright=((10.0, 14.0), (50.0, 53.0))):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    monkeypatch.setattr("bridge_stg.runtime.loading.load_grounder", lambda *_, **__: live_grounder())
    command = ["infer", str(video), "the car", "--bundle", "any", "--json", str(out), "--untrained"]
    assert cli.run(command) == 0  # a window is 64 s long
    found = json.loads(out.read_text())["results"][0]
    spans = [(one["span"]["start_s"], one["span"]["end_s"]) for one in found["occurrences"]]
    assert sorted(spans) == [(10.0, 14.0), (50.0, 53.0)] and found["windows"]["shots"] == 5
    assert "occurrences: 2" in capsys.readouterr().out
    assert cli.run([*command, "--no-cuts"]) == 0
    windows = json.loads(out.read_text())["results"][0]["windows"]
    assert (windows["shots"], windows["count"]) == (1, 2)
    assert cli.run([*command, "--window", "20", "--top", "1", "--annotate", str(tmp_path / "drawn.mp4")]) == 0
    assert len(json.loads(out.read_text())["results"][0]["occurrences"]) == 1
    assert cli.run([*command, "--window", "whole"]) == 0
    assert "occurrences" not in json.loads(out.read_text())["results"][0]
    capsys.readouterr()
    assert "--window 0.1:" in complaint([*command, "--window", "0.1"], capsys, code="options.out_of_range")
    complaint([*command, "--window", "long"], capsys, code="options.invalid")
    assert cli.run([*command, "--window", "whole", "--top", "3"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drawn.mp4", "long.mp4", "out.json"]
