"""Position tables, by their own rules; tests/bridge_stg/model compares them with transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bridge_stg.runtime.bundle.spec import VisionSpec
from bridge_stg.runtime.chain.positions import merge_order, vision_tables

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
