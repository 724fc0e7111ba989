"""The config of a plain model, a vision-language model as it is downloaded: text heads, and the prompts of its folder.

Chat template, ids that end an answer and limits of frame sizes come from the folder, messages from the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from bridge_stg.checkpoint.weight_store import TOKENIZER
from bridge_stg.model.backbones import FAMILIES, backbone
from bridge_stg.model.backbones.interface import Backbone
from bridge_stg.model.config import BridgeSTGConfig, read_json
from bridge_stg.runtime.bundle.spec import Deviations, Means, Penalty, Pixels, TextSpec, TokenId
from bridge_stg.runtime.bundle.typed_json import from_json
from bridge_stg.runtime.chain.opened_video import ChatMessage
from bridge_stg.runtime.errors import CheckpointError
from bridge_stg.runtime.heads.chat import MESSAGE, head_after, text_after_video

DOWNLOAD = "download the model's whole folder"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files that may have the chat template, in the order in which transformers searches them."""


def plain_config(folder: Path, values: Mapping[str, Any]) -> BridgeSTGConfig:
    """Return the config of a plain model.

    Args:
        folder: its folder.
        values: values of its config.json.

    Raises:
        CheckpointError: the model is not supported, a file of its folder is invalid, or its chat template cannot print
            a video and an image, or opens a thought.
    """
    family = backbone(values)
    mean, std = image_statistics(folder, family)
    head, text = text_section(folder, values)
    config = BridgeSTGConfig(
        backbone=values, prompt=dataclasses.replace(family.text_prompt(), head=head), heads="text", text=text,
        frames=family.text_frames(
            image_pixels=max_pixels(folder / "preprocessor_config.json"),
            video_pixels=max_pixels(folder / "video_preprocessor_config.json"),
        ),
        image_mean=mean, image_std=std,
    )  # fmt: skip
    return config.checked(folder / "config.json")


def plain_summary(folder: Path) -> str:
    """Return a line that says what `export` makes of a plain model, and whose prompt it has; empty for others.

    It says as well what the folder lacks: a token that ends an answer, a chat template that prints chats.
    """
    values, found = optional_json(folder / "config.json"), find_template(folder)
    if values.get("model_type") not in FAMILIES:
        return ""
    prompt = f"prompt by {found[0].name}" if found else "no chat template in the folder, so the prompt is the family's"
    _, text = text_section(folder, values)
    prompt += "" if text.user_turn else ", which prints no system messages and earlier turns in a supported form"
    prompt += "" if text.stop_ids else "; no token ends an answer (no eos_token_id), so answers run to --max-tokens"
    return f"a plain {values['model_type']} model: text heads, two graphs, boxes written as text; {prompt}"


def text_section(folder: Path, values: Mapping[str, Any]) -> tuple[str, TextSpec]:
    """Return the text before a video's tokens, and how the model answers in text. Raises as `plain_config` does."""
    family = backbone(values)
    prompt, text = family.text_prompt(), family.text()
    head = prompt.head
    if (found := find_template(folder)) is not None:
        head, video_turn = template_parts(*found, "video", prompt.visual_token)
        image_head, image_turn = template_parts(*found, "image", text.image_token)
        text = dataclasses.replace(text, video_turn=video_turn, image_head=image_head, image_turn=image_turn)
        text = with_message_turns(text, found[1])
    text = dataclasses.replace(text, stop_ids=stop_ids(folder, values, text))
    path = folder / "generation_config.json"
    if (penalty := optional_json(path).get("repetition_penalty")) is not None:
        penalty = checked_value(Penalty, penalty, path, "repetition_penalty")
        text = dataclasses.replace(text, repetition_penalty=penalty)
    return head, text


def find_template(folder: Path) -> tuple[Path, str] | None:
    """Return the file and the text of a folder's chat template; None if it has none."""
    for name in TEMPLATE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if path.suffix == ".json":
            template = optional_json(path).get("chat_template")
        else:
            try:
                template = path.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise CheckpointError("checkpoint.bad_chat_template", f"{path}: cannot be read ({error})") from error
        if isinstance(template, list):  # several templates by name
            named = [one.get("template") for one in template if isinstance(one, dict) and one.get("name") == "default"]
            template = named[0] if named else None
        if isinstance(template, str) and template.strip():
            return path, template
    return None


def template_parts(path: Path, template: str, kind: str, token: str) -> tuple[str, str]:
    """Return the text that a chat template prints before and after a video or image; the latter has `{message}`.

    Args:
        path: the template's file.
        template: its text.
        kind: `video` or `image`.
        token: placeholder of its visual tokens.

    Raises CheckpointError as `plain_config` does.
    """
    try:
        printed = print_chat(template, [("user", MESSAGE)], kind)
    except Exception as error:  # templates raise many exception types
        message = f"{path}: the chat template cannot print a message with a {kind} ({error!s:.300})"
        raise CheckpointError("checkpoint.bad_chat_template", f"{message}; {DOWNLOAD}") from error
    head, _, turn = printed.partition(token)
    if printed.count(token) != 1 or turn.count(MESSAGE) != 1:
        message = f"{path}: the chat template prints a message with a {kind} as {printed!r:.300}"
        hint = f"expected one {token} and then the text; use the template of the model's processor"
        raise CheckpointError("checkpoint.bad_chat_template", f"{message}, {hint}")
    if turn.rstrip().endswith("<think>"):
        message = f"{path}: the chat template opens a thought (<think>) before the answer"
        hint = "text heads need an answer without one; use the Instruct model, or a template that closes the thought"
        raise CheckpointError("checkpoint.thinking_model", f"{message}; {hint}")
    return head, turn


