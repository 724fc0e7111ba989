"""Frames of a training are those of an evaluation: parts of videos, folders of frames, and parts of frames."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.evaluation.media import clip_frames, folder_frames, frame_files
from bridge_stg.runtime.bundle.spec import ModelSpec
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.token_budget import Budget
from bridge_stg.training.data.media import Crop, cropped, open_clip, read_medium
from bridge_stg.training.data.sources import Clip
from tests.errors import raises
from tests.evaluation import official
from tests.fakes.clips import GOP, pictures, write

CROP: Crop = (8, 4, 50, 44)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "a.mp4"
    return write(path, pictures(100), rate=20, options={"x264-params": GOP})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = official.got10k(tmp_path_factory.mktemp("got"), frames=30)
    return files.media / "val" / "GOT-10k_val_000001".replace("val_", "Val_")


def clip(media: Path, part: tuple[float, float] | None = None, frame_rate: float | None = None) -> Clip:
    return Clip(0, "jsonl", media, str(media), (), part=part, frame_rate=frame_rate)


def same_frames(found: Clip, frames: Iterator[tuple[float, np.ndarray]], spec: ModelSpec, crop: Crop | None) -> None:
    """Compare a clip's frames with those of the evaluation's stream of them."""
    stream = ((time, cropped(rgb, crop)) for time, rgb in frames)
    budget = Budget(spec.frames.max_visual_tokens)
    source, later_s = open_clip(found, spec, budget=budget, crop=crop)
    with source, open_source(stream, spec, budget=budget, buffer_frames=1024) as expected:
        coarse, wanted = source.coarse(), expected.coarse()
        np.testing.assert_allclose(coarse.times, wanted.times)
        assert np.array_equal(coarse.frames, wanted.frames) and later_s == 0
        np.testing.assert_allclose(source.duration_s, expected.duration_s, atol=0.051)
        grid = expected.fine_grid()
        fine, kept = source.fine(grid), expected.fine(grid)
        np.testing.assert_allclose(fine.times, kept.times, atol=1e-6)
        assert np.array_equal(fine.frames, kept.frames)


@pytest.mark.parametrize("crop", [None, CROP], ids=["whole", "cropped"])
@pytest.mark.parametrize("kept_bytes", [0, 2**26], ids=["sought", "kept"])
@pytest.mark.parametrize("part", [(0.0, 5.0), (0.52, 3.11), (2.0, 4.0)], ids=str)
def test_a_part_of_a_video(
    *, video: Path, spec: ModelSpec, part: tuple[float, float], crop: Crop | None, kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("bridge_stg.runtime.video.file.KEPT_BYTES", kept_bytes)
    same_frames(clip(video, part), clip_frames(video, *part), spec, crop)


@pytest.mark.parametrize("crop", [None, CROP], ids=["whole", "cropped"])
def test_a_folder_of_frames(folder: Path, spec: ModelSpec, crop: Crop | None) -> None:
    same_frames(clip(folder, frame_rate=10.0), folder_frames(folder, 10.0), spec, crop)


@pytest.mark.parametrize("kind", ["video", "part", "folder"])
def test_a_clip_may_start_later(kind: str, video: Path, folder: Path, spec: ModelSpec) -> None:
    found = {"video": clip(video), "part": clip(video, (1.0, 4.0)), "folder": clip(folder, frame_rate=10.0)}[kind]
    budget = Budget(None)
    source, later_s = open_clip(found, spec, budget=budget, later_s=0.33)
    assert later_s == pytest.approx(0.4 if kind == "folder" else 0.35)
    with source, open_clip(found, spec, budget=budget)[0] as whole:
        assert source.duration_s == pytest.approx(whole.duration_s - later_s, abs=0.01)
        times = np.array([0.0, 0.6, 1.2]) + 1e-3
        assert np.array_equal(source.fine(times).frames, whole.fine(times + later_s).frames)
    assert read_medium(found).duration_s == pytest.approx({"video": 5.0, "part": 3.0, "folder": 3.0}[kind], abs=0.06)


def test_a_damaged_or_changed_folder_is_named(folder: Path, spec: ModelSpec, tmp_path: Path) -> None:
    copy = tmp_path / "sequence"
    shutil.copytree(folder, copy)
    third = frame_files(copy)[3]
    official.drawn(0.0).resize((48, 32)).save(third)
    budget = Budget(None)
    with (
        raises("video.size_changed", third, "48 × 32"),
        open_clip(clip(copy, frame_rate=10.0), spec, budget=budget)[0] as s,
    ):
        s.fine(s.fine_grid())
    third.write_bytes(b"damaged")
    with raises("video.unreadable", third), open_clip(clip(copy, frame_rate=10.0), spec, budget=budget)[0] as s:
        s.fine(s.fine_grid())
    with raises("video.too_short", copy):
        open_clip(clip(copy, (9.0, 12.0), 10.0), spec, budget=budget)


def test_a_part_after_the_end_is_too_short(video: Path, spec: ModelSpec) -> None:
    with raises("video.too_short", video, "7.00 s"):
        open_clip(clip(video, (7.0, 9.0)), spec, budget=Budget(None))
