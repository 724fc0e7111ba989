"""HTTP errors: every unsuccessful response has a status, a stable code and one paragraph of text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from bridge_stg.runtime.errors import BridgeError, EngineError, HostError, Interrupted, QueryError, VideoError
from bridge_stg.runtime.host.failures import host_error
from bridge_stg.server.metrics import Metrics

logger = logging.getLogger("bridge_stg.server")

FRAMEWORK_CODES = {404: "server.not_found", 405: "server.method_not_allowed"}
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
OPENAI_PATHS = ("/v1/chat/", "/v1/models")
"""Beginnings of the paths whose errors have OpenAI's form."""


class ApiError(HTTPException):
    """An HTTP error with a stable dotted code, which is also a label of the metrics.

    The message is one paragraph of text, without paths of the server and without keys.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        headers = {} if retry_after_s is None else {"Retry-After": str(max(1, round(retry_after_s)))}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(status, message, headers)
        self.code = code

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        return {"error": self.detail, "code": self.code}

    def to_openai_json(self) -> dict[str, Any]:
        """Return the body of the response in OpenAI's form."""
        kind = OPENAI_TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.detail, "type": kind, "param": None, "code": self.code}}


def api_error(error: BaseException, *, path: str = "", name: str = "the video") -> ApiError:
    """Convert any exception to the HTTP error that the client gets; those that are not the client's fault are logged.

    Messages say `name` instead of `path`, the client's file on the server.
    """
    error = host_error(error) or error
    if isinstance(error, RequestValidationError):
        texts = [f"{'.'.join(map(str, one['loc'])) or 'the body'}: {one['msg']}" for one in error.errors()[:5]]
        return ApiError(422, "server.invalid_request", f"The request does not match /docs: {'; '.join(texts)}.")
    if isinstance(error, HTTPException):
        return error if isinstance(error, ApiError) else _framework_error(error)
    if isinstance(error, (QueryError, VideoError, Interrupted)):
        text = " ".join(str(error).split())
        status = 408 if isinstance(error, Interrupted) else 422
        return ApiError(status, error.code, text.replace(path, name) if path else text)
    logger.error("%s: %s", type(error).__name__, error, exc_info=None if isinstance(error, BridgeError) else error)
    if isinstance(error, HostError):
        message = "This server has run out of memory, threads, files or disk; its log says which. Try again later."
        return ApiError(503, error.code, message, retry_after_s=30)
    if isinstance(error, EngineError):
        return ApiError(503, error.code, "The engine of this server failed; its log says why.", retry_after_s=30)
    return ApiError(500, "server.internal", "Something went wrong in this server; its log says what.")


@contextmanager
def client_input() -> Iterator[None]:
    """Report a pydantic error inside the block as an invalid request; anywhere else it is a bug of the server."""
    try:
        yield
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _framework_error(error: HTTPException) -> ApiError:
    if error.status_code == 400:  # raised by FastAPI for JSON that is nested too deeply
        return ApiError(422, "server.invalid_request", "The body is not JSON that can be parsed.")
    found = ApiError(error.status_code, FRAMEWORK_CODES.get(error.status_code, "server.http"), f"{error.detail}.")
    found.headers = error.headers  # `Allow` of a method that the path does not have
    return found


def busy(message: str, retry_after_s: float) -> ApiError:
    """Return the error of a server that cannot accept more work now."""
    return ApiError(429, "server.busy", message, retry_after_s=retry_after_s)


def stopping() -> ApiError:
    """Return the error of a server that is shutting down."""
    return ApiError(503, "server.stopping", "This server is shutting down; try again later.", retry_after_s=10)


def error_response(error: ApiError, metrics: Metrics, path: str) -> JSONResponse:
    """Count an error and return its response; `path`, that of the request, decides its form."""
    metrics.errors.labels(error.code).inc()
    if not path.startswith(OPENAI_PATHS):
        return JSONResponse(error.to_json(), error.status_code, error.headers)
    # OpenAI's clients would repeat a request that timed out, and it would time out again.
    headers = {**(error.headers or {}), **({"x-should-retry": "false"} if error.status_code == 408 else {})}
    return JSONResponse(error.to_openai_json(), error.status_code, headers)
