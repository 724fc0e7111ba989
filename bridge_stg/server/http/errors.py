"""What a client is told when its request cannot be served: a status, a short code and one paragraph."""

from __future__ import annotations

import logging
from typing import Any

from bridge_stg.runtime.errors import BridgeError, EngineError, Interrupted, QueryError, VideoError

logger = logging.getLogger("bridge_stg.server")


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        code: a short name for programs; counted in the metrics.
        message: one paragraph for people; holds no path of the server and no key.
        retry_after_s: when to try again, where that may help.
    """

    def __init__(self, status: int, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s

    def to_json(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": self.message, "code": self.code}

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


def api_error(error: BaseException, *, path: str = "", name: str = "the video") -> ApiError:
    """Turn whatever went wrong into what the client is told.

    Args:
        path: of the file on the server; where it stands in a message, `name` takes its place.
        name: what the client calls the file.
    """
    if isinstance(error, ApiError):
        return error
    text = " ".join(str(error).split())
    text = text.replace(path, name) if path else text
    if isinstance(error, QueryError):
        return ApiError(422, "query", text)
    if isinstance(error, VideoError):
        return ApiError(422, "video", text)
    if isinstance(error, Interrupted):
        return ApiError(408, "deadline", text)
    logger.error("%s: %s", type(error).__name__, error, exc_info=None if isinstance(error, BridgeError) else error)
    if isinstance(error, EngineError):
        return ApiError(503, "engine", "The engine of this server failed; its log says why.", retry_after_s=30)
    return ApiError(500, "internal", "Something went wrong in this server; its log says what.")


def full(what: str, retry_after_s: float) -> ApiError:
    """Return the refusal of a server that has no room now."""
    return ApiError(429, "busy", what, retry_after_s=retry_after_s)


def stopping() -> ApiError:
    """Return the refusal of a server that is about to end."""
    return ApiError(503, "stopping", "This server is shutting down; ask again when it is back.", retry_after_s=10)
