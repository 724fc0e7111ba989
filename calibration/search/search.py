"""Search for the fewest blocks in float with which a loss is within its limit.

Knows nothing of graphs and metrics: a trial is a function from the blocks in float to a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Kept = tuple[str, ...]
"""Blocks in float, in the order of the ranking."""


@dataclass(frozen=True)
class Choice:
    """Result of the search: the blocks that stay in float, and the loss of the trial with exactly these.

    If that is not `within` the limit, it is the least of all trials. The choice is `minimal` if trials showed that each
    of the blocks is needed, and not if the trials ran out first.
    """

    kept: Kept
    loss: float
    within: bool
    minimal: bool


def fewest_in_float(
    ranked: Sequence[str], trial: Callable[[Kept], float], *, limit: float, max_trials: int = 24
) -> Choice:
    """Search for the fewest blocks in float.

    The first blocks of the ranking are kept. Their number is doubled until the loss is within the limit, then bisected.
    Since a ranking is never exact, each of them is then quantized on trial, least sensitive first.

    Args:
        ranked: all blocks that may stay in float, most sensitive first, without duplicates.
        trial: returns the loss with these blocks in float; called once for each set.
        limit: largest allowed loss.
        max_trials: maximum number of trials; after it, the best set so far is returned.
    """
    trials = _Trials(ranked, trial, limit, max_trials)
    if trials.passes(0):
        return trials.choice(minimal=True)
    most, count = 0, 1  # the largest number that is known to be too small, and the next one to try
    while not trials.spent and not trials.passes(min(count, len(ranked))):
        if count >= len(ranked):
            return trials.choice(minimal=False)  # even with all of them in float
        most, count = count, 2 * count
    least = min(count, len(ranked))
    while not trials.spent and least - most > 1:
        middle = (most + least) // 2
        if trials.passes(middle):
            least = middle
        else:
            most = middle
    return trials.choice(minimal=_quantize_one_by_one(trials))


class _Trials:
    """Remembers all trials, and the smallest set that passed."""

    def __init__(self, ranked: Sequence[str], trial: Callable[[Kept], float], limit: float, most: int) -> None:
        if len(set(ranked)) != len(ranked):
            raise ValueError("the ranking has a block twice")
        self.ranked = tuple(ranked)
        self.losses: dict[Kept, float] = {}
        self.best: Kept | None = None
        self._trial, self._limit, self._most = trial, limit, most

    @property
    def spent(self) -> bool:
        return len(self.losses) >= self._most

    def passes(self, kept: int | set[str]) -> bool:
        """Try the first blocks of the ranking, or a set of blocks."""
        chosen = self.ranked[:kept] if isinstance(kept, int) else self.ordered(kept)
        if chosen not in self.losses:
            self.losses[chosen] = self._trial(chosen)
        passed = self.losses[chosen] <= self._limit
        if passed and (self.best is None or len(chosen) < len(self.best)):
            self.best = chosen
        return passed

    def ordered(self, kept: set[str]) -> Kept:
        return tuple(block for block in self.ranked if block in kept)

    def choice(self, *, minimal: bool) -> Choice:
        kept = self.best if self.best is not None else min(self.losses, key=lambda k: (self.losses[k], len(k)))
        return Choice(kept, self.losses[kept], self.best is not None, minimal)


def _quantize_one_by_one(trials: _Trials) -> bool:
    """Remove blocks from the best set while it passes. Return whether each of the rest is known to be needed."""
    if trials.best is None:
        return False
    for block in reversed(trials.best):
        rest = set(trials.best) - {block}
        if trials.spent and trials.ordered(rest) not in trials.losses:
            return False
        trials.passes(rest)
    return True
