"""Checks of every request before a route runs, and the headers of every response. Plain ASGI middleware.

Without a key the server trusts everyone who can reach it, and on the loopback interface that includes every page in a
browser of this machine. So the Host header must be a name of this machine (a page that rebinds its own name to
127.0.0.1 sends its own name), and a request that changes something must not come from another origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridge_stg.server.http.errors import ApiError, error_response
from bridge_stg.server.metrics import Metrics
from bridge_stg.server.settings import Settings

PUBLIC = frozenset({"/", "/health", "/health/live", "/docs", "/openapi.json"})
"""Paths that need no key, as do those below /page/: they hold no data of clients."""
UPLOADS = frozenset({"/v1/videos", "/v1/ground"})
"""Paths that limit the forms they receive themselves, while they write the file to disk."""
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "DELETE")
SAFE_METHODS = METHODS[:3]
BODY_BYTES = 2**18
REST_BYTES, REST_S = 2**23, 2.0
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """Middleware that checks key, host, origin and body size, adds headers and counts requests."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._active = 0
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        status, sent, more = 500, False, path in UPLOADS
        if method == "HEAD" and not path.endswith("/events"):
            scope = {**scope, "method": "GET"}  # uvicorn sends the answer to HEAD without its body

        async def counted() -> Message:
            nonlocal more
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def sending(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status, sent = message["status"], True
                if status >= 400 and method == "POST":
                    await _read_rest(counted, lambda: more)
                headers = MutableHeaders(scope=message)
                headers.setdefault("cache-control", "no-cache" if path.startswith("/page/") else "no-store")
                headers.update(HEADERS)
            await send(message)

        try:
            self._active += 1
            self._check(scope)
            form = path in UPLOADS and not is_json(Headers(scope=scope))
            read = counted if form or method in SAFE_METHODS else await _read_body(counted, self._settings.idle_s)
            await self._app(scope, read, sending)
        except ApiError as error:
            if sent:
                raise
            await error_response(error, self._metrics)(scope, receive, sending)
        finally:
            self._active -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(method if method in METHODS else "other", route, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers, path, settings = Headers(scope=scope), scope["path"], self._settings
        host = headers.get("host", "").lower()
        if self._active > settings.max_connections:
            message = "This server has too many clients; try again later."
            raise ApiError(503, "server.too_many_connections", message, retry_after_s=5)
        if self._key is not None:
            if path not in PUBLIC and not path.startswith("/page/") and not self._has_key(headers):
                message = "This server requires an API key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`."
                raise ApiError(401, "server.unauthorized", message)
        elif not settings.insecure and re.sub(r":\d*$", "", host) not in settings.known_hosts:
            message = "The Host header is not a name of this server; its operator can add it with --allow-host."
            raise ApiError(400, "server.unknown_host", message)
        origin = headers.get("origin")
        if scope["method"] not in SAFE_METHODS and origin and urlsplit(origin).netloc.lower() != host:
            raise ApiError(403, "server.foreign_origin", "Pages of other origins may not use this server.")

    def _has_key(self, headers: Headers) -> bool:
        """Compare the digests of the keys: the duration does not depend on how much of a key is right."""
        assert self._key is not None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        return hmac.compare_digest(_digest(key), self._key)


def is_json(headers: Headers) -> bool:
    """Return whether the body is JSON rather than a form."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _read_body(receive: Receive, within_s: float) -> Receive:
    """Read a body within BODY_BYTES and `within_s` seconds; return a `receive` that gives it to the route."""
    body = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await receive()
            body.extend(message.get("body", b""))
            more = message.get("more_body", False)
            if len(body) > BODY_BYTES:
                raise ApiError(413, "server.body_too_large", f"The body is larger than {BODY_BYTES} bytes.")

    try:
        await asyncio.wait_for(read(), within_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "server.slow_request", f"The body took longer than {within_s:g} s.") from None
    unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def receiving() -> Message:
        return unread.pop() if unread else await receive()

    return receiving


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()


async def _read_rest(receive: Receive, more: Callable[[], bool]) -> None:
    """Keep reading briefly after an early error: a client that is still sending would not read the response."""
    size, end = 0, time.monotonic() + REST_S
    with contextlib.suppress(asyncio.TimeoutError):
        while more() and size < REST_BYTES and time.monotonic() < end:
            message = await asyncio.wait_for(receive(), max(0.01, end - time.monotonic()))
            size += len(message.get("body", b""))
