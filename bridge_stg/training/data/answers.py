"""Rows of text: the ids of query, answer and bridging queries, and the targets of the answer. No torch modules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridge_stg.runtime.chain.grammar import AnswerGrammar


def answer_row(
    query_ids: np.ndarray, grammar: AnswerGrammar, groups: tuple[int, int] | None, bridging_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return ids and targets of one row: query, answer and bridging ids.

    Targets are the answer ids among which the grammar leaves a choice; all others are −100.
    """
    answer, state = grammar.answer_ids(groups), grammar.start()
    ids = [*map(int, query_ids), *answer, *bridging_ids]
    target = [-100] * len(ids)
    while not state.done:
        state.forced()
        if not state.done:
            index = len(state.ids)
            target[len(query_ids) + index - 1] = answer[index]
            state.choose(answer[index])
    return ids, target


def pad_rows(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and targets [B, L], right-padded, and lengths [B]."""
    ids, target = zip(*rows)
    return pad_right(ids, 0), pad_right(target, -100), torch.tensor([*map(len, ids)])


def pad_right(rows: Sequence[list[int]], fill: int) -> Tensor:
    """Pad rows on the right to int64 [B, L]."""
    return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_value=fill)
