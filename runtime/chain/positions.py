"""Position tables of the vision encoder, and the three rotary positions of every token of a stock prompt.

The tables depend on the frame size alone. They are inputs of the graph, since integer paths inside a graph break in
fp16, and baked constants would fix the resolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bridge_stg.runtime.bundle.spec import VisionSpec


def merge_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """Return raster indices [rows·columns] of patches in merge order: blocks of merge × merge, row by row."""
    raster = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def vision_tables(spec: VisionSpec, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Return the position inputs of `vision_encoder` for a grid of rows × columns patches, in the graph's order.

    Returns:
        With N = rows · columns patches in merge order: `rotary_cos`, `rotary_sin` float32 [N, head_dim], axial rotary
        angles, half of them from the row and half from the column. An encoder with learned positions
        (`position_grid`) has before them `pos_index` int64 [N, 4] and `pos_weight` float32 [N, 4], bilinear taps
        (corners aligned) into their grid; one with attention windows (`window_patches`) has after them those of
        `window_tables`.

    Raises:
        ValueError: the grid does not divide into merge blocks.
    """
    if rows % spec.merge_size or columns % spec.merge_size:
        raise ValueError(f"a grid of {rows} × {columns} patches does not divide by the merge size {spec.merge_size}")
    order = merge_order(rows, columns, spec.merge_size)
    row, column = order // columns, order % columns
    tables: dict[str, np.ndarray] = {}
    if spec.position_grid:
        tables |= _learned_tables(spec, row, column, rows, columns)
    tables |= _rotary_tables(spec, row, column)
    if spec.window_patches:
        tables |= window_tables(row, column, spec.window_patches)
    return tables


def _learned_tables(
    spec: VisionSpec, row: np.ndarray, column: np.ndarray, rows: int, columns: int
) -> dict[str, np.ndarray]:
    """Return the taps into the learned positions (transformers, `get_vision_interpolation_indices_and_weights`)."""
    row_taps, row_weights = _axis_taps(row, rows, spec.position_grid)
    column_taps, column_weights = _axis_taps(column, columns, spec.position_grid)
    index = row_taps[:, :, None] * spec.position_grid + column_taps[:, None, :]
    weight = row_weights[:, :, None] * column_weights[:, None, :]
    return {"pos_index": index.reshape(-1, 4), "pos_weight": weight.reshape(-1, 4).astype(np.float32)}


def _axis_taps(position: np.ndarray, length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two taps [n, 2] (int64, float32 weights) of each position along one axis, corners aligned."""
    source = position.astype(np.float32) * (np.float32(side - 1) / np.float32(max(length - 1, 1)))
    low = np.floor(source).astype(np.int64)
    fraction = (source - low).astype(np.float32)
    taps = np.stack([low, np.minimum(low + 1, side - 1)], -1)
    return taps, np.stack([1 - fraction, fraction], -1)


def _rotary_tables(spec: VisionSpec, row: np.ndarray, column: np.ndarray) -> dict[str, np.ndarray]:
    half = spec.head_dim // 2
    inverse_frequency = 1.0 / spec.rope_theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = np.stack([row, column], -1)[..., None].astype(np.float32) * inverse_frequency.astype(np.float32)
    angles = np.tile(angles.reshape(len(row), half), 2)
    return {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}


def window_tables(row: np.ndarray, column: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """Return the indices that gather patches at (row, column), int [N] each, into windows of side × side, and back.

    The order of patches within a window is arbitrary, since attention there has no positions. (transformers reorders
    the patches themselves, `get_vision_window_index`.)

    Returns:
        With W windows of M = side² places: `window_index` int64 [W, M], the patch in each place (0 if empty);
        `window_mask` bool [W, M], False for empty places; `window_place` int64 [N], the place of each patch in the
        flattened windows.
    """
    across = int(column.max()) // side + 1
    window = row // side * across + column // side
    by_window = np.argsort(window, kind="stable")
    rank = np.empty_like(window)
    rank[by_window] = np.arange(len(window)) - np.searchsorted(window[by_window], window[by_window])
    place = (window * side**2 + rank).astype(np.int64)
    shape = (int(window.max()) + 1, side**2)
    index, mask = np.zeros(shape, np.int64), np.zeros(shape, bool)
    index.flat[place] = np.arange(len(place))
    mask.flat[place] = True
    return {"window_index": index, "window_mask": mask, "window_place": place}


@dataclass(frozen=True)
class VisualGrid:
    """The visual tokens of one image or video of a stock prompt, after merging.

    Attributes:
        groups: groups of frames; 1 for an image.
        rows: rows of visual tokens per group.
        columns: columns of visual tokens per group.
        interval_s: seconds from one group to the next; None for an image.
    """

    groups: int
    rows: int
    columns: int
    interval_s: float | None = None


def stock_positions(spec: VisionSpec, visual: np.ndarray, grids: Sequence[VisualGrid]) -> tuple[np.ndarray, int]:
    """Return the rotary positions of a prompt as the family's own processor writes it.

    Text counts up in all three rows; the tokens of a group have (time, row, column) offsets from the end of the text,
    which continues past the larger side of the grid. With printed times (Qwen3-VL) there is text between the groups;
    without (Qwen2.5-VL), the groups of a video are adjacent and step in time by `tokens_per_second` · seconds, as
    truncated whole numbers. (transformers, `get_rope_index` of either family.)

    Args:
        spec: the family's geometry.
        visual: bool [L], True for visual tokens.
        grids: images and videos in the order of the prompt.

    Returns:
        Positions int64 [3, L] (time, row, column), and the position of the token that follows.

    Raises:
        ValueError: the visual tokens do not match the grids.
    """
    if spec.tokens_per_second is None:
        grids = [VisualGrid(1, grid.rows, grid.columns) for grid in grids for _ in range(grid.groups)]
    positions = np.empty((3, len(visual)), np.int64)
    cursor = place = 0
    for grid in grids:
        text = int(np.argmax(visual[place:])) if visual[place:].any() else len(visual) - place
        positions[:, place : place + text] = cursor + np.arange(text)
        cursor, place = cursor + text, place + text
        tokens = grid.groups * grid.rows * grid.columns
        if place + tokens > len(visual) or not visual[place : place + tokens].all():
            raise ValueError(f"the prompt has no {tokens} consecutive visual tokens at {place}, as {grid} needs")
        step = np.float32((spec.tokens_per_second or 0) * (grid.interval_s or 0))
        time = (np.arange(grid.groups, dtype=np.float32) * step).astype(np.int64)
        axes = np.meshgrid(time, np.arange(grid.rows), np.arange(grid.columns), indexing="ij")
        positions[:, place : place + tokens] = cursor + np.stack(axes).reshape(3, -1)
        cursor, place = cursor + max(grid.rows, grid.columns), place + tokens
    if visual[place:].any():
        raise ValueError(f"the prompt has visual tokens after {place}, where the grids end")
    positions[:, place:] = cursor + np.arange(len(visual) - place)
    return positions, int(positions.max()) + 1 if len(visual) else 0
