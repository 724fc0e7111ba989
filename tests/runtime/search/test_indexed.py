"""A search with an index: the second one decodes and encodes nothing, and finds the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.index.index import VisualIndex
from bridge_stg.runtime.search.occurrences import SearchResult
from bridge_stg.runtime.video import decoder
from tests.fakes.answers import write_video
from tests.fakes.chain import fake_spec
from tests.fakes.live_chain import live_grounder, stream

BRIGHT = ((3.0, 5.0), (21.0, 26.0), (40.0, 43.0), (44.0, 46.0))
OPTIONS: dict[str, Any] = {"window_s": 8.0, "overlap": 0.25, "cuts": False}
SECONDS = 46.5  # the last group of frames is longer than the rest of the video


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", list(stream(SECONDS, bright=BRIGHT)))


def found(result: SearchResult) -> dict[str, Any]:
    row = result.to_json()
    assert row["found"] and len(row["occurrences"]) == len(BRIGHT)
    return {**row, "timings_s": None}


def searched(
    video: Path, root: Path | None, spec: ModelSpec | None = None, **options: Any
) -> tuple[dict[str, Any], int]:
    """Return the result of a search, and how many groups of frames were encoded."""
    grounder = live_grounder(spec, index=None if root is None else VisualIndex(root, {}))
    sessions: Any = grounder.sessions
    result = grounder.search(video, ["the car"], **{**OPTIONS, **options})[0]
    return found(result), sessions["vision_encoder"].frames


def test_the_second_search_decodes_and_encodes_nothing(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "index"
    expected, plain = searched(video, None)
    assert searched(video, root) == (expected, plain)
    decoded: list[Any] = []
    monkeypatch.setattr(decoder.Decoder, "frames", lambda self: decoded.append(self) or iter(()))
    assert searched(video, root) == (expected, 0) and not decoded


@pytest.mark.parametrize("lost", ["groups-*", "fine-maps-*", "*-*"])
def test_what_is_missing_is_computed_again(video: Path, tmp_path: Path, lost: str) -> None:
    root = tmp_path / "index"
    expected, plain = searched(video, root)
    for number, file in enumerate(sorted(root.rglob(lost))):
        if lost == "*-*" or number % 2 == 0:
            file.write_bytes(file.read_bytes()[:-1])
    mended, encoded = searched(video, root)
    assert mended == expected and 0 < encoded <= plain
    assert searched(video, root) == (expected, 0)


def test_other_windows_use_the_same_tokens(video: Path, tmp_path: Path) -> None:
    root = tmp_path / "index"
    searched(video, root)
    expected, _ = searched(video, None, overlap=0.5)
    assert searched(video, root, overlap=0.5)[0] == expected


@pytest.mark.parametrize("fine", [False, True])
def test_a_long_video_is_indexed_for_searches(video: Path, tmp_path: Path, fine: bool) -> None:
    spec = fake_spec(max_coarse_groups=8)  # the default windows last 8 s
    expected, plain = searched(video, None, cuts=True)
    grounder = live_grounder(spec, index=VisualIndex(tmp_path, {}))
    indexed = grounder.index(video, fine=fine)
    assert indexed.duration_s == pytest.approx(SECONDS) and indexed.nbytes > 0 and not indexed.reused
    assert grounder.index(video, fine=fine).reused
    result, encoded = searched(video, tmp_path, spec=spec, cuts=True)
    assert result["occurrences"] == expected["occurrences"] and encoded < plain
    assert encoded == 0 or not fine
