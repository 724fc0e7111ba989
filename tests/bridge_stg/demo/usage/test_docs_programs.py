"""The programs of README.md and docs/embedding.md run as they stand, on the demo bundle."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import av
import pytest

from bridge_stg.runtime import Grounder

ROOT = Path(__file__).parents[4]
CLIP = ROOT / "assets/demo/clips/1-named.mp4"


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def place(demo_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the programs name."""
    (tmp_path / "bundle").symlink_to(demo_bundle)
    shutil.copyfile(CLIP, tmp_path / "video.mp4")
    with av.open(str(CLIP)) as container:
        next(container.decode(video=0)).to_image().save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(place: Path) -> None:
    (program,) = programs("README.md")
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["result"].query == "the red car" and [r.query for r in names["results"]] == ["the red car", "the dog"]
    assert names["when"].boxes is None and names["where"].found and names["track"].found


def test_embedding(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, search, _, stream = programs("docs/embedding.md")  # the demo has no text heads
    exec(video, {})
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the ")]  # boxes take lines
    assert [line[:7] for line in answers] == ["the red", "the dog"]
    query = CLIP.with_suffix(".txt").read_text().strip()
    stream = stream.replace("rtsp://camera/stream", "video.mp4").replace("the red car", query)
    with Grounder.load("bundle/") as grounder:
        exec(search.replace("recording.mp4", "video.mp4").replace("the red car", query), {"grounder": grounder})
        assert capsys.readouterr().out.startswith(query)
        assert not Path("recording.search.jsonl").exists()  # the search is complete
        exec(stream, {"grounder": grounder})
    shown = capsys.readouterr().out
    assert f"appeared {query} [" in shown and "LiveStats(" in shown
