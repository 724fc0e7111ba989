"""The application: routes, middleware, and one answer to every kind of error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import bridge_stg
from bridge_stg.runtime.errors import BridgeError
from bridge_stg.server.http import schemas as models
from bridge_stg.server.http.errors import ApiError, api_error
from bridge_stg.server.http.security import Guard
from bridge_stg.server.routes import jobs as routes_jobs
from bridge_stg.server.routes import live as routes_live
from bridge_stg.server.routes import status as routes_status
from bridge_stg.server.routes import videos as routes_videos
from bridge_stg.server.routes.videos import invalid
from bridge_stg.server.service import Service

DESCRIPTION = (
    "Find when and where a sentence happens in a video. Upload a video, ask queries about it, follow the job, and get "
    "a time span and a box for every frame of it. Every error is {error, code}: one paragraph for people, one word for "
    "programs; 429 and 503 come with Retry-After."
)
PROBLEMS = {400: "malformed", 401: "no key", 404: "not there", 408: "too late", 409: "not now", 413: "too large",
            415: "not a type that is read", 422: "cannot be used", 429: "no room now", 503: "not now"}  # fmt: skip


def create_app(service: Service) -> FastAPI:
    """Return the application over a service, which it starts and closes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="bridge-stg",
        version=bridge_stg.__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": models.Problem, "description": text} for status, text in PROBLEMS.items()},
    )
    app.state.service = service
    for routes in (routes_videos, routes_jobs, routes_live, routes_status):
        app.include_router(routes.router)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)

    async def refused(request: Request, error: Exception) -> Response:
        refusal = _refusal(error)
        service.metrics.refused.labels(refusal.code).inc()
        return JSONResponse(refusal.to_json(), refusal.status, headers=refusal.headers)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    kinds: tuple[Any, ...] = (ApiError, BridgeError, RequestValidationError, HTTPException, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, refused)
    app.add_exception_handler(ClientDisconnect, gone)
    return app


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, RequestValidationError):
        return ApiError(422, "invalid", invalid(error.errors()))
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # what the framework says of JSON that is nested too deep
            return ApiError(422, "invalid", "The request is not as /docs says: its body is no JSON that can be read.")
        codes = {404: "not_found", 405: "method"}
        return ApiError(error.status_code, codes.get(error.status_code, "http"), f"{error.detail}.")
    return api_error(error)
