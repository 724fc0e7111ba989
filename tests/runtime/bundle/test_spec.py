"""What a model spec says about training and vocabulary."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from bridge_stg.runtime.bundle.spec import KnowsSpec, ModelSpec, TextSpec
from bridge_stg.runtime.bundle.typed_json import from_json
from tests.fakes.chain import fake_spec


def knowing(*words: str) -> ModelSpec:
    return dataclasses.replace(fake_spec(), knows=KnowsSpec("It knows dogs.", words))


@pytest.mark.parametrize(
    ("words", "query", "expected"),
    [
        (("the", "dog"), "The DOG!", ()),
        (("the", "dog"), "the dogs, the Dogs and 3 dog", ("dogs", "and")),
        (("the", "dog"), "dog's the_dog", ("s",)),
        (("ice cream", "Straße"), "STRASSE, Ice", ()),
        (("caf\u00e9",), "cafe\u0301 cafe", ("cafe",)),
        (("हिन्दी",), "हिन्दी", ()),
        (("dog",), "\ud800 42 <|im_end|>", ("im", "end")),
        ((), "anything", ()),
    ],
)
def test_unknown_words_are_casefolded_runs_of_letters(
    words: tuple[str, ...], query: str, expected: tuple[str, ...]
) -> None:
    assert knowing(*words).unknown_words(query) == expected


def test_a_spec_without_these_fields_is_trained_and_reports_no_words() -> None:
    values = json.loads(json.dumps(dataclasses.asdict(fake_spec())))
    del values["trained"], values["knows"]
    spec = from_json(ModelSpec, values)
    assert spec.trained and spec.knows is None and spec.unknown_words("anything") == ()


@pytest.mark.parametrize(
    "knows", [{}, {"summary": ""}, {"summary": "s", "words": [""]}, {"summary": "s", "words": [1]}]
)
def test_invalid_sections_are_rejected(knows: dict[str, Any]) -> None:
    values = dataclasses.asdict(fake_spec()) | {"knows": knows}
    with pytest.raises(ValueError, match="knows"):
        from_json(ModelSpec, values)


def test_text_heads_are_the_trained_backbone() -> None:
    text = TextSpec(tube="{query}", span="{query}", image="{query}")
    spec = dataclasses.replace(fake_spec(), trained=False, text=text)
    assert not spec.is_trained() and not spec.is_trained("bridge") and spec.is_trained("text")
    assert fake_spec().is_trained()


@pytest.mark.parametrize(
    "wrong", [{"list_open": "list: "}, {"list_close": ""}, {"stop_ids": [-1]}, {"tube": "find it"}], ids=str
)
def test_sections_of_text_that_answers_cannot_follow(wrong: dict[str, Any]) -> None:
    text = dataclasses.asdict(TextSpec(tube="{query}", span="{query}", image="{query}")) | wrong
    with pytest.raises(ValueError, match=rf"text\.{next(iter(wrong))}"):
        from_json(ModelSpec, dataclasses.asdict(fake_spec()) | {"text": text})
