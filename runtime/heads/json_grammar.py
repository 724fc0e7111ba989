"""The grammar of text answers: JSON with times of the prompt in rising order, and boxes with positive sides.

An answer is written in parts. A part ends where the next number depends on one before it: the right side of a box on
its left side, a time on the time before. Each part has a small grammar for the package llguidance, which returns the
allowed tokens and those without an alternative. Must not know logits and caches.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import TextSpec
from bridge_stg.runtime.chain.prompt import Tokenizer
from bridge_stg.runtime.errors import BundleError
from bridge_stg.runtime.heads.generate import GreedyDecoding

START, END = '{"start": ', ', "end": '
TIME, BOX, LABEL = '{"time": ', '"bbox_2d": [', ', "label": '
CORNER = re.compile(r'(?:\{"time": ([\d.]+), |\{)"bbox_2d": \[(\d+), (\d+), $')
"""The end of a part after which the right and bottom sides of a box follow."""


def json_label(query: str) -> str:
    """Return a query as a JSON string, the label of its boxes."""
    return json.dumps(query, ensure_ascii=False)


@dataclass(frozen=True)
class JsonForm:
    """The form of one answer: a span, or a list of boxes.

    Attributes:
        spec: how the model writes a list.
        times: the times of the prompt as text, in order; empty for a list of boxes without times.
        scale: largest right and bottom side of a box; see `TextSpec.box_scale`.
        label: label of every box in JSON; None: the answer is a span, `{"start": …, "end": …}`, without boxes.
        allow_none: whether the answer may be that the target is absent.
    """

    spec: TextSpec
    times: tuple[str, ...]
    scale: tuple[int, int] = (0, 0)
    label: str | None = None
    allow_none: bool = True

    @property
    def absent(self) -> str:
        """The answer that the target is absent: `null` for a span, an empty list for boxes."""
        if self.label is None:
            return "null"
        return f"{self.spec.list_open.partition('[')[0]}[]{self.spec.list_close.partition(']')[2]}"

    def first(self) -> str:
        """Return the grammar of the first part, in the Lark syntax of llguidance."""
        if self.label is None:
            part = f"{_text(START)} ({_any(self.times)}) {_text(END)}"
        else:
            part = f"{_text(self.spec.list_open)} {self._corner(self.times)}"
        return self._rules(f"{_text(self.absent)} | {part}" if self.allow_none else part)

    def following(self, written: str) -> str | None:
        """Return the grammar of the part after the part `written`; None: the answer is complete."""
        if self.label is None:
            if not written.endswith(END):
                return None
            start = written[len(START) : -len(END)]
            return self._rules(f'({_any(self.times[self.times.index(start) :])}) "}}"')
        corner = CORNER.search(written)
        if corner is None:
            return None
        later = self.times[self.times.index(corner[1]) + 1 :] if self.times else ()
        another = f" | {_text(self.spec.list_separator)} {self._corner(later)}" if later else ""
        part = f'x2 ", " y2 {_text(f"]{LABEL}{self.label}}}")} ({_text(self.spec.list_close)}{another})'
        (right, bottom), left, top = self.scale, int(corner[2]), int(corner[3])
        return self._rules(part) + f"x2: {_integer(left + 1, right)}\ny2: {_integer(top + 1, bottom)}\n"

    def _corner(self, times: tuple[str, ...]) -> str:
        """Return the rule of an entry up to the left and top sides of its box; its time is one of `times`."""
        before = f"{_text(TIME)} ({_any(times)}) {_text(', ' + BOX)}" if self.times else _text("{" + BOX)
        return f'{before} x1 ", " y1 ", "'

    def _rules(self, start: str) -> str:
        """Return the grammar with this start rule, and the rules of left and top sides if it uses them."""
        rules = f"start: {start}\n"
        if " x1 " in start:
            right, bottom = self.scale
            rules += f"x1: {_integer(0, right - 1)}\ny1: {_integer(0, bottom - 1)}\n"
        return rules


def _text(text: str) -> str:
    """Return a text as a Lark literal."""
    return json.dumps(text, ensure_ascii=False)


def _any(texts: tuple[str, ...]) -> str:
    """Return a Lark rule that accepts one of several texts."""
    return " | ".join(map(_text, texts))


def _integer(least: int, most: int) -> str:
    """Return a Lark rule that accepts an integer from `least` to `most`."""
    return "%json " + json.dumps({"type": "integer", "minimum": least, "maximum": most})


class JsonGrammar:
    """Makes llguidance's matchers for one tokenizer, which is converted once, on first use, for all answers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @functools.cached_property
    def tokens(self) -> Any:
        """The tokenizer in llguidance's form. Raises BundleError if llguidance cannot read it.

        Tokens such as `<think>`, added but not special, are left out: llguidance would force them where a label has
        their text, and then reject them, because it treats them as special.
        """
        from llguidance import LLTokenizer

        try:
            values = json.loads(self.tokenizer.to_json())
            values["added_tokens"] = [token for token in values.get("added_tokens") or () if token["special"]]
            return LLTokenizer(json.dumps(values))
        except Exception as error:  # the package raises ValueError and its own panics
            message = f"tokenizer.json: llguidance cannot read it ({error!s:.200}); use --no-grammar"
            raise BundleError("bundle.bad_tokenizer", message) from error

    def matcher(self, rules: str) -> Any:
        """Return a new `llguidance.LLMatcher` for a grammar. Raises BundleError if llguidance rejects it."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self.tokens, LLMatcher.grammar_from_lark(rules), log_level=0)
        if matcher.is_error():
            raise BundleError("bundle.bad_tokenizer", f"llguidance rejects the answer's grammar: {matcher.get_error()}")
        return matcher


class ConstrainedDecoding(GreedyDecoding):
    """Greedy decoding of one answer in a `JsonForm`. Attributes as of `GreedyDecoding`; it needs no stop ids."""

    def __init__(self, grammar: JsonGrammar, form: JsonForm, *, max_tokens: int) -> None:
        absent = grammar.tokenizer.encode(form.absent) if form.allow_none else ()
        super().__init__(max_tokens=max_tokens, absent_ids=absent)
        self._grammar, self._form = grammar, form
        self._matcher, self._part = grammar.matcher(form.first()), list[int]()

    def allowed(self) -> np.ndarray:
        """Return the ids, int64 sorted, that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

    def forced(self) -> list[int]:
        """Append the ids that have no alternative, and return them."""
        ids: list[int] = []
        while not self.done and (more := self._matcher.compute_ff_tokens()):
            self.accept(more)
            ids += more
        return ids

    def accept(self, ids: Sequence[int]) -> None:
        """Append ids; at the end of a part, begin the next one. Raises BundleError if the grammar rejects an id."""
        if not self._matcher.consume_tokens(list(ids)):
            reason = self._matcher.get_error().partition("\n")[0]
            raise BundleError("bundle.bad_tokenizer", f"llguidance rejects the answer's ids {list(ids)} ({reason})")
        self._part += ids
        super().accept(ids)
        if self._matcher.is_accepting():
            rules = self._form.following(self._grammar.tokens.decode_str(self._part))
            if rules is None:
                self.done, self.truncated = True, False
            else:
                self._matcher, self._part = self._grammar.matcher(rules), []
