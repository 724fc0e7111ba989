"""Choose the blocks that stay in float: rank blocks by their effect on the task, then keep as few as the limits allow.

Knows nothing of how a recipe is tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_stg.calibration.options import Options
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.scoring.scores import Scores
from bridge_stg.calibration.search.search import Choice, Kept, fewest_in_float
from bridge_stg.calibration.search.sensitivity import Sensitivity, confirm, rank_blocks
from bridge_stg.calibration.search.trials import RecipeTrials
from bridge_stg.export.graph.blocks import FLOAT, HEAD, TABLE, Matmul, Table
from bridge_stg.runtime.errors import BridgeError

CONFIRM_SAMPLES = 24
"""Number of samples on which the sensitivity of a block is measured."""


@dataclass(frozen=True, eq=False)
class Entries:
    """The parts of a bundle that may be quantized: matmuls and tables of all graphs."""

    matmuls: Sequence[Matmul]
    tables: Sequence[Table]

    @property
    def tied(self) -> bool:
        """Whether the head shares its bytes with the table: the two are then one block with the head's name."""
        return bool({table.weight for table in self.tables} & {matmul.weight for matmul in self.matmuls})

    def quantized(self, recipe: Recipe) -> list[Matmul | Table]:
        """Return the entries that a recipe quantizes; of a tied pair only the head."""
        matmuls = [m for m in self.matmuls if recipe.of(m.graph).form_of(m) != FLOAT]
        tables = [t for t in self.tables if recipe.of(t.graph).form_of_table(t) != FLOAT]
        return [*matmuls, *([] if self.tied else tables)]

    def alone(self, recipe: Recipe, graph: str, block: str) -> Recipe:
        """Return the recipe with one block quantized, and all other blocks of all graphs in float."""
        chosen = dataclasses.replace(recipe.of(graph), cache=FLOAT, keep_float=())
        partner = TABLE if self.tied and block == HEAD else None
        entries: list[Matmul | Table] = [*self.matmuls, *self.tables]
        others = {entry.block for entry in entries if entry.graph == graph} - {block, partner}
        return Recipe(recipe.name, {graph: chosen}).with_float(*sorted(others))


def rank_by_sensitivity(
    trials: RecipeTrials,
    recipe: Recipe,
    entries: Entries,
    errors: Mapping[str, Mapping[str, float]],
    reference: Scores,
    *,
    count: int,
) -> list[Sensitivity]:
    """Rank the blocks that a recipe quantizes, most sensitive first; the metric is measured for `count` of them."""
    ids = trials.spread_ids(CONFIRM_SAMPLES)

    def alone(one: Sensitivity) -> tuple[float, float]:
        only = entries.alone(recipe, one.graph, one.block)
        scores = trials.trial(only, reference, ids=ids, stage=f"evaluating with only {one.block} quantized")
        return scores.drop, 1 - (1.0 if scores.tube_iou is None else scores.tube_iou)

    return confirm(rank_blocks(entries.quantized(recipe), errors), alone, count=count)


def choose_float_blocks(
    trials: RecipeTrials, recipe: Recipe, ranked: Sequence[Sensitivity], reference: Scores, options: Options
) -> tuple[Choice, list[dict[str, Any]]]:
    """Find the fewest blocks in float that meet both limits; raise BridgeError if no trial does.

    Return the choice, and every trial for the report.
    """
    tried: list[dict[str, Any]] = []

    def trial(kept: Kept) -> float:
        stage = f"trial {len(tried) + 1}, {len(kept)} of {len(ranked)} blocks in float"
        scores = trials.trial(recipe.with_float(*kept), reference, stop_above=options.max_drop, stage=stage)
        allowed = max(options.max_changed, 100 / scores.samples)  # one changed answer is no evidence
        loss = round(max(scores.drop / options.max_drop, scores.changed / allowed), 9)  # 3 of 100 are 3 %, not more
        tried.append({"kept": list(kept), "drop": scores.drop, "changed": scores.changed, "within": loss <= 1})
        return loss

    choice = fewest_in_float([one.block for one in ranked], trial, limit=1.0, max_trials=options.max_trials)
    if not choice.within:
        best = next(one for one in tried if one["kept"] == list(choice.kept))
        limits = f"{options.max_drop:g} points and {options.max_changed:g} % of the answers"
        found = f"the best loses {best['drop']:.2f} points and changes {best['changed']:.1f} % of the answers"
        advice = "Raise --max-drop or --max-changed, choose another --recipe, or leave out --kv8"
        what = f"none of {len(tried)} trials is within {limits}: {found}. {advice}"
        raise BridgeError("calibration.limit_exceeded", what)
    return choice, tried
