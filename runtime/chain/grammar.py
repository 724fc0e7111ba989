"""The grammar of answers: `{start} to {end}` or `none`, where both times are strings printed in the prompt.

A token trie over those strings; the end is restricted to times not before the start. Ids without an alternative are
appended without running the model. Knows nothing of logits and caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bridge_stg.runtime.bundle.spec import PromptSpec
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import BundleError


class AnswerGrammar:
    """The answers that a prompt allows.

    Args:
        tokenizer: the model's tokenizer.
        spec: rules of the answer.
        times: the time strings printed in the prompt, in order.
        allow_none: whether `none` is a valid answer.
        first_start: index of the time string that the answer must start with (tracking: 0); None: any.

    Raises:
        BundleError: the ids of one time string are a prefix of another's, or `none` begins like a time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        spec: PromptSpec,
        times: Sequence[str],
        *,
        allow_none: bool = True,
        first_start: int | None = None,
    ) -> None:
        self.time_ids = [tuple(tokenizer.encode(time)) for time in times]
        self.between = tuple(tokenizer.encode(spec.between))
        self.none_ids = tuple(tokenizer.encode(spec.absent))
        self.allow_none = allow_none
        self.first_start = first_start
        spellings = set(self.time_ids)
        prefixes = {ids[:i] for ids in self.time_ids for i in range(1, len(ids))}
        if len(spellings) < len(times) or spellings & prefixes or self.none_ids[:1] in {i[:1] for i in spellings}:
            message = "tokenizer.json: the ids of one time are the beginning of another's; times need a terminator"
            raise BundleError("bundle.bad_tokenizer", message)

    @property
    def longest_answer(self) -> int:
        """Maximum number of tokens of an answer."""
        return max(2 * max(map(len, self.time_ids)) + len(self.between), len(self.none_ids))

    def start(self) -> AnswerState:
        """Return the state before the first id."""
        return AnswerState(self)

    def answer_ids(self, span: tuple[int, int] | None) -> list[int]:
        """Return the ids of a whole answer, as a training target; the answer to None is `none`."""
        if span is None:
            return list(self.none_ids)
        return [*self.time_ids[span[0]], *self.between, *self.time_ids[span[1]]]


class AnswerState:
    """An answer that is being written, token by token."""

    def __init__(self, grammar: AnswerGrammar) -> None:
        self.ids: list[int] = []
        self.done = False
        self.span: tuple[int, int] | None = None
        self._grammar = grammar
        self._start: int | None = None
        first = range(len(grammar.time_ids)) if grammar.first_start is None else [grammar.first_start]
        self._open = [(grammar.time_ids[i], i) for i in first]
        if grammar.allow_none and grammar.first_start is None:
            self._open.append((grammar.none_ids, -1))
        self._written = 0

    def forced(self) -> list[int]:
        """Append the ids that have no alternative, and return them."""
        before = len(self.ids)
        while not self.done and len(choices := self._next_ids()) == 1:
            self._append(choices[0])
        return self.ids[before:]

    def choices(self) -> np.ndarray:
        """Return the ids, int64 sorted, that may come next; empty when the answer is complete."""
        return np.asarray([] if self.done else self._next_ids(), np.int64)

    def choose(self, token: int) -> None:
        """Append one of `choices`; raise ValueError if it is none of them."""
        if token not in self.choices():
            raise ValueError(f"id {token} is not among the choices {self.choices().tolist()}")
        self._append(int(token))

    def _next_ids(self) -> list[int]:
        return sorted({ids[self._written] for ids, _ in self._open})

    def _append(self, token: int) -> None:
        self.ids.append(token)
        self._open = [(ids, i) for ids, i in self._open if ids[self._written] == token]
        self._written += 1
        ids, index = self._open[0]
        if len(ids) > self._written:
            return
        if index == -1:
            self.done = True
        elif self._start is None:
            self._start = index
            between = self._grammar.between
            self._open = [
                (between + end_ids, end) for end, end_ids in enumerate(self._grammar.time_ids) if end >= index
            ]
            self._written = 0
        else:
            self.done, self.span = True, (self._start, index)
