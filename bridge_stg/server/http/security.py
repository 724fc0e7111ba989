"""Checks of every request before a route runs, and the headers of every response. Plain ASGI middleware.

Without a key the server trusts everyone who can reach it, and on the loopback interface that includes every page in a
browser of this machine. So the Host header must be a name of this machine (a page that rebinds its own name to
127.0.0.1 sends its own name), and a request that changes something, or that follows events and so may start a camera,
must not come from another origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
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
CHAT_PATH = "/v1/chat/completions"
CHAT_BYTES = 2**25
"""Maximum body of a chat, whose data URL may hold a whole file; it is in memory, unlike an upload."""
CHATS_BYTES = 8 * CHAT_BYTES
"""Maximum memory of the bodies of all chats."""
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

requests = logging.getLogger("bridge_stg.server.requests")
"""The log of requests. It has routes instead of paths, since whoever knows the id of a video may read the video."""


class Guard:
    """Middleware that checks key, host, origin and body size, adds headers, counts and logs requests."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._active = self._chat_bytes = 0
        self._key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        status, sent, more, held, began = 500, False, path in UPLOADS, list[int](), time.monotonic()
        if method == "HEAD" and answers_head(path):
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
            await self._app(scope, await self._read(scope, counted, held), sending)
        except ApiError as error:
            if sent:
                raise
            await error_response(error, self._metrics, path)(scope, receive, sending)
        finally:
            self._active, self._chat_bytes = self._active - 1, self._chat_bytes - sum(held)
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(method if method in METHODS else "other", route, str(status)).inc()
            client, took_ms = (scope.get("client") or ("-",))[0], 1000 * (time.monotonic() - began)
            requests.info("%s %s %s %d %.0f ms", client, method, route, status, took_ms)

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
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "server.unsupported_content_type", "Send the body uncompressed.")
        origin = headers.get("origin")
        foreign = bool(origin) and urlsplit(origin or "").netloc.lower() != host
        if path.endswith(("/events", "/video.mjpg")):  # a GET, but it starts a live source
            foreign = foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        elif scope["method"] in SAFE_METHODS:
            foreign = False
        if foreign:
            raise ApiError(403, "server.foreign_origin", "Pages of other origins may not use this server.")

    async def _read(self, scope: Scope, receive: Receive, held: list[int]) -> Receive:
        """Read the body of a request, and return a `receive` for its route, which reads forms itself."""

        def hold(size: int) -> None:
            if self._chat_bytes + size > CHATS_BYTES:
                message = "The bodies of other chats take all memory for them; upload the file, or try again later."
                raise ApiError(503, "server.too_many_connections", message, retry_after_s=5)
            held.append(size)
            self._chat_bytes += size

        path, settings = scope["path"], self._settings
        if scope["method"] in SAFE_METHODS or (path in UPLOADS and not is_json(Headers(scope=scope))):
            return receive
        if path == CHAT_PATH:
            return await _read_body(receive, settings.upload_s, most=CHAT_BYTES, hold=hold)
        return await _read_body(receive, settings.idle_s)

    def _has_key(self, headers: Headers) -> bool:
        """Compare the digests of the keys: the duration does not depend on how much of a key is right."""
        assert self._key is not None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        key = bearer.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        return hmac.compare_digest(_digest(key), self._key)


def answers_head(path: str) -> bool:
    """Return whether a path that answers GET answers HEAD too: a stream of events never ends."""
    return not path.endswith(("/events", "/video.mjpg"))


def is_json(headers: Headers) -> bool:
    """Return whether the body is JSON rather than a form."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _read_body(
    receive: Receive, within_s: float, *, most: int = BODY_BYTES, hold: Callable[[int], None] = lambda size: None
) -> Receive:
    """Read a body of at most `most` bytes in `within_s` seconds; return a `receive` that gives it to the route.

    `hold` is called with the size of each piece, and raises ApiError if the server has no memory for it.
    """
    body = bytearray()

    async def read() -> None:
        more = True
        while more:
            message = await receive()
            piece = message.get("body", b"")
            hold(len(piece))
            body.extend(piece)
            more = message.get("more_body", False)
            if len(body) > most:
                text = f"The body is larger than {most} bytes; a file can be uploaded first, see /docs."
                raise ApiError(413, "server.body_too_large", text)

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
