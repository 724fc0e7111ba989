"""Equal frames are encoded once, and every place gets its own result."""

from __future__ import annotations

import numpy as np
import pytest

from bridge_stg.runtime.chain.vision_pass import coarse_tokens, deduplicate_frames, fine_maps
from bridge_stg.runtime.errors import VideoError
from bridge_stg.runtime.grounder import Grounder
from tests.errors import raises
from tests.fakes.chain import fake_grounder


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_equal_groups_share_one_wherever_they_stand() -> None:
    groups = noise(4, 2, 16, 24, 3)[[0, 1, 0, 2, 2, 3, 0]]
    chosen, places = deduplicate_frames(groups, patch=8)
    assert chosen.tolist() == [0, 1, 3, 5] and places.tolist() == [0, 1, 0, 2, 2, 3, 0]
    np.testing.assert_array_equal(groups[chosen][places], groups)


def test_one_changed_pixel_is_a_change_even_if_the_checksum_is_equal() -> None:
    groups = np.repeat(noise(1, 2, 16, 24, 3), 2, axis=0)
    groups[1, 1, 5, 7, 2] ^= 1  # a row that the checksum leaves out
    assert deduplicate_frames(groups, patch=8)[0].tolist() == [0, 1]


def test_a_tolerance_compares_the_patch_that_changed_most_and_slow_drifts_add_up() -> None:
    groups = np.full((6, 1, 16, 16, 3), 100, np.uint8)
    groups[1, 0, :8, :8] += 3  # one patch of four
    for g in range(2, 6):
        groups[g] += 2 * (g - 1)
    assert deduplicate_frames(groups, patch=8, tolerance=2.9)[0].tolist() == [0, 1, 3, 5]
    chosen, places = deduplicate_frames(groups, patch=8, tolerance=4)
    assert chosen.tolist() == [0, 4] and places.tolist() == [0, 0, 0, 0, 1, 1]
    assert deduplicate_frames(groups, patch=8, tolerance=255)[1].tolist() == [0] * 6
    falling = np.stack([np.full((1, 8, 8, 3), value, np.uint8) for value in (250, 5)])
    assert len(deduplicate_frames(falling, patch=8, tolerance=200)[0]) == 2  # a difference of bytes does not wrap round


def test_tokens_and_maps_are_those_of_encoding_every_frame() -> None:
    with fake_grounder() as grounder:
        session, spec = grounder.sessions["vision_encoder"], grounder.spec
        side = spec.vision.patch_size * spec.vision.merge_size
        order = [0, 1, 1, 2, 0, 0, 1, 3]
        groups = noise(4, spec.vision.temporal_patch_size, 2 * side, 3 * side, 3)[order]
        ignore = lambda done, total: None  # noqa: E731
        each = [coarse_tokens(session, spec, groups[g : g + 1], report=ignore)[:, 1:] for g in range(len(groups))]
        calls = len(session.calls)
        tokens = coarse_tokens(session, spec, groups, report=ignore)
        assert sum(len(call["frames"]) for call in session.calls[calls:]) == 4
        np.testing.assert_array_equal(tokens[:, 1:], np.concatenate(each, axis=1))
        assert not tokens[:, 0].any()
        frames = groups[:, 0]
        maps = [fine_maps(session, spec, frames[f : f + 1], report=ignore) for f in range(len(frames))]
        np.testing.assert_array_equal(fine_maps(session, spec, frames, report=ignore), np.concatenate(maps))


@pytest.mark.parametrize("value", [-1, 256, float("nan")])
def test_a_tolerance_out_of_range_is_rejected(value: float) -> None:
    with raises("options.out_of_range", "unchanged_tolerance", value, kind=VideoError), fake_grounder() as made:
        Grounder(made.sessions, made.spec, made.tokenizer, unchanged_tolerance=value)
