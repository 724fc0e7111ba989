"""Which blocks of a recipe stay in float: ranked by what they do to the task, then as few as hold the limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bridge_stg.calibration.judge.judge import Judgement
from bridge_stg.calibration.options import Options
from bridge_stg.calibration.recipes import Recipe
from bridge_stg.calibration.search.search import Choice, Kept, fewest_in_float
from bridge_stg.calibration.search.sensitivity import Sensitivity, confirm, rank_blocks
from bridge_stg.calibration.search.trials import RecipeTrials, subset
from bridge_stg.export.graph.blocks import FLOAT, HEAD, TABLE, Matmul, Table
from bridge_stg.runtime.errors import BridgeError

CONFIRM_SAMPLES = 24
"""Samples that confirm the rank of a block."""


@dataclass(frozen=True, eq=False)
class Entries:
    """What of a bundle may be in integers.

    Attributes:
        products: of all graphs.
        tables: of all graphs.
    """

    products: Sequence[Matmul]
    tables: Sequence[Table]

    @property
    def tied(self) -> bool:
        """Whether the head shares its bytes with the table: the two are one block then, named by the head."""
        return bool({table.weight for table in self.tables} & {product.weight for product in self.products})

    def in_integers(self, recipe: Recipe) -> list[Matmul | Table]:
        """Return what a recipe has in integers; of a tied pair the head alone."""
        products = [p for p in self.products if recipe.of(p.graph).form_of(p) != FLOAT]
        tables = [t for t in self.tables if recipe.of(t.graph).form_of_table(t) != FLOAT]
        return [*products, *([] if self.tied else tables)]

    def alone(self, recipe: Recipe, graph: str, block: str) -> Recipe:
        """Return the recipe with one block in integers, everything else of every graph in float."""
        chosen = dataclasses.replace(recipe.of(graph), cache=FLOAT, keep_float=())
        partner = TABLE if self.tied and block == HEAD else None
        entries: list[Matmul | Table] = [*self.products, *self.tables]
        others = {entry.block for entry in entries if entry.graph == graph} - {block, partner}
        return Recipe(recipe.name, {graph: chosen}).with_float(*sorted(others))


def ranked_blocks(
    trials: RecipeTrials,
    recipe: Recipe,
    entries: Entries,
    errors: Mapping[str, Mapping[str, float]],
    reference: Judgement,
    *,
    count: int,
) -> list[Sensitivity]:
    """Rank what a recipe has in integers.

    Args:
        trials: judge recipes.
        recipe: as it is asked for.
        entries: of the bundle.
        errors: of the products' outputs, by graph and node.
        reference: the judgement of the bundle in float.
        count: blocks that the metric confirms.
    """
    ids = subset(trials, CONFIRM_SAMPLES)

    def alone(one: Sensitivity) -> tuple[float, float]:
        only = entries.alone(recipe, one.graph, one.block)
        judged = trials.trial(only, reference, chosen=ids, stage=f"asking with {one.block} alone in integers")
        return judged.drop, 1 - (1.0 if judged.tube_iou is None else judged.tube_iou)

    return confirm(rank_blocks(entries.in_integers(recipe), errors), alone, count=count)


def chosen_blocks(
    trials: RecipeTrials, recipe: Recipe, ranked: Sequence[Sensitivity], reference: Judgement, options: Options
) -> tuple[Choice, list[dict[str, Any]]]:
    """Find the fewest blocks in float that hold both limits. Return the choice, and every trial for the report.

    Raises:
        BridgeError: no choice holds them.
    """
    tried: list[dict[str, Any]] = []

    def trial(kept: Kept) -> float:
        stage = f"trial {len(tried) + 1}, {len(kept)} of {len(ranked)} blocks in float"
        chosen = recipe.with_float(*kept)
        judged = trials.trial(chosen, reference, stop_above=options.max_drop, stage=stage)
        # One answer may change however few there are: that is no evidence yet.
        allowed = max(options.max_changed, 100 / judged.samples)
        loss = round(max(judged.drop / options.max_drop, judged.changed / allowed), 9)  # 3 of 100 are 3 %, not more
        tried.append({"kept": list(kept), "drop": judged.drop, "changed": judged.changed, "within": loss <= 1})
        return loss

    choice = fewest_in_float([one.block for one in ranked], trial, limit=1.0, max_trials=options.max_trials)
    if not choice.within:
        best = next(one for one in tried if one["kept"] == list(choice.kept))
        raise BridgeError(
            f"no choice of blocks in float holds the limits after {len(tried)} trials: the best loses "
            f"{best['drop']:.2f} points and changes {best['changed']:.1f} % of the answers, and {options.max_drop:g} "
            f"points and {options.max_changed:g} % are allowed. Raise --max-drop or --max-changed, give another "
            "--recipe, or leave out --kv8"
        )
    return choice, tried
