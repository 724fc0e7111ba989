"""Chats over a language model that records its prompts: messages before and after a video, the prefix, and errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from bridge_stg.runtime.backends.session import Preferences
from bridge_stg.runtime.grounder import Grounder
from tests.errors import raises
from tests.fakes.chain import clip, fake_grounder, text_spec

CLIP = list(clip(4.0))
REPLY = "It stops."
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
DEFAULT = f"<|im_start|>system\nYou are helpful.{END}"
CONTEXT = [("system", "Be brief."), ("user", "Hello!"), ("assistant", "Hi.")]
HISTORY = [("user", "What is it? {message}"), ("assistant", "A <b>car</b>."), ("user", "Really?"), ("assistant", "")]


def chat_grounder(default: str = "", **turns: Any) -> Grounder:
    """Return a grounder whose chat template has a default system message."""
    spec = text_spec()
    assert spec.text is not None
    prompt = dataclasses.replace(spec.prompt, head=default + spec.prompt.head)
    text = dataclasses.replace(spec.text, image_head=default + spec.text.image_head, **turns)
    return fake_grounder(dataclasses.replace(spec, prompt=prompt, text=text), replies={"Then?": REPLY})


def language(grounder: Grounder) -> Any:
    return grounder.sessions["language_model"]


@pytest.mark.parametrize("default", ["", DEFAULT])
@pytest.mark.parametrize("source", [CLIP, CLIP[0][1]], ids=["video", "image"])
def test_messages_are_printed_around_the_video(source: Any, default: str) -> None:
    printed = f"{USER}Hello!{END}{ASSISTANT}Hi.{END}{USER}<|vision_start|>"
    with chat_grounder(default) as grounder:
        answer = "".join(grounder.ask(source, "Then?", context=CONTEXT, history=HISTORY))
        (prompt,) = language(grounder).seen[-1]
        assert answer == REPLY and prompt.startswith(f"<|im_start|>system\nBe brief.{END}{printed}")
        after = prompt.rpartition("<|vision_end|>")[2].rpartition(REPLY)[0]
        first = f"What is it? {{message}}{END}{ASSISTANT}A <b>car</b>.{END}"
        assert after == f"{first}{USER}Really?{END}{ASSISTANT}{END}{USER}Then?{END}{ASSISTANT}"
        list(grounder.ask(source, "Then?", context=CONTEXT[1:]))
        assert language(grounder).seen[-1][0].startswith(default + printed)


def test_chats_about_one_video_share_its_prefix() -> None:
    with chat_grounder() as grounder, grounder.open(CLIP, context=CONTEXT) as opened:
        encoded, fed = len(grounder.sessions["vision_encoder"].calls), []  # type: ignore[attr-defined]
        for history in ((), HISTORY, HISTORY[:2]):
            language(grounder).calls.clear()
            assert "".join(opened.ask("Then?", history=history)) == REPLY
            fed.append(language(grounder).calls[0])
        assert len(grounder.sessions["vision_encoder"].calls) == encoded  # type: ignore[attr-defined]
        assert len({int(call["cache_position"][0]) for call in fed}) == 1  # what follows the same prefix
        assert not any(call["visual_index"].any() for call in fed)
        assert "Be brief." in language(grounder).seen[-1][0]


def test_a_long_chat_is_prefilled_in_chunks() -> None:
    history = [("user", "What is it? " * 60), ("assistant", "A car.")]
    with chat_grounder() as grounder, grounder.open(CLIP) as opened:
        whole = list(opened.ask("Then?", history=history))
        seen = language(grounder).seen[-1]
        language(grounder).preferences = Preferences(prefill_chunk=100)
        language(grounder).calls.clear()
        assert list(opened.ask("Then?", history=history)) == whole and language(grounder).seen[-1] == seen
        sizes = [call["input_ids"].shape[1] for call in language(grounder).calls]
        assert max(sizes) == 100 and sum(size > 1 for size in sizes) > 7
        positions = np.concatenate([call["positions"][0, 0] for call in language(grounder).calls])
        assert (np.diff(positions) == 1).all()
        with raises("call.cancelled"):
            list(opened.ask("Then?", history=history, cancel=lambda: len(language(grounder).calls) > len(sizes) + 2))
        assert len(language(grounder).calls) == len(sizes) + 3


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"context": [("tool", "x")]}, "query.bad_message"),
        ({"context": [("user", "x"), ("system", "x")]}, "query.bad_message"),
        ({"history": [("system", "x")]}, "query.bad_message"),
        ({"history": [("assistant", "x")]}, "query.bad_message"),
        ({"history": ["user"]}, "query.bad_message"),
        ({"history": "Hello"}, "query.bad_message"),
        ({"history": [{"role": "user", "content": "x"}]}, "query.bad_message"),
        ({"history": [("user", 3)]}, "query.not_text"),
        ({"history": [("user", "a <|im_end|>")]}, "query.bad_characters"),
        ({"context": [("system", "\x00")]}, "query.bad_characters"),
        ({"context": [("system", "\ud800")]}, "query.bad_characters"),
        ({"history": [("user", "x" * 60_000), ("assistant", "x" * 60_000)]}, "query.too_long"),
        ({"history": [("user", "x" * 5_000)]}, "query.too_long"),
    ],
)
def test_messages_that_are_rejected(options: dict[str, Any], code: str) -> None:
    with chat_grounder() as grounder, raises(code):
        list(grounder.ask(CLIP, "Then?", **options))


def test_a_context_leaves_less_room_for_the_video_and_none_at_last() -> None:
    with chat_grounder() as grounder:
        with raises("video.exceeds_prompt"):
            grounder.open(CLIP, context=[("system", "x" * 5_000)])
        with grounder.open(CLIP, context=[("system", "x" * 500)]) as opened:
            assert opened.ground("the car").heads == "text"


def test_a_template_without_chats_answers_single_questions() -> None:
    turns: dict[str, Any] = {"system_turn": None, "user_turn": None, "assistant_turn": None}
    with chat_grounder(**turns) as grounder:
        assert "".join(grounder.ask(CLIP, "Then?")) == REPLY
        for options in ({"context": CONTEXT[:1]}, {"history": HISTORY}):
            with raises("query.unsupported_chat"):
                list(grounder.ask(CLIP, "Then?", **options))  # type: ignore[arg-type]
    with fake_grounder() as grounder, raises("query.needs_text_heads"):
        grounder.open(CLIP, context=CONTEXT)
