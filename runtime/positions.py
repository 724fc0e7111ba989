"""Position tables of the vision encoders: host arithmetic that follows from the frame size alone.

Computed here, in numpy, and fed to the graph as inputs: integer paths inside a graph break in fp16, and baked
constants would fix the resolution.
"""

from __future__ import annotations

import numpy as np

from bridge_stg.runtime.spec import VisionSpec


def merge_order(rows: int, columns: int, merge: int) -> np.ndarray:
    """Return raster indices [rows·columns] of patches in merge order: blocks of merge × merge, row by row."""
    raster = np.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    return raster.transpose(0, 2, 1, 3).reshape(-1)


def vision_tables(spec: VisionSpec, rows: int, columns: int) -> dict[str, np.ndarray]:
    """Return the position inputs of `vision_encoder` for a grid of rows × columns patches.

    Args:
        spec: the encoder's geometry; `family` names the rule.
        rows: patches along the height, a multiple of the merge size.
        columns: patches along the width, a multiple of the merge size.

    Returns:
        For `qwen3_vl`, with N = rows · columns patches in merge order: `pos_index` int64 [N, 4] and `pos_weight`
        float32 [N, 4], bilinear taps (corners aligned) into the learned grid; `rotary_cos`, `rotary_sin`
        float32 [N, head_dim], axial rotary angles, half of them from the row and half from the column.

    Raises:
        ValueError: the family is unknown, or the grid does not divide into merge blocks.
    """
    if spec.family != "qwen3_vl":
        raise ValueError(f"vision family {spec.family!r} is unknown; supported: 'qwen3_vl'")
    if rows % spec.merge_size or columns % spec.merge_size:
        raise ValueError(f"a grid of {rows} × {columns} patches does not divide by the merge size {spec.merge_size}")
    order = merge_order(rows, columns, spec.merge_size)
    row, column = order // columns, order % columns
    (row_taps, row_weights), (column_taps, column_weights) = (
        _axis_taps(row, rows, spec.position_grid),
        _axis_taps(column, columns, spec.position_grid),
    )
    index = row_taps[:, :, None] * spec.position_grid + column_taps[:, None, :]
    weight = row_weights[:, :, None] * column_weights[:, None, :]
    half = spec.head_dim // 2
    inverse_frequency = 1.0 / spec.rope_theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = np.stack([row, column], -1)[..., None].astype(np.float32) * inverse_frequency.astype(np.float32)
    angles = angles.reshape(len(order), half)
    angles = np.concatenate([angles, angles], -1)
    return {
        "pos_index": index.reshape(-1, 4),
        "pos_weight": weight.reshape(-1, 4).astype(np.float32),
        "rotary_cos": np.cos(angles),
        "rotary_sin": np.sin(angles),
    }


def _axis_taps(position: np.ndarray, length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the two taps [n, 2] (int64, float32 weights) of each position along one axis, corners aligned."""
    source = position.astype(np.float32) * (np.float32(side - 1) / np.float32(max(length - 1, 1)))
    low = np.floor(source).astype(np.int64)
    fraction = (source - low).astype(np.float32)
    taps = np.stack([low, np.minimum(low + 1, side - 1)], -1)
    return taps, np.stack([1 - fraction, fraction], -1)
