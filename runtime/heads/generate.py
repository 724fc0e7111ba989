"""Decode text answers greedily with a backbone's language model, several rows at a time, and verify drafts.

Without a grammar, the ids equal those of transformers' greedy `generate` for the same weights. Knows ids, positions
and one session; must not know videos and times. Letters as in `bridge_stg.runtime.chain.decode`.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bridge_stg.runtime.backends.session import PREFILL_CHUNK, KVCache, Session, check_finite, largest, smallest
from bridge_stg.runtime.bundle.spec import VisionSpec
from bridge_stg.runtime.chain.decode import feed
from bridge_stg.runtime.chain.positions import VisualGrid, stock_positions
from bridge_stg.runtime.chain.prompt import Segment, text_segment
from bridge_stg.runtime.device.array_ops import Array

Draft = Callable[[Sequence[int]], Sequence[int]]
"""Given the ids of an answer so far, return a draft of the next ids."""
LEAST_DRAFT = 4
"""Minimum of `TextRow.longest_draft`: a call of a few tokens costs about as much as a call of one."""


class GreedyDecoding:
    """Greedy decoding of one answer: its state, here without a grammar.

    Args:
        max_tokens: maximum tokens of the answer; it is cut there.
        stop_ids: ids that end it.
        penalty: repetition penalty (Keskar et al., arXiv 1909.05858) of the ids in the prompt and in the answer.
        prompt_ids: ids of the prompt; not needed without a penalty.
        absent_ids: ids of the answer that the target is absent; empty if that is not allowed.

    Attributes:
        ids: the answer so far.
        done: whether it is complete or was cut.
        truncated: whether it was cut.
        absent: probability of the answer `absent_ids`; 0 without them.
        log_probability: sum over the tokens that were chosen by logits.
        choices: number of these tokens.
    """

    def __init__(
        self, *, max_tokens: int, stop_ids: Sequence[int] = (), penalty: float = 1.0,
        prompt_ids: Sequence[int] | np.ndarray = (), absent_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.ids: list[int] = []
        self.done = self.truncated = False
        self.absent, self.log_probability, self.choices = float(bool(absent_ids)), 0.0, 0
        self.max_tokens, self._stop_ids, self._penalty = max_tokens, frozenset(stop_ids), penalty
        self._seen = set(map(int, prompt_ids))
        self._rest_of_absent = list(absent_ids)  # empty once the answer differs

    def allowed(self) -> np.ndarray | None:
        """Return the ids, int64 sorted, that may come next; None: all."""
        return None

    def forced(self) -> list[int]:
        """Append the ids that have no alternative, and return them."""
        return []

    def accept(self, ids: Sequence[int]) -> None:
        """Append ids to the answer."""
        for token in ids:
            if self._rest_of_absent and self._rest_of_absent.pop(0) != token:
                self._rest_of_absent = []
        self.ids += ids
        self._seen.update(ids)
        self.done = bool(ids) and ids[-1] in self._stop_ids
        if not self.done and len(self.ids) >= self.max_tokens:
            self.done = self.truncated = True

    def choose(self, logits: np.ndarray) -> int:
        """Append the most probable allowed id by the logits [vocab], and return it.

        Raises EngineError if a logit is not finite.
        """
        allowed = self.allowed()
        values = (logits if allowed is None else logits[allowed]).astype(np.float32, copy=self._penalty != 1)
        check_finite("language_model", logits=values)
        if self._penalty != 1 and allowed is None:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            values[seen] = np.where(values[seen] < 0, values[seen] * self._penalty, values[seen] / self._penalty)
        best = int(values.argmax())
        # In float32 a vocabulary of 150,000 takes a tenth of the time of float64; the sum stays within 1e-7 of it.
        odds = np.exp(values - values[best])
        total = float(odds.sum(dtype=np.float64))
        if self._rest_of_absent:
            ids = np.arange(len(values)) if allowed is None else allowed
            self.absent *= float(odds[ids == self._rest_of_absent[0]].sum()) / total
        self.log_probability -= math.log(total)
        self.choices += 1
        chosen = best if allowed is None else int(allowed[best])
        self.accept([chosen])
        return chosen


@dataclass(eq=False)
class TextRow:
    """One answer in its row of a cache.

    Attributes:
        decoding: the answer.
        length: tokens in the row.
        pending: tokens to feed next; its `next_position` is that of the token that follows them.
        draft: see `Draft`; None: no drafts.
        counts: `calls` while the answer was not done; `forced`, `drafted` and `accepted` tokens.
        longest_draft: maximum tokens of the next draft: twice those that were accepted of the last one.
    """

    decoding: GreedyDecoding
    length: int
    pending: Segment
    draft: Draft | None = None
    counts: Counter[str] = field(default_factory=Counter)
    longest_draft: int = sys.maxsize

    def start(self) -> None:
        """Append the tokens that are forced at the beginning of the answer."""
        self.pending = self.pending.followed_by(self._forced())

    def drafted(self, most: int) -> list[int]:
        """Return and count a draft of at most `most` and `longest_draft` tokens."""
        ids = [] if self.draft is None else list(self.draft(self.decoding.ids))[: max(min(most, self.longest_draft), 0)]
        self.counts["drafted"] += len(ids)
        return ids

    def verify(self, drafted: Sequence[int], logits: np.ndarray) -> None:
        """Append the tokens that greedy decoding chooses, as long as the draft agrees with them.

        `logits` [1 + D, vocab] are those after the last pending token and after each of the D drafted ones.
        """
        self.counts["calls"] += 1
        self.length += len(self.pending)
        position, agreed = self.pending.next_position, 0
        while True:
            new = [self.decoding.choose(logits[agreed])]
            if not self.decoding.done:
                new += self._forced()
            equal = 0
            while equal < len(new) and drafted[agreed + equal : agreed + equal + 1] == new[equal : equal + 1]:
                equal += 1
            agreed += equal
            if self.decoding.done or equal < len(new):
                break
        if drafted:
            self.longest_draft = max(LEAST_DRAFT, 2 * agreed)
        self.counts["accepted"] += agreed
        self.length += agreed
        self.pending = text_segment(new[equal:], position + agreed)

    def _forced(self) -> list[int]:
        """Append the forced tokens to the answer, count and return them."""
        ids = self.decoding.forced()
        self.counts["forced"] += len(ids)
        return ids


def decode_answers(session: Session, cache: KVCache, rows: Sequence[TextRow], no_visual_tokens: Array) -> Iterator[int]:
    """Decode the answers of B rows; after each call of the model, yield the number of calls so far.

    Every row has at least one pending token, all of them text; `no_visual_tokens` are zeros [1+D, 2, H]. A row that is
    done waits for the others: it is fed tokens after its own end, which nothing attends to.
    """
    most = largest(session, "L")
    for row in rows:
        row.start()
    calls = 0
    while any(not row.decoding.done for row in rows):
        drafts = [[] if row.decoding.done else row.drafted(most - len(row.pending)) for row in rows]
        fed = [row.pending.followed_by(draft) for row, draft in zip(rows, drafts, strict=True)]
        fed = [s if len(s) else text_segment([0], s.next_position) for s in fed]
        longest = 1 + max(map(len, drafts))
        lengths = [row.length for row in rows]
        outputs = feed(session, cache, fed, lengths, outputs=longest, visual_tokens=no_visual_tokens)
        for row, draft, logits in zip(rows, drafts, outputs["logits"], strict=True):
            if not row.decoding.done:
                row.verify(draft, logits[longest - 1 - len(draft) :])
        calls += 1
        yield calls


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
    visual_tokens: Array,
    *,
    chunk: int = PREFILL_CHUNK,
    cached: int = 0,
    report: Callable[[], None] = lambda: None,
) -> list[Segment]:
    """Run B prompts through the language model except for their last token, which must be text; return the last tokens.

    A row whose prompt has ended is fed its last token again, at the same position. `cache` has B rows with room for the
    longest prompt; `visual_tokens` are [1+D, V, H] of all prompts, row 0 all zero; a call feeds at most `chunk` tokens
    per row. The prompts follow `cached` tokens of each row. `report` is called before each call, and may raise to stop.
    """
    longest, outputs = max(map(len, prompts)) - 1, smallest(session, "K")
    for start in range(0, longest, chunk):
        starts = [max(0, min(start, len(prompt) - 2)) for prompt in prompts]
        ends = [min(start + chunk, max(len(prompt) - 1, 1)) for prompt in prompts]
        pieces = [prompt.part(*piece) for prompt, *piece in zip(prompts, starts, ends, strict=True)]
        report()
        feed(session, cache, pieces, [cached + start for start in starts], outputs=outputs, visual_tokens=visual_tokens)
    return [prompt.part(len(prompt) - 1, len(prompt)) for prompt in prompts]


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
    last = prefill(session, cache, prompts, visual_tokens, chunk=chunk)
    rows = [
        TextRow(GreedyDecoding(max_tokens=max_new_tokens, stop_ids=stop_ids), len(prompt) - 1, pending)
        for prompt, pending in zip(prompts, last, strict=True)
    ]
    for _ in decode_answers(session, cache, rows, np.zeros_like(visual_tokens[:, :2])):
        pass
    return [row.decoding.ids for row in rows]
