"""Load a model's tokenizer, and check that its ids fit the model and that it encodes the prompt without changes.

Knows nothing of how a query is answered.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from bridge_stg.runtime.bundle.spec import ModelSpec, PromptSpec, TextSpec
from bridge_stg.runtime.chain.grammar import AnswerGrammar
from bridge_stg.runtime.chain.prompt import Tokenizer, time_strings
from bridge_stg.runtime.errors import BridgeError, BundleError

QUERY = f"{string.ascii_letters} {string.digits} {string.punctuation} straße, машина, 赤い車, 🚗"
"""A query with every kind of character."""


def load_tokenizer(path: Path | str, spec: ModelSpec) -> Tokenizer:
    """Read the tokenizer of a model.

    Raises:
        BundleError: the file is missing or is not a tokenizer, it has ids that the model lacks, gives one id to two
            tokens, or cannot encode the prompt and a query without changing their text.
    """
    tokenizer = Tokenizer.from_file(path)
    values = json.loads(Path(path).read_text(encoding="utf-8"))
    for fault in chain(id_faults(tokenizer, spec, values), text_faults(tokenizer, spec, values)):
        message = f"{path}: {fault}; use the tokenizer of this {spec.vision.family} model"
        raise BundleError("bundle.bad_tokenizer", message)
    return tokenizer


def id_faults(tokenizer: Tokenizer, spec: ModelSpec, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the faults of the token ids in tokenizer.json (`values`)."""
    added = {token["content"]: int(token["id"]) for token in values.get("added_tokens") or ()}
    for text, number in added.items():
        if (found := tokenizer.id_of(text)) != number:
            yield f"gives {text!r} the id {number}, which the tokenizers package reads as {found}"
    words = values["model"]["vocab"]
    texts = added | (words if isinstance(words, dict) else {text: i for i, (text, _) in enumerate(words)})
    by_id = {number: text for text, number in texts.items()}
    if len(by_id) < len(texts):
        text, number = next((text, number) for text, number in texts.items() if by_id[number] != text)
        yield f"gives the id {number} to both {text!r} and {by_id[number]!r}"
    if (largest := max(by_id)) >= (count := spec.language.vocab_size):
        yield f"has the id {largest} ({by_id[largest]!r}), but the model has only {count:,} ids"


def text_faults(tokenizer: Tokenizer, spec: ModelSpec, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of the prompt that a tokenizer cannot encode without changing them."""
    prompt = spec.prompt
    forms, visual = [prompt.head, prompt.query, prompt.track], [prompt.visual_token]
    if (text := spec.text) is not None:
        forms += [text.video_turn, text.image_head, text.image_turn, *message_forms(text)]
        visual.append(text.image_token)
    for marker in (*visual, *re.findall(r"<\|.*?\|>", "".join(forms))):
        if (tokens := len(tokenizer.encode(marker))) != 1:
            yield f"encodes the prompt's {marker!r} as {tokens} tokens, expected one"
    for part in [*prompt_texts(prompt), *(chat_texts(text) if text else ())]:
        given, back = part.casefold(), tokenizer.decode(tokenizer.encode(part)).casefold()
        if back != given:
            at = next(i for i in range(len(given) + len(back)) if given[: i + 1] != back[: i + 1])
            near = slice(max(0, at - 8), at + 8)
            steps = [*names(values.get("normalizer")), *names(values.get("pre_tokenizer")), *names(values["model"])]
            yield f"turns {given[near]!r} into {back[near]!r} ({', '.join(steps)}), expected no change"
    try:
        AnswerGrammar(tokenizer, prompt, time_strings(np.arange(2 * spec.frames.max_coarse_groups) / 2, prompt))
    except BridgeError as error:
        yield f"does not fit the prompt ({error})"


def prompt_texts(prompt: PromptSpec) -> list[str]:
    """Return every text of a prompt that is encoded separately, with the query `QUERY`."""
    queries = [form.replace("{query}", QUERY).replace("{box}", "0 12 345 999") for form in (prompt.query, prompt.track)]
    times = time_strings([0.0, 12.3, 456.7], prompt)
    return [prompt.head, prompt.group_open, prompt.group_close, *queries, *times, prompt.between, prompt.absent]


def chat_texts(text: TextSpec) -> list[str]:
    """Return the texts of a text head's prompts and answers, with the query `QUERY`."""
    messages = [form.replace("{query}", QUERY) for form in (text.tube, text.span, text.image)]
    turns = [form.replace("{message}", message) for form in (text.video_turn, text.image_turn) for message in messages]
    turns += [form.replace("{message}", QUERY) for form in message_forms(text)]
    return [text.image_head, *turns, text.list_open, text.list_separator, text.list_close]


def message_forms(text: TextSpec) -> list[str]:
    """Return how messages of a chat are printed; empty if chats are not supported."""
    return [form for form in (text.system_turn, text.user_turn, text.assistant_turn) if form is not None]


def names(part: Mapping[str, Any] | None) -> list[str]:
    """Return the types of a tokenizer's part and of the parts in it."""
    if part is None:
        return []
    inner = [name for key in ("normalizers", "pretokenizers") for one in part.get(key, ()) for name in names(one)]
    return inner or [f"{part.get('type')}{' with add_prefix_space' if part.get('add_prefix_space') else ''}"]
