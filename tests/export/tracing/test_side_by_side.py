"""Tasks that run side by side read a matrix once, give what each gives alone, and leave no thread behind."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge_stg.export.parity.golden_cases import random_case
from bridge_stg.export.tracing import streaming
from bridge_stg.export.tracing.side_by_side import multiply_together, side_by_side
from bridge_stg.export.tracing.skeleton import open_skeleton
from bridge_stg.export.tracing.streaming import with_weights
from bridge_stg.model.model import BridgeSTG


def test_cases_of_a_model_on_disk_share_passes(
    checkpoint: Path, model: BridgeSTG, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    row_blocks = streaming.row_blocks
    monkeypatch.setattr(
        streaming, "row_blocks", lambda store, key, **o: reads.append(key) or row_blocks(store, key, **o)
    )
    skeleton, store = open_skeleton(checkpoint)
    sizes = [("vision_encoder", 0), ("language_model", 2), ("language_model", 3), ("language_model", 4)]
    with with_weights(skeleton, store, resident_bytes=0):
        found = side_by_side([partial(random_case, name, index, skeleton) for name, index in sizes])
    assert len(reads) == len(set(reads)) > 20
    for case, (name, index) in zip(found, sizes, strict=True):
        for tensor, values in random_case(name, index, model).expected.items():
            np.testing.assert_allclose(case.expected[tensor], values, rtol=0, atol=2e-5 * max(1, np.abs(values).max()))


def test_those_behind_go_first() -> None:
    passes: list[tuple[int, int]] = []

    def task(*places: int) -> float:
        x = torch.ones(1)
        for place in places:
            x = multiply_together(
                place, lambda xs, place=place: passes.append((place, len(xs))) or [x + 1 for x in xs], x
            )
        return float(x)

    assert side_by_side([partial(task, 1, 2), partial(task, 0, 1, 2), partial(task, 2), partial(task)]) == [3, 4, 2, 1]
    assert passes == [(0, 1), (1, 2), (2, 3)]


def test_an_error_ends_all_tasks() -> None:
    def fails() -> None:
        raise ValueError("this one")

    threads = threading.active_count()
    waits = partial(multiply_together, 0, list, torch.ones(1))
    with pytest.raises(ValueError, match="this one"):
        side_by_side([waits, fails, waits])
    assert threading.active_count() == threads
