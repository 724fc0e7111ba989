"""A budget of visual tokens chooses rate and size of a video of any length, the same for files and streams."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridge_stg.runtime.backends.session import Preferences
from bridge_stg.runtime.bundle.spec import FramesSpec, ModelSpec
from bridge_stg.runtime.host.limits import Limits
from bridge_stg.runtime.video.frame import resize
from bridge_stg.runtime.video.open import open_source
from bridge_stg.runtime.video.sizes import frame_sizes
from bridge_stg.runtime.video.source import CoarseFrames
from bridge_stg.runtime.video.token_budget import Budget, CoarsePlan
from tests.errors import raises
from tests.fakes.chain import clip, fake_grounder, fake_spec
from tests.fakes.clips import LANGUAGE, VISION, Counter, pictures, write

# Cells of 16 pixels: a 64 × 48 video has 4 × 3 of them at full size and 2 × 2 at the smallest.
FRAMES = FramesSpec(
    coarse_fps=2, coarse_max_pixels=64 * 64, coarse_min_pixels=2 * 256, max_coarse_groups=32, fine_fps=4,
    fine_max_pixels=64 * 64, fine_min_pixels=256,
)  # fmt: skip
SPEC = ModelSpec(VISION, LANGUAGE, FRAMES)
FULL, LEAST = 12, 4


def stream(seconds: float, rate: float = 4, size: tuple[int, int] = (48, 64)) -> Iterator[tuple[float, np.ndarray]]:
    rows, columns = np.mgrid[: size[0], : size[1]]
    for index in range(round(seconds * rate)):
        frame = np.stack([rows * 3, columns * 3, np.full_like(rows, index % 256)], axis=-1)
        yield index / rate, frame.astype(np.uint8)


def read(
    video: Any, tokens: int | None, spec: ModelSpec = SPEC, *, cancel: Any = None, buffer_frames: int = 256
) -> CoarseFrames:
    with open_source(video, spec, budget=Budget(tokens), buffer_frames=buffer_frames) as source:
        return source.coarse(Limits(cancel=cancel))


def expected(groups_at_full_rate: int, tokens: int, spec: ModelSpec = SPEC) -> tuple[int, int]:
    """The rule, said again: halve the rate until the smallest size fits, then the largest size that does."""
    stride = 1
    while -(-groups_at_full_rate // stride) > min(tokens // LEAST, spec.frames.max_coarse_groups):
        stride *= 2
    return stride, tokens // -(-groups_at_full_rate // stride)


@pytest.mark.parametrize("tokens", [4, 7, 30, 64, 100, 127, 128, 200, 10_000])
@pytest.mark.parametrize("seconds", [1, 5, 12, 31, 40, 130])
def test_any_length_fits_any_budget(seconds: int, tokens: int) -> None:
    coarse = read(stream(seconds), tokens)
    choice, frames = coarse.choice, coarse.frames
    stride, a_group = expected(seconds, tokens)
    assert choice.tokens == choice.groups * (frames.shape[2] // 16) * (frames.shape[3] // 16) <= tokens
    assert choice.groups == len(frames) == -(-seconds // stride)
    assert choice.fps == 2 / stride == 1 / coarse.interval_s
    assert choice.size == frames.shape[3:1:-1] and choice.max_visual_tokens == tokens
    # As large as fits: 2 × 2, 3 × 2 and 4 × 3 cells are the sizes of this shape.
    assert choice.tokens // choice.groups == max(size for size in (4, 6, 12) if size <= a_group)
    assert bool(choice.limited_by) == (stride > 1 or a_group < FULL)


def test_without_a_budget_nothing_changes() -> None:
    choice = read(stream(8), None).choice
    assert (choice.fps, choice.size, choice.groups, choice.tokens) == (2, (64, 48), 8, 96)
    assert choice.max_visual_tokens is None and choice.limited_by == ()
    assert read(stream(40), None).choice.limited_by == ("max_coarse_groups",)
    assert read(stream(40), 150).choice.limited_by == ("max_coarse_groups", "max_visual_tokens")
    assert read(stream(8), 90).choice.limited_by == ("max_visual_tokens",)


def test_the_spec_can_set_the_budget() -> None:
    spec = dataclasses.replace(SPEC, frames=dataclasses.replace(FRAMES, max_visual_tokens=50))
    with open_source(stream(8), spec) as source:
        assert source.coarse().choice.tokens == 8 * 6
    assert read(stream(8), 40, spec).choice.tokens == 8 * 4


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (37, 501), (1000, 8), (17, 17), (300, 300), (1080, 1920)])
def test_sizes_go_down_to_the_smallest(shape: tuple[int, int]) -> None:
    spec = ModelSpec(VISION, LANGUAGE, FramesSpec(coarse_max_pixels=512 * 512, coarse_min_pixels=64 * 64))
    plan = CoarsePlan(*shape, spec, Budget(10**6))
    areas = [math.prod(size) for size in plan.sizes]
    assert plan.sizes[0] == frame_sizes(*shape, spec)[0]
    assert areas == sorted(set(areas), reverse=True) and areas[-1] >= min(areas[0], 64 * 64)
    assert all(side % 16 == 0 for size in plan.sizes for side in size)
    assert set(plan.rungs) <= set(plan.sizes)
    if areas[0] > 4 * 64 * 64:
        assert len(areas) > 4 and areas[-1] < 3 * 64 * 64
    for a, b in zip(plan.rungs, plan.rungs[1:]):
        assert 2 * math.prod(b) <= math.prod(a)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True, "9"])
def test_invalid_budgets(tokens: Any) -> None:
    with raises("video.bad_option", f"max_visual_tokens={tokens!r}"):
        read(stream(2), tokens)


def test_the_error_for_a_budget_below_one_group_gives_the_minimum() -> None:
    with raises("video.budget_too_small", "max_visual_tokens=3", "64 × 48", "4 tokens"):
        read(stream(2), 3)
    assert read(stream(2), 4).choice.groups == 1


def test_an_image_is_made_smaller_once() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    coarse = read(picture, 6)
    assert coarse.choice.size == (48, 32) and coarse.choice.limited_by == ("max_visual_tokens",)
    np.testing.assert_array_equal(coarse.frames[0, 1], resize(picture, (32, 48)))


def test_a_long_stream_is_kept_at_a_small_size() -> None:
    """Neither the frames at full size nor all samples at coarse size are ever in memory together."""
    frames = FramesSpec(
        coarse_fps=2, coarse_max_pixels=512 * 512, coarse_min_pixels=64 * 64, max_coarse_groups=4000,
        fine_max_pixels=64 * 64,
    )  # fmt: skip
    spec = ModelSpec(VISION, LANGUAGE, frames)
    peaks = []
    for seconds in (100, 600):
        tracemalloc.start()
        coarse = read(stream(seconds, 2, (480, 640)), 4000, spec, buffer_frames=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert coarse.choice.groups == seconds / 4 and coarse.choice.fps == 0.5  # 20 cells a group at the least
    samples = 4000 * 256 * 3 * 2  # bytes of the budget at one byte a channel, two samples a group
    assert peaks[1] < 8 * samples  # 600 s at coarse size would be 1.1 GB, at full size the same
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("groups", [*range(14, 22), *range(30, 42, 3), 65])
def test_frames_grow_again_when_the_rate_is_halved(groups: int) -> None:
    """What a stream shows at last depends on its length alone, though its frames were made smaller on the way."""
    spec = ModelSpec(VISION, LANGUAGE, dataclasses.replace(FRAMES, coarse_max_pixels=160**2, max_coarse_groups=99))
    coarse = read(stream(groups, 2, (16, 512)), 128, spec)  # from 1 × 32 to 1 × 8 cells
    best = CoarsePlan(16, 512, spec, Budget(128)).size_of(coarse.group_times)
    assert coarse.frames.shape[2:4] == best
    assert coarse.choice.groups <= 16 < 2 * coarse.choice.groups or groups <= 16


def video(path: Path, seconds: int) -> Path:
    return write(path, pictures(seconds * 5), rate=5, options={"g": "25"})


@pytest.mark.parametrize("tokens", [None, 20, 60, 100])
def test_a_file_is_chosen_like_its_frames(tokens: int | None, tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 14)
    check = Counter()
    from_file = read(path, tokens, cancel=check)
    from_stream = read([(i / 5, picture) for i, picture in enumerate(pictures(70))], tokens)
    assert from_file.choice == from_stream.choice
    np.testing.assert_array_equal(from_file.times, from_stream.times)
    # Made smaller in steps or at once, and through a codec: the same pictures all the same.
    assert np.abs(from_file.frames.astype(int) - from_stream.frames).mean() < 8
    assert check.count == 70


def test_a_file_that_is_shorter_than_it_says_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", pictures(200), rate=5, options={"g": "5"})
    whole = read(path, 48).choice
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 8])  # its header still promises 40 s
    check = Counter()
    coarse = read(path, 48, cancel=check)
    frames = check.count // 2
    assert 10 < frames < 50 and check.count == 2 * frames
    again = read([(i / 5, picture) for i, picture in enumerate(pictures(frames))], 48)
    assert coarse.choice == again.choice != whole and coarse.choice.tokens > whole.tokens / 2


def test_a_file_without_a_length_adapts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h264", pictures(100), rate=5, time_base=Fraction(1, 5))
    coarse = read(path, 30)
    assert coarse.choice.tokens <= 30 and coarse.choice.limited_by == ("max_visual_tokens",)


def test_animations_obey_the_budget(tmp_path: Path) -> None:
    images = [Image.fromarray(picture) for picture in pictures(8)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=500)
    assert read(tmp_path / "a.gif", 20).choice.tokens == 16


def test_the_choice_is_in_the_result(tmp_path: Path) -> None:
    script = {"the car": "<2.2 seconds> to <4.2 seconds>", "the cat": "none"}
    grounder = fake_grounder(script=script)
    free = grounder.ground(clip(), "the car")
    assert free.coarse.to_json() == {
        "fps": 2.0, "size": {"width": 32, "height": 16}, "groups": 8, "tokens": 16, "max_visual_tokens": None,
        "limited_by": [],
    }  # fmt: skip
    bound = grounder.ground(clip(), "the car", max_visual_tokens=8)
    assert bound.coarse.limited_by == ("max_visual_tokens",) and bound.coarse.tokens == bound.tokens["coarse"] == 8
    assert (bound.coarse.fps, bound.coarse.groups) == (1, 4)
    with grounder.open(clip(), max_visual_tokens=8) as opened:
        absent = opened.ground("the cat")
    assert not absent.found and absent.coarse == bound.coarse
    assert absent.to_json()["coarse"]["max_visual_tokens"] == 8
    sent = grounder.sessions["vision_encoder"].calls  # type: ignore[attr-defined]
    assert sum(len(call["frames"]) for call in sent if call["frames"].shape[2] == 16) == 8 + 4 + 4


@pytest.mark.parametrize("room", [400, 250, 190, 150])
def test_positions_limit_the_size_instead_of_an_error(room: int) -> None:
    spec = fake_spec(coarse_max_pixels=64 * 64)
    spec = dataclasses.replace(spec, language=dataclasses.replace(spec.language, max_positions=room))
    grounder = fake_grounder(spec, {"the car": "none"})
    with grounder.open(clip()) as opened:
        result = opened.ground("the car")
    assert ("max_positions" in result.coarse.limited_by) == (room < 400)
    assert room > 150 or result.coarse.fps < 2
    last = grounder.sessions["language_model"].calls  # type: ignore[attr-defined]
    assert max(call["positions"].max() for call in last) < room
    assert result.coarse.max_visual_tokens is None


@pytest.mark.parametrize(
    ("patches", "best", "groups"), [(8192, None, 3), (48, None, 1), (96, None, 2), (10, None, 1), (8192, 100, 2)]
)
def test_encoder_chunks_have_a_limited_number_of_patches(patches: int, best: int | None, groups: int) -> None:
    spec = fake_spec(coarse_max_pixels=64 * 64, encoder_chunk_patches=patches)
    grounder = fake_grounder(spec, {"the car": "<2.2 seconds> to <4.2 seconds>"})
    if best is not None:  # what the session takes best
        grounder.sessions["vision_encoder"].preferences = Preferences(encoder_patches=best)  # type: ignore[misc]
    reference = fake_grounder(fake_spec(coarse_max_pixels=64 * 64), {"the car": "<2.2 seconds> to <4.2 seconds>"})
    result, same = grounder.ground(clip(), "the car"), reference.ground(clip(), "the car")
    calls = grounder.sessions["vision_encoder"].calls  # type: ignore[attr-defined]
    assert max(len(call["frames"]) for call in calls) == groups  # of 8 × 6 patches
    assert result.boxes is not None and same.boxes is not None
    np.testing.assert_allclose(result.boxes.boxes, same.boxes.boxes)


def test_a_picture_file_obeys_the_budget(tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.jpg")
    assert read(tmp_path / "b.jpg", 4).choice.size == (32, 32)
