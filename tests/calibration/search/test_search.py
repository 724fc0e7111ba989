"""The search on made-up losses, without a model."""

from __future__ import annotations

import pytest

from bridge_stg.calibration.search.search import Kept, fewest_in_float

BLOCKS = [f"block {i}" for i in range(20)]


class Loss:
    """The sum of the costs of all blocks in INT8; remembers its calls."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs, self.tried = costs, list[Kept]()

    def __call__(self, kept: Kept) -> float:
        self.tried.append(kept)
        return sum(cost for block, cost in self.costs.items() if block not in kept)


def test_nothing_is_kept_where_all_of_int8_is_within_the_limit() -> None:
    loss = Loss({"block 3": 0.5, "block 4": 0.5})
    choice = fewest_in_float(BLOCKS, loss, limit=1.0)
    assert (choice.kept, choice.loss, choice.within, choice.minimal) == ((), 1.0, True, True)
    assert len(loss.tried) == 1


@pytest.mark.parametrize("place", [0, 1, 2, 3, 7, 8, 19])
def test_the_one_hostile_block_is_kept_alone_wherever_it_is_ranked(place: int) -> None:
    loss = Loss({BLOCKS[place]: 30.0, **{block: 0.01 for block in BLOCKS if block != BLOCKS[place]}})
    choice = fewest_in_float(BLOCKS, loss, limit=1.0, max_trials=100)
    assert choice.kept == (BLOCKS[place],)
    assert choice.within and choice.minimal
    assert choice.loss == pytest.approx(0.19)


def test_several_hostile_blocks() -> None:
    hostile = {"block 1": 5.0, "block 4": 5.0, "block 11": 2.0}
    loss = Loss(hostile)
    choice = fewest_in_float(BLOCKS, loss, limit=1.0, max_trials=100)
    assert choice.kept == ("block 1", "block 4", "block 11")
    assert len(loss.tried) == len(set(loss.tried))  # each set once


def test_a_well_ranked_search_takes_few_trials() -> None:
    loss = Loss(dict.fromkeys(BLOCKS[:3], 10.0))
    choice = fewest_in_float(BLOCKS, loss, limit=1.0)
    assert choice.kept == tuple(BLOCKS[:3])
    assert len(loss.tried) <= 7


def test_trials_run_out() -> None:
    loss = Loss({BLOCKS[7]: 30.0})
    choice = fewest_in_float(BLOCKS, loss, limit=1.0, max_trials=6)
    assert len(loss.tried) == 6
    assert choice.within and not choice.minimal and BLOCKS[7] in choice.kept


def test_all_in_float_is_not_enough() -> None:
    choice = fewest_in_float(BLOCKS, lambda kept: 9.0 - 0.1 * len(kept), limit=1.0)
    assert not choice.within and choice.kept == tuple(BLOCKS)
    choice = fewest_in_float(BLOCKS, lambda kept: 9.0, limit=1.0)
    assert not choice.within and choice.kept == ()  # keeping blocks does not help


def test_without_blocks_there_is_one_trial() -> None:
    assert fewest_in_float([], lambda kept: 2.0, limit=1.0).within is False
    assert fewest_in_float([], lambda kept: 0.0, limit=1.0).within is True


def test_a_duplicate_block() -> None:
    with pytest.raises(ValueError, match="twice"):
        fewest_in_float(["a", "a"], lambda kept: 0.0, limit=1.0)
