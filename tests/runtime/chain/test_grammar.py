"""The grammar allows exactly the answers that a prompt has times for."""

from __future__ import annotations

import itertools

import pytest

from bridge_stg.demo.tiny_model import write_demo_tokenizer
from bridge_stg.runtime.bundle.spec import PromptSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings
from bridge_stg.runtime.errors import BundleError
from tests.errors import raises

SPEC = PromptSpec()
TIMES = time_strings([0.2, 1.2, 2.7, 10.2, 12.2, 20.2], SPEC)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("grammar") / "tokenizer.json"
    write_demo_tokenizer(path)
    return Tokenizer.from_file(path)


def all_answers(grammar: AnswerGrammar) -> dict[str, tuple[int, int] | None]:
    """Walk every path of the grammar and return text → span."""
    found: dict[str, tuple[int, int] | None] = {}
    pending: list[list[int]] = [[]]
    while pending:
        chosen = pending.pop()
        state, rest = grammar.start(), iter(chosen)
        while True:
            state.forced()
            step = next(rest, None)
            if step is None:
                break
            state.choose(step)
        if state.done:
            assert state.choices().size == 0
            found[",".join(map(str, state.ids))] = state.span
        else:
            pending += [[*chosen, int(c)] for c in state.choices()]
    return found


def test_it_allows_every_ordered_pair_and_none(tokenizer):
    answers = all_answers(AnswerGrammar(tokenizer, SPEC, TIMES))
    pairs = list(itertools.combinations_with_replacement(range(len(TIMES)), 2))
    assert sorted(s for s in answers.values() if s) == pairs
    assert list(answers.values()).count(None) == 1
    for text, span in answers.items():
        ids = [int(i) for i in text.split(",")]
        assert tokenizer.decode(ids) == ("none" if span is None else f"{TIMES[span[0]]} to {TIMES[span[1]]}")


def test_without_none(tokenizer):
    grammar = AnswerGrammar(tokenizer, SPEC, TIMES, allow_none=False)
    assert None not in all_answers(grammar).values()
    assert grammar.start().forced()  # the opening of a time needs no model


def test_tracking_forces_the_first_start(tokenizer):
    spans = all_answers(AnswerGrammar(tokenizer, SPEC, TIMES, first_start=0)).values()
    assert sorted(spans) == [(0, end) for end in range(len(TIMES))]


def test_one_group_leaves_only_presence_to_decide(tokenizer):
    state = AnswerGrammar(tokenizer, SPEC, TIMES[:1]).start()
    assert state.forced() == [] and len(state.choices()) == 2 and not state.ids
    grammar = AnswerGrammar(tokenizer, SPEC, TIMES[:1])
    state.choose(next(int(c) for c in state.choices() if c != grammar.none_ids[0]))
    state.forced()
    assert state.done and state.span == (0, 0)


def test_answers_for_training_follow_the_grammar(tokenizer):
    grammar = AnswerGrammar(tokenizer, SPEC, TIMES)
    for span in (None, (0, 0), (1, 4), (3, 5)):
        state, answer = grammar.start(), grammar.answer_ids(span)
        while not state.done:
            state.forced()
            if not state.done:
                state.choose(answer[len(state.ids)])
        assert state.ids == answer and state.span == span


def test_an_id_outside_the_grammar_is_rejected(tokenizer):
    with pytest.raises(ValueError, match="id 3"):
        AnswerGrammar(tokenizer, SPEC, TIMES).start().choose(3)


def test_times_without_a_terminator_are_rejected(tokenizer):
    with raises("bundle.bad_tokenizer", kind=BundleError):
        AnswerGrammar(tokenizer, SPEC, ["1", "12"])
