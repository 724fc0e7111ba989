"""Position tables and stock positions, by their own rules; tests/model compares them with transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bridge_stg.runtime.bundle.spec import VisionSpec
from bridge_stg.runtime.chain.positions import VisualGrid, merge_order, stock_positions, vision_tables

LEARNED = VisionSpec("qwen3_vl", 16, 2, 2, 32, 16, 1, position_grid=4)
WINDOWED = VisionSpec("qwen2_5_vl", 14, 2, 2, 32, 16, 0, position_grid=0, window_patches=4, tokens_per_second=2.0)


def test_the_spec_determines_the_tables() -> None:
    assert list(vision_tables(LEARNED, 4, 6)) == ["pos_index", "pos_weight", "rotary_cos", "rotary_sin"]
    windows = ["window_index", "window_mask", "window_place"]
    assert list(vision_tables(WINDOWED, 4, 6)) == ["rotary_cos", "rotary_sin", *windows]
    plain = dataclasses.replace(WINDOWED, window_patches=0)
    assert list(vision_tables(plain, 4, 6)) == ["rotary_cos", "rotary_sin"]


def test_a_grid_that_does_not_divide_is_rejected() -> None:
    with pytest.raises(ValueError, match="5 × 6 patches"):
        vision_tables(WINDOWED, 5, 6)


@pytest.mark.parametrize("rows, columns", [(2, 2), (4, 4), (6, 10), (12, 8), (2, 14), (22, 2)])
def test_windows_contain_every_patch_once_with_its_neighbours(rows: int, columns: int) -> None:
    tables = vision_tables(WINDOWED, rows, columns)
    index, mask, place = tables["window_index"], tables["window_mask"], tables["window_place"]
    patches = rows * columns
    assert index.shape == mask.shape == (-(-rows // 4) * -(-columns // 4), 16)
    assert sorted(index[mask]) == list(range(patches))
    np.testing.assert_array_equal(index.flat[place], np.arange(patches))
    assert mask.any(1).all() and (index[~mask] == 0).all()
    order = merge_order(rows, columns, 2)
    row, column = order // columns, order % columns
    for patch_index, filled in zip(index, mask):
        mine = patch_index[filled]
        assert len(set(row[mine] // 4)) == len(set(column[mine] // 4)) == 1


def visual(*runs: int) -> np.ndarray:
    """Return a prompt of alternating runs of text and visual tokens."""
    return np.concatenate([np.full(count, bool(i % 2)) for i, count in enumerate(runs)])


def test_text_continues_past_the_larger_side_of_an_image() -> None:
    positions, following = stock_positions(WINDOWED, visual(2, 6, 3), [VisualGrid(1, 2, 3)])
    time = [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7]
    row = [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7]
    column = [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7]
    assert positions.tolist() == [time, row, column] and following == 8


def test_a_videos_groups_step_in_time_where_no_times_are_printed() -> None:
    positions, following = stock_positions(WINDOWED, visual(1, 8, 1), [VisualGrid(4, 1, 2, interval_s=0.8)])
    assert positions[0].tolist() == [0, 1, 1, 2, 2, 4, 4, 5, 5, 3]  # 1.6 steps a group, cut
    assert positions[2].tolist() == [0, 1, 2, 1, 2, 1, 2, 1, 2, 3]
    assert following == 6  # generated text continues after the latest time, not after the text


def test_groups_are_separate_where_times_are_printed() -> None:
    positions, following = stock_positions(LEARNED, visual(2, 2, 2, 2, 1), [VisualGrid(2, 1, 2, interval_s=1.0)])
    assert positions[0].tolist() == [0, 1, 2, 2, 4, 5, 6, 6, 8] and following == 9


@pytest.mark.parametrize("runs", [(2, 5, 1), (2, 6, 1, 6), (3,)])
def test_visual_tokens_must_match_the_grids(runs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="visual tokens"):
        stock_positions(WINDOWED, visual(*runs), [VisualGrid(1, 2, 3)])


def test_an_empty_prompt_has_no_positions() -> None:
    positions, following = stock_positions(LEARNED, np.zeros(0, bool), [])
    assert positions.shape == (3, 0) and following == 0
