"""Which clip comes at which place of a training: the mixture of the sources.

A clip follows from the seed, the stage and the place alone, so that any number of processes sees the same data. Must
not know files and frames.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

import numpy as np

from bridge_stg.training.data.index import Index, lengths
from bridge_stg.training.recipe import DataRecipe

WORD = re.compile(r"\w+")
PERIOD = 1000  # places in which each source has its exact share
GROUPED_STEPS = 64  # at most as many steps exchange clips, so that those of one step have similar lengths
TRIES = 20  # for a query about something that a clip does not contain
ORDER, SHARES, STEPS, REPLACEMENT = range(4)  # purposes of random numbers
COMMON = frozenset(
    WORD.findall(
        "a an and are at by for from he her his in is it its of on or she that the their they this to who with"
    )
)
"""Words that say nothing about what a query looks for."""


class Mixture:
    """The clips of a stage, picklable.

    In every 1000 places, a source has the share of its weight; each of its epochs has all its clips in another order.
    With `group_by_length`, the clips of up to 64 steps, or an epoch of the smallest source, are sorted by their length
    into steps, and these steps come in a random order.

    Args:
        index: the clips.
        recipe: weights and other rules.
        seed: seed of all random choices.
        stage: number of the stage.
        clips_per_step: number of places of a step.
    """

    def __init__(self, index: Index, recipe: DataRecipe, seed: int, stage: int, clips_per_step: int) -> None:
        self.index, self.recipe, self.seed, self.stage, self.step = index, recipe, seed, stage, clips_per_step
        sources = np.array([clip.source for clip in index.clips])
        self.members = [np.flatnonzero(sources == number) for number in range(len(index.names))]
        self.counts = shares(np.array(index.weights), PERIOD)
        self.lengths = lengths(index, fine_frames=recipe.fine_frames, max_visual_tokens=recipe.max_visual_tokens)
        epoch = min(len(own) * PERIOD / count for own, count in zip(self.members, self.counts))
        self.block = clips_per_step * max(1, min(GROUPED_STEPS, int(epoch) // clips_per_step))

    def clip(self, place: int, attempt: int = 0) -> int:
        """Return the number in `index.clips` of the clip at a place; after `attempt` others could not be read."""
        if attempt:
            first = self.clip(place)
            members = self.members[self.index.clips[first].source]
            others = self.rng(REPLACEMENT, place).permutation(members[members != first])
            return int(others[(attempt - 1) % len(others)]) if len(others) else first
        if not self.recipe.group_by_length or self.step == 1:
            return self.in_order(place)
        block, within = divmod(place, self.block)
        return int(_grouped(self, block)[within])

    def rng(self, *purpose: int) -> np.random.Generator:
        """Return random numbers of their own for a purpose."""
        return np.random.default_rng((self.seed, self.stage, *purpose))

    def foreign_query(self, rng: np.random.Generator, task: str, number: int) -> str | None:
        """Return a query of the same task about another medium that shares no word with those of clip `number`.

        None if none is found in `TRIES` tries.
        """
        clip, pool = self.index.clips[number], self._queries.get(task)
        known = words(" ".join(sample.query for sample in clip.queries))
        for _ in range(TRIES if pool is not None else 0):
            assert pool is not None
            other, index = pool[int(rng.integers(len(pool)))]
            found = self.index.clips[other]
            text: str = found.queries[index].query
            if found.name != clip.name and not known & words(text):
                return text
        return None

    @cached_property
    def _queries(self) -> dict[str, np.ndarray]:
        """By task, the number of the clip of each query, and its index there, int64 [N, 2]."""
        found: dict[str, list[tuple[int, int]]] = {}
        for number, clip in enumerate(self.index.clips):
            for index, sample in enumerate(clip.queries):
                found.setdefault(sample.task, []).append((number, index))
        return {task: np.array(pairs) for task, pairs in found.items()}

    def in_order(self, place: int) -> int:
        """Return the clip at a place before the grouping by length."""
        period, within = divmod(place, PERIOD)
        order = _period(self, period)
        source = order[within]
        earlier = period * self.counts[source] + int((order[:within] == source).sum())
        epoch, rank = divmod(int(earlier), len(self.members[source]))
        return int(_epoch(self, int(source), epoch)[rank])


@lru_cache(maxsize=64)
def _period(mixture: Mixture, period: int) -> np.ndarray:
    """Return the source of each place of a period."""
    sources = np.repeat(np.arange(len(mixture.index.names)), mixture.counts)
    return mixture.rng(SHARES, period).permutation(sources)


@lru_cache(maxsize=64)
def _epoch(mixture: Mixture, source: int, epoch: int) -> np.ndarray:
    """Return the clips of a source in the order of an epoch."""
    return mixture.rng(ORDER, source, epoch).permutation(mixture.members[source])


@lru_cache(maxsize=8)
def _grouped(mixture: Mixture, block: int) -> np.ndarray:
    """Return the clips of a block of steps, in which each step has clips of similar lengths."""
    numbers = np.array([mixture.in_order(place) for place in range(block * mixture.block, (block + 1) * mixture.block)])
    numbers = numbers[np.argsort(mixture.lengths[numbers], kind="stable")].reshape(-1, mixture.step)
    return mixture.rng(STEPS, block).permutation(numbers).reshape(-1)


def shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers ≥ 1 in proportion to `weights` [N] whose sum is `total`, which must be at least N."""
    exact = weights / weights.sum() * total
    counts: np.ndarray = np.maximum(1, np.floor(exact).astype(int))
    while (left := total - counts.sum()) != 0:
        rest = exact - counts
        counts[rest.argmax() if left > 0 else np.where(counts > 1, rest, np.inf).argmin()] += np.sign(left)
    return counts


def words(text: str) -> set[str]:
    """Return the words of a text that say what it looks for."""
    return set(WORD.findall(text.lower())) - COMMON
