"""The JSON forms of OpenAI's API for chats: requests, complete and streamed answers. Must not know videos and jobs."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

DEFAULT_TOKENS = 512


class OpenAIError(BaseModel):
    """The content of an HTTP error."""

    message: str = Field(description="One paragraph of text; its wording may change.")
    type: str
    param: None = None
    code: str = Field(description="Stable dotted code for programs.")


class OpenAIProblem(BaseModel):
    """An HTTP error in OpenAI's form."""

    error: OpenAIError


class MediaUrl(BaseModel):
    """The URL of an image or video."""

    url: str = Field(description="`upload:ID` with the id of an uploaded video, or a data URL in base64.")


class TextPart(BaseModel):
    """A part of the question."""

    type: Literal["text"]
    text: str


class ImagePart(BaseModel):
    """The image, or a video."""

    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(BaseModel):
    """The video, or an image."""

    type: Literal["video_url"]
    video_url: MediaUrl


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(BaseModel):
    """A message of the chat."""

    role: Literal["user", "system", "developer", "assistant", "tool"] = Field(
        description="`developer` is the newer name of `system`; messages of tools are rejected.",
        json_schema_extra={"enum": ["user", "system", "developer", "assistant"]},
    )
    content: str | list[Part]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = Field(False, description="Whether the last piece, without text, has the counts of tokens.")


class ResponseFormat(BaseModel):
    """The form of the answer."""

    type: Literal["text"]


class ChatRequest(BaseModel):
    """A chat about one image or video, which is in one of its user messages; the last message is the question.

    Decoding is greedy. Options that would change the answer are accepted only with values that do not change it;
    unknown options are ignored.
    """

    model: str = Field(description="Name of the bundle; see `GET /v1/models`.")
    messages: list[Message] = Field(json_schema_extra={"minItems": 1})
    stream: bool | None = Field(None, description="Whether the answer is sent in pieces, as server-sent events.")
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(
        None, ge=1, description=f"Maximum tokens of the answer; by default max_tokens, or else {DEFAULT_TOKENS}."
    )
    max_tokens: int | None = Field(None, ge=1, description="Former name of max_completion_tokens.")
    temperature: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    n: int | None = Field(None, ge=1, le=1)
    stop: Annotated[str, Field(max_length=0)] | Annotated[list[str], Field(max_length=0)] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    logprobs: Literal[False] | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int:
        """Maximum tokens of the answer."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_TOKENS


FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """The answer of the model."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """The only choice of an answer."""

    index: int
    message: Answer
    logprobs: None
    finish_reason: FinishReason = Field(description="`length`: the maximum of tokens cut the answer.")


class ChatCompletion(BaseModel):
    """A complete answer."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Unix time in seconds.")
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """A piece of the text."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    """The only choice of a piece."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer; the last one, with the usage, has no choice."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A model that answers chats."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bridge-stg"


class ModelCards(BaseModel):
    """All models that answer chats."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Completion:
    """Writes the answer to one request in OpenAI's forms.

    Args:
        name: unique name of the answer.
        model: name of the model.
    """

    def __init__(self, name: str, model: str) -> None:
        self._head = {"id": f"chatcmpl-{name}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """Return a complete answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def piece(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        """Return a piece of a streamed answer, as a server-sent event."""
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def usage(self, usage: dict[str, int]) -> bytes:
        """Return the counts of tokens that end a streamed answer, as a server-sent event."""
        return self._chunk([], usage=usage)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


END = b"data: [DONE]\n\n"
"""The event after the last piece."""


def event(value: dict[str, Any]) -> bytes:
    """Return a value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode("utf-8", "replace")
