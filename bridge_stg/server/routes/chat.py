"""Routes for clients of OpenAI's API: a chat about one image or video, and the models that answer chats.

The prompt is the bundle's chat template around the video. Its prefix, up to the end of the video, is computed once for
all chats with the same messages before the video, such as a system message.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from bridge_stg.runtime.chain.opened_video import ChatMessage
from bridge_stg.server.http.document import component, json_data
from bridge_stg.server.http.errors import ApiError
from bridge_stg.server.http.openai import (
    END,
    ChatCompletion,
    ChatRequest,
    Completion,
    MediaUrl,
    ModelCard,
    ModelCards,
    OpenAIProblem,
    TextPart,
    VideoPart,
    event,
)
from bridge_stg.server.http.schemas import QUERYING, problems
from bridge_stg.server.jobs.job import Chat, Question
from bridge_stg.server.routes.jobs import while_connected
from bridge_stg.server.routes.videos import TakesJson, TheService
from bridge_stg.server.service import Service
from bridge_stg.server.videos.uploads import Upload

router = APIRouter(prefix="/v1", tags=["chat"], responses=problems(400, 401, 500, 503, model=OpenAIProblem))

UPLOAD, DATA = "upload:", "data:"
STARTED = int(time.time())
PIECE = json_data({"anyOf": [component("ChatCompletionChunk"), component("OpenAIProblem")]})
EVENT = {"type": "object", "properties": {"data": {"anyOf": [PIECE, {"const": "[DONE]"}]}}, "required": ["data"]}
STREAM: dict[int | str, Any] = {200: {"content": {"text/event-stream": {"itemSchema": EVENT}}}}


@router.post(
    "/chat/completions",
    response_class=JSONResponse,
    response_model=ChatCompletion,
    responses=STREAM | problems(*QUERYING, model=OpenAIProblem),
    dependencies=[TakesJson],
)
async def complete(request: Request, service: TheService, chat: ChatRequest) -> Response:
    """Answer a question about one image or video in text, at once or in pieces. Closing the connection cancels.

    The question is the last message. The text of a message follows its image or video, wherever it is. A file is given
    as `upload:ID` with the id of `POST /v1/videos`, or as a data URL; other URLs are rejected.
    """
    check_model(service, chat.model)
    question, url = split_messages(chat)
    service.check_question(question)
    service.scheduler.check_room()
    with ExitStack() as stack:
        job = service.add_chat(await upload_from_url(service, url, stack), question)
        stack.callback(service.forget, job)
        completion = Completion(job.id, service.bundle)
        if chat.stream:
            await while_connected(request.receive, job.begin())  # an error before it has a status of its own
            usage = chat.stream_options is not None and chat.stream_options.include_usage
            return _Stream(_events(job, completion, usage=usage), stack.pop_all().close)
        await while_connected(request.receive, job.end())
        job.check_done()
        return JSONResponse(completion.whole(job.text, job.finish_reason, job.usage))


@router.get("/models")
async def models(service: TheService) -> ModelCards:
    """List the models that answer chats: the bundle, if it answers in text."""
    known = [] if service.grounder.spec.text is None else [ModelCard(id=service.bundle, created=STARTED)]
    return ModelCards(data=known)


@router.get("/models/{model}", responses=problems(404, 422, model=OpenAIProblem))
async def model(model: str, service: TheService) -> ModelCard:
    """Describe a model that answers chats."""
    check_model(service, model)
    return ModelCard(id=service.bundle, created=STARTED)


def check_model(service: Service, name: str) -> None:
    """Raise ApiError 404 if no such model is served, and 422 if it does not answer in text."""
    if name != service.bundle:
        message = f"This server has no model {name[:100]!r}; its model is {service.bundle!r}."
        raise ApiError(404, "server.model_not_found", message)
    if service.grounder.spec.text is None:
        message = "The bundle of this server does not answer in text; send queries to /v1/jobs or /v1/ground."
        raise ApiError(422, "query.needs_text_heads", message)


def split_messages(chat: ChatRequest) -> tuple[Question, str]:
    """Return the question and the URL of the image or video. Raises ApiError 422 for unsupported chats."""
    found: list[tuple[int, MediaUrl]] = []
    messages: list[ChatMessage] = []
    for i, message in enumerate(chat.messages):
        role = "system" if message.role == "developer" else message.role
        content = message.content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        media = [part for part in parts if not isinstance(part, TextPart)]
        found += [(i, part.video_url if isinstance(part, VideoPart) else part.image_url) for part in media]
        messages.append((role, "".join(part.text for part in parts if isinstance(part, TextPart))))
        if role == "tool" or (role == "system" and i) or (role != "user" and media):
            has = " with an image or video" if media else ""
            raise _unsupported_chat(f"message {i} has the role {message.role}{has}")
    if len(found) != 1:
        raise _unsupported_chat(f"found {len(found)} images and videos")
    if messages[-1][0] != "user":
        raise _unsupported_chat(f"the last message has the role {messages[-1][0]}")
    (at, url), (*earlier, (_, question)) = found[0], messages
    return Question(question, tuple(earlier[:at]), tuple(earlier[at:]), chat.limit), url.url


def _unsupported_chat(found: str) -> ApiError:
    message = (
        "A chat has at most one system message, which is the first, and messages of the user and the assistant; the "
        f"last is of the user, and one of the user has one image or video. Here {found}."
    )
    return ApiError(422, "server.unsupported_chat", message)


async def upload_from_url(service: Service, url: str, stack: ExitStack) -> Upload:
    """Return the upload that a URL names, or a new one with the content of a data URL.

    A new one is given to `Service.keep_file` when `stack` is closed. Raises ApiError 404 for an unknown upload, 422 for
    other URLs, and as `Store.finish`.
    """
    if url.startswith(UPLOAD):
        return service.store.get(url.removeprefix(UPLOAD))
    if url[: len(DATA)].lower() != DATA:
        message = "This server does not load URLs. Send a data URL, or `upload:ID` with the id of `POST /v1/videos`."
        raise ApiError(422, "server.unsupported_url", message)
    content = await service.in_thread(decode_data_url, url)
    with service.store.receive() as incoming:
        await incoming.write(content)
        upload = await service.store.finish(incoming, "the file")
    stack.callback(service.keep_file, upload)
    return upload


def decode_data_url(url: str) -> bytes:
    """Return the content of a data URL in base64; case and media type are ignored. Raises ApiError 422."""
    head, comma, content = url.partition(",")
    try:
        if comma and head.lower().endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise ApiError(422, "server.bad_data_url", "The data URL is invalid; expected `data:video/mp4;base64,…`.")


async def _events(job: Chat, completion: Completion, *, usage: bool) -> AsyncIterator[bytes]:
    """Yield the pieces of an answer as server-sent events, and the error if one ends it."""
    yield completion.piece({"role": "assistant", "content": ""})
    try:
        async for piece in job.pieces():
            yield completion.piece({"content": piece})
    except ApiError as error:
        yield event(error.to_openai_json())
        return
    yield completion.piece({}, job.finish_reason)
    if usage:
        yield completion.usage(job.usage)
    yield END


class _Stream(EventSourceResponse):
    """A stream that calls `close` when it has ended, also if its client disconnected before it began."""

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(content)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
