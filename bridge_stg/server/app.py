"""The application: routes, middleware, and one form of response for every error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import bridge_stg
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.server.http.errors import api_error, error_response
from bridge_stg.server.http.schemas import Problem, problems
from bridge_stg.server.http.security import Guard
from bridge_stg.server.routes import chat, jobs, live, status, videos
from bridge_stg.server.service import Service

DESCRIPTION = (
    "Find when and where a sentence happens in a video. Upload a video, send queries about it, follow the job, and get "
    "a time span and a box for every frame of it. Every error is {error, code}: one paragraph of text, and a stable "
    "code for programs; 429 and 503 come with Retry-After. Errors of chats and models have OpenAI's form."
)


def create_app(service: Service) -> FastAPI:
    """Return the application over a service, which it starts and closes."""
    app = FastAPI(
        title="bridge-stg",
        version=bridge_stg.__version__,
        description=DESCRIPTION,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        responses=problems(Problem),
    )
    app.openapi_version = "3.2.0"  # the first that describes server-sent events
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    app.state.service = service
    for routes in (videos, jobs, live, chat, status):
        app.include_router(routes.router)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    for kind in (BridgeError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    return app


def _openapi(app: FastAPI, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the OpenAPI document, in which every error is JSON: FastAPI gives errors the type of a route's answers."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = make()
    for operations in document["paths"].values():
        for operation in operations.values():
            for code, response in operation["responses"].items():
                if code.isdecimal() and int(code) >= 400 and (content := response.get("content")):
                    response["content"] = {"application/json": next(iter(content.values()))}
    return document


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.service.start()
    try:
        yield
    finally:
        await app.state.service.close()


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(api_error(error), request.app.state.service.metrics, request.url.path)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the client has gone
