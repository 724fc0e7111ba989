"""The application: routes, middleware, and one form of response for every error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

import bridge_stg
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.server.http.document import complete
from bridge_stg.server.http.errors import api_error, error_response
from bridge_stg.server.http.openai import ChatCompletionChunk
from bridge_stg.server.http.schemas import Progress, Queued, problems
from bridge_stg.server.http.security import METHODS, Guard, answers_head
from bridge_stg.server.routes import chat, jobs, live, status, videos
from bridge_stg.server.service import Service

DESCRIPTION = (
    "Find when and where a sentence happens in a video. Upload a video, send queries about it, follow the job, and get "
    "a time span and a box for every frame of it. Every error is {error, code}: one paragraph of text, and a stable "
    "code for programs; 429 and 503 come with Retry-After. Errors of chats and models have OpenAI's form."
)


OF_EVENTS = (Queued, Progress, ChatCompletionChunk)
"""The data of events, beside those of the schema of results."""


def create_app(service: Service) -> FastAPI:
    """Return the application over a service, which it starts and closes."""
    app = FastAPI(
        title="bridge-stg",
        version=bridge_stg.__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would name this server as a proxy sees it
        responses=problems(400, 401, 500, 503),
    )
    app.openapi_version = "3.2.0"  # the first that describes server-sent events
    limits, make = service.settings, app.openapi

    def openapi() -> dict[str, Any]:
        most_chars = min(limits.max_query_chars, service.grounder.spec.prompt.max_query_characters)
        if app.openapi_schema is None:
            complete(make(), OF_EVENTS, max_queries=limits.max_queries, max_query_chars=most_chars)
        return make()

    app.openapi = openapi  # type: ignore[method-assign]
    app.state.service = service
    for routes in (videos, jobs, live, chat, status):
        app.include_router(routes.router)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    for kind in (BridgeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.service.start()
    try:
        yield
    finally:
        await app.state.service.close()


async def _answer_error(request: Request, error: Exception) -> Response:
    found = api_error(error)
    if found.status_code == 405:
        found.headers = {"Allow": ", ".join(_methods(request))}
    return error_response(found, request.app.state.service.metrics, request.url.path)


def _methods(request: Request) -> list[str]:
    """Return the methods that a path has, on whichever of its routes."""
    scope = request.scope

    def has(method: str) -> bool:
        routes = request.app.router.routes
        return any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)

    found = [method for method in METHODS if has(method)]
    return sorted([*found, "HEAD"]) if "GET" in found and answers_head(scope["path"]) else found


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has gone
