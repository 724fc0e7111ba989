"""Which clip comes at which place: exact shares, whole epochs, steps of similar lengths, and nothing but the place."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bridge_stg.evaluation.samples import Sample, span_truth
from bridge_stg.training.data.index import ClipSize, Index
from bridge_stg.training.data.media import Medium
from bridge_stg.training.data.mixture import Mixture, shares
from bridge_stg.training.data.sources import Clip
from bridge_stg.training.recipe import DataRecipe


def truth() -> object:
    return span_truth((0.0, 1.0))


def index(counts: list[int], weights: list[float], *, lengths: int = 1) -> Index:
    """Return an index of made-up clips, whose lengths are 1 … `lengths`."""
    clips, sizes = [], []
    for source, count in enumerate(counts):
        for number in range(count):
            name = f"{source}/{number}"
            sample = Sample(name, "span", Path(name), name, f"query {number}", truth)  # type: ignore[arg-type]
            clips.append(Clip(source, "jsonl", Path(name), name, (sample,)))
            groups = 1 + number % lengths
            sizes.append(ClipSize(Medium("video", (64, 64), 1.0 * groups), groups, 100 * groups, 8, 10))
    nothing = tuple(() for _ in counts)
    names = tuple(f"source {number}" for number in range(len(counts)))
    return Index(names, tuple(weights), tuple(clips), tuple(sizes), nothing, nothing, nothing)


@pytest.mark.parametrize("grouped", [False, True])
def test_sources_have_the_share_of_their_weights(grouped: bool) -> None:
    found = index([7, 300, 20], [1.0, 2.0, 5.0])
    mixture = Mixture(found, DataRecipe(group_by_length=grouped), 0, 0, 4)
    sources = [found.clips[mixture.clip(place)].source for place in range(4000)]
    counts = Counter(sources)
    assert all(abs(counts[source] / 4000 - weight / 8) < 0.01 for source, weight in enumerate((1, 2, 5)))
    assert all(set(sources[start : start + 100]) == {0, 1, 2} for start in range(0, 4000, 100))


def test_shares_are_whole_and_at_least_one() -> None:
    assert shares(np.array([1.0, 1.0, 1.0]), 1000).tolist() in ([334, 333, 333], [333, 334, 333], [333, 333, 334])
    assert shares(np.array([1e-6, 1.0]), 1000).tolist() == [1, 999]
    assert shares(np.array([1e-6, 1e-6, 1.0]), 3).tolist() == [1, 1, 1]


def test_an_epoch_of_a_source_has_all_its_clips() -> None:
    mixture = Mixture(index([13, 5], [1.0, 1.0]), DataRecipe(group_by_length=False), 3, 0, 2)
    numbers = [number for number in map(mixture.clip, range(2000)) if number < 13]
    epochs = [numbers[start : start + 13] for start in range(0, 13 * 20, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_the_clips_of_a_step_have_similar_lengths() -> None:
    def spread(*, grouped: bool) -> float:
        mixture = Mixture(index([400], [1.0], lengths=40), DataRecipe(group_by_length=grouped), 0, 0, 8)
        lengths = np.array([mixture.lengths[mixture.clip(place)] for place in range(800)]).reshape(-1, 8)
        steps = lengths.mean(1)
        assert np.abs(np.diff(steps)).mean() > 0.2 * (steps.max() - steps.min()) or not grouped
        return float((lengths.max(1) - lengths.min(1)).mean())

    assert spread(grouped=True) < 0.2 * spread(grouped=False)
    mixture = Mixture(index([400], [1.0], lengths=40), DataRecipe(), 0, 0, 8)
    assert sorted(mixture.clip(place) for place in range(400)) == list(range(400))


def test_a_clip_follows_from_seed_stage_and_place() -> None:
    found = index([50, 20], [1.0, 3.0], lengths=5)
    mixture = Mixture(found, DataRecipe(), 0, 0, 4)
    places = [mixture.clip(place) for place in range(200)]
    copy = pickle.loads(pickle.dumps(Mixture(index([50, 20], [1.0, 3.0], lengths=5), DataRecipe(), 0, 0, 4)))
    assert [copy.clip(place) for place in reversed(range(200))] == places[::-1]
    for seed, stage in ((1, 0), (0, 1)):
        other = Mixture(found, DataRecipe(), seed, stage, 4)
        assert [other.clip(place) for place in range(200)] != places


def test_a_clip_is_replaced_by_others_of_its_source() -> None:
    found = index([1, 9], [1.0, 1.0])
    mixture = Mixture(found, DataRecipe(), 0, 0, 1)
    for place in range(20):
        tried = [mixture.clip(place, attempt) for attempt in range(9)]
        if tried[0]:
            assert sorted(tried) == list(range(1, 10))
        else:
            assert set(tried) == {0}


def test_the_digest_of_an_index_changes_with_its_clips_and_queries() -> None:
    digests = {index(counts, weights).digest for counts, weights in (([3], [1.0]), ([4], [1.0]), ([3], [2.0]))}
    assert len(digests) == 3 and index([3], [1.0]).digest in digests
