"""Chats about one video: check their messages, print them in the model's chat template, and stream the answer.

The prompt up to the end of the video is the prefix, which is computed once. Messages before the video, such as a system
message, are part of it; those after the video follow it, as text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from bridge_stg.runtime.bundle.spec import ModelSpec, TextSpec
from bridge_stg.runtime.chain.opened_video import ChatMessage, TextStream
from bridge_stg.runtime.chain.prompt import Tokenizer, check_query, check_text
from bridge_stg.runtime.errors import QueryError
from bridge_stg.runtime.heads.generate import GreedyDecoding
from bridge_stg.runtime.heads.options import check_max_tokens

MAX_QUESTION_CHARACTERS = 10_000
"""Maximum length of a question, if the model has enough positions; its text is used as it is."""
MAX_CHAT_CHARACTERS = 100_000
"""Maximum length of the messages before a video together, and of those after it."""
MESSAGE = "{message}"
"""Placeholder of a message in the printed chat template; see `TextSpec`."""


def check_chat(
    spec: ModelSpec,
    question: str,
    *,
    max_tokens: int,
    context: Sequence[ChatMessage] = (),
    history: Sequence[ChatMessage] = (),
) -> None:
    """Check a question and the messages before it, before a video is read for them. Arguments as of `Grounder.ask`.

    Raises:
        QueryError: the model cannot answer in text, or not in a chat; the question is empty; a message is too long, has
            another role than expected, or contains control characters or the prompt's own markers.
        BridgeError: `max_tokens` is not a whole number of 1 or more.
    """
    if spec.text is None:
        raise needs_text_heads()
    check_max_tokens(max_tokens)
    check_query(spec.prompt, question, max_characters=MAX_QUESTION_CHARACTERS)
    check_context(spec, context)
    check_messages("history", history, first=("user",))
    text_after_video(spec.text, spec.text.video_turn, history, question)


def check_context(spec: ModelSpec, context: Sequence[ChatMessage]) -> None:
    """Check the messages before a video. Raises QueryError as `check_chat`."""
    check_messages("context", context, first=("system", "user", "assistant"))
    with_context(spec, context)


def needs_text_heads() -> QueryError:
    """Return the error of a model that cannot answer in text."""
    message = "this model cannot answer in text: its checkpoint's config.json has no section `text`"
    return QueryError("query.needs_text_heads", f"{message}; use a bundle with text heads")


def check_messages(name: str, messages: Sequence[ChatMessage], *, first: Sequence[str]) -> None:
    """Raise QueryError if messages are no list of (role, text), or too long; `first` are the roles of the first one."""
    if isinstance(messages, str):
        raise QueryError("query.bad_message", f"{name} is a text; expected a list of messages, each (role, text)")
    for i, message in enumerate(messages):
        roles = ("user", "assistant") if i else first
        if not isinstance(message, tuple) or len(message) != 2 or message[0] not in roles:
            expected = f"expected (role, text) with the role {' or '.join(roles)}"
            raise QueryError("query.bad_message", f"message {i} of {name} is {message!r:.100}, {expected}")
        try:
            check_text(message[1], max_characters=MAX_CHAT_CHARACTERS)
        except QueryError as error:
            raise QueryError(error.code, f"message {i} of {name}: {error}") from error
    if (count := sum(len(text) for _, text in messages)) > MAX_CHAT_CHARACTERS:
        found = f"the messages of {name} have {count:,} characters, and at most {MAX_CHAT_CHARACTERS:,} are possible"
        raise QueryError("query.too_long", f"{found}; leave out the oldest ones")


def with_context(spec: ModelSpec, context: Sequence[ChatMessage]) -> ModelSpec:
    """Return a spec whose prompts, those of its video and of its image, have messages before the video.

    A system message replaces that of the template. Raises QueryError if the chat template cannot print the messages.
    """
    if not context:
        return spec
    if (text := spec.text) is None:
        raise needs_text_heads()
    prompt = dataclasses.replace(spec.prompt, head=head_after(text, spec.prompt.head, context))
    text = dataclasses.replace(text, image_head=head_after(text, text.image_head, context))
    return dataclasses.replace(spec, prompt=prompt, text=text)


def head_after(text: TextSpec, head: str, context: Sequence[ChatMessage]) -> str:
    """Return the text `head` before a video's tokens with messages before it; see `with_context`."""
    start, user, media = head.partition(turn_ends(text, "user")[0])
    if not user:
        raise unsupported_chat()
    if context and context[0][0] == "system":
        start = ""
    return start + "".join(format_message(text, role, message) for role, message in context) + user + media


def text_after_video(text: TextSpec, turn: str, history: Sequence[ChatMessage], question: str) -> str:
    """Return the text after a video's tokens, up to where the answer begins.

    `turn` is one of those of `TextSpec`, and `history` are the messages before the question; the video is in the first
    of them. Raises QueryError if the chat template cannot print them.
    """
    before, _, after = turn.partition(MESSAGE)
    if not history:
        return before + question + after
    opening, closing = turn_ends(text, "user")
    if not after.startswith(closing):
        raise unsupported_chat()
    later = "".join(format_message(text, role, message) for role, message in history[1:])
    return before + history[0][1] + closing + later + opening + question + after


def format_message(text: TextSpec, role: str, message: str) -> str:
    """Return a message as the chat template prints it. Raises QueryError as `turn_ends`."""
    opening, closing = turn_ends(text, role)
    return opening + message + closing


def turn_ends(text: TextSpec, role: str) -> tuple[str, str]:
    """Return what the chat template prints before and after a message. Raises QueryError if it cannot print chats."""
    turn = {"system": text.system_turn, "user": text.user_turn, "assistant": text.assistant_turn}[role]
    if turn is None:
        raise unsupported_chat()
    opening, _, closing = turn.partition(MESSAGE)
    return opening, closing


def unsupported_chat() -> QueryError:
    """Return the error of a model whose chat template prints messages in a form that is not supported."""
    message = "the chat template of this model has no supported form of system messages and earlier turns"
    return QueryError("query.unsupported_chat", f"{message}; send one question without them")


class AnswerStream(TextStream):
    """The answer to a question; see `TextStream`. Each item of `steps` has added tokens to `decoding`."""

    def __init__(
        self, tokenizer: Tokenizer, decoding: GreedyDecoding, steps: Iterator[None], stop_ids: Sequence[int],
        prompt_tokens: int,
    ) -> None:  # fmt: skip
        self._tokenizer, self._decoding, self._steps = tokenizer, decoding, steps
        self._stop_ids, self._shown = stop_ids, ""
        self.prompt_tokens, self.tokens, self.finish_reason = prompt_tokens, 0, ""

    def __next__(self) -> str:
        """Return the next piece of text; whole characters only."""
        while True:
            ended = next(self._steps, self) is self
            ids = self._decoding.ids
            self.tokens = len(ids)
            text = self._tokenizer.decode([token for token in ids if token not in self._stop_ids])
            if ended or self._decoding.done:
                self.finish_reason = "length" if self._decoding.truncated else "stop"
            if text != self._shown and (self.finish_reason or not text.endswith("\ufffd")):
                piece, self._shown = text[len(self._shown) :], text
                return piece
            if ended:
                raise StopIteration
