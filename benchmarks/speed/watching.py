"""Record the graph calls of a chain while it runs, and force a fixed answer.

Models with random weights give arbitrary answers, and a different answer means a different amount of work, so every
runner must give the same one. The language model computes its logits as usual; then those of the fixed answer are
raised.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Infer = Callable[..., dict[str, Any]]


@dataclass(eq=False)
class Call:
    """One call of a graph.

    Attributes:
        graph: name of the graph.
        began, ended: start and end, seconds of `time.perf_counter`.
        feeds, outputs: inputs and outputs, if `Watch` keeps them.
        tokens: number of new tokens in all rows; language model only.
        answers: whether the first token of an answer is chosen from its logits.
    """

    graph: str
    began: float
    ended: float = 0.0
    feeds: Mapping[str, Any] = field(default_factory=dict)
    outputs: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    answers: bool = False


class Watch:
    """Wraps the `infer` of each session of a grounder.

    Args:
        sessions: sessions by graph name.
        marker: ids that precede an answer.
        keep: whether to keep inputs and outputs.
    """

    def __init__(self, sessions: Mapping[str, Any], *, marker: Sequence[int], keep: bool = False) -> None:
        self.calls: list[Call] = []
        self.answer: list[int] | None = None
        self._keep = keep
        self._marker = np.asarray(marker, np.int64)
        self._starts: dict[tuple[int, int], int] = {}
        for name, session in sessions.items():
            session.infer = self._watched(name, session.infer)

    def clear(self) -> None:
        """Forget the calls so far."""
        self.calls = []
        self._starts = {}

    def seconds(self) -> dict[str, float]:
        """Return the total seconds of all calls by graph."""
        found: dict[str, float] = {}
        for call in self.calls:
            found[call.graph] = found.get(call.graph, 0.0) + call.ended - call.began
        return found

    def _watched(self, name: str, infer: Infer) -> Infer:
        def run(feeds: Mapping[str, Any], **options: Any) -> dict[str, Any]:
            call = Call(name, time.perf_counter())
            outputs = infer(feeds, **options)
            call.ended = time.perf_counter()
            if self._keep:
                call.feeds, call.outputs = dict(feeds), dict(outputs)
            if name == "language_model":
                call.tokens = feeds["input_ids"].size
                self._raise_logits(feeds, outputs, options.get("cache"), call)
            self.calls.append(call)
            return outputs

        return run

    def _raise_logits(self, feeds: Mapping[str, Any], outputs: dict[str, Any], cache: Any, call: Call) -> None:
        ids, begin = np.asarray(feeds["input_ids"]), np.asarray(feeds["cache_position"])
        for row in range(len(ids)):
            place = _end_of(self._marker, ids[row])
            if place is not None:
                self._starts[id(cache), row] = int(begin[row]) + place
                call.answers = True
            start = self._starts.get((id(cache), row))
            if start is None or self.answer is None:
                continue
            logits = np.array(outputs["logits"]) if not outputs["logits"].flags.writeable else outputs["logits"]
            outputs["logits"] = logits
            for k, index in enumerate(np.asarray(feeds["output_index"])[row]):
                step = int(begin[row]) + int(index) + 1 - start
                if 0 <= step < len(self.answer):
                    logits[row, k, self.answer[step]] += 1000.0


def _end_of(marker: np.ndarray, ids: np.ndarray) -> int | None:
    """Return the index after the last occurrence of a marker in ids, or None."""
    size = len(marker)
    for start in range(len(ids) - size, -1, -1):
        if np.array_equal(ids[start : start + size], marker):
            return start + size
    return None


def answer_marker(encode: Callable[[str], Sequence[int]], query_form: str) -> list[int]:
    """Return the ids that follow the query in the prompt's query template."""
    return list(encode(query_form.partition("{query}")[2]))
