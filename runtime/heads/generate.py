"""Free decoding with a backbone's language model: stock prompts, greedy decoding without a grammar.

Equal to transformers' `generate` for the same weights. Knows ids and positions; grounding goes through
`bridge_stg.runtime.chain.decode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bridge_stg.runtime.backends.session import PREFILL_CHUNK, KVCache, Session
from bridge_stg.runtime.bundle.spec import VisionSpec
from bridge_stg.runtime.chain.decode import feed
from bridge_stg.runtime.chain.positions import VisualGrid, stock_positions
from bridge_stg.runtime.chain.prompt import Segment, text_segment


def stock_segment(
    spec: VisionSpec,
    input_ids: Sequence[int] | np.ndarray,
    visual_ids: Sequence[int],
    grids: Sequence[VisualGrid],
    *,
    first_row: int = 1,
) -> Segment:
    """Return the input_ids [L] of a family's processor as a segment.

    `visual_ids` are the ids of visual tokens, of images and of videos; `grids` are these in the order of the prompt.
    Prompts of one batch share the rows of visual_tokens; `first_row` is that of the prompt's first visual token. Raises
    ValueError if the visual tokens do not match the grids.
    """
    ids = np.asarray(input_ids, np.int64)
    visual = np.isin(ids, visual_ids)
    positions, next_position = stock_positions(spec, visual, grids)
    return Segment(ids, np.where(visual, first_row - 1 + np.cumsum(visual), 0), positions, next_position)


def prefill(
    session: Session,
    cache: KVCache,
    prompts: Sequence[Segment],
    visual_tokens: np.ndarray,
    *,
    chunk: int = PREFILL_CHUNK,
) -> np.ndarray:
    """Run B whole prompts of any lengths through the language model; return the logits [B, vocab] after each.

    A row whose prompt has ended is fed its last token again, at the same position. `cache` has B rows with room for the
    longest prompt; `visual_tokens` are [1+D, V, H] of all prompts, row 0 all zero; a call feeds at most `chunk` tokens
    per row.
    """
    longest = max(map(len, prompts))
    outputs: dict[str, np.ndarray] = {}
    for start in range(0, longest, chunk):
        starts = [min(start, len(prompt) - 1) for prompt in prompts]
        pieces = [prompt.part(begin, start + chunk) for prompt, begin in zip(prompts, starts, strict=True)]
        outputs = feed(session, cache, pieces, starts, outputs=1, visual_tokens=visual_tokens)
    return outputs["logits"][:, 0]


def generate(
    session: Session,
    prompts: Sequence[Segment],
    visual_tokens: np.ndarray,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    chunk: int = PREFILL_CHUNK,
) -> list[list[int]]:
    """Decode greedily after B prompts of at least one token; return the new ids of each row with the one that ended it.

    A row ends after one of `stop_ids`, or after `max_new_tokens`. Other arguments as for `prefill`.
    """
    capacity = max(map(len, prompts)) + max_new_tokens
    cache = session.allocate_cache(batch=len(prompts), capacity=capacity)
    logits = prefill(session, cache, prompts, visual_tokens, chunk=chunk)
    no_visual_tokens = np.ascontiguousarray(visual_tokens[:, :2])  # new tokens are all text
    lengths = [len(prompt) for prompt in prompts]
    # The one token that each row is fed next.
    tails = [text_segment([], prompt.next_position) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(max_new_tokens):
        for row, best in enumerate(logits.argmax(-1).tolist()):
            if not done[row]:
                answers[row].append(best)
                lengths[row] += len(tails[row])
                tails[row] = text_segment([best], tails[row].next_position)
                done[row] = best in stop_ids or len(answers[row]) == max_new_tokens
        if all(done):
            break
        # A row that is done is fed its last token, at the same position, until the others are done.
        logits = feed(session, cache, tails, lengths, outputs=1, visual_tokens=no_visual_tokens)["logits"][:, 0]
    return answers
