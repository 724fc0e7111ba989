"""`index` over files and folders, and the commands that use what it stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge_stg import cli
from bridge_stg.evaluation.run import evaluate as evaluate_module
from bridge_stg.evaluation.run.evaluate import Model
from bridge_stg.runtime.grounder import Grounder
from bridge_stg.runtime.index.index import VisualIndex
from bridge_stg.runtime.video import decoder
from tests.evaluation.official import video
from tests.fakes.chain import fake_grounder

ANSWERS = {"the red square": "<1.2 seconds> to <1.2 seconds>"}


@pytest.fixture
def media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two videos and one that is broken, and commands whose bundle is a fake model."""

    def model(path: Path, label: str, *, index: Path | None = None, **options: Any) -> Model:
        def open_model() -> Grounder:
            kept = None if index is None else VisualIndex(index, {})
            return fake_grounder(script=ANSWERS, index=kept)

        return Model(label, {"fingerprint": "a"}, open_model)

    monkeypatch.setattr(evaluate_module, "bundle_model", model)
    folder = tmp_path / "media"
    video(folder / "a.mp4", 3, 8)
    video(folder / "sub/b.mp4", 2, 8)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


def test_index_and_query_a_folder(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ["--index", str(tmp_path / "index"), "--bundle", "b"]
    assert cli.run(["index", str(media), str(media / "a.mp4"), "--fine", *index]) == 1
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert "a.mp4: 3.0 s of video" in first and "indexed in" in first
    assert "broken.mp4: VideoError" in second and "b.mp4: 2.0 s of video" in third
    assert total.startswith("2 files") and "1 failed" in total and total.endswith(" MB per hour")
    (media / "broken.mp4").unlink()
    rows = []
    for options in ([], index[:2]):
        if options:
            monkeypatch.setattr(decoder.Decoder, "frames", lambda self: pytest.fail("a file is decoded"))
        out = tmp_path / f"{len(options)}.jsonl"
        command = ["infer-many", str(media), "--query", "the red square", "--bundle", "b", "--out", str(out), *options]
        assert cli.run(command) == 0
        rows.append([json.loads(line) | {"timings_s": None} for line in out.read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    capsys.readouterr()
    assert cli.run(["index", str(media), *index]) == 0
    assert capsys.readouterr().out.count("was indexed") == 2
    assert cli.run(["index", str(media), "--remove", *index[:2]]) == 0
    assert capsys.readouterr().out.startswith("deleted ") and len(list((tmp_path / "index").iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["MEDIA/sub"], "options.missing"),
        (["MEDIA/gone.mp4", "--index", "INDEX"], "video.not_found"),
        (["EMPTY", "--index", "INDEX"], "video.not_found"),
        (["MEDIA/sub", "--index", "MEDIA"], "index.not_an_index"),
        (["MEDIA/sub", "--index", "MEDIA/a.mp4"], "index.not_an_index"),
    ],
)
def test_bad_arguments(
    media: Path, tmp_path: Path, arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    names = {"MEDIA": str(media), "EMPTY": str(tmp_path / "empty"), "INDEX": str(tmp_path / "index")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    assert cli.run(["index", *arguments, "--bundle", "b"]) == 2
    output = capsys.readouterr()
    assert output.err.rstrip().endswith(f"[{code}]") and "Traceback" not in output.err
    assert len(list(media.iterdir())) == 3 and not (tmp_path / "index").exists()


@pytest.mark.slow
def test_ray_fills_an_index(media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    command = ["index", str(media / "a.mp4"), str(media / "sub"), "--index", str(tmp_path / "index"), "--bundle", "b"]
    assert cli.run([*command, "--engine", "ray", "--workers", "2"]) == 0
    assert cli.run(command) == 0
    assert capsys.readouterr().out.count("was indexed") == 2