def print_chat(template: str, chat: Sequence[ChatMessage], kind: str, *, media: int = 0, prompt: bool = True) -> str:
    """Return a chat as a template prints it, which may raise anything.

    Message `media` has a video or image, by `kind`, before its text. `prompt` says whether the beginning of the answer
    is printed as well.
    """
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in chat]
    messages[media]["content"] = [{"type": kind}, {"type": "text", "text": messages[media]["content"]}]
    (printed,), _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=prompt, enable_thinking=False
    )
    return str(printed)


def with_message_turns(text: TextSpec, template: str) -> TextSpec:
    """Return how a model answers in text, with how its chat template prints messages without a video or image.

    `system_turn`, `user_turn` and `assistant_turn` are read off one chat, and compared with the template on others. If
    it cannot print these, or not as a series of messages, all are None: the model answers single questions only.
    """
    none = dataclasses.replace(text, system_turn=None, user_turn=None, assistant_turn=None)
    system, answer, question = "{system}", "{answer}", "{question}"
    try:
        chat = [("system", system), ("user", MESSAGE), ("assistant", answer), ("user", question)]
        head, _, turn = print_chat(template, chat, "image", media=1).partition(text.image_token)
        between = turn.partition(MESSAGE)[2].partition(question)[0]  # the end of a message, the answer, the next one
        start = print_chat(template, chat[1:2], "image", prompt=False)
        closing = start.partition(MESSAGE)[2]
        opening = between.rpartition(answer)[2].removeprefix(closing)
        answer_opening = between.partition(answer)[0].removeprefix(closing)
        user = text.image_head.rfind(opening)
        system_turn = head.removesuffix(text.image_head[user:]).replace(system, MESSAGE)
        if not closing or not opening or user < 0 or system_turn.count(MESSAGE) != 1:
            return none
        user_turn, assistant_turn = f"{opening}{MESSAGE}{closing}", f"{answer_opening}{MESSAGE}{closing}"
        made = dataclasses.replace(text, system_turn=system_turn, user_turn=user_turn, assistant_turn=assistant_turn)
        for first in (0, 1):  # with a system message, and without one
            context = [("system", "S."), ("user", "A?"), ("assistant", "B.")][first:]
            history = [("user", "C?"), ("assistant", "D."), ("user", "E?"), ("assistant", "F.")]
            printed = print_chat(template, [*context, *history, ("user", "G?")], "image", media=len(context))
            ours = head_after(made, text.image_head, context) + text.image_token
            if printed != ours + text_after_video(made, text.image_turn, history, "G?"):
                return none
    except Exception:  # noqa: BLE001 - templates raise many exception types
        return none
    return made


def stop_ids(folder: Path, values: Mapping[str, Any], text: TextSpec) -> tuple[int, ...]:
    """Return the ids that end an answer: generation_config.json's, else config.json's, else the tokenizer's.

    If they name none, it is the special token with which the prompt ends the user's message; empty if there is none.
    """
    generation, config = folder / "generation_config.json", folder / "config.json"
    nested = values.get("text_config")  # `Backbone.config` reports one that is no object
    nested = nested if isinstance(nested, Mapping) else {}
    places = ((generation, optional_json(generation)), (config, values), (config, nested))
    ids: tuple[int, ...]
    for path, section in places:
        if (given := section.get("eos_token_id")) is not None:
            given = given if isinstance(given, list) else [given]
            ids = checked_value(tuple[TokenId, ...], given, path, "eos_token_id")
            return ids
    end = optional_json(folder / "tokenizer_config.json").get("eos_token")
    end = end.get("content") if isinstance(end, Mapping) else end
    added = optional_json(folder / TOKENIZER).get("added_tokens")
    tokens = [token for token in added if isinstance(token, Mapping)] if isinstance(added, list) else []
    given = [token.get("id") for token in tokens if token.get("content") == end]
    if not given:
        closing = text.image_turn.partition(MESSAGE)[2]
        special = [token for token in tokens if token.get("special") is True and token.get("content")]
        given = [token.get("id") for token in special if closing.startswith(str(token["content"]))]
    ids = checked_value(tuple[TokenId, ...], given, folder / TOKENIZER, "id")
    return ids


def image_statistics(folder: Path, family: Backbone) -> tuple[Means, Deviations]:
    """Return mean and standard deviation of pixels, by default the family's. Raises CheckpointError if invalid."""
    path = folder / "preprocessor_config.json"
    values = optional_json(path)
    kinds: dict[str, Any] = {"image_mean": Means, "image_std": Deviations}
    mean, std = (
        checked_value(kind, values.get(name, getattr(family, name)), path, name) for name, kind in kinds.items()
    )
    return mean, std


def max_pixels(path: Path) -> int | None:
    """Return the maximum pixels by a processor's config; None without a limit. Raises CheckpointError if invalid."""
    values = optional_json(path)
    size = values.get("size")
    limit = values.get("max_pixels") or (size.get("longest_edge") if isinstance(size, Mapping) else None)
    if limit is None:
        return None
    pixels: int = checked_value(Pixels, min(limit, 2**28) if type(limit) is int else limit, path, "longest_edge")
    return pixels


def checked_value(kind: Any, value: Any, path: Path, name: str) -> Any:
    """Return the value of a field in a file as `kind`. Raises CheckpointError, which names both, if it does not fit."""
    try:
        return from_json(kind, value, name)
    except ValueError as error:
        raise CheckpointError("checkpoint.bad_config", f"{path}: {error}") from error


def optional_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    return read_json(path, hint=DOWNLOAD) if path.is_file() else {}
